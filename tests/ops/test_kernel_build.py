"""`kernels/build.py`: what it builds, when it builds again, and what it says where it cannot.

It runs on a tiny kernel (`tiny_kernel/`, which multiplies a tensor by 3 in place) in a copy of the builder, so that the
project's own kernels stay as they are.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, USAGE, LACKING = range(4)

compiled = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
has_nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
has_kernels = importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels").origin


def run_python(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


class Workshop:
    """A copy of the builder with the tiny kernel beside it."""

    def __init__(self, root: Path):
        self.root = root
        self.kernel = root / "tiny-scale"

    @property
    def variant(self) -> Path:
        (variant,) = self.kernel.glob("build/torch-stable-abi211-cpu-*")
        return variant

    @property
    def library(self) -> Path:
        (library,) = self.variant.glob("*.abi3.so")
        return library

    def run(self, *arguments, backend="cpu", **environment):
        """The exit code and what was printed."""
        result = run_python(self.root / "build.py", "--backend", backend, *arguments, cwd=self.root, **environment)
        assert not result.stderr, result.stderr
        return result.returncode, result.stdout

    def edit(self, file: str, old: str, new: str):
        text = (self.kernel / file).read_text()
        assert old in text
        (self.kernel / file).write_text(text.replace(old, new))

    def snapshot(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.variant.iterdir() if path.is_file()}


def make_workshop(folder: Path) -> Workshop:
    root = folder / "kernels"
    root.mkdir()
    shutil.copy(ROOT / "kernels" / "build.py", root)
    for name in ("_build", "include"):
        shutil.copytree(ROOT / "kernels" / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parent / "tiny_kernel", root / "tiny-scale")
    return Workshop(root)


@pytest.fixture
def workshop(tmp_path):
    """Nothing is built yet."""
    return make_workshop(tmp_path)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    workshop = make_workshop(tmp_path_factory.mktemp("built"))
    code, said = workshop.run("--verbose")
    assert code == OK, said
    return workshop, said


@pytest.fixture
def built(built_once, tmp_path):
    """The tiny kernel's CPU variant is built."""
    shutil.copytree(built_once[0].root, tmp_path / "kernels")
    return Workshop(tmp_path / "kernels")


@compiled
def test_a_build_is_whole_and_says_what_it_did(built_once):
    workshop, said = built_once
    assert "[3/3] linked" in said
    assert "ran on the CPU" in said
    name = workshop.library.name.removesuffix(".abi3.so")
    assert name.startswith("_tiny_scale_cpu_")
    assert len(name) == len("_tiny_scale_cpu_") + 7
    metadata = json.loads((workshop.variant / "metadata.json").read_text())
    assert metadata == {
        "name": "tiny-scale",
        "id": name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    assert {path.name for path in workshop.variant.parent.iterdir()} == {".lock", workshop.variant.name}
    binding, source, link = (line for line in said.splitlines() if " -o " in line)
    assert "-ffast-math" in source
    assert "-ffast-math" not in binding + link  # on the link line it would turn denormals off for the whole process


@compiled
def test_loading_leaves_denormals_alone_and_two_builds_can_share_a_process(built):
    first = built.variant.rename(built.root / "first")
    built.edit("include/factor.h", "3.0f", "5.0f")
    built.edit("example.py", "3.0", "5.0")
    assert built.run()[0] == OK
    code = f"""
import sys, torch
sys.path.insert(0, {str(built.root / "_build")!r})
from pathlib import Path
from check_variant import load
kernels = [load(Path(folder)) for folder in ({str(first)!r}, {str(built.variant)!r})]
print([kernel.scale_(torch.ones(1)).item() for kernel in kernels], (torch.tensor([1e-40]) * 0.5).item() > 0)
"""
    result = run_python("-c", code)
    assert result.stdout.strip() == "[3.0, 5.0] True", result.stderr


@compiled
def test_only_what_changed_is_built_again(built):
    before = built.snapshot()
    code, said = built.run()
    assert (code, "current" in said, "building" in said) == (OK, True, False)
    assert built.snapshot() == before
    built.edit("torch-ext/tiny_scale/__init__.py", "A kernel", "One kernel")
    code, said = built.run()
    assert (code, "renewing" in said, "building" in said) == (OK, True, False)  # no compiler for a Python file
    assert built.snapshot()[built.library.name] == before[built.library.name]
    assert "One kernel" in (built.variant / "__init__.py").read_text()
    built.edit("include/factor.h", "3.0f", "1.0f + 2.0f")
    assert built.run("--check") == (
        FAILED,
        "tiny-scale cpu: stale (include/factor.h changed). `python kernels/build.py` builds it.\n",
    )
    code, said = built.run()
    assert (code, "building (include/factor.h changed)" in said) == (OK, True)
    assert built.library.name not in before
    code, said = built.run("--force")
    assert (code, "building with" in said) == (OK, True)


@compiled
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("build.toml", "-ffast-math", "-fno-math-errno"),
        ("build.toml", "version = 1", "version = 2"),
        ("torch-ext/torch_binding.cpp", "-> ()", "->  ()"),
        ("../include/registration.h", "// ", "//  "),
    ],
)
def test_each_input_counts(built, file, old, new):
    assert built.run("--check")[0] == OK
    built.edit(file, old, new)
    code, said = built.run("--check")
    assert (code, "stale" in said) == (FAILED, True)


