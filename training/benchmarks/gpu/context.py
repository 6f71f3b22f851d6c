"""The process that one part of the GPU agenda runs in, and what the part is given: a device, a time limit, a place for
results.

A process is started ahead of its part, imports what all parts need, says that it is ready, and waits. It ends with the
process that started it, and takes those that it started itself along.
"""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from training.benchmarks.environment import ROOT, cuda_kernels, write_result


T = TypeVar("T")
OUTCOME = "outcome.json"
TEXT = "text.safetensors"


class MissingPrerequisiteError(Exception):
    """Something that a part needs and this machine lacks, or that refuses to work on it."""


@dataclass
class PartContext:
    """
    Settings of one run of a part: device, time limit, folders.

    Args:
        device (`torch.device`): the GPU, or the CPU in a rehearsal.
        rehearsal (`bool`): whether tiny sizes are to walk the same code paths.
        deadline (`float`): when the process is killed, by `time.monotonic()`.
        scratch (`Path`): a folder that is gone afterwards.
        out (`Path`): the folder that is kept; `agenda.json` there holds what the part returns.
        pack (`Path`): the folder with packed text.
        repeats (`int`): timed runs of each peer.
    """

    device: torch.device
    rehearsal: bool
    deadline: float
    scratch: Path
    out: Path
    pack: Path
    repeats: int
    not_rehearsed: list[str] = field(default_factory=list)

    def choose(self, real: T, tiny: T) -> T:
        """One of two sizes: that of a measurement, or that of a rehearsal."""
        return tiny if self.rehearsal else real

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Print progress, for whoever watches and for the log."""
        for stream in (sys.stdout, sys.stderr):
            print(f"    {text}", file=stream, flush=True)

    def save(self, result: dict[str, Any]) -> None:
        """Keep what has been found so far, for the case that the part does not end."""
        self.write({"partial": result})

    def write(self, outcome: dict[str, Any]) -> None:
        write_result(self.scratch / OUTCOME, {**outcome, "not_rehearsed": self.not_rehearsed})

    def needs_gpu(self, what: str) -> None:
        """Note what a rehearsal leaves out."""
        if self.rehearsal and what not in self.not_rehearsed:
            self.not_rehearsed.append(what)


def load_from_kernels(path: str) -> ModuleType:
    """A module of the folder kernels/, which is no package: `import kernels` gives the library of that name."""
    file = ROOT / "kernels" / path
    name = f"{file.parent.name}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def find_tool(name: str) -> str | None:
    """A program of PATH, else of CUDA_HOME, else of /usr/local/cuda."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [name, *(f"{place}/bin/{name}" for place in places if place)]
    return next((found for candidate in candidates if (found := shutil.which(candidate))), None)


def _lacks_module(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def _lacks_tool(name: str, context: PartContext) -> str | None:
    return None if context.rehearsal or find_tool(name) else f"{name} is not installed"


def _lacks_kernel(context: PartContext) -> str | None:
    from hf_efficient.ops.kernel_loader import find_variant

    backend = context.device.type
    missing = [name for name in cuda_kernels() if find_variant(name, backend) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} is not built for {backend} (kernels/*/build was not carried along?)"


def _lacks_text(context: PartContext) -> str | None:
    return None if (context.pack / TEXT).is_file() else f"{context.pack / TEXT} is not there: `--pack` writes it"


# What a part can need: a function that says what is missing. `gpu kernel` is for parts that a rehearsal runs in plain
# torch where the kernel is not built.
NEEDS: dict[str, Callable[[PartContext], str | None]] = {
    "kernel": _lacks_kernel,
    "gpu kernel": lambda context: None if context.rehearsal else _lacks_kernel(context),
    "compute-sanitizer": lambda context: _lacks_tool("compute-sanitizer", context),
    "ncu": lambda context: _lacks_tool("ncu", context),
    "triton": lambda context: _lacks_module("triton"),
    "pytest": lambda context: _lacks_module("pytest"),
    "text": _lacks_text,
}


def run_part(function: str, needs: list[str], context: PartContext) -> None:
    """Run `module:function`, and write its result, or how it failed, to the scratch folder."""
    try:
        lacking = [lack for need in needs if (lack := NEEDS[need](context))]
        if lacking:
            raise MissingPrerequisiteError("; ".join(lacking))
        module, name = function.split(":")
        torch.manual_seed(0)
        context.write({"result": getattr(importlib.import_module(module), name)(context)})
    except MissingPrerequisiteError as error:
        context.write({**read_outcome(context.scratch), "missing": str(error)})
    except BaseException as error:  # whatever it is, the parts after it can still be run
        traceback.print_exc()
        context.write({**read_outcome(context.scratch), "error": f"{type(error).__name__}: {error}"})


def read_outcome(scratch: Path) -> dict[str, Any]:
    """Read the last outcome that a part wrote, which is always whole; an empty one if it wrote none."""
    path = scratch / OUTCOME
    return json.loads(path.read_text()) if path.exists() else {}


def _end_with_parent() -> None:
    sys.stdin.read()  # until the other end is closed
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(preloaded: str, closed_when_ready: int) -> None:
    """
    Wait for a line of settings on the standard input, and run the part that it names.

    Args:
        preloaded (`str`): a module that is imported first, since that takes long.
        closed_when_ready (`int`): a file descriptor that is closed once it is imported.
    """
    importlib.import_module(preloaded)
    os.close(closed_when_ready)
    line = sys.stdin.readline()
    if not line:  # not needed any more
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run_as_told(json.loads(line))


def run_as_told(settings: dict[str, Any]) -> None:
    """Run the part that the agenda's settings name."""
    function, needs, seconds = (settings.pop(name) for name in ("function", "needs", "seconds"))
    folders: dict[str, Any] = {name: Path(settings.pop(name)) for name in ("scratch", "out", "pack")}
    device, deadline = torch.device(settings.pop("device")), time.monotonic() + seconds
    run_part(function, needs, PartContext(device=device, deadline=deadline, **folders, **settings))
