"""
Memory and time of a training step of Terraformer on long input, on one core: reversible layers beside gradient
checkpointing, and attention by hashing (LSH) beside attention to all keys.

    python -m training.benchmarks run long_input
    python -m training.benchmarks run long_input --cases depth --repeats 1

Each case runs in a fresh process. `depth`: what the forward pass keeps of 4 and 24 decoder layers at 2,048 tokens.
`layers`: the peak of 6, 12 and 24 layers each in encoder and decoder. `length`: peak and time at 4,096 and 16,384
tokens, 6 + 6 layers. All models are 512 wide, with sparse feed-forward and attention maps, and read random tokens; the
loss is computed in pieces, so that logits are no part of what is compared, and gradients of parameters exist before.
Attention to all keys drops none of its weights: where some are dropped, torch holds those of all pairs (above 15 GB at
16,384 tokens), and it does without them otherwise, which makes the stronger opponent. Writes
training/results/long_input.json.
"""

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration

from .decoding.worker import resident_bytes
from .environment import RESULTS, describe, write_result
from .timing import core_time, in_fresh_processes, peak_growth


RESULT = RESULTS / "long_input.json"
WIDTH, VOCABULARY, TARGET, PIECE = 512, 8192, 128, 64
FORMS = ("reversible", "checkpointed", "ordinary")
FIGURES = ("seconds", "kept_bytes", "peak_bytes")


class Case(NamedTuple):
    """
    A step that is measured.

    Args:
        form (`str`): one of `FORMS`.
        attention (`str`): `"lsh"` or `"full"`.
        layers (`int`): of the encoder, and of the decoder.
        tokens (`int`): of the source.
    """

    form: str
    attention: str
    layers: int
    tokens: int


CASES = {
    "depth": [Case(form, "lsh", layers, 2048) for form in FORMS for layers in (4, 24)],
    "layers": [Case(form, "lsh", layers, 8192) for form in FORMS[:2] for layers in (6, 12, 24)],
    "length": [
        *(Case("reversible", "lsh", 6, tokens) for tokens in (4096, 16384)),
        Case("checkpointed", "lsh", 6, 16384),
        Case("reversible", "full", 6, 16384),
        Case("checkpointed", "full", 6, 16384),
    ],
}


def build(case: Case) -> TerraformerForConditionalGeneration:
    """Make a model of random weights whose gradients exist."""
    torch.manual_seed(0)
    config = TerraformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=8,
        num_encoder_layers=case.layers,
        num_decoder_layers=case.layers,
        attentions_per_layer=1,
        max_position_embeddings=max(case.tokens, 64),
        ff_sparsity=64,
        ff_rank=32,
        attention_type="multiplicative_conv",
        attention_sparsity=8,
        lm_head_type="multiplicative",
        loss_sparsity=4,
        encoder_long_attention="lsh" if case.attention == "lsh" else "none",
        decoder_long_attention="lsh" if case.attention == "lsh" else "none",
        lsh_chunk_length=128,
        attention_dropout=None if case.attention == "lsh" else 0.0,
        reversible=case.form == "reversible",
    )
    model = TerraformerForConditionalGeneration(config).train()
    if case.form == "checkpointed":
        model.config.use_cache = False
        # The newer of its names, where transformers has it.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def loss_in_pieces(head: nn.Module, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a target, whose logits exist for a few tokens at a time."""

    def of_piece(hidden: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(hidden).flatten(0, 1), target.flatten(), reduction="sum")

    pieces = zip(hidden_states.split(PIECE, 1), labels.split(PIECE, 1), strict=True)
    return sum(checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces) / labels.numel()