@compiled
def test_a_variant_of_another_abi_is_replaced(built):
    old = built.variant
    other = old.rename(old.with_name(old.name.replace("abi211", "abi210")))
    assert "is not what would be built here" in built.run("--check")[1]
    assert built.run()[0] == OK
    assert old.is_dir()
    assert not other.exists()


@compiled
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tiny_cpu/scale.cpp", "*= FACTOR", "*= FACTORY", "FACTORY"),
        ("include/factor.h", "3.0f", "4.0f", "the check of it failed"),
        ("torch-ext/torch_binding.cpp", "TORCH_BOX(&scale)", "TORCH_BOX(&gone)", "gone"),
    ],
    ids=["does not compile", "wrong results", "binding does not compile"],
)
def test_a_failed_build_leaves_the_old_variant(built, file, old, new, message):
    before = built.snapshot()
    built.edit(file, old, new)
    code, said = built.run()
    assert (code, message in said, "NOT built" in said) == (FAILED, True, True), said
    assert built.snapshot() == before
    assert {path.name for path in built.variant.parent.iterdir()} == {".lock", built.variant.name}


@compiled
def test_a_killed_build_leaves_the_old_variant(built, tmp_path):
    before, marker, compiler = built.snapshot(), tmp_path / "started", tmp_path / "hangs"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\ntouch {marker}\nsleep 600\n')
    compiler.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, built.root / "build.py", "--backend", "cpu", "--force"],
        env={**os.environ, "CXX": str(compiler)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert marker.exists()
    left = [path for path in built.variant.parent.iterdir() if path.name.startswith(".building-")]
    assert len(left) == 1
    assert built.snapshot() == before
    assert built.run("--check")[0] == OK
    # The short moment in which the old variant is aside and the new one is not yet there.
    name = built.variant.name
    built.variant.rename(built.variant.with_name(f".previous-{name}"))
    code, said = built.run()
    assert (code, "current" in said) == (OK, True)
    assert built.snapshot() == before
    assert not left[0].exists()


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CXX": "no-such-compiler"}])
def test_no_compiler(workshop, environment):
    """The message says what is missing and how to get it; the exit code is one that `make` can tell from a failure."""
    for arguments in ([], ["--check"]):
        code, said = workshop.run(*arguments, **{"CXX": "", **environment})
        assert code == LACKING
        assert said.startswith("tiny-scale cpu: missing. This machine cannot build it: ")
        assert len(said.splitlines()) == 1
        assert environment.get("CXX", "no C++ compiler") in said
        assert "apt install g++" in said or "xcode-select --install" in said
        assert not (workshop.kernel / "build").exists()


@compiled
def test_what_is_built_stays_current_without_a_compiler(built):
    code, said = built.run(PATH="", CXX="")
    assert (code, "current (ran on the CPU)" in said) == (OK, True)
    assert built.run("--force", PATH="", CXX="")[0] == LACKING


def test_cuda_is_no_duty_unless_it_is_named(workshop, monkeypatch):
    command = [workshop.root / "build.py", "--check"]
    result = run_python(*command, PATH="", CXX="")
    assert result.returncode == LACKING
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["tiny-scale cpu", "tiny-scale cuda"]
    workshop.edit("build.toml", 'backends = ["cpu", "cuda"]', 'backends = ["cuda"]')
    assert run_python(*command, PATH="", CXX="").returncode == OK
    assert run_python(*command, "--backend", "cuda", PATH="", CXX="").returncode == LACKING


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("depends = ", "dependz = ", "[kernel.tiny_cpu]: unknown key 'dependz'"),
        ("license = ", "licence = ", "[general]: unknown key 'licence'"),
        ("[torch]", "[torch]\nminver = '2.11'", "[torch]: unknown key 'minver'"),
        ("[general]", "[flags]\n[general]", "build.toml: unknown key 'flags'"),
        ('license = "Apache-2.0"\n', "", "[general]: the key 'license' is missing"),
        ("version = 1", "version = '1'", "[general]: 'version' is of type str"),
        ("edition = 5", "edition = 4", "'edition' is 4"),
        ('name = "tiny-scale"', 'name = "tiny_scale"', "'name' must be"),
        ('stable-abi = "2.11"', "stable-abi = { cuda = '2.11' }", "for backend 'cpu'"),
        ('backend = "cpu"', 'backend = "metal"', "[kernel.tiny_cpu]: 'backend' is 'metal'"),
        ('"9.0+PTX"', '"sm_90"', "'cuda-capabilities' holds 'sm_90'"),
        ('src = ["torch-ext', 'src = [1, "torch-ext', "[torch]: 'src' must be a list of strings"),
        ("[general]", "[general", "build.toml: Expected"),
        ('src = ["tiny_cpu/scale.cpp", ', 'src = ["tiny_cpu/gone.cpp", ', "tiny_cpu/gone.cpp"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(workshop, old, new, message):
    workshop.edit("build.toml", old, new)
    code, said = workshop.run("--check")
    assert (code, "build.toml" in said, message in said) == (USAGE, True, True), said


@compiled
def test_an_unlisted_header_counts_and_is_named(workshop):
    """kernel-builder would not find it."""
    workshop.edit("build.toml", ', "include/factor.h"', "")
    code, said = workshop.run()
    assert (code, "build.toml should list include/factor.h" in said) == (OK, True), said
    workshop.edit("include/factor.h", "3.0f", "4.0f")
    assert "include/factor.h changed" in workshop.run("--check")[1]


def test_an_unknown_kernel_is_refused_by_name(workshop):
    result = run_python(workshop.root / "build.py", "huge-scale")
    assert (result.returncode, "huge-scale" in result.stdout, "tiny-scale" in result.stdout) == (USAGE, True, True)


@compiled
@pytest.mark.skipif(not has_kernels, reason="the `kernels` library is not installed")
def test_the_kernels_library_loads_it(built):
    code = f"""
from pathlib import Path
import torch
from kernels import get_loaded_kernels, get_local_kernel
kernel = get_local_kernel(Path({str(built.kernel)!r}), backend="cpu")
(loaded,) = get_loaded_kernels()
print(kernel.scale_(torch.ones(1)).item(), loaded.metadata.name, loaded.metadata.id)
"""
    result = run_python("-c", code)
    expected = f"3.0 tiny-scale {built.library.name.removesuffix('.abi3.so')}"
    assert result.stdout.strip() == expected, result.stderr


@compiled
@pytest.mark.skipif(not has_nvcc, reason="no nvcc")
def test_cuda_is_built_where_nvcc_is(workshop):
    code, said = workshop.run(backend="cuda")
    assert code == OK, said
    (variant,) = workshop.kernel.glob("build/torch-stable-abi211-cu*")
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0+PTX"]}
    log = (variant / "compiler.log").read_text()
    assert "'sm_80'" in log
    assert "0 bytes spill stores" in log
    assert "ran on" in said or "not run: no GPU" in said


def test_the_project_s_recipes_are_in_order():
    result = run_python(ROOT / "kernels" / "build.py", "--check")
    assert result.returncode in (OK, FAILED, LACKING), result.stdout + result.stderr
    assert "sru-recurrence cpu: " in result.stdout


@pytest.mark.skipif(not has_kernels, reason="the `kernels` library is not installed")
def test_our_folder_does_not_hide_the_kernels_library():
    result = run_python("-c", "import kernels; print(hasattr(kernels, 'get_local_kernel'))")
    assert result.stdout.strip() == "True", result.stderr


def setuptools_version() -> int:
    found = importlib.util.find_spec("setuptools")
    if found is None:
        return 0
    import setuptools

    return int(setuptools.__version__.split(".")[0])


@pytest.mark.skipif(setuptools_version() < 77, reason="setuptools >= 77 is not installed")
def test_a_wheel_holds_the_package_alone(tmp_path):
    """Built in a copy of the repository in which a kernel has been built."""
    source, ignore = tmp_path / "source", shutil.ignore_patterns("__pycache__", "build")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_efficient", "kernels", "training", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    library = source / "kernels" / "sru-recurrence" / "build" / "torch-stable-abi211-cpu-x86_64-linux" / "_sru.abi3.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF")
    result = run_python("-c", "from setuptools import build_meta; build_meta.build_wheel('.')", cwd=source)
    (wheel,) = source.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(source).as_posix() for path in (source / "hf_efficient").rglob("*") if path.is_file()}
    assert names == expected, result.stderr
