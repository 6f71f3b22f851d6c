"""Compile and link one library. Each source has its section's flags; the link has none of them: flags such as
`-ffast-math` would there change how the whole process rounds."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from _build.build_config import SHARED, BuildConfig, Section
from _build.toolchain import Nvcc, Toolchain, system


# What every source is compiled with. Python's limited API and torch's stable ABI are what let one library serve
# every Python from 3.9 on and every torch from the stated one on.
FLAGS = ("-O3", "-std=c++17")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden")
PYTHON_ABI = "0x03090000"


class CompileError(Exception):
    """A compiler or linker failed; the message holds its command and all that it said."""


def target_version(stable_abi: str) -> str:
    """`"2.11"` as libtorch's headers want it: one byte for each part of the version, from the top of 64 bits down."""
    major, minor = map(int, stable_abi.split("."))
    return f"0x{major << 56 | minor << 48:016x}"


def host_flags(tools: Toolchain) -> list[str]:
    # GNU's "unique" symbols are shared by all libraries of a process, so also by two versions of one kernel.
    return [*HOST_FLAGS, *(["-fno-gnu-unique"] if tools.compiler.is_gcc else [])]


def supported_capabilities(section: Section, nvcc: Nvcc) -> list[str]:
    """The compute capabilities of a section that this nvcc can compile for; the newest of them keeps the PTX, which
    cards that are newer still need, if the section asks for any."""
    named = [capability.removesuffix("+PTX") for capability in section.cuda_capabilities]
    supported = [capability for capability in named if capability.replace(".", "").rstrip("af") in nvcc.codes]
    if supported and len(supported) < len(named):
        return [*supported[:-1], f"{supported[-1]}+PTX"]
    return [capability for capability in section.cuda_capabilities if capability.removesuffix("+PTX") in supported]


def architectures(section: Section, nvcc: Nvcc) -> list[str]:
    """nvcc's options for the compute capabilities of a section; `9.0+PTX` also keeps the code that newer cards need."""
    options = []
    for capability in supported_capabilities(section, nvcc):
        number = capability.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if capability.endswith("+PTX") else f"sm_{number}"
        options += ["-gencode", f"arch=compute_{number},code={code}"]
    return options


def compiler_flags(section: Section, tools: Toolchain) -> list[str]:
    """The flags of a section's sources, less includes and names; part of what a build is known by."""
    if tools.nvcc is None:
        return [*FLAGS, *host_flags(tools), *section.cxx_flags]
    passed_on = [option for flag in (*host_flags(tools), *section.cxx_flags) for option in ("-Xcompiler", flag)]
    return [*FLAGS, *architectures(section, tools.nvcc), *section.cuda_flags, *passed_on]


def compiler_command(section: Section, config: BuildConfig, tools: Toolchain, ops: str) -> list[str]:
    """The compiler with all options but source and object."""
    program = list(tools.compiler.command)
    if tools.nvcc is not None:
        program = [tools.nvcc.path, "-ccbin", tools.compiler.program]
    defines = {
        "Py_LIMITED_API": PYTHON_ABI,
        "TORCH_TARGET_VERSION": target_version(config.stable_abi[tools.backend]),
        "TORCH_EXTENSION_NAME": ops,
        f"{tools.backend.upper()}_KERNEL": "1",
    }
    folders = [*section.include, "torch-ext", str(SHARED)]
    if section.needs_torch:
        folders += [str(tools.torch.folder / "include"), tools.python_include]
    return [
        *program,
        *compiler_flags(section, tools),
        *(f"-D{name}={value}" for name, value in defines.items()),
        *(f"-I{folder}" for folder in folders),
    ]


def parallel_options(tools: Toolchain, jobs: int) -> list[str]:
    """Options that let nvcc divide one source among `jobs` threads, by architecture and kernel. The result is the same."""
    return [] if tools.nvcc is None else [f"--threads={jobs}", f"--split-compile={jobs}"]


def link_command(tools: Toolchain, objects: list[Path], library: Path) -> list[str]:
    """libtorch must be named and kept even where nothing seems to need it, or its C functions are not found later."""
    libraries = [f"-L{tools.torch.folder / 'lib'}", "-ltorch", "-ltorch_cpu"]
    files = [*map(str, objects), "-o", str(library)]
    if tools.nvcc is not None:
        host = ["-ccbin", tools.compiler.program, "-Xlinker", "--no-as-needed"]
        return [tools.nvcc.path, "-shared", "-cudart", "shared", *host, *files, *libraries]
    keep = ["-undefined", "dynamic_lookup"] if system() == "darwin" else ["-Wl,--no-as-needed"]
    return [*tools.compiler.command, "-shared", *keep, *files, *libraries]


def run(command: list[str], folder: Path) -> str:
    """Run a compiler in `folder` and give back what it said."""
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise CompileError(
            f"This command failed with code {result.returncode}:\n{shlex.join(command)}\n{result.stdout}"
        )
    return result.stdout


def build_library(
    config: BuildConfig, tools: Toolchain, library: Path, scratch: Path, say: Callable[[str], None], jobs: int, verbose: bool
) -> str:
    """
    Compile the sources of one backend, `jobs` at a time, and link them.

    Args:
        library (`Path`): the file to write; its stem is the name of the Python module and of the ops' namespace.
        scratch (`Path`): an empty folder for the objects.
        say (`Callable`): called with a line for each step that is done.
        verbose (`bool`): say the commands, too.

    Returns:
        `str`: what the compilers said.

    Raises:
        CompileError: if one of them failed.
    """
    ops = library.name.split(".")[0]
    steps: dict[tuple[str, str], tuple[list[str], Path]] = {}
    for section in config.sections(tools.backend):
        command = [*compiler_command(section, config, tools, ops), *parallel_options(tools, jobs)]
        for unit in section.units:
            obj = scratch / f"{len(steps)}_{Path(unit).stem}.o"
            steps[unit, section.name] = ([*command, "-c", unit, "-o", str(obj)], obj)
    link = link_command(tools, [obj for _, obj in steps.values()], library)
    if verbose:
        for command in (*(command for command, _ in steps.values()), link):
            say(shlex.join(command))
    started, said, total = time.monotonic(), {}, len(steps) + 1
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run, command, config.folder): step for step, (command, _) in steps.items()}
        for done, future in enumerate(as_completed(futures), start=1):
            said[futures[future]] = future.result()
            say(f"[{done}/{total}] {futures[future][0]} ({time.monotonic() - started:.0f} s)")
    finally:
        pool.shutdown(cancel_futures=True)
    said["link", ""] = run(link, config.folder)
    say(f"[{total}/{total}] linked ({time.monotonic() - started:.0f} s)")
    ordered = [*steps, ("link", "")]
    return "".join(f"== {step[0]}\n{said[step]}" for step in ordered if said[step].strip())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
