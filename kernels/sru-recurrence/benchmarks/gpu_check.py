"""
All that only a GPU can show of the compiled recurrence, in one run of a few minutes: whether it is right, whether it
stays within its memory, and how fast it is.

    python kernels/sru-recurrence/benchmarks/gpu_check.py
    python kernels/sru-recurrence/benchmarks/gpu_check.py --parts build parity sanitizer
    python kernels/sru-recurrence/benchmarks/gpu_check.py --parts recurrence --repeats 50 --result gpu.json

    build       compile with `kernels/build.py --backend cuda`, if sources have changed
    parity      outputs and all gradients against the torch form on the same GPU, in all dtypes, directions and forms
    sanitizer   the smaller cases of parity again under NVIDIA's compute-sanitizer (skipped where it is not installed)
    recurrence  length 512, batch 8 and 64, width 3,072, bfloat16 and float32: against the time to copy as many bytes,
                and against a scan in Triton (skipped where Triton is not installed)
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

from hf_efficient.ops.backend import use_backend  # noqa: E402
from hf_efficient.ops.sru import sru_recurrence  # noqa: E402


GPU = torch.device("cuda")
TYPES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
SMALL_SHAPES = [(1, 1, 1), (1, 63, 5), (3, 1, 500), (2, 17, 64)]
SHAPES = [*SMALL_SHAPES, (8, 512, 3072), (64, 65, 3072)]
# Both forms compute in float32 or float64; results in 16 bits may be rounded to neighbouring numbers. Sums over time
# and batch are compared relative to their largest.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GOALS = {
    "forward": "at most 2 times the floor",
    "backward": None,
    "triton": "at least 1.3 times as fast",
    "lstm": "at least 5 times as fast",
    "lm": None,
}


def random_inputs(shape: tuple[int, int, int], parts: int, dtype: torch.dtype, x_type: torch.dtype | None) -> dict:
    """All arguments that there are, NaN at pads; with three parts a highway input, if `x_type` is a dtype."""
    batch, length, width = shape
    state = torch.promote_types(dtype, torch.float32)
    make: dict[str, Any] = {"dtype": state, "device": GPU}
    inputs: dict[str, Any] = {
        "u": (2 * torch.randn(batch, length, parts, width, **make)).to(dtype),
        "x": None if x_type is None else torch.randn(batch, length, width, **make).to(x_type),
        "weight_c": torch.randn(2, width, **make),
        "bias": torch.randn(2, width, **make),
        "c0": torch.randn(batch, width, **make),
        "mask": torch.rand(batch, length, device=GPU) < 0.8,
        "reset": torch.rand(batch, length, device=GPU) < 0.1,
        "dropout_mask": (torch.rand(batch, width, device=GPU) < 0.7).to(state) / 0.7,
    }
    for name in ("u", "x"):
        if inputs[name] is not None:
            inputs[name][~inputs["mask"]] = float("nan")
    for name, values in inputs.items():
        if values is not None and values.is_floating_point() and name != "dropout_mask":
            values.requires_grad_()
    return {name: values for name, values in inputs.items() if values is not None}


def results_of(backend: str, inputs: dict, options: dict, seed: int) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: values for name, values in inputs.items() if values.requires_grad}
    with use_backend(backend):
        h, states = sru_recurrence(**inputs, **options, return_all_states=True)
        generator = torch.Generator(GPU).manual_seed(seed)
        weights = [torch.randn(t.shape, generator=generator, device=GPU).to(t.dtype) for t in (h, states)]
        gradients = torch.autograd.grad((h, states), list(leaves.values()), weights)
    return {"h": h, "states": states, **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}}


def check_parity(shapes: list[tuple[int, int, int]]) -> dict[str, float]:
    """
    The largest error of each dtype as a share of what is allowed.

    Raises:
        SystemExit: if one is larger, or a number that should be finite is not; names the case.
    """
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    cases = [(types, 3) for types in TYPES] + [((dtype, None), 4) for dtype, x_type in TYPES if x_type is None]
    for (dtype, x_type), parts in cases:
        for shape in shapes:
            for reverse in (False, True):
                scale_x = 1.0 if x_type is None else 0.8
                options = {"reverse": reverse, "activation": "tanh" if reverse else "identity", "scale_x": scale_x}
                x_of_it = dtype if parts == 3 and x_type is None else x_type
                inputs = random_inputs(shape, parts, dtype, x_of_it)
                expected = results_of("reference", inputs, options, 1)
                for name, ours in results_of("cuda", inputs, options, 1).items():
                    other = expected[name].double()
                    scale = max(1.0, other.abs().max().item())
                    error = (ours.double() - other).abs().max().item() / scale / LIMITS[ours.dtype]
                    key = str(dtype).removeprefix("torch.")
                    worst[key] = max(worst.get(key, 0.0), error)
                    if not error <= 1.0:
                        case = f"{key}, x {x_of_it}, {parts} parts, shape {shape}, {options}"
                        raise SystemExit(f"WRONG: {name} is {error:.3g} times the allowed error away ({case}).")
    return worst


def build() -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "kernels" / "build.py"), "sru-recurrence", "--backend", "cuda"]
    done = subprocess.run(command)
    if done.returncode != 0:
        raise SystemExit(f"kernels/build.py ended with exit code {done.returncode}; what it lacks stands above.")
    return {"built": True}


def run_sanitizer() -> dict[str, Any]:
    """The small cases under compute-sanitizer, in a process whose tensors each have memory of their own."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = ["compute-sanitizer", *(f"{place}/bin/compute-sanitizer" for place in places if place)]
    tool = next((found for candidate in candidates if (found := shutil.which(candidate))), None)
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--parts", "small-parity"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    if done.returncode != 0 or not summary:
        raise SystemExit(f"compute-sanitizer ended with exit code {done.returncode}:\n{done.stdout[-6000:]}")
    return {"ran": True, "said": summary[-1].strip("= ")}


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
    "sanitizer": lambda repeats: run_sanitizer(),
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
