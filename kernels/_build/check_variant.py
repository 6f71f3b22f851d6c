"""Load a built variant in a fresh process and run it: `python -m _build.check_variant <variant> <backend> [example.py]`.

An `example.py` beside `build.toml` holds `run(kernel, device)`, which calls the ops on a small example and raises if a
result is wrong. The last line printed says how far the check went; a failure is an exception and an exit code.
"""

import ctypes
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from kernel_testing.loading import load_variant


def unresolved_symbols(library: Path) -> list[str]:
    """
    Load a CUDA library into a torch without CUDA, and name the functions that it needs and that are not found.

    Functions are bound when they are first called (RTLD_LAZY), so that loading works and registers the ops.
    """
    handle, process = ctypes.CDLL(str(library), mode=os.RTLD_LAZY), ctypes.CDLL(None)
    if shutil.which("nm") is None:
        raise RuntimeError("`nm` of binutils is needed to list what the library needs; it comes with every compiler")
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split() for line in listing.stdout.splitlines()]
    needed = [symbol.split("@")[0] for kind, symbol in symbols if kind == "U"]
    return [symbol for symbol in needed if not (hasattr(handle, symbol) or hasattr(process, symbol))]


def check_without_cuda(variant: Path) -> str:
    """Check of a CUDA library what a torch without CUDA allows: it loads, and misses libtorch's CUDA part alone."""
    (library,) = variant.glob("*.abi3.so")
    unresolved = unresolved_symbols(library)
    foreign = [symbol for symbol in unresolved if not (symbol.startswith("aoti_torch_") and "cuda" in symbol)]
    if foreign:
        raise ImportError(f"undefined symbols: {', '.join(foreign)}")
    return "built, not run: no GPU, and this torch has no CUDA"


def check_ops(variant: Path) -> None:
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if not any(op.startswith(f"{name}::") for op in torch._C._dispatch_get_all_op_names()):
        raise ImportError(f"the library loads, but registers no op in the namespace {name}")


def check(variant: Path, backend: str, example: Path | None) -> str:
    """Load the variant, run the example where the hardware is there, and say how far that went."""
    if backend == "cuda" and torch.version.cuda is None:
        said = check_without_cuda(variant)
        check_ops(variant)
        return said
    kernel = load_variant(variant)
    check_ops(variant)
    if backend == "cuda" and not torch.cuda.is_available():
        return "built, not run: no GPU"
    if example is None:
        return "loaded, not run: no example.py"
    runpy.run_path(str(example))["run"](kernel, torch.device(backend))
    return f"ran on {torch.cuda.get_device_name() if backend == 'cuda' else 'the CPU'}"


if __name__ == "__main__":
    print(check(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None))
