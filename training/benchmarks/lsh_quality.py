"""
Keys that attention by hashing (LSH) sees, of those that attention to all keys weighs, and the quality that it costs.

    python -m training.benchmarks run lsh_quality train --text enwiki.xml.xz
    python -m training.benchmarks run lsh_quality measure --text enwiki.xml.xz

`train` trains a language model of one stack (Terraformer without an encoder, 4 layers, 256 wide, bytes) with attention
to all keys, in which queries are keys as LSH has them. `measure` takes that model and, with 1, 2, 4 and 8 rounds of
hashing, gives the share of its attention's weight that lies on the keys that LSH sees, and its bits per byte with LSH;
then the same with two rounds after training goes on with LSH for a tenth of the steps. Beside each stands attention to
as many neighbours, the own chunk and those before it, which needs no hashing. A text's chunks depend on the tokens that
follow, so that a token which is decoded sees other keys than in a pass over the whole text: `measure` says how far both
are apart. Writes training/results/lsh_quality.json. Killed, the same command goes on.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_efficient import TerraformerConfig, TerraformerForCausalLM
from hf_efficient.modules.lsh_layers import LshAttention
from hf_efficient.utils.cache_naming import cache_kwarg

from .environment import RESULTS, describe, write_result
from .equal_time import train_interleaved
from .lm_comparison import TimedLanguageModelTrainer, add_training_arguments, bits, eval_batches, read_bytes, split
from .sparse_quality import train_config
from .sparsify_quality import score


RESULT = RESULTS / "lsh_quality.json"
ROUNDS = (1, 2, 4, 8)
CHUNK = 32
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_decoder_layers": 4}
DECODED = 256  # last tokens of a text that are decoded one by one


def build(length: int) -> TerraformerForCausalLM:
    """Build a model whose texts are short, so that it attends to all keys until it is told otherwise."""
    return TerraformerForCausalLM(
        TerraformerConfig(
            vocab_size=256,
            is_encoder_decoder=False,
            num_encoder_layers=0,
            attentions_per_layer=1,
            max_position_embeddings=length,
            position_init_scale=0.1,
            dropout=0.0,
            activation_dropout=0.0,
            decoder_long_attention="mixed",
            lsh_full_length=length,
            lsh_chunk_length=CHUNK,
            lsh_rounds=2,
            pad_token_id=None,
            eos_token_id=None,
            **SIZES,
        )
    )


def attentions(model: Any) -> list[LshAttention]:
    return [module for module in model.modules() if isinstance(module, LshAttention)]


@contextmanager
def hashing(model: Any) -> Iterator[None]:
    """Let a model attend by LSH, in as many rounds as its config says, inside the `with` block."""
    before = [one.full_length for one in attentions(model)]
    for one in attentions(model):
        one.full_length = 0
    yield
    for one, length in zip(attentions(model), before, strict=True):
        one.full_length = length


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
            with hashing(model):
                measure(one, query_key, query_key.shape[2])
            return alone(query_key, *args, **kwargs)

        one.attend_alone = watched  # type: ignore[method-assign]
        handles.append(one)
    for batch in batches:
        model(batch["input_ids"], use_cache=False)
    for one in handles:
        del one.attend_alone
    return found / count, near / count


@torch.no_grad()
def distance_of_decoding(model: Any, texts: Tensor, decoded: int) -> dict[str, float]:
    """
    Measure how far decoding token by token is from one forward pass over the same text.

    Args:
        model (`PreTrainedModel`): a causal LM, in evaluation.
        texts (`torch.LongTensor` of shape `(texts, tokens)`): ids.
        decoded (`int`): last tokens of a text that are predicted one by one; those before them are read in one call.

    Returns:
        `dict[str, float]`: of the decoded tokens the `divergence` of the distributions, from the forward pass's to
        decoding's in bits, the share whose likeliest next token `differs`, and the bits a token of both, `bits_forward`
        and `bits_decode`.
    """
    ids, labels = texts[:, :-1], texts[:, -decoded:]
    forward = model(ids, use_cache=False).logits[:, -decoded:].log_softmax(-1)
    cache = cache_kwarg(DynamicCache(config=model.config))
    model(ids[:, :-decoded], **cache, use_cache=True)
    steps = [model(token, **cache, use_cache=True).logits for token in ids[:, -decoded:].split(1, 1)]
    decode = torch.cat(steps, 1).log_softmax(-1)
    per_token = {
        "divergence": torch.nn.functional.kl_div(decode, forward, reduction="none", log_target=True).sum(-1).mean(),
        "bits_forward": -forward.gather(-1, labels[..., None]).mean(),
        "bits_decode": -decode.gather(-1, labels[..., None]).mean(),
    }
    differs = (forward.argmax(-1) != decode.argmax(-1)).float().mean()
    return {name: bits(float(value)) for name, value in per_token.items()} | {"differs": float(differs)}


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
    with hashing(model) if kind == "lsh" else near_only(model, 2):
        trainer = trainer_of(kind, model, args.steps // 10, args)
        train_interleaved([trainer], folder, args.slice, save_every=1)
        return score(model, validation_batches(args))


def measure_rounds(folder: Path, batches: list[dict], rounds: int) -> dict[str, Any]:
    """Measure what the trained model sees and loses with so many rounds of LSH, and with as many near keys."""
    model = TerraformerForCausalLM.from_pretrained(folder, lsh_eval_rounds=rounds).eval()
    seen, near = shares_seen(model, batches[:1], rounds)
    with hashing(model):
        by_hash = score(model, batches)
        decoding = distance_of_decoding(model, batches[0]["input_ids"], DECODED)
    with near_only(model, rounds):
        by_place = score(model, batches)
    print(
        f"{rounds} rounds: {seen:.3f} of the weight, near keys {near:.3f}; bits {by_hash:.3f}, {by_place:.3f}; "
        f"decoding {decoding['bits_decode']:.3f}, a forward pass over the same tokens {decoding['bits_forward']:.3f}"
    )
    return {"rounds": rounds, "seen": seen, "near": near, "bits": by_hash, "bits_near": by_place, "decoding": decoding}


def table_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the pages for each number of rounds."""
    shown = []
    for row in rows:
        shares = [f"{100 * row[name]:.0f}%" for name in ("seen", "near")]
        decoding = row["decoding"]
        found = (row["bits"], row["bits_near"], decoding["bits_forward"], decoding["bits_decode"])
        shown.append([row["rounds"], *shares, *(f"{value:.3f}" for value in found)])
    names = [
        "rounds",
        "weight seen",
        "by near keys",
        "bits per byte",
        "by near keys",
        "last bytes",
        "last bytes, decoded",
    ]
    return {"columns": names, "rows": shown}


