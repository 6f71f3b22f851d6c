"""A compiled kernel measured with each instruction set of the processor, each in a process of its own, since a kernel
asks for its instruction set once."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from hf_efficient.ops.kernel_loader import load_kernel
from training.benchmarks.environment import RESULTS, instructions


CAPABILITIES = ("avx512", "avx2")
# What holds torch and its libraries to an instruction set, beside which a kernel is to be measured with the same.
TORCH_LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {},
    "avx512_vnni": {},
}


def has_instructions(capability: str) -> bool:
    return {"avx512_vnni": "avx512_vnni", "avx512": "avx512bw", "avx2": "avx2"}[capability] in instructions()


def variable_of(kernel: str) -> str:
    """The environment variable that chooses a kernel's instruction set."""
    return f"{kernel.replace('-', '_').upper()}_CPU_CAPABILITY"


def load_with(kernel: str, capability: str) -> ModuleType:
    """
    Load a kernel for this process, which then has one thread and a fixed seed.

    Raises:
        RuntimeError: if it uses another instruction set than `capability`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = load_kernel(kernel, "cpu")
    used = module.ops.cpu_capability()
    if used != capability:
        variable = variable_of(kernel)
        raise RuntimeError(f"The kernel uses {used} and not {capability}: {variable} was not set when it was loaded.")
    return module


def measure_each(
    benchmark: str,
    description: str | None,
    kernel: str,
    parts: Sequence[str],
    measure: Callable[[str, list[str], int, Path], None],
    argv: list[str] | None,
    limits: Mapping[str, Mapping[str, str]] | None = None,
    capabilities: Sequence[str] = CAPABILITIES,
) -> None:
    """
    Run a benchmark's command line.

    Args:
        benchmark (`str`): its name, which results begin with.
        description (`str`): for `--help`.
        kernel (`str`): the kernel that it measures.
        parts (`Sequence[str]`): the parts that it has.
        measure (`Callable`): called with capability, parts, repeats and the result's path, where the environment is
            that of the capability.
        argv (`list[str]`, *optional*): the command line.
        limits (`Mapping`, *optional*): by capability, further variables of its process.
        capabilities (`Sequence[str]`): those that the kernel tells apart and that are worth measuring.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capabilities",
        nargs="+",
        default=[name for name in capabilities if has_instructions(name)],
        choices=capabilities,
        help="the kernel's instruction sets (default: those of the processor)",
    )
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder for {benchmark}_CAPABILITY.json")
    args = parser.parse_args(argv)
    for capability in args.capabilities:
        wanted = {variable_of(kernel): capability, **(limits or {}).get(capability, {})}
        if all(os.environ.get(name) == value for name, value in wanted.items()):
            measure(capability, args.parts, args.repeats, args.results / f"{benchmark}_{capability}.json")
            continue
        options = ["--capabilities", capability, "--parts", *args.parts, "--repeats", str(args.repeats)]
        options += [] if args.results == RESULTS else ["--results", str(args.results)]
        command = ["-m", "training.benchmarks", "run", benchmark, *options]
        subprocess.run([sys.executable, *command], env={**os.environ, **wanted}, check=True)