def measure_process(*case: Any) -> dict[str, float]:
    """Measure core seconds, what the forward pass keeps and the peak, in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    model = build(Case(*case))
    source = torch.randint(2, VOCABULARY, (1, Case(*case).tokens))
    target = torch.randint(2, VOCABULARY, (1, TARGET))
    found: dict[str, float] = {}

    def step(source: Tensor) -> None:
        inputs = model.prepare_decoder_input_ids_from_labels(target)
        before, start = resident_bytes(), core_time(torch.device("cpu"))
        hidden = model.model(source, decoder_input_ids=inputs, use_cache=False).last_hidden_state
        loss = loss_in_pieces(model.lm_head, hidden, target)
        gc.collect()
        found["kept_bytes"] = resident_bytes() - before
        loss.backward()
        found["seconds"] = core_time(torch.device("cpu")) - start

    step(source[:, :256])  # what is loaded and allocated on first use is no part of it
    found["peak_bytes"] = peak_growth(lambda: step(source))
    return found


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Measure a case in so many processes; without figures if one was killed, since its memory does not suffice."""
    try:
        runs = in_fresh_processes(measure_process, tuple(case), repeats)
    except ChildProcessError:
        return {**case._asdict(), **dict.fromkeys(FIGURES, None)}
    figures = {name: [run[name] for run in runs] for name in FIGURES}
    return {**case._asdict(), **figures}


def _of(entries: list[dict[str, Any]], name: str, **wanted: Any) -> float | None:
    for entry in entries:
        if all(entry[key] == value for key, value in wanted.items()) and entry[name] is not None:
            return statistics.median(entry[name])
    return None


def goals(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that have goals, of those that were measured."""
    found = []

    def add(name: str, value: float | None, unit: str, goal: str) -> None:
        if value is not None:
            found.append({"name": name, "value": value, "unit": unit, "goal": goal})

    def ratio(first: float | None, second: float | None) -> float | None:
        return None if first is None or not second else first / second

    kept = [_of(entries, "kept_bytes", form="reversible", layers=layers, tokens=2048) for layers in (24, 4)]
    add("kept by the forward pass, 24 layers over 4", ratio(*kept), "times", "at most 1.3")
    slopes = []
    for form in FORMS[:2]:
        few, many = (_of(entries, "peak_bytes", form=form, layers=layers, tokens=8192) for layers in (6, 24))
        slopes.append(None if few is None or many is None else (many - few) / 18)
    add("growth of the peak a layer, over checkpointing's", ratio(*slopes), "times", "at most 0.25")
    at = {"form": "reversible", "attention": "lsh", "layers": 6}
    peak = _of(entries, "peak_bytes", **at, tokens=16384)
    add("peak at 16,384 tokens", None if peak is None else peak / 1e9, "GB", "at most 8")
    times = [_of(entries, "seconds", **at, tokens=tokens) for tokens in (16384, 4096)]
    add("time of 16,384 tokens over that of 4,096", ratio(*times), "times", "below 5.2")
    return found


def report(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the table for pages, and the figures that have goals."""
    rows = []
    for entry in entries:
        sizes = [f"{entry['layers']} + {entry['layers']}", f"{entry['tokens']:,}"]
        told = ["-", "out of memory", "-"]
        if entry["seconds"] is not None:
            seconds, kept, peak = (statistics.median(entry[name]) for name in FIGURES)
            told = [f"{kept / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{seconds:.1f}"]
        rows.append([entry["form"], entry["attention"], *sizes, *told])
    columns = ["layers run", "attention", "layers", "source tokens", "MB kept", "MB at the peak", "core seconds"]
    return {"table": {"columns": columns, "rows": rows}, "summary": goals(entries), "entries": entries}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run long_input",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes a case (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    entries: list[dict[str, Any]] = []
    for name in args.cases:
        for case in CASES[name]:
            entries.append(measure(case, args.repeats))
            found = report(entries)
            row = zip(found["table"]["columns"], found["table"]["rows"][-1], strict=True)
            print(", ".join(f"{column} {value}" for column, value in row))
            write_result(args.result, {**found, **describe()})  # a long run that is stopped keeps what it has
    for row in report(entries)["summary"]:
        print(f"{row['name']}: {row['value']:.3g} {row['unit']} ({row['goal']})")


if __name__ == "__main__":
    main()
