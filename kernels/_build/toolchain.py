"""Tools that this machine has for building: compilers, torch's headers and Python's; and what to do where one is missing."""

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path


GET_COMPILER = {
    "linux": "`apt install g++`, `dnf install gcc-c++` or `conda install -c conda-forge cxx-compiler`",
    "darwin": "`xcode-select --install` or `conda install -c conda-forge cxx-compiler`",
}
GET_PYTHON_HEADERS = {
    "linux": "`apt install python3-dev` or `dnf install python3-devel`",
    "darwin": "use a Python of python.org, Homebrew or conda",
}
GET_NVCC = (
    "install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads, `apt install nvidia-cuda-toolkit` or "
    "`conda install -c nvidia cuda-nvcc`); a toolkit in an unusual place is found through CUDA_HOME"
)


class MissingDependencyError(Exception):
    """Something that a build needs is not on this machine; the message says what, and how to get it, in one line."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, and the line by which it names itself and its version."""

    command: tuple[str, ...]
    version: str
    is_gcc: bool

    @property
    def program(self) -> str:
        """The compiler alone, as nvcc wants it: `g++` of `ccache g++ -m64`."""
        return [word for word in self.command if not word.startswith("-")][-1]


@dataclass(frozen=True)
class Torch:
    """The torch of this interpreter, found without importing it."""

    folder: Path
    version: tuple[int, int]
    cuda: str | None


@dataclass(frozen=True)
class Nvcc:
    path: str
    release: str  # such as "13.0"
    version: str
    codes: tuple[str, ...]  # compute capabilities that it compiles for, such as "90"


@dataclass(frozen=True)
class Toolchain:
    """The tools that build for one backend; `nvcc` is there for "cuda" alone."""

    backend: str
    compiler: Compiler
    torch: Torch
    python_include: str
    nvcc: Nvcc | None = None

    @property
    def cuda(self) -> str | None:
        """The CUDA version that the library is for. Those of one major version work together, and a loader refuses a
        newer one than torch's: with an older torch it is torch's, by whose runtime the library is checked."""
        if self.nvcc is None:
            return None
        versions = [version for version in (self.nvcc.release, self.torch.cuda) if version]
        return min(versions, key=lambda version: tuple(map(int, version.split(".")[:2])))

    @property
    def versions(self) -> str:
        return self.compiler.version + (f", nvcc {self.nvcc.version}" if self.nvcc else "")


def system() -> str:
    return platform.system().lower()


def platform_tag() -> str:
    """Processor and system, named as the `kernels` library names them in variants, such as `x86_64-linux`."""
    machine = platform.machine()
    return f"{'aarch64' if machine == 'arm64' else machine}-{system()}"


def _output(command: tuple[str, ...]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


@cache
def find_compiler() -> Compiler:
    """The C++ compiler that CXX names, else the first of c++, g++ and clang++ that runs."""
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else ["c++", "g++", "clang++"]:
        command = tuple(shlex.split(candidate))
        text = _output((*command, "--version")) if shutil.which(command[0]) else None
        if text:
            return Compiler(command, text.splitlines()[0].strip(), "Free Software Foundation" in text)
    what = f"CXX is {chosen!r}, which does not run" if chosen else "no C++ compiler (c++, g++ or clang++)"
    raise MissingDependencyError(f"{what}; get one with {GET_COMPILER[system()]}")


@cache
def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(f"torch is not installed for {sys.executable}; get it with `pip install torch`")
    folder = Path(spec.origin).parent
    about = runpy.run_path(str(folder / "version.py"))
    major, minor = about["__version__"].split(".")[:2]
    return Torch(folder, (int(major), int(minor)), about.get("cuda"))


@cache
def find_python_include() -> str:
    folder = sysconfig.get_paths()["include"]
    if not Path(folder, "Python.h").is_file():
        raise MissingDependencyError(f"Python's headers are not in {folder}; get them: {GET_PYTHON_HEADERS[system()]}")
    return folder


@cache
def find_nvcc() -> Nvcc:
    """nvcc of CUDA_HOME or CUDA_PATH, else of PATH, else of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        path = shutil.which(place)
        match = re.search(r"release (\d+\.\d+), V([\d.]+)", _output((path, "--version")) or "") if path else None
        if path and match:
            codes = re.findall(r"^sm_(\d+)$", _output((path, "--list-gpu-code")) or "", re.MULTILINE)
            return Nvcc(path, release=match[1], version=match[2], codes=tuple(codes))
    raise MissingDependencyError(f"no CUDA compiler (nvcc); {GET_NVCC}")


def has_nvidia_gpu() -> bool:
    """Return whether an NVIDIA driver is here, found without torch: by its device file or by its command."""
    return Path("/dev/nvidiactl").exists() or bool(_output(("nvidia-smi", "--list-gpus")))


def find_toolchain(backend: str, stable_abi: str) -> Toolchain:
    """
    Find the tools that build for `backend`, against the stable ABI of torch `stable_abi`.

    Raises:
        MissingDependencyError: with the first thing that is missing.
    """
    if system() not in GET_COMPILER:
        raise MissingDependencyError("kernels are built on Linux and macOS alone (on Windows: in WSL); here all runs in plain torch")
    if backend == "cuda" and system() != "linux":
        raise MissingDependencyError("CUDA kernels are built on Linux alone")
    torch = find_torch()
    if torch.version < tuple(map(int, stable_abi.split("."))):
        found = ".".join(map(str, torch.version))
        raise MissingDependencyError(f"torch {found} is older than {stable_abi}; get a newer one with `pip install -U torch`")
    compiler, python_include = find_compiler(), find_python_include()
    nvcc = find_nvcc() if backend == "cuda" else None
    if nvcc and torch.cuda and nvcc.release.split(".")[0] != torch.cuda.split(".")[0]:
        raise MissingDependencyError(
            f"nvcc {nvcc.release} and torch's CUDA {torch.cuda} are of different major versions; name the toolkit "
            f"that fits by CUDA_HOME, or install torch for CUDA {nvcc.release.split('.')[0]}"
        )
    return Toolchain(backend, compiler, torch, python_include, nvcc)
