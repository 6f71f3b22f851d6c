"""Machine, versions, commit and command of a measurement, and the JSON file that holds it with its figures."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "training" / "results"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "tokenizers")


def cuda_kernels() -> list[str]:
    """Names of the kernels that have a form for GPUs, by their build.toml."""
    paths = sorted((ROOT / "kernels").glob("*/build.toml"))
    return [path.parent.name for path in paths if "cuda" in tomllib.loads(path.read_text())["general"]["backends"]]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# What decides how fast a processor computes, by the names of Linux.
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
# Variables that hold torch, its libraries or our kernels to fewer instructions than the processor has.
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "SRU_RECURRENCE_CPU_CAPABILITY",
    "SPARSE_FF_CPU_CAPABILITY",
    "DECODE_LAYER_CPU_CAPABILITY",
)


def instructions() -> list[str]:
    """Name the vector instructions that the processor has, of those that matter; none where Linux does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [name for name in INSTRUCTIONS if name in flags]


def _vector_instructions() -> str:
    """Say in words what torch computes with, and by which variables it was held to less than the processor has."""
    flags = instructions()
    most = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "neither AVX2 nor AVX-512"
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" and most == "AVX-512":
        return f"AVX2, simulated on a processor with AVX-512 by {' '.join(limits)}"
    return f"{most} with {' '.join(limits)}" if limits else most


def _bf16_units() -> list[str]:
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2"):  # whose products would use them
        return []
    checks = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_tile": "_is_amx_tile_supported"}
    return [name for name, check in checks.items() if getattr(torch.cpu, check, lambda: False)()]


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None if it is not there, or the folder is not its."""
    try:
        asked = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out, with `-dirty` behind it if tracked files differ from it, those that benchmarks
    write themselves apart; None without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(top,exclude)training/results")
    return f"{commit}-dirty" if changed else commit


# Asked at the start: a measurement is not of code that is committed while it runs.
COMMIT = commit_of(ROOT)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> list[str]:
    """The command line of this process, a module by its name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    return [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]


def _without_place(argument: str) -> str:
    """A path outside of the repository by its name alone, since nobody else has that place."""
    path = Path(argument)
    outside = path.is_absolute() or argument.startswith("..")
    return path.name if outside and not path.resolve().is_relative_to(ROOT) else argument


def describe(command: list[str] | None = None) -> dict[str, Any]:
    """
    Describe machine, versions, commit and command, as every file in `training/results` holds them.

    Args:
        command (`list[str]`, *optional*): arguments of Python; by default those of this process.
    """
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": instructions(),
            "vector_instructions": _vector_instructions(),
            "bf16": _bf16_units(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": COMMIT,
        "command": shlex.join(["python", *map(_without_place, command or _command())]),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Write through a temporary name, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)
