"""
Quality of a GPT-2 made sparse: what its feed-forward layers lose, and what distillation brings back.

    python -m training.benchmarks.sparsify_quality train --text enwiki.xml.xz

`train` trains a GPT-2 of transformers, 5 M parameters, on bytes. Killed, the same command goes on from the last save.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from .environment import describe, write_result
from .equal_time import TrainConfig, train_interleaved
from .lm_comparison import (
    TimedLanguageModelTrainer,
    add_training_arguments,
    bits,
    eval_batches,
    read_bytes,
    split,
)


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
    config = TrainConfig(
        budget_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        evaluations=args.evaluations,
        schedule="cosine",
        final_fraction=0.02,
        decay_matrices_only=True,
        bf16=args.bf16,
    )
    trainer = TimedLanguageModelTrainer(
        "gpt2", build_gpt2(args.length), "random", text, validation[: args.eval_bytes + 1], args.length, config,
        args.seed, torch.device("cpu"),
    )  # fmt: skip
    train_interleaved([trainer], folder, args.slice, save_every=1)
    trainer.model.eval()
    with torch.no_grad():
        score = bits(trainer.score(eval_batches(validation, args.length, 16, with_memory=False)))
    trainer.model.save_pretrained(folder / "model")
    progress = trainer.progress
    found = {
        "bits_per_byte": score,
        "parameters": trainer.model.num_parameters(),
        "steps": progress.steps,
        "step_s": progress.seconds / progress.steps,
        "curve": [(steps, bits(nats)) for _, steps, nats in progress.curve],
        "settings": {name: getattr(args, name) for name in ("steps", "batch_size", "length", "learning_rate", "bf16")},
    }
    write_result(folder / "result.json", {**found, **describe()})
    print(f"Dense GPT-2: {score:.3f} bits per byte")


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
    for command in (trains,):
        command.add_argument("--output_dir", type=Path, default=Path("runs/sparsify_quality"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"train": train}[args.command](args)


if __name__ == "__main__":
    main()
