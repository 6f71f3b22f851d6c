"""
Quality of a GPT-2 made sparse: what its feed-forward layers lose, and what distillation brings back.

    python -m training.benchmarks.sparsify_quality train --text enwiki.xml.xz
    python -m training.benchmarks.sparsify_quality run --text enwiki.xml.xz --block_sizes 4 16 64
    python -m training.benchmarks.sparsify_quality speed
    python -m training.benchmarks.sparsify_quality report

`train` trains a GPT-2 of transformers, 5 M parameters, on bytes. `run` makes it sparse, with units that are seldom
active together in a block and with random ones, and distils each for a tenth of the dense model's steps; it measures
bits per byte before and after, also with the true best unit of each block in the place of the controller's. Killed, the
same command goes on from the last save. `speed` decodes with all of them in turn. `report` writes
training/results/sparsify_quality.json, and the picture beside it.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_efficient import DistillationTrainer, ScalingTransformerForCausalLM, from_gpt2, sparsify
from hf_efficient.data.segments import RandomSegments
from hf_efficient.models.scaling_transformer.layer_fitting import DenseUnits, best_units, chosen_units
from hf_efficient.models.scaling_transformer.sparsify import ASSIGNMENTS
from hf_efficient.modules.unit_usage import sparse_feed_forwards
from hf_efficient.ops.backend import last_backend
from hf_efficient.utils.labels import IGNORE_INDEX

from .environment import describe, write_result
from .equal_time import train_interleaved
from .lm_comparison import (
    TimedLanguageModelTrainer,
    add_training_arguments,
    bits,
    eval_batches,
    read_bytes,
    split,
)
from .sparse_quality import train_config
from .sparsify_report import write_report
from .timing import interleave, medians


RESULT = Path(__file__).resolve().parents[1] / "results" / "sparsify_quality.json"


def build_gpt2(length: int) -> GPT2LMHeadModel:
    """Build a GPT-2 of 4.8 M parameters: 6 layers, 256 wide, GELU as GPT-2 has it, tied embeddings, no dropout."""
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    sizes: dict[str, Any] = {"vocab_size": 256, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": length}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **ids))


def train(args: argparse.Namespace) -> None:
    """Train the dense GPT-2, and write it and its figures."""
    folder = args.output_dir / "dense"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    text, validation = split(read_bytes(args.text))
    config = train_config(args.steps, args.learning_rate, args)
    trainer = TimedLanguageModelTrainer(
        "gpt2", build_gpt2(args.length), "random", text, validation[: args.eval_bytes + 1], args.length, config,
        args.seed, torch.device("cpu"),
    )  # fmt: skip
    train_interleaved([trainer], folder, args.slice, save_every=1)
    found_bits = score(trainer.model, eval_batches(validation, args.length, 16, with_memory=False))
    trainer.model.save_pretrained(folder / "model")
    progress = trainer.progress
    found = {
        "bits_per_byte": found_bits,
        "parameters": trainer.model.num_parameters(),
        "steps": progress.steps,
        "step_s": progress.seconds / progress.steps,
        "curve": [(steps, bits(nats)) for _, steps, nats in progress.curve],
        "settings": {name: getattr(args, name) for name in ("steps", "batch_size", "length", "learning_rate", "bf16")},
    }
    write_result(folder / "result.json", {**found, **describe()})
    print(f"Dense GPT-2: {found_bits:.3f} bits per byte")


def dense_of(folder: Path) -> Any:
    """Load the trained GPT-2 as its dense twin."""
    if not (folder / "dense" / "result.json").exists():
        raise SystemExit(f"{folder / 'dense'} holds no trained GPT-2: use `train` first.")
    return from_gpt2(GPT2LMHeadModel.from_pretrained(folder / "dense" / "model"))


@torch.no_grad()
def score(model: Any, batches: list[dict]) -> float:
    """Bits per byte of a model on validation batches."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"]
        targets = int((labels != IGNORE_INDEX).sum())
        total += model(batch["input_ids"], labels=labels, shift_labels=labels, use_cache=False).loss.item() * targets
        count += targets
    return bits(total / count)


