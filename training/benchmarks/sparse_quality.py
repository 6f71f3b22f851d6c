"""
Quality of sparse layers: Scaling Transformers of equal size, dense and sparse, on the same tokens in the same order.

    python -m training.benchmarks.sparse_quality screen --text enwiki.xml.xz
    python -m training.benchmarks.sparse_quality run --text enwiki.xml.xz --kinds dense all --seed 0
    python -m training.benchmarks.sparse_quality cost
    python -m training.benchmarks.sparse_quality report

`screen` gives the dense model and the sparsest one short runs at three learning rates; `run` trains kinds of one seed,
by default all of them, at the better rate or at the one given: dense and sparse models may want different ones. Killed,
the same command goes on from the last save. `cost` measures what counting the controllers' choices costs a train step
of the sparsest kind. `report` writes training/results/sparse_quality.json: bits per byte of all validation text, beside
the weights that a token reads in decoding, and what the controllers choose.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.modules.unit_usage import UnitUsageCallback, observed_units

from .environment import describe, write_result
from .equal_time import TrainConfig, refuse_changes, train_interleaved
from .lm_comparison import (
    TimedLanguageModelTrainer,
    add_training_arguments,
    bits,
    eval_batches,
    read_bytes,
    split,
)
from .timing import interleave


RESULT = Path(__file__).resolve().parents[1] / "results" / "sparse_quality.json"
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "position_init_scale": 0.1,
}
_FF = {"ff_sparsity": 16, "ff_rank": 16}
_QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 8}
_LOSS = {"lm_head_type": "multiplicative", "loss_sparsity": 4}
# What a kind saves in attention and output layer makes its feed-forward layer wider, as in the paper.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"intermediate_size": 1024},
    "ff": {"intermediate_size": 992, **_FF},
    "qkv": {"intermediate_size": 1472, **_QKV},
    "all": {"intermediate_size": 1440, **_FF, **_QKV, **_LOSS},
}
# Equal in size too, for a GPU: the benchmark itself trains those above.
LARGE: dict[str, Any] = {**COMMON, "hidden_size": 768, "num_hidden_layers": 14, "num_attention_heads": 12}
LARGE_KINDS: dict[str, dict[str, Any]] = {
    "dense": {"intermediate_size": 3072},
    "all": {
        "intermediate_size": 4448,
        "ff_sparsity": 32,
        "ff_rank": 32,
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 16,
        "lm_head_type": "multiplicative",
        "loss_sparsity": 8,
    },
}
TITLES = {"dense": "dense", "ff": "sparse FF", "qkv": "sparse QKV", "all": "sparse FF, QKV and loss"}
RATES = (1e-3, 2e-3, 4e-3)


def build(kind: str, length: int, large: bool = False) -> ScalingTransformerForCausalLM:
    """Build a model of one kind for segments of `length` bytes, of 5 M parameters or, if `large`, of 100 M."""
    sizes = {**LARGE, **LARGE_KINDS[kind]} if large else {**COMMON, **KINDS[kind]}
    return ScalingTransformerForCausalLM(ScalingTransformerConfig(max_position_embeddings=length, **sizes))


class SparseQualityTrainer(TimedLanguageModelTrainer):
    """[`TimedLanguageModelTrainer`] whose draws depend on the step alone, so that a run that was taken up again gives
    the same numbers."""

    def before_step(self) -> None:
        torch.manual_seed((self.seed << 32) + self.progress.steps)


def train_config(steps: int, rate: float, args: argparse.Namespace) -> TrainConfig:
    """Settings of a run of so many steps: AdamW on matrices alone, cosine decay to 2 % of the rate."""
    return TrainConfig(
        budget_steps=steps,
        batch_size=args.batch_size,
        learning_rate=rate,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        evaluations=args.evaluations,
        schedule="cosine",
        final_fraction=0.02,
        decay_matrices_only=True,
        bf16=args.bf16,
    )


def make_trainer(name: str, kind: str, rate: float, steps: int, args: argparse.Namespace) -> SparseQualityTrainer:
    """Make the trainer of a run, whose model starts as the seed says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    train, validation = split(read_bytes(args.text))
    config = train_config(steps, rate, args)
    validation = validation[: args.eval_bytes + 1]
    model = build(kind, args.length)
    return SparseQualityTrainer(name, model, "random", train, validation, args.length, config, args.seed, device)


def unit_figures(model: ScalingTransformerForCausalLM, batches: list[dict]) -> list[dict[str, float]]:
    """Measure the choices of each layer's controller on some text, without noise."""
    device = model.model.embed_tokens.weight.device
    with torch.no_grad(), observed_units(model) as usage:
        for batch in batches:
            model(batch["input_ids"].to(device), use_cache=False)
    return [layer.figures() for layer in usage.values()]


