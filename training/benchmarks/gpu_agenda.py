"""
Checks and measurements that need a GPU, in the order that loses least if it is cut off: whether the compiled kernels
are right, how fast they are, what models gain by them, and whether they stay within their memory. What has been found
so far is in training/results/gpu_*.json, which `python -m training.benchmarks.gpu.report` makes of the files below.

GPU time is rare and short, so everything is prepared beforehand. On a machine without a GPU, where the text is:

    python kernels/build.py && python -m training.benchmarks.gpu_agenda --pack enwiki.xml.xz

Then copy the working tree to the machine with the GPU, with two folders that git ignores, kernels/*/build and
runs/gpu_pack (without them kernels are compiled there, if there is nvcc, and the race is left out), and run from the
repository's root:

    python -m training.benchmarks.gpu_agenda --minutes 9 --commit HASH --out FOLDER

Each part runs in a process of its own, which is killed with all that it started at its time limit. What a part finds is
written to FOLDER/agenda.json at once; FOLDER/agenda.log holds all output. A part that fails, or lacks something, does
not stop the others; the exit code is 1 if one failed, or if the kernels are missing. The same command goes on where it
was cut off: finished parts are skipped, those never tried come first, then those that failed. (Where nothing but FOLDER
comes back and it starts empty, put the agenda.json of the last call there.)

    python -m training.benchmarks.gpu_agenda --list
    python -m training.benchmarks.gpu_agenda --only smoke recurrence --out FOLDER
    python -m training.benchmarks.gpu_agenda --rehearse          the whole agenda at tiny sizes on a CPU, in minutes

A rehearsal measures nothing; it says of each part what it could not try without a GPU. To add a part, write a function
that takes a `PartContext` and returns a dict whose "line" is the one line that matters, and add a row to `PARTS`.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.benchmarks.environment import COMMIT, RESULTS, ROOT, describe, write_result
from training.benchmarks.gpu.context import read_outcome


CHECKS, SPEED, MODELS, RACE, SPARSE_FF, DECODE = (
    f"training.benchmarks.gpu.{name}" for name in ("checks", "speed", "models", "race", "sparse_ff", "decode")
)
# It imports all that takes long.
PRELOADED = MODELS
PACK = ROOT / "runs" / "gpu_pack"
REHEARSAL = ROOT / "runs" / "gpu_rehearsal"


@dataclass(frozen=True)
class Part:
    """
    A row of the agenda.

    Args:
        name (`str`): for the command line.
        shows (`str`): what it shows, in a few words.
        function (`str`): `module:function` that runs it.
        seconds (`int`): what it is expected to take on a GPU; with less time left it is not started.
        limit (`int`): the seconds after which it is killed.
        needs (`tuple[str, ...]`): names of `gpu.context.NEEDS`.
        timed (`bool`): whether it measures time, so that no other process may be starting meanwhile.
        required (`bool`): whether the agenda fails where something that the part needs is missing.
    """

    name: str
    shows: str
    function: str
    seconds: int
    limit: int
    needs: tuple[str, ...] = ()
    timed: bool = False
    required: bool = False


PARTS = (
    Part("load", "the built kernels load, and their examples run", f"{CHECKS}:load_kernels", 15, 240, required=True),
    Part("kernel-tests", "the kernels' own tests", f"{CHECKS}:run_kernel_tests", 25, 90, ("kernel", "pytest")),
    Part("smoke", "without flags, every width of access, last state", f"{CHECKS}:check_smoke", 10, 60, ("kernel",)),
    Part("recurrence", "copy bandwidth; plain torch", f"{SPEED}:measure_recurrence", 30, 120, ("kernel",), timed=True),
    Part("parity", "every kernel, odd and large shapes, same bits", f"{CHECKS}:check_full", 30, 150, ("kernel",)),
    Part("graphs", "CUDA graph, side stream, compile, opcheck", f"{CHECKS}:check_capture", 50, 120, ("kernel",)),
    Part("sparse-ff", "sparse feed-forward, every kernel", f"{SPARSE_FF}:check_sparse_ff", 10, 60, ("kernel",)),
    Part("sparse-speed", "against dense", f"{SPARSE_FF}:measure_sparse_ff", 20, 90, ("kernel",), timed=True),
    Part("decode", "tokens at batch 1", f"{DECODE}:measure_decoding", 15, 150, ("gpu kernel",), timed=True),
    Part("decode-17b", "17 G weights in bf16", f"{DECODE}:measure_17b", 10, 120, ("gpu kernel",), timed=True),
    Part("lstm", "a layer against cuDNN's LSTM", f"{SPEED}:measure_lstm", 10, 60, ("gpu kernel",), timed=True),
    Part("triton", "against a scan in Triton", f"{SPEED}:measure_triton", 45, 120, ("kernel", "triton"), timed=True),
    Part("encoder-steps", "train steps of TUPE and BERT", f"{MODELS}:measure_encoders", 30, 180, timed=True),
    Part("lm-steps", "train steps of SRU++ and GPT-2", f"{MODELS}:measure_lms", 30, 180, ("gpu kernel",), timed=True),
    Part("gpu-tests", "tests of the suite that are marked gpu", f"{CHECKS}:run_gpu_tests", 60, 150, ("pytest",)),
    Part("memcheck", "accesses outside of memory", f"{CHECKS}:check_memory", 60, 120, ("kernel", "compute-sanitizer")),
    Part("profile", "counters of two kernels", f"{CHECKS}:profile_kernels", 30, 90, ("kernel", "ncu")),
    Part("sparse-100m", "Scaling Transformers of 100 M", f"{RACE}:train_scaling", 60, 240, ("text",), timed=True),
    Part("race", "SRU++ and GPT-2 trained for equal time", f"{RACE}:race", 60, 900, ("gpu kernel", "text"), timed=True),
)
FINISHED, FAILED = ("done", "rehearsed"), ("failed", "timed out")
# Seconds of a rehearsal's parts, on two cores.
REHEARSAL_SECONDS, REHEARSAL_LIMIT = 2, 90


class Worker:
    """A process that imports what parts need, and then waits for a part to run."""

    def __init__(self, log: Path):
        ready, closed_when_ready = os.pipe()
        self.ready = os.fdopen(ready)  # at its end once the process is ready, or has ended
        program = f"from training.benchmarks.gpu.context import main; main({PRELOADED!r}, {closed_when_ready})"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                pass_fds=[closed_when_ready],
                text=True,
            )
        os.close(closed_when_ready)

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until its imports are finished, or it has ended, for so many seconds at most."""
        select.select([self.ready], [], [], max(seconds, 0.0))

    def run(self, settings: dict[str, Any]) -> str | None:
        """Run a part; how it ended otherwise than by itself, if it did."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.flush()
            code = self.process.wait(settings["seconds"])
        except BrokenPipeError:
            code = self.process.wait()
        except subprocess.TimeoutExpired:
            return "timed out"
        return None if code == 0 else f"the process ended with exit code {code}"

    def end(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ready.close()


class Agenda:
    """
    The parts, and what has been found of them, which is written anew after each.

    Args:
        args (`argparse.Namespace`): the command line.

    Raises:
        SystemExit: if `--out` holds a rehearsal and this is none, or the other way round.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.monotonic()
        self.path, self.log = args.out / "agenda.json", args.out / "agenda.log"
        args.out.mkdir(parents=True, exist_ok=True)
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if known and known["rehearsal"] != args.rehearse:
            raise SystemExit(f"{self.path} is of {'a' if known['rehearsal'] else 'no'} rehearsal: name another --out.")
        self.records: dict[str, dict[str, Any]] = known.get("parts", {})
        self.environment = {**describe(), "commit": args.commit or COMMIT}

    def seconds_left(self) -> float:
        return 60 * self.args.minutes - (time.monotonic() - self.started)

    def chosen(self) -> list[Part]:
        """The parts that the command line names; all if it names none."""
        return [part for part in PARTS if not self.args.only or part.name in self.args.only]

    def state(self, part: Part) -> str:
        return self.records.get(part.name, {}).get("state", "left")

    def order(self) -> list[Part]:
        """The parts to run: those never tried, then those that did not finish."""
        open_parts = [part for part in self.chosen() if self.state(part) not in FINISHED]
        return sorted(open_parts, key=lambda part: self.state(part) != "left")

    def has_failed(self) -> bool:
        """Return whether a chosen part failed, or a required one lacks something."""
        states = [(part, self.state(part)) for part in self.chosen()]
        return any(state in FAILED or (part.required and state == "missing") for part, state in states)

    def record(self, part: Part, **found: Any) -> None:
        """Keep what is known of a part, in the file as well."""
        machine = self.environment["machine"]
        made = {"commit": self.environment["commit"], "gpu": machine["gpu"], "ran_on_gpu": not self.args.rehearse}
        self.records[part.name] = {**found, **made}
        names = [row.name for row in PARTS if row.name in self.records]
        parts = {name: self.records[name] for name in names}
        write_result(self.path, {"rehearsal": self.args.rehearse, **self.environment, "parts": parts})

    def run(self) -> None:
        """Run all that is open, as far as the time goes."""
        order = self.order()
        with self.workers() as living:
            for index, part in enumerate(order):
                wanted = REHEARSAL_SECONDS if self.args.rehearse else part.seconds
                if self.seconds_left() < wanted:
                    said = f"it wants {wanted} seconds, and {max(self.seconds_left(), 0):.0f} are left"
                    if part.name not in self.records:
                        self.record(part, state="left", seconds=0.0, line=said)
                    self.print(f"{part.name}: left, since {said}")
                    continue
                self.prepare(order[index:], living)
                self.run_part(part, living)

    @contextmanager
    def workers(self) -> Iterator[list[Worker]]:
        """The list of living processes, empty at first; they are ended on exit."""
        living: list[Worker] = []
        try:
            yield living
        finally:
            for worker in living:
                worker.end()

    def prepare(self, order: list[Part], living: list[Worker]) -> None:
        """
        Start the processes of the next parts. Imports beside a part that is timed would disturb it, so they are started
        beside the one before, as many as it takes to reach the next part that is not timed.
        """
        wanted = 1
        if not order[0].timed:
            wanted += next((index for index, part in enumerate(order[1:], 1) if not part.timed), len(order) - 1)
        while len(living) < wanted:
            living.append(Worker(self.log))
        if order[0].timed:
            for worker in living:
                worker.wait_until_ready(self.seconds_left())

    def run_part(self, part: Part, living: list[Worker]) -> None:
        """Run one part in the first of the living processes, and end that."""
        limit = min(REHEARSAL_LIMIT if self.args.rehearse else part.limit, max(self.seconds_left(), 0.0))
        self.print(f"{part.name}: {part.shows}, {limit:.0f} seconds at most")
        self.record(part, state="running", seconds=0.0, line="interrupted")
        worker, started = living[0], time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu_agenda_") as scratch:
            settings = {
                "function": part.function,
                "needs": part.needs,
                "seconds": limit,
                "device": "cpu" if self.args.rehearse else "cuda",
                "rehearsal": self.args.rehearse,
                "scratch": scratch,
                "out": str(self.args.out.resolve()),
                "pack": str(self.args.pack_folder.resolve()),
                "repeats": self.args.repeats,
            }
            said = worker.run(settings)
            worker.end()
            living.remove(worker)
            outcome = read_outcome(Path(scratch))
        found = judge(outcome, said, self.args.rehearse, limit)
        self.record(part, **{**found, "seconds": round(time.monotonic() - started, 1)})
        self.print(f"{part.name}: {found['state']}: {found['line']}")

    def print(self, text: str) -> None:
        """Say it to whoever watches, and to the log."""
        text = f"[{time.monotonic() - self.started:4.0f} s] {text}"
        print(text, flush=True)
        with self.log.open("a") as file:
            file.write(text + "\n")

    def table(self) -> str:
        """The table at the end: part, state, seconds, the line that matters."""
        rows = [("part", "state", "seconds", "")]
        for part in PARTS:
            found = self.records.get(part.name, {"state": "left", "seconds": 0.0, "line": ""})
            rows.append((part.name, found["state"], f"{found['seconds']:.0f}", shortened(found["line"])))
        machine = self.environment["machine"]
        where = "a rehearsal on a CPU, which measures nothing" if self.args.rehearse else machine["gpu"]
        lines = [f"{name:<14} {state:<10} {seconds:>7}  {line}".rstrip() for name, state, seconds, line in rows]
        return "\n".join([f"{where}; commit {self.environment['commit']}; {self.path}", *lines])


