"""
Keys that attention by hashing (LSH) sees, of those that attention to all keys weighs, and the quality that it costs.

    python -m training.benchmarks run lsh_quality train --text enwiki.xml.xz
    python -m training.benchmarks run lsh_quality measure --text enwiki.xml.xz

`train` trains a language model of one stack (Terraformer without an encoder, 4 layers, 256 wide, bytes) with attention
to all keys, in which queries are keys as LSH has them. `measure` takes that model and, with 1, 2, 4 and 8 rounds of
hashing, gives the share of its attention's weight that lies on the keys that LSH sees, and its bits per byte with LSH;
then the same with two rounds after training goes on with LSH for a tenth of the steps. Beside each stands attention to
as many neighbours, the own chunk and those before it, which needs no hashing. Writes training/results/lsh_quality.json.
Killed, the same command goes on.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient import TerraformerConfig, TerraformerForCausalLM
from hf_efficient.modules.lsh_layers import LshAttention

from .environment import RESULTS, describe, write_result
from .equal_time import train_interleaved
from .lm_comparison import TimedLanguageModelTrainer, add_training_arguments, eval_batches, read_bytes, split
from .sparse_quality import train_config
from .sparsify_quality import score


RESULT = RESULTS / "lsh_quality.json"
ROUNDS = (1, 2, 4, 8)
CHUNK = 32


def build(length: int) -> TerraformerForCausalLM:
    """Build a model whose texts are short, so that it attends to all keys until it is told otherwise."""
    return TerraformerForCausalLM(
        TerraformerConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=1024,
            num_attention_heads=4,
            is_encoder_decoder=False,
            num_encoder_layers=0,
            num_decoder_layers=4,
            attentions_per_layer=1,
            max_position_embeddings=length,
            position_init_scale=0.1,
            dropout=0.0,
            activation_dropout=0.0,
            decoder_long_attention="mixed",
            lsh_full_length=length,
            lsh_chunk_length=CHUNK,
            lsh_rounds=2,
            lsh_eval_rounds=max(ROUNDS),
            pad_token_id=None,
            eos_token_id=None,
        )
    )


def attentions(model: Any) -> list[LshAttention]:
    return [module for module in model.modules() if isinstance(module, LshAttention)]


@contextmanager
def hashing(model: Any, rounds: int) -> Iterator[None]:
    """Let a model attend by LSH of so many rounds inside the `with` block."""
    before = [(one.full_length, one.eval_rounds) for one in attentions(model)]
    for one in attentions(model):
        one.full_length, one.eval_rounds = 0, rounds
    yield
    for one, (length, own_rounds) in zip(attentions(model), before, strict=True):
        one.full_length, one.eval_rounds = length, own_rounds


def neighbours(length: int, chunks: int) -> Tensor:
    """Keys in a query's own chunk or in one of those before it, `chunks` in all, and not after the query."""
    places = torch.arange(length)
    distance = places[:, None] // CHUNK - places[None, :] // CHUNK
    return (distance >= 0) & (distance < chunks) & (places[None, :] <= places[:, None])


@contextmanager
def near_only(model: Any, rounds: int) -> Iterator[None]:
    """Let a model attend to as many keys as LSH of so many rounds sees, all of them near, inside the `with` block."""

    def attend_alone(one: LshAttention) -> Any:
        def attend(query_key: Tensor, value: Tensor, attention_mask: Any, real: Any, memory: Any = None, **kwargs: Any):
            seen = neighbours(query_key.shape[2], 2 * rounds)[None, None]
            return one.attend(query_key, query_key, value, seen, **kwargs)[0]

        return attend

    for one in attentions(model):
        one.attend_alone = attend_alone(one)  # type: ignore[method-assign]
    yield
    for one in attentions(model):
        del one.attend_alone


@torch.no_grad()
def shares_seen(model: Any, batches: list[dict], rounds: int) -> tuple[float, float]:
    """
    The share of the weight of attention to all keys that lies on those that LSH sees, and on as many near ones, over
    all heads, layers and queries beyond the first `2 * CHUNK * rounds` tokens, which see all of them near.
    """
    found, near, count = 0.0, 0.0, 0

    def measure(one: LshAttention, query_key: Tensor, length: int) -> None:
        nonlocal found, near, count
        scores = (query_key @ query_key.transpose(2, 3)) * one.scaling
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        places = torch.eye(length).expand(*query_key.shape[:2], -1, -1)
        # Of values that are the keys' own numbers the output is each key's weight.
        seen = one._attend_hashed(query_key, places, one._hash(query_key, None), None).transpose(1, 2) > 0
        late = slice(min(2 * CHUNK * rounds, length - 1), None)
        found += float((weights * seen)[:, :, late].sum())
        near += float((weights * neighbours(length, 2 * rounds))[:, :, late].sum())
        count += weights[:, :, late, 0].numel()

    handles = []
    for one in attentions(model):
        alone = one.attend_alone

        def watched(query_key: Tensor, *args: Any, one: Any = one, alone: Any = alone, **kwargs: Any) -> Tensor:
            with hashing(model, rounds):
                measure(one, query_key, query_key.shape[2])
            return alone(query_key, *args, **kwargs)

        one.attend_alone = watched  # type: ignore[method-assign]
        handles.append(one)
    for batch in batches:
        model(batch["input_ids"], use_cache=False)
    for one in handles:
        del one.attend_alone
    return found / count, near / count