def figures_of(trainer: SparseQualityTrainer, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Take the figures of a run that has finished, and score it on all validation bytes."""
    _, validation = split(read_bytes(args.text))
    batches = eval_batches(validation, args.length, 16, with_memory=False)
    trainer.model.eval()
    with torch.no_grad():
        final = trainer.score(batches)
    progress = trainer.progress
    return {
        "kind": kind,
        "seed": args.seed,
        "parameters": trainer.model.num_parameters(),
        "weights_read_per_token": trainer.model.weights_read_per_token(),
        "learning_rate": trainer.config.learning_rate,
        "steps": progress.steps,
        "tokens": progress.steps * args.batch_size * args.length,
        "step_s": progress.seconds / progress.steps,
        "bits_per_byte": bits(final),
        "curve": [(steps, bits(nats)) for _, steps, nats in progress.curve],
        "unit_usage": unit_figures(trainer.model, batches[:8]),
    }


def screen(args: argparse.Namespace) -> None:
    """Make short runs of the first and the last kind at each rate, and write which rate served each best."""
    folder = args.output_dir / "screen"
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{kind}-{rate:g}": (kind, rate) for kind in ("dense", "all") for rate in RATES}
    trainers = [make_trainer(name, kind, rate, args.steps, args) for name, (kind, rate) in names.items()]
    train_interleaved(trainers, folder, args.slice)
    found = {trainer.name: bits(trainer.progress.curve[-1][2]) for trainer in trainers}
    best: dict[str, float] = {}
    for name in sorted(found, key=lambda name: found[name]):
        kind, rate = names[name]
        best.setdefault(kind, rate)
    write_result(folder / "result.json", {"steps": args.steps, "bits_per_byte": found, "best": best, **describe()})
    print("\n".join(f"{name:12} {value:.3f} bits per byte" for name, value in found.items()))


def run(args: argparse.Namespace) -> None:
    """Train kinds with one seed, one after the other, and write the figures of each as soon as it has finished."""
    screened = args.output_dir / "screen" / "result.json"
    if args.learning_rate is None and not screened.exists():
        raise SystemExit(f"{screened} is missing: run `screen` first, or give --learning_rate.")
    best = json.loads(screened.read_text())["best"] if screened.exists() else {}
    folder = args.output_dir / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        path = folder / f"{kind}.json"
        rate = args.learning_rate or best["dense" if kind == "dense" else "all"]
        settings = {name: getattr(args, name) for name in ("steps", "batch_size", "length", "bf16")}
        settings |= {"learning_rate": rate, "text": args.text.name}
        if path.exists():
            refuse_changes(path, json.loads(path.read_text())["settings"], settings)
            continue
        trainer = make_trainer(kind, kind, rate, args.steps, args)
        train_interleaved([trainer], folder, args.slice, save_every=4)
        outcome = figures_of(trainer, kind, args)
        write_result(path, {**outcome, "settings": settings, **describe()})
        print(f"{TITLES[kind]}, seed {args.seed}: {outcome['bits_per_byte']:.3f} bits per byte")


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare each kind with the dense model of the same seed."""
    dense = {run["seed"]: run["bits_per_byte"] for run in runs if run["kind"] == "dense"}
    table = {}
    for kind in KINDS:
        own = [run for run in runs if run["kind"] == kind]
        if not own:
            continue
        ratios = [run["bits_per_byte"] / dense[run["seed"]] for run in own if run["seed"] in dense]
        table[kind] = {
            "parameters": own[0]["parameters"],
            "weights_read_per_token": own[0]["weights_read_per_token"],
            "bits_per_byte": [run["bits_per_byte"] for run in own],
            "of_dense": ratios,
            "step_s": float(np.median([run["step_s"] for run in own])),
        }
    return table


def cost(args: argparse.Namespace) -> None:
    """Measure train steps with and without counting what controllers choose; both draw the same."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = build("all", args.length).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = torch.randint(COMMON["vocab_size"], (args.batch_size, args.length))

    def step(seeds: Iterator[int], counted: bool) -> None:
        torch.manual_seed(next(seeds))
        with observed_units(model) if counted else nullcontext(), torch.autocast("cpu", torch.bfloat16, args.bf16):
            model(rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    runs = {name: partial(step, itertools.count(), name == "counted") for name in ("plain", "counted")}
    seconds = interleave(runs, args.repeats, device, "train steps")
    ratio = float(np.median(np.divide(seconds["counted"], seconds["plain"])))
    every = UnitUsageCallback(model).every
    found = {"counted_step": ratio, "every": every, "of_a_step": 1 + (ratio - 1) / every, "seconds": seconds}
    write_result(args.output_dir / "cost.json", {**found, **describe()})
    print(f"A counted step takes {ratio:.3f} of another; of one in {every}: {found['of_a_step']:.4f}.")


def summary_of(table: dict[str, Any], counting: dict[str, Any] | None) -> list[dict[str, Any]]:
    """List what was measured with its goal, for cards."""
    rows = []
    for kind, row in table.items():
        values = ", ".join(f"{value:.3f}" for value in row["bits_per_byte"])
        read = f"{row['weights_read_per_token']:,} of {row['parameters']:,} weights read a token"
        goal = "below 2.6" if kind == "dense" else None
        name = f"bits per byte of all validation, {TITLES[kind]}"
        unit = f"bits ({values}); {read}"
        rows.append({"name": name, "value": float(np.mean(row["bits_per_byte"])), "unit": unit, "goal": goal})
        if kind != "dense":
            worst = max(row["of_dense"], default=None)
            name = f"bits per byte, {TITLES[kind]} / dense (worst seed)"
            rows.append({"name": name, "value": worst, "unit": "times", "goal": "at most 1.02"})
    share = None if counting is None else counting["of_a_step"]
    name = "train step with one in 10 counted / without, sparse FF, QKV and loss"
    return [*rows, {"name": name, "value": share, "unit": "times", "goal": "at most 1.02"}]


def headline_of(table: dict[str, Any], runs: list[dict[str, Any]]) -> str | None:
    """The sentence about what sparse layers cost in quality and spare in weights; None without a dense model."""
    said = []
    for kind, row in table.items():
        if kind != "dense" and row["of_dense"]:
            ratios = " and ".join(f"{ratio:.3f}" for ratio in row["of_dense"])
            read = row["weights_read_per_token"] / row["parameters"]
            said.append(
                f"{TITLES[kind]} {ratios} times the dense model's bits per byte, {read:.0%} of weights read a token"
            )
    tokens = runs[-1]["tokens"] / 1e6
    size = runs[-1]["parameters"] / 1e6
    where = runs[-1]["machine"]["gpu"] or runs[-1]["machine"]["processor"]
    head = f"Models of {size:.1f} M parameters, trained on {tokens:.1f} M bytes of text ({where})"
    return f"{head}: {'; '.join(said)}." if said else None


def report(args: argparse.Namespace) -> None:
    """Merge all runs that have finished into one file, and print them."""
    paths = sorted(args.output_dir.glob("seed-*/*.json"))
    if not paths:
        raise SystemExit(f"{args.output_dir} holds no finished run: use `run` first.")
    runs = [json.loads(path.read_text()) for path in paths]
    table = summarise(runs)
    screened, counted = args.output_dir / "screen" / "result.json", args.output_dir / "cost.json"
    screen, counting = (json.loads(path.read_text()) if path.exists() else None for path in (screened, counted))
    found = {
        "headline": headline_of(table, runs),
        "summary": summary_of(table, counting),
        "kinds": table,
        "counting": counting,
        "screen": screen,
    }
    # It may be written elsewhere than where the models were trained.
    trained = {key: runs[-1][key] for key in ("machine", "versions", "command")}
    if any(run["machine"]["processor"] != trained["machine"]["processor"] for run in runs):
        raise SystemExit(f"{args.output_dir} holds runs of several processors: report them one by one.")
    trained["commit"] = ", ".join(dict.fromkeys(run["commit"] for run in runs if run["commit"]))
    note = {"note": args.note} if args.note else {}
    write_result(args.result, {**found, **note, "runs": runs, **describe(), **trained})
    for kind, row in table.items():
        values = ", ".join(f"{value:.3f}" for value in row["bits_per_byte"])
        read = row["weights_read_per_token"] / row["parameters"]
        print(f"{TITLES[kind]:24} {values} bits per byte, {row['parameters']:,} weights, {read:.0%} read a token")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.sparse_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    screens = commands.add_parser("screen", help="find the learning rate of dense and of sparse models")
    runs = commands.add_parser("run", help="train kinds with one seed")
    reports = commands.add_parser("report", help="merge all that is there into one table")
    screens.add_argument("--steps", type=int, default=150, help="of each short run (%(default)s)")
    runs.add_argument("--steps", type=int, default=2000, help="of each model (%(default)s)")
    runs.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which, in this order (all)")
    runs.add_argument("--learning_rate", type=float, help="of all kinds; by default what `screen` found")
    costs = commands.add_parser("cost", help="measure what counting controllers' choices costs a train step")
    costs.add_argument("--repeats", type=int, default=25, help="timed steps of each kind (%(default)s)")
    costs.add_argument("--batch_size", type=int, default=16, help="(%(default)s)")
    costs.add_argument("--length", type=int, default=128, help="tokens in a row (%(default)s)")
    costs.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast (%(default)s)")
    for command in (screens, runs):
        add_training_arguments(command, batch_size=16, bf16=True, slice=60.0)
        command.add_argument("--evaluations", type=int, default=20, help="points of a curve (%(default)s)")
    for command in (screens, runs, costs, reports):
        command.add_argument("--output_dir", type=Path, default=Path("runs/sparse_quality"))
    reports.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    reports.add_argument("--note", help="what a reader of the result must know")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"screen": screen, "run": run, "cost": cost, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