def rows_as_trained(sparse: Any, dense: Any) -> list[Tensor]:
    """The dense model's second matrices, one row a unit, in the order of the sparse model's units before distillation:
    its first matrices hold the same rows."""
    found = []
    for layer, own in zip(dense.model.layers, sparse_feed_forwards(sparse).values(), strict=True):
        block = layer.feed_forward
        order = torch.cdist(own.up.flatten(0, 1).double(), block.up_proj.weight.double()).argmin(1)
        found.append(block.down_proj.weight.T[order].detach().clone())
    return found


@contextmanager
def best_of_each_block(sparse: Any, rows: list[Tensor]) -> Iterator[None]:
    """Let the unit that contributes most, by the dense model's rows, win each block inside the `with` block."""
    layers: list[Any] = list(sparse_feed_forwards(sparse).values())

    def forward(layer: Any, weights: Tensor, x: Tensor, draws: Any = None, real: Any = None) -> Tensor:
        flat, bias = x.flatten(0, -2), layer.inner_bias.flatten()
        units = DenseUnits(layer.up.flatten(0, 1), weights, bias, layer.activation)
        winners, _ = best_units(units, flat, layer.block_size)
        output = chosen_units(units, flat, winners, layer.block_size) @ layer.down.flatten(0, 1) + layer.bias
        return output.view_as(x)

    for layer, weights in zip(layers, rows, strict=True):
        layer.forward = partial(forward, layer, weights)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def measured(sparse: Any, rows: list[Tensor], batches: list[dict]) -> dict[str, float]:
    """Bits per byte with the controllers' choices, and with the best unit of each block."""
    found = {"controller": score(sparse, batches)}
    with best_of_each_block(sparse, rows):
        found["best_unit"] = score(sparse, batches)
    return found


def fitted_model(folder: Path, dense: Any, text: Any, kind: str, block_size: int, args: argparse.Namespace) -> Any:
    """The sparse model before distillation, made or taken up, and the figures of its layers."""
    kept = folder / "fit.json"
    if kept.exists():
        return ScalingTransformerForCausalLM.from_pretrained(folder / "fitted"), json.loads(kept.read_text())
    figures: list[dict[str, float]] = []
    sparse = sparsify(
        dense, torch.from_numpy(text.astype("int64")), block_size, args.rank, length=args.length,
        max_tokens=args.fit_tokens, assignment=kind, seed=args.seed, figures=figures,
    )  # fmt: skip
    sparse.save_pretrained(folder / "fitted")
    write_result(kept, {"layers": figures})
    return sparse, {"layers": figures}


def distil(folder: Path, sparse: Any, dense: Any, text: Any, steps: int, args: argparse.Namespace) -> Any:
    """Train the sparse model on the text and towards the dense one's logits."""
    settings = TrainingArguments(
        output_dir=str(folder / "distilled"),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 16),
        weight_decay=0.01,
        adam_beta2=0.98,
        bf16=args.bf16,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        seed=args.seed,
        report_to=[],
        use_cpu=True,
    )
    rows = RandomSegments(text, args.length, args.seed)
    trainer = DistillationTrainer(sparse, settings, teacher=dense, train_dataset=rows)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def run(args: argparse.Namespace) -> None:
    """Make the dense model sparse in each way, measure, distil, and measure again."""
    dense = dense_of(args.output_dir)
    trained = json.loads((args.output_dir / "dense" / "result.json").read_text())
    text, validation = split(read_bytes(args.text))
    batches = eval_batches(validation[: args.eval_bytes + 1], args.length, 16, with_memory=False)
    before = args.output_dir / "dense" / "score.json"
    if not before.exists():
        write_result(before, {"bits_per_byte": score(dense, batches), "eval_bytes": args.eval_bytes})
    steps = round(args.share * trained["steps"])
    for block_size in args.block_sizes:
        for kind in args.kinds:
            folder = args.output_dir / f"{kind}-{block_size}"
            if (folder / "result.json").exists():
                continue
            sparse, fit = fitted_model(folder, dense, text, kind, block_size, args)
            rows = rows_as_trained(sparse, dense)
            if "at_once" not in fit:
                fit["at_once"] = measured(sparse, rows, batches)
                write_result(folder / "fit.json", fit)
                print(f"{kind}, N {block_size}, at once: {fit['at_once']}")
            trainer = distil(folder, sparse, dense, text, steps, args)
            found = {
                **fit,
                "kind": kind,
                "block_size": block_size,
                "rank": args.rank,
                "fit_tokens": args.fit_tokens,
                "distilled": measured(trainer.model.eval(), rows, batches),
                "steps": steps,
                "learning_rate": args.learning_rate,
                "parameters": trainer.model.num_parameters(),
                "weights_read_per_token": trainer.model.weights_read_per_token(),
            }
            trainer.model.config.use_cache = True
            trainer.model.save_pretrained(folder / "model")
            write_result(folder / "result.json", {**found, **describe()})
            print(f"{kind}, N {block_size}, distilled: {found['distilled']}")