def shortened(text: str, size: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= size else f"{text[: size - 3]}..."


def judge(outcome: dict[str, Any], said: str | None, rehearsal: bool, limit: float) -> dict[str, Any]:
    """State and line of a part, from what it wrote and how its process ended."""
    kept = {name: outcome[name] for name in ("result", "partial", "not_rehearsed") if outcome.get(name)}
    if "missing" in outcome:
        return {"state": "missing", "line": outcome["missing"], **kept}
    if "error" in outcome:
        return {"state": "failed", "line": outcome["error"], **kept}
    if "result" in outcome:
        line = outcome["result"].get("line", "")
        if rehearsal and outcome["not_rehearsed"]:
            line = f"{line} (not without a GPU: {', '.join(outcome['not_rehearsed'])})"
        return {"state": "rehearsed" if rehearsal else "done", "line": line, **kept}
    if said == "timed out":
        partly = f", having found: {outcome['partial'].get('line', 'part of it')}" if "partial" in outcome else ""
        return {"state": "timed out", "line": f"killed after {limit:.0f} seconds{partly}", **kept}
    return {"state": "failed", "line": said or "the process ended without a result", **kept}


def list_parts() -> None:
    print(f"{'part':<14} {'expected':>8} {'at most':>7}  shows (needs)")
    for part in PARTS:
        needs = f" ({', '.join(part.needs)})" if part.needs else ""
        print(f"{part.name:<14} {part.seconds:>6} s {part.limit:>5} s  {part.shows}{needs}")


def describe_cuda_builds() -> str:
    """The kernels that are built for CUDA here, which are to be copied as well, with their sizes."""
    folders = [path for path in sorted(ROOT.glob("kernels/*/build/*-cu[0-9]*")) if path.is_dir()]
    if not folders:
        return "No kernel is built for CUDA: without nvcc on the other machine all that needs one is left out."
    sizes = (sum(path.stat().st_size for path in folder.iterdir()) / 1e6 for folder in folders)
    return "\n".join(f"{path.relative_to(ROOT)}: {size:.0f} MB" for path, size in zip(folders, sizes, strict=True))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.gpu_agenda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (%(default)g)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART", default=[])
    parser.add_argument("--list", action="store_true", help="show the parts, and run none")
    parser.add_argument("--out", type=Path, help="where results go ($OUT if that is set, else training/results/gpu)")
    parser.add_argument("--commit", help="the commit that is measured, where git is not there to say it")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each peer (%(default)d)")
    parser.add_argument("--rehearse", action="store_true", help="walk the agenda on a CPU (--out: runs/gpu_rehearsal)")
    parser.add_argument("--pack", type=Path, metavar="TEXT", help="write a few MB of a text file or folder, and end")
    parser.add_argument("--pack_folder", type=Path, default=PACK, help="of the packed text (runs/gpu_pack)")
    args = parser.parse_args(arguments)
    if args.out is None:
        args.out = REHEARSAL if args.rehearse else Path(os.environ.get("OUT") or RESULTS / "gpu")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.list:
        list_parts()
        return
    if args.pack:
        from training.benchmarks.gpu.race import write_pack

        print(write_pack(args.pack, args.pack_folder))
        print(describe_cuda_builds())
        return
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use; `--rehearse` walks the agenda without one.")
    # An exception, unlike the default action of SIGTERM, ends the workers on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu_agenda_pack_") as folder:
        if args.rehearse and not args.pack_folder.is_dir():
            from training.benchmarks.gpu.race import write_pack

            args.pack_folder = Path(folder)
            write_pack(ROOT / "README.md", args.pack_folder)
        agenda = Agenda(args)
        agenda.run()
    print(agenda.table())
    if agenda.has_failed():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