def headline_of(rows: list[dict[str, Any]], full: float, tuned_bits: dict[str, float]) -> str:
    """The result in sentences, of two rounds."""
    two = next(row for row in rows if row["rounds"] == 2)
    better = "better" if tuned_bits["lsh"] < tuned_bits["near"] else "no better"
    decoding, lost, lost_near = two["decoding"], two["bits"] - full, two["bits_near"] - full
    return (
        f"With two rounds LSH sees {100 * two['seen']:.0f}% of the weight of attention to all keys, as many near keys "
        f"{100 * two['near']:.0f}%. Used at once they cost {lost:.3f} and {lost_near:.3f} bits per byte over "
        f"{full:.3f} with all keys; trained on with them the model has {tuned_bits['lsh']:.3f} and "
        f"{tuned_bits['near']:.3f}: LSH is {better} than attention to neighbouring chunks here. Decoded token by "
        f"token, the last {DECODED} bytes of a text take {decoding['bits_decode']:.3f} bits each where one forward "
        "pass with LSH gives "
        f"{decoding['bits_forward']:.3f} (divergence {decoding['divergence']:.4f} bits, another likeliest byte in "
        f"{100 * decoding['differs']:.1f}%)."
    )


def measure(args: argparse.Namespace) -> None:
    """Measure what LSH sees of the trained model, and write the result."""
    folder = args.output_dir / "full" / "model"
    if not folder.exists():
        raise SystemExit(f"{args.output_dir} holds no trained model: use `train` first.")
    model = TerraformerForCausalLM.from_pretrained(folder).eval()
    batches = validation_batches(args)
    full = score(model, batches)
    exact = distance_of_decoding(model, batches[0]["input_ids"], DECODED)
    rows = [measure_rounds(folder, batches, rounds) for rounds in ROUNDS]
    after = {kind: tuned(model, kind, args) for kind in ("lsh", "near")}
    print(
        f"After training with them, two rounds: LSH {after['lsh']:.3f}, near keys {after['near']:.3f}, all {full:.3f}"
    )
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "length", "learning_rate", "seed")}
    pages = {"headline": headline_of(rows, full, after), "table": table_of(rows)}
    found = {"rows": rows, "bits": full, "decoding_with_all_keys": exact, "tuned": after}
    write_result(args.result, {**pages, **found, "settings": settings, "chunk": CHUNK, **describe()})


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
