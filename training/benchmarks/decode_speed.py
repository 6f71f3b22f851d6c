"""
Decoding at batch 1 on one core: sparse and dense Scaling Transformers in fp32, bf16, int8 and int4, transformers'
GPT-2, and llama.cpp.

    python -m training.benchmarks run decode_speed run --llama_python ENVIRONMENT/bin/python
    python -m training.benchmarks run decode_speed run --instruction_set avx2 --llama_python ANOTHER/bin/python
    python -m training.benchmarks run decode_speed run --races int8 --threads 2 --redo
    python -m training.benchmarks run decode_speed report

Weights are random. Engines are measured in turn, some tokens each, in processes that stay: one holds all models of
torch, one all of llama.cpp, which need not be in the same environment. A figure is the median over the rounds of the
core seconds of a token; with two threads it is wall time. The first round and the first token of each turn are thrown
away. Before its turn a cache is given its length: of torch's models with random keys and values, of llama.cpp's by
reading random tokens. A race is a set of engines in turn; each of its contexts is kept in a file of its own, and what
is there is not measured again without `--redo`. Ratios are always of one race.

llama.cpp comes as llama-cpp-python, which is compiled for the processor, or, to be compared with `avx2`, without more:

    pip install scikit-build-core cmake ninja gguf
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON" pip install --no-build-isolation llama-cpp-python==0.3.36
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" ...

Flash attention is off, which is faster on a CPU; weights are repacked as llama.cpp likes them. Without llama.cpp the
other engines run alone.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .capabilities import TORCH_LIMITS, variable_of
from .decoding import report
from .decoding.races import FULL, IN_TORCH, NARROW, RACES, TINY, WIDE, Race, Size
from .decoding.worker import EngineError, Worker, close_all, in_turn
from .environment import RESULTS, ROOT, describe, write_result


RUNS = ROOT / "runs" / "decode_speed"
KERNELS = ("sparse-ff", "decode-layer")
QUICK = "-quick"  # behind the folders' names of what tiny models have measured
TOKENS = 6  # of a turn; the first one does not count


def limits_of(instruction_set: str) -> dict[str, str]:
    """The variables that hold torch, its libraries and our kernels to an instruction set; none for `native`."""
    if instruction_set == "native":
        return {}
    return {**{variable_of(kernel): instruction_set for kernel in KERNELS}, **TORCH_LIMITS[instruction_set]}


def check_instruction_set(instruction_set: str, system_info: str) -> None:
    """
    Check that llama.cpp was compiled for the instruction set that our side is held to.

    Raises:
        ValueError: if it was compiled for more.
    """
    if instruction_set == "avx2" and "AVX512 = 1" in system_info:
        raise ValueError(
            "llama.cpp was compiled for AVX-512, and the other side is held to AVX2: give --llama_python an "
            f"environment with a build for AVX2. It says: {system_info}"
        )


class Field:
    """
    The processes of all engines, and what each model takes.

    Args:
        args (`argparse.Namespace`): the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.limits = limits_of(args.instruction_set)
        self.llama: Worker | None = None
        self.about: dict[str, Any] = {"llama": None}
        self.loaded: dict[str, dict[str, Any]] = {}  # of llama.cpp, whose models stay
        self.torch: Worker | None = None
        self.bandwidth = 0.0
        if not args.no_llama:
            self._start_llama()

    def _start_llama(self) -> None:
        worker = Worker("training.benchmarks.decoding.llama_engine", self.args.llama_python)
        try:
            self.about["llama"] = worker.ask("start", threads=self.args.threads)
        except EngineError as error:
            worker.close()
            print(f"Without llama.cpp, since {self.args.llama_python} does not run it: {error}", file=sys.stderr)
            return
        self.llama = worker
        check_instruction_set(self.args.instruction_set, self.about["llama"]["system_info"])

    def start_torch(self) -> Worker:
        """Begin a new process of torch's models, so that what each of them takes can be told."""
        if self.torch is not None:
            self.torch.close()
        self.torch = Worker("training.benchmarks.decoding.torch_engine", environment=self.limits)
        self.about["torch"] = self.torch.ask("start", threads=self.args.threads)
        if not self.bandwidth:
            self.bandwidth = self.torch.ask("read_bandwidth", quick=self.args.quick)
        return self.torch

    def size(self, race: Race) -> Size:
        return TINY[race.size] if self.args.quick else {"full": FULL, "narrow": NARROW, "wide": WIDE}[race.size]

    def load(self, race: Race, name: str) -> tuple[Worker, str, dict[str, Any]]:
        """
        Load an engine of a race: its process, its name there, and what it takes and reads.

        Raises:
            EngineError: if that process cannot.
        """
        size, one_layer = self.size(race), name.endswith("/1")
        form, kind = name.removesuffix("/1").split(" ")
        if form == "llama":
            if self.llama is None:
                raise EngineError("llama.cpp does not run here")
            shape = {**size.gguf(), **({"layers": 1} if one_layer else {})}
            key = f"{kind} {shape}"
            if key not in self.loaded:
                length = max((*race.contexts, race.prompt or 0))
                asked = {"form": kind, "shape": shape, "length": length, "folder": str(self.args.gguf_folder)}
                self.loaded[key] = self.llama.ask("load", name=key, **asked)
            return self.llama, key, self.loaded[key]
        assert self.torch is not None
        if kind.endswith(IN_TORCH) and not one_layer:
            return self.torch, name, self.torch.ask("load_in_torch", name=name, of=name.removesuffix(IN_TORCH))
        if one_layer:
            return self.torch, name, self.torch.ask("load_first_layer", name=name, of=name.removesuffix("/1"))
        preset, settings = ("gpt2", size.gpt2()) if kind == "gpt2" else size.settings(kind)
        return self.torch, name, self.torch.ask("load", name=name, kind=preset, form=form, settings=settings)

    def close(self) -> None:
        close_all(worker for worker in (self.llama, self.torch) if worker is not None)