def _decode(model: Any, prompt: Tensor, tokens: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(prompt, **options, pad_token_id=0)


def speed(args: argparse.Namespace) -> None:
    """Decode at batch 1 with the dense model and the sparse ones in turn."""
    models: dict[str, Any] = {"dense": dense_of(args.output_dir)}
    for path in sorted(args.output_dir.glob("coactivation-*/model")):
        models[path.parent.name.rpartition("-")[2]] = ScalingTransformerForCausalLM.from_pretrained(path)
    prompt = torch.arange(16)[None]
    for model in models.values():
        model.eval()
    runs = {name: partial(_decode, model, prompt, args.tokens) for name, model in models.items()}
    seconds = medians(interleave(runs, args.repeats, torch.device("cpu"), "decoding", warmup=1))
    found = {name: args.tokens / value for name, value in seconds.items()}
    write_result(
        args.output_dir / "speed.json", {"tokens_per_s": found, "backend": last_backend("sparse_ff"), **describe()}
    )
    print("\n".join(f"{name:6} {value:.1f} tokens/s" for name, value in found.items()))


def report(args: argparse.Namespace) -> None:
    """Write the result and its picture, and print the table."""
    write_report(args.output_dir, args.result, dense_of(args.output_dir).weights_read_per_token())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.sparsify_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("train", help="train the dense GPT-2")
    add_training_arguments(trains, batch_size=8, bf16=True, slice=30.0)
    trains.add_argument("--steps", type=int, default=4000, help="(%(default)s)")
    trains.add_argument("--learning_rate", type=float, default=1e-3, help="(%(default)s)")
    trains.add_argument("--evaluations", type=int, default=20, help="points of the curve (%(default)s)")
    runs = commands.add_parser("run", help="make it sparse, and distil")
    add_training_arguments(runs, batch_size=8, bf16=True, eval_bytes=65_536)
    runs.add_argument("--block_sizes", type=int, nargs="+", default=[4, 16, 64], help="N (%(default)s)")
    runs.add_argument("--kinds", nargs="+", choices=ASSIGNMENTS, default=list(ASSIGNMENTS), help="of blocks (all)")
    runs.add_argument("--rank", type=int, default=64, help="of controllers (%(default)s)")
    runs.add_argument("--fit_tokens", type=int, default=32_768, help="tokens to fit to (%(default)s)")
    runs.add_argument("--share", type=float, default=0.1, help="of the dense model's steps (%(default)s)")
    runs.add_argument("--learning_rate", type=float, default=5e-4, help="of the distillation (%(default)s)")
    speeds = commands.add_parser("speed", help="decode with all of them")
    speeds.add_argument("--tokens", type=int, default=64, help="decoded in a run (%(default)s)")
    speeds.add_argument("--repeats", type=int, default=7, help="timed runs of each (%(default)s)")
    reports = commands.add_parser("report", help="merge all that is there into one table and a picture")
    reports.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    for command in (trains, runs, speeds, reports):
        command.add_argument("--output_dir", type=Path, default=Path("runs/sparsify_quality"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"train": train, "run": run, "speed": speed, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
