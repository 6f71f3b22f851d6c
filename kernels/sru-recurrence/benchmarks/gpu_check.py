"""
All that only a GPU can show of the compiled recurrence, in one run of a few minutes: whether it is right, whether it
stays within its memory, and how fast it is.

    python kernels/sru-recurrence/benchmarks/gpu_check.py
    python kernels/sru-recurrence/benchmarks/gpu_check.py --parts build parity sanitizer
    python kernels/sru-recurrence/benchmarks/gpu_check.py --parts recurrence --repeats 50 --result gpu.json

    build       compile with `kernels/build.py --backend cuda`, if sources have changed
    parity      outputs and all gradients against the torch form on the same GPU, in all dtypes, directions and forms;
                float32 also against float64
    sanitizer   the smaller cases of parity again under NVIDIA's compute-sanitizer (skipped where it is not installed):
                memcheck, initcheck and racecheck
    recurrence  length 512, batch 8 and 64, width 3,072, bfloat16 and float32: against its floor, the longer of the
                time to copy as many bytes and of that which the dependence of a step on the one before it takes
                (`bare_chain.cu`, measured in the same run), and against a scan in Triton (skipped where Triton is not
                installed)
    lstm        a layer, matrix product included, against cuDNN's LSTM: length 512, batch 32, width 1,024
    lm          a training step of the 42 M SRU++ in bfloat16 autocast, against a GPT-2 of equal size with flash
                attention: tokens a second

Times are medians of CUDA events, peers in turn after a warm-up; the recurrence and the Triton scan are replayed from
CUDA graphs, since a launch from Python costs as much as a small call. The result goes to training/results, with the
card's name, after each part; without a GPU nothing is written. A wrong result, a failed build or an error of the
sanitizer ends the run with exit code 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "training" / "benchmarks")]

from environment import RESULTS, describe, write_result  # noqa: E402
from gpu_measure import measure_lm, measure_lstm, measure_recurrence  # noqa: E402
from gpu_parity import SHAPES, SMALL_SHAPES, check_parity  # noqa: E402


SANITIZERS = ("memcheck", "initcheck", "racecheck")
# An error as compute-sanitizer says it: a line, and indented ones that say where.
REPORT = re.compile(r"^=+ \S.*(?:\n=+ {2,}.*)+", re.MULTILINE)
GOALS = {
    "forward": "at most 2 times the floor",
    "backward": None,
    "triton": "at least 1.3 times as fast",
    "lstm": "at least 5 times as fast",
    "lm": None,
}


def build() -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "kernels" / "build.py"), "sru-recurrence", "--backend", "cuda"]
    done = subprocess.run(command)
    if done.returncode != 0:
        raise SystemExit(f"kernels/build.py ended with exit code {done.returncode}; what it lacks stands above.")
    return {"built": True}


def run_sanitizer(tool: str, program: str) -> str:
    """
    The small cases under one of compute-sanitizer's programs, in a process whose tensors each have memory of their own;
    what it says at its end.

    Raises:
        SystemExit: if it finds an error; with what it says of it.
    """
    command = [tool, "--tool", program, "--error-exitcode", "9", sys.executable, __file__, "--parts", "small-parity"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    errors, allowed = REPORT.findall(done.stdout), {0}
    if program == "initcheck":
        # CUB, which torch uses, reads such memory on purpose; what we leave unwritten others of torch's kernels read.
        errors = [error for error in errors if not re.search(r"\b(cub|thrust)::", error)]
        allowed.add(9)
    if errors or done.returncode not in allowed or not summary:
        said = "\n".join(errors[:10]) or done.stdout[-6000:]
        raise SystemExit(f"compute-sanitizer's {program} ended with exit code {done.returncode}:\n{said}")
    return summary[-1].strip("= ")


def sanitize() -> dict[str, Any]:
    """All of compute-sanitizer's programs that look at memory; results are uninitialised memory at first."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = ["compute-sanitizer", *(f"{place}/bin/compute-sanitizer" for place in places if place)]
    tool = next((found for candidate in candidates if (found := shutil.which(candidate))), None)
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    return {"ran": True, "said": {program: run_sanitizer(tool, program) for program in SANITIZERS}}


def parity() -> dict[str, Any]:
    return {"largest_error_of_the_allowed": check_parity(SHAPES)}


def summarise(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each measured ratio, with its goal."""
    rows: list[dict[str, Any]] = []
    for case in parts.get("recurrence", {}).get("cases", []):
        where = f"batch {case['batch']}, {case['dtype']}"
        for name in ("forward", "backward"):
            value = case["microseconds"][name] / case["floor_microseconds"][name]
            rows.append({"name": f"{name} over its floor, {where}", "value": value, "goal": GOALS[name]})
        if "triton" in case["microseconds"]:
            value = case["microseconds"]["triton"] / case["microseconds"]["forward"]
            rows.append({"name": f"forward against the Triton scan, {where}", "value": value, "goal": GOALS["triton"]})
    for name, times in parts.get("lstm", {}).get("microseconds", {}).items():
        row = {"name": f"layer against cuDNN's LSTM, {name}", "value": times["lstm"] / times["sru"]}
        rows.append({**row, "goal": GOALS["lstm"]})
    tokens = parts.get("lm", {}).get("tokens_per_second", {})
    for name in sorted(set(tokens) - {"gpt2"}):
        row = {"name": f"training tokens a second, {name} / gpt2", "value": tokens[name] / tokens["gpt2"]}
        rows.append({**row, "goal": GOALS["lm"]})
    return rows


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "build": lambda repeats: build(),
    "parity": lambda repeats: parity(),
    "sanitizer": lambda repeats: sanitize(),
    "recurrence": measure_recurrence,
    "lstm": measure_lstm,
    "lm": measure_lm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, "small-parity"], metavar="PART")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each peer (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULTS / "sru_recurrence_gpu.json", help="(%(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use here: nothing was run and nothing written.")
    if args.parts == ["small-parity"]:
        check_parity(SMALL_SHAPES)
        return
    parts: dict[str, Any] = {}
    for name in args.parts:
        print(f"{name} ...", flush=True)
        parts[name] = PARTS[name](args.repeats)
        print(f"{name}: {parts[name]}", flush=True)
        result = {"card": torch.cuda.get_device_name(), "summary": summarise(parts), **describe(), "parts": parts}
        write_result(args.result, result)
    for row in summarise(parts):
        print(f"{row['name']}: {row['value']:.2f}" + (f" (goal: {row['goal']})" if row["goal"] else ""))


if __name__ == "__main__":
    main()