def trainer_of(name: str, model: Any, steps: int, args: argparse.Namespace) -> TimedLanguageModelTrainer:
    text, validation = split(read_bytes(args.text))
    config = train_config(steps, args.learning_rate, args)
    return TimedLanguageModelTrainer(
        name, model, "random", text, validation[: args.eval_bytes + 1], args.length, config, args.seed,
        torch.device("cpu"),
    )  # fmt: skip


def validation_batches(args: argparse.Namespace) -> list[dict]:
    _, validation = split(read_bytes(args.text))
    return eval_batches(validation[: args.eval_bytes + 1], args.length, 4, with_memory=False)


def train(args: argparse.Namespace) -> None:
    """Train the model with attention to all keys."""
    folder = args.output_dir / "full"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    trainer = trainer_of("full", build(args.length), args.steps, args)
    train_interleaved([trainer], folder, args.slice, save_every=1)
    trainer.model.save_pretrained(folder / "model")
    print(f"All keys: {score(trainer.model, validation_batches(args)):.3f} bits per byte")


def tuned(base: Any, kind: str, args: argparse.Namespace) -> float:
    """Bits per byte of two rounds of LSH, or of as many near keys, after training goes on with them."""
    folder = args.output_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(base)
    with (hashing if kind == "lsh" else near_only)(model, 2):
        trainer = trainer_of(kind, model, args.steps // 10, args)
        train_interleaved([trainer], folder, args.slice, save_every=1)
        return score(model, validation_batches(args))


def measure(args: argparse.Namespace) -> None:
    """Measure what LSH sees of the trained model, and write the result."""
    folder = args.output_dir / "full" / "model"
    if not folder.exists():
        raise SystemExit(f"{args.output_dir} holds no trained model: use `train` first.")
    model = TerraformerForCausalLM.from_pretrained(folder).eval()
    batches = validation_batches(args)
    full = score(model, batches)
    rows = []
    for rounds in ROUNDS:
        seen, near = shares_seen(model, batches[:1], rounds)
        with hashing(model, rounds):
            by_hash = score(model, batches)
        with near_only(model, rounds):
            by_place = score(model, batches)
        rows.append({"rounds": rounds, "seen": seen, "near": near, "bits": by_hash, "bits_near": by_place})
        print(f"{rounds} rounds: {seen:.3f} of the weight, near keys {near:.3f}; bits {by_hash:.3f}, {by_place:.3f}")
    after = {kind: tuned(model, kind, args) for kind in ("lsh", "near")}
    print(
        f"After training with them, two rounds: LSH {after['lsh']:.3f}, near keys {after['near']:.3f}, all {full:.3f}"
    )
    better = after["lsh"] < after["near"]
    headline = (
        f"With two rounds LSH sees {100 * rows[1]['seen']:.0f} % of the weight of attention to all keys, as many near "
        f"keys {100 * rows[1]['near']:.0f} %; trained on with them the model has {after['lsh']:.3f} and "
        f"{after['near']:.3f} bits per byte, {full:.3f} with all keys: LSH is {'better' if better else 'no better'} "
        "than attention to neighbouring chunks here."
    )
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "length", "learning_rate", "seed")}
    found = {"headline": headline, "rows": rows, "bits": full, "tuned": after, "settings": settings, "chunk": CHUNK}
    write_result(args.result, {**found, **describe()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run lsh_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (("train", "train with attention to all keys"), ("measure", "measure LSH beside it")):
        command = commands.add_parser(name, help=help_text)
        add_training_arguments(command, length=1024, batch_size=2, eval_bytes=65_536)
        command.add_argument("--steps", type=int, default=2000)
        command.add_argument("--evaluations", type=int, default=10, help="points of the curve (%(default)s)")
        command.add_argument("--learning_rate", type=float, default=1e-3)
        command.add_argument("--output_dir", type=Path, default=Path("runs/lsh_quality"))
        command.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"train": train, "measure": measure}[args.command](args)


if __name__ == "__main__":
    main()
