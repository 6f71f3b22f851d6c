"""
Quality in 8 and 4 bits: bits per byte of models that `sparse_quality run` has trained, and the units that they change.

    python -m training.benchmarks.quantized_quality measure --runs runs/sparse_quality --text enwiki.xml.xz
    python -m training.benchmarks.quantized_quality report

`measure` takes the last state of each run, quantises it as `from_pretrained` does, and scores both on the validation
text, in float32 and without autocast, by the same windows; a kind that was measured is not measured again. `report`
writes training/results/quantized_quality.json: bits per byte of each format over those of floats, and the share of
winners of each sparse feed-forward layer that are other units than those of the float model on the same text.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient import ScalingTransformerForCausalLM, SparseQuantizationConfig
from hf_efficient.ops.quantized import FORMATS

from .environment import RESULTS, describe, write_result
from .equal_winners import watched_winners
from .lm_comparison import IGNORE_INDEX, bits, eval_batches, read_bytes, split
from .sparse_quality import KINDS, TITLES, build


RESULT = RESULTS / "quantized_quality.json"


@torch.no_grad()
def score(model: Any, batches: list[dict[str, Tensor]]) -> tuple[float, list[Tensor]]:
    """Compute bits per byte of a text, and the winners of each sparse feed-forward layer, `(tokens, blocks)`."""
    total, count = 0.0, 0
    with watched_winners(model) as winners:
        for batch in batches:
            targets = int((batch["labels"] != IGNORE_INDEX).sum())
            output = model(batch["input_ids"], shift_labels=batch["labels"], use_cache=False)
            total, count = total + output.loss.item() * targets, count + targets
    return bits(total / count), [torch.cat([call.to(torch.uint8) for call in calls]) for calls in winners]


def measure_run(state: Path, kind: str, length: int, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Score the float model of a run and the quantised ones that are made from it."""
    model = build(kind, length).eval()
    model.load_state_dict(torch.load(state, map_location="cpu", weights_only=True)["objective"])
    found: dict[str, Any] = {"parameters": model.num_parameters()}
    found["float32"], expected = score(model, batches)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for weights in FORMATS:
            config = SparseQuantizationConfig(weights)
            quantized: Any = ScalingTransformerForCausalLM.from_pretrained(folder, quantization_config=config)
            found[weights], winners = score(quantized, batches)
            changed = [(a != b).double().mean().item() for a, b in zip(winners, expected, strict=True)]
            found[f"changed_winners_{weights}"] = changed
            print(f"{TITLES[kind]}: float32 {found['float32']:.4f}, {weights} {found[weights]:.4f} bits per byte")
    return found


def measure(args: argparse.Namespace) -> None:
    """Measure every run that has finished, and write what was found as soon as it is there."""
    _, validation = split(read_bytes(args.text))
    for path in sorted(args.runs.glob("seed-*/*.json")):
        target = args.output_dir / path.parent.name / path.name
        if path.stem not in args.kinds or target.exists() or not path.with_suffix(".pt").exists():
            continue
        run = json.loads(path.read_text())
        length = run["settings"]["length"]
        batches = eval_batches(validation[: args.eval_bytes], length, 16, with_memory=False)
        found = measure_run(path.with_suffix(".pt"), path.stem, length, batches)
        target.parent.mkdir(parents=True, exist_ok=True)
        trained = {name: run[name] for name in ("kind", "seed", "steps", "tokens")}
        write_result(target, {**trained, "eval_bytes": len(validation[: args.eval_bytes]), **found, **describe()})


def summary_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List what was measured with its goal, for cards."""
    rows = []
    for kind in KINDS:
        own = [run for run in runs if run["kind"] == kind]
        for weights in FORMATS if own else ():
            ratios = [run[weights] / run["float32"] for run in own]
            name = f"bits per byte, {TITLES[kind]}, {weights} / float32 (worst seed)"
            goal = "at most 1.005" if weights == "int8" else None
            rows.append({"name": name, "value": max(ratios), "unit": "times", "goal": goal})
            shares = [share for run in own for share in run[f"changed_winners_{weights}"]]
            if shares:
                name = f"winners that {weights} changes, {TITLES[kind]} (worst layer)"
                rows.append({"name": name, "value": max(shares), "unit": "of all", "goal": None})
    return rows


def table_of(runs: list[dict[str, Any]]) -> dict[str, list]:
    """Bits per byte of each kind and format, one number a seed, for pages."""
    formats, rows = ["float32", *FORMATS], []
    for kind in KINDS:
        own = sorted((run for run in runs if run["kind"] == kind), key=lambda run: run["seed"])
        if own:
            rows.append([TITLES[kind], *(", ".join(f"{run[name]:.3f}" for run in own) for name in formats)])
    return {"columns": ["bits per byte", *formats], "rows": rows}


def headline_of(runs: list[dict[str, Any]]) -> str:
    """Say for pages what rounding costs, at the worst kind and seed, and how many winners it changes."""
    one, seeds = runs[0], len({run["seed"] for run in runs})
    costs = {name: max(run[name] / run["float32"] for run in runs) - 1 for name in FORMATS}
    said = [
        f"Models of {one['parameters'] / 1e6:.1f} M parameters, trained on {one['tokens'] / 1e6:.1f} M bytes of text "
        f"and scored on {one['eval_bytes']:,} bytes of validation text, {seeds} seed{'s' * (seeds > 1)}, have at most "
        f"{' and '.join(f'{cost:.2%} more bits per byte in {name}' for name, cost in costs.items())}."
    ]
    for name in FORMATS:
        shares = [run[f"changed_winners_{name}"] for run in runs if run[f"changed_winners_{name}"]]
        if shares:
            first, last = max(layers[0] for layers in shares), max(layers[-1] for layers in shares)
            said.append(
                f"At most {first:.1%} of the winners change in the first layer, {last:.1%} in the last ({name})."
            )
    return " ".join(said)


def report(args: argparse.Namespace) -> None:
    """Merge all that was measured into one file, and print it."""
    runs = [json.loads(path.read_text()) for path in sorted(args.output_dir.glob("seed-*/*.json"))]
    if not runs:
        raise SystemExit(f"{args.output_dir} holds nothing: use `measure` first.")
    summary = summary_of(runs)
    measured = {key: runs[-1][key] for key in ("machine", "versions", "command", "commit")}
    found = {"headline": headline_of(runs), "table": table_of(runs), "summary": summary, "runs": runs}
    write_result(args.result, {**found, **describe(), **measured})
    for row in summary:
        print(f"{row['name']:72} {row['value']:.4f} {row['unit']}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.quantized_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measures = commands.add_parser("measure", help="score trained models in floats and in 8 and 4 bits")
    reports = commands.add_parser("report", help="merge all that is there into one table")
    measures.add_argument("--runs", type=Path, default=Path("runs/sparse_quality"), help="of `sparse_quality run`")
    measures.add_argument("--text", type=Path, required=True, help="text that they were trained on, or an .xz of it")
    measures.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which (all)")
    measures.add_argument("--eval_bytes", type=int, help="validation bytes to score (all)")
    for command in (measures, reports):
        command.add_argument("--output_dir", type=Path, default=Path("runs/quantized_quality"))
    reports.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"measure": measure, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
