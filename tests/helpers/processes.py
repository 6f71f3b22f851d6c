"""Modules as programs: in this process, in forks of it that form a group, or by torchrun."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from unittest import mock

from accelerate.state import AcceleratorState


ROOT = Path(__file__).resolve().parents[2]


def run_program(module: ModuleType, *arguments: object) -> None:
    """
    Run a module in this process as `python -m` does, with arguments of the command line.

    A process of its own would import torch and transformers for it, which takes 5 seconds.

    Args:
        module (`ModuleType`): the program.
        arguments (`object`): what follows its name.

    Raises:
        SystemExit: where the program ends so.
    """
    with mock.patch.object(sys, "argv", [str(module.__file__), *map(str, arguments)]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
        runpy.run_module(module.__name__, run_name="__main__")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_main(module: ModuleType, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.environ.update(environment)
        sys.argv = [str(module.__file__), *arguments]
        AcceleratorState._reset_state(reset_partial_state=True)  # what ran before the fork was one process
        module.main()


def run_distributed(module: ModuleType, folder: Path, *arguments: object, processes: int = 2) -> None:
    """
    Run `module.main` in several forks of this process that form a group, with the variables that torchrun sets.

    A fork has all modules imported, so that it starts at once. When one of them fails, the others are ended, and the
    error shows the end of what it said.

    Args:
        module (`ModuleType`): its `main` takes the folder and the arguments from `sys.argv`.
        folder (`Path`): where it leaves its results, and each process what it says.
        arguments (`object`): further arguments.
        processes (`int`): size of the group.

    Raises:
        AssertionError: if a process fails.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    context, words = multiprocessing.get_context("fork"), [str(folder), *map(str, arguments)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = Path(folder) / f"said-{rank}.txt"
        child = context.Process(target=_run_main, args=(module, words, environment, said))
        child.start()
        children.append(child)
    try:
        running = list(children)
        while running:
            ended = wait([child.sentinel for child in running])
            for rank, child in enumerate(children):
                if child in running and child.sentinel in ended:
                    child.join()
                    running.remove(child)
                    said = (Path(folder) / f"said-{rank}.txt").read_text()
                    assert child.exitcode == 0, f"process {rank} ended with {child.exitcode}: {said[-3000:]}"
    finally:
        for child in children:
            child.kill()
            child.join()


def run_by_torchrun(module: str, *arguments: object, processes: int = 2) -> None:
    """Run a module as a program in several processes by torchrun; an error shows the end of what they said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module]
    command = [sys.executable, *launcher, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
