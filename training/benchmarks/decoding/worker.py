"""Processes that stay, each with an engine in it, and are asked one after the other: two engines that cannot share a
process are measured in turn all the same, each by its own core time.

The standard library alone, since an engine may live in an environment without torch.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[3]


class EngineError(RuntimeError):
    """An engine could not do what it was asked for, or its process has ended."""


class Worker:
    """
    A process with an engine in it.

    Args:
        module (`str`): a module that calls [`serve`] when it is run.
        python (`str`, defaults to that of this process): the interpreter, which may be that of another environment.
        environment (`Mapping[str, str]`, *optional*): variables besides those of this process.
    """

    def __init__(self, module: str, python: str = sys.executable, environment: Mapping[str, str] | None = None):
        self.module = module
        self.process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """
        Call a method of the engine, and wait for what it returns.

        Raises:
            EngineError: if it raises something, with its words; or if the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([what, arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise EngineError(f"{self.module} ended with exit code {self.process.wait()} when asked to {what}.")
        found = json.loads(answer)
        if "error" in found:
            raise EngineError(f"{self.module}, asked to {what} {arguments}: {found['error']}")
        return found["result"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(engine: Any) -> None:
    """Answer what [`Worker.ask`] asks for, until its end of the pipe is closed. What the engine prints goes to the
    standard error, so that the pipe holds answers alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = {"result": getattr(engine, what)(**arguments)}
        except Exception as error:  # whatever it is, the other side must hear of it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(run: Callable[[], object], count: int) -> dict[str, list[float]]:
    """Core seconds (of all threads of the process) and wall seconds of each of `count` calls."""
    core, wall = [], []
    for _ in range(count):
        start = time.process_time(), time.perf_counter()
        run()
        core.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return {"core": core, "wall": wall}


def resident_bytes() -> int:
    """The memory of this process that is in RAM, without what malloc keeps for later."""
    with suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def in_turn(
    runs: Mapping[str, Callable[[], dict[str, list[float]]]], repeats: int, dropped: int = 1
) -> dict[str, dict[str, list[float]]]:
    """
    Ask engines in turn. The first round is thrown away, and so are the first calls of each turn: memory that was not
    touched for some seconds is several times slower.

    Args:
        runs (`Mapping[str, Callable]`): by name what gives the seconds of some calls, as [`timed`] does.
        repeats (`int`): rounds that count.
        dropped (`int`, defaults to 1): calls that do not count, at the beginning of each turn.

    Returns:
        `dict`: by name `core` and `wall`, of each round the median of its calls.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"core": [], "wall": []} for name in runs}
    for round_index in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if round_index:
                for clock, values in found[name].items():
                    values.append(statistics.median(seconds[clock][dropped:]))
    return found


def close_all(workers: Iterable[Worker]) -> None:
    """End the processes of workers."""
    for worker in workers:
        worker.close()