def path_of(args: argparse.Namespace, race: str, context: int) -> Path:
    threads = "1-thread" if args.threads == 1 else f"{args.threads}-threads"
    return args.output_dir / f"{args.instruction_set}{QUICK * args.quick}" / threads / f"{race}-{context}.json"


def measure(field: Field, name: str, contexts: list[int]) -> None:
    """Run a race at some contexts, and write the file of each as soon as it has finished."""
    race, args = RACES[name], field.args
    field.start_torch()
    engines, loaded, missing = {}, {}, {}
    for engine in race.engines:
        try:
            worker, key, loaded[engine] = field.load(race, engine)
            engines[engine] = (worker, key)
        except EngineError as error:
            missing[engine] = str(error)
            print(f"  without {engine}: {error}", file=sys.stderr)
    for context in contexts:
        if race.prompt is None:
            turn, repeats = {"what": "decode", "context": context, "count": args.tokens}, args.repeats
        else:
            length = min(race.prompt, 8) if args.quick else race.prompt
            turn, repeats = {"what": "prompt", "length": length}, min(args.repeats, 3)
        runs = {engine: partial(worker.ask, name=key, **turn) for engine, (worker, key) in engines.items()}
        seconds = in_turn(runs, repeats, dropped=0 if race.prompt else 1)
        result = {
            "race": name,
            "size": vars(field.size(race)),
            "context": context,
            "prompt": turn.get("length"),
            "quick": args.quick,
            "threads": args.threads,
            "instruction_set": args.instruction_set,
            "limits": field.limits,
            "read_bandwidth": field.bandwidth,
            "seconds": seconds,
            "engines": loaded,
            "missing": missing,
            "llama": field.about["llama"],
        }
        write_result(path_of(args, name, context), {**result, **field.about["torch"], **_command()})
        report.print_race(result)


def _command() -> dict[str, Any]:
    """The command of this process, in the place of a worker's."""
    return {"command": describe()["command"]}


def run(args: argparse.Namespace) -> None:
    """Measure what was not measured yet."""
    field = None
    try:
        for name in args.races:
            race = RACES[name]
            contexts = [c for c in race.contexts if c in args.contexts or race.size != "full" or race.prompt]
            if not args.redo:
                contexts = [context for context in contexts if not path_of(args, name, context).exists()]
            if not contexts:
                continue
            field = field or Field(args)
            measure(field, name, contexts)
    finally:
        if field is not None:
            field.close()


def write_report(args: argparse.Namespace) -> None:
    """Print the tables, and write a result file for each instruction set that was measured."""
    folders = sorted(path for path in args.output_dir.glob("*") if path.is_dir())
    folders = [path for path in folders if path.name.endswith(QUICK) == args.quick]
    if not folders:
        raise SystemExit(f"Nothing was measured yet in {args.output_dir}: begin with `run`.")
    for folder in folders:
        races = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
        result = report.result_of(races)
        print(f"## {folder.name}\n\n{report.text_of(result)}")
        write_result(args.results / f"decode_speed_{folder.name}.json", result)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run decode_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure")
    running.add_argument("--races", nargs="+", default=list(RACES), choices=list(RACES))
    running.add_argument("--contexts", nargs="+", type=int, default=[16, 512, 2048], choices=[16, 512, 2048])
    running.add_argument("--threads", type=int, default=1, choices=[1, 2])
    running.add_argument("--instruction_set", default="native", choices=["native", "avx2"], help="of both sides")
    running.add_argument("--repeats", type=int, default=10, help="rounds that count")
    running.add_argument("--tokens", type=int, default=TOKENS, help="of a turn, of which the first does not count")
    running.add_argument("--llama_python", default=sys.executable, help="interpreter that has llama-cpp-python")
    running.add_argument("--no_llama", action="store_true", help="leave llama.cpp out")
    running.add_argument("--gguf_folder", type=Path, default=RUNS / "gguf", help="for llama.cpp's files")
    running.add_argument("--redo", action="store_true", help="measure again what there is")
    reporting = commands.add_parser("report", help="print tables, and write the result files")
    reporting.add_argument("--results", type=Path, default=RESULTS)
    for command in (running, reporting):
        command.add_argument("--output_dir", type=Path, default=RUNS, help="folder for the files of races")
        command.add_argument("--quick", action="store_true", help="tiny models, which say nothing about speed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    {"run": run, "report": write_report}[args.command](args)


if __name__ == "__main__":
    main()
