"""
Cost of making a GPT-2 sparse: time on one core, and the peak of memory, of the fit of one layer.

    python -m training.benchmarks run sparsify_cost
    python -m training.benchmarks run sparsify_cost --cases 768:32768:4 --repeats 1

A case is `WIDTH:TOKENS:N`: a model of one layer of GPT-2's shape (4 units for each number of its width, a vocabulary of
256, windows of 512 tokens) and random weights, made sparse on random tokens with controllers of rank 64, in a fresh
process each time. The time holds the layer's passes over the text; the peak, all beyond the dense model itself. Writes
training/results/sparsify_cost.json.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM, sparsify

from .environment import RESULTS, describe, write_result
from .timing import core_time, in_fresh_processes, peak_growth


RESULT = RESULTS / "sparsify_cost.json"
RANK, WINDOW, VOCABULARY = 64, 512, 256
CASES = ("256:16384:4", "768:32768:4", "768:65536:4")


def _fit(width: int, tokens: int, block_size: int) -> Any:
    """Build a model of one layer, and return a function that makes it sparse."""
    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=WINDOW,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        lm_head_bias=False,
    )
    model = ScalingTransformerForCausalLM(config).eval()
    ids = torch.randint(VOCABULARY, (tokens,))
    length = min(WINDOW, tokens)
    return lambda: sparsify(model, ids, block_size, RANK, length=length, max_tokens=tokens, progress=False)


def measure_process(width: int, tokens: int, block_size: int) -> dict[str, float]:
    """Measure core seconds and peak in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    _fit(8, 64, 4)()  # what is loaded on first use is no part of it
    fit, seconds = _fit(width, tokens, block_size), list[float]()

    def run() -> None:
        start = core_time(torch.device("cpu"))
        fit()
        seconds.append(core_time(torch.device("cpu")) - start)

    peak = peak_growth(run)
    return {"seconds": seconds[0], "peak_bytes": peak}


def measure(case: str, repeats: int) -> dict[str, Any]:
    """Measure a case in so many processes."""
    width, tokens, block_size = map(int, case.split(":"))
    runs = in_fresh_processes(measure_process, (width, tokens, block_size), repeats)
    figures = {name: [run[name] for run in runs] for name in ("seconds", "peak_bytes")}
    return {"width": width, "units": 4 * width, "tokens": tokens, "block_size": block_size, **figures}


def report(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the table and the sentence for pages; the last case is the one that the sentence is about."""
    rows = []
    for entry in entries:
        seconds, peak = (statistics.median(entry[name]) for name in ("seconds", "peak_bytes"))
        shape = [entry["width"], f"{entry['units']:,}", f"{entry['tokens']:,}", entry["block_size"]]
        rows.append([*shape, f"{seconds:.0f}", f"{peak / 1e9:.2f}"])
    width, units, tokens, block_size, seconds, peak = rows[-1]
    headline = (
        f"One layer {width} wide of {units} units was fitted to {tokens} tokens, with N {block_size} and rank {RANK}, "
        f"in {seconds} s on one core, and took {peak} GB at its peak, beyond the model itself."
    )
    columns = ["width", "units", "tokens", "N", "seconds a layer", "GB at the peak"]
    return {"headline": headline, "table": {"columns": columns, "rows": rows}, "entries": entries}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run sparsify_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="WIDTH:TOKENS:N (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a case (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = report([measure(case, args.repeats) for case in args.cases])
    write_result(args.result, {**found, **describe()})
    for row in found["table"]["rows"]:
        print(", ".join(f"{name} {value}" for name, value in zip(found["table"]["columns"], row, strict=True)))


if __name__ == "__main__":
    main()
