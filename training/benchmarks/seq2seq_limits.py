"""
Decoding of encoder-decoders at their limits, at batch 1 on one core: very wide layers, and a very long source.

    python -m training.benchmarks run seq2seq_limits wide-bf16
    python -m training.benchmarks run seq2seq_limits wide-int8
    python -m training.benchmarks run seq2seq_limits long

`wide`: one decoder layer of Terraformer 17B (9,216 wide, 65,536 units, N 256, rank 32, S 64) in bf16 or int8, behind a
source of 16 tokens, beside one of its dense twin (40,960 units, dense attention to target and source, dense output
layer) in bf16, by our compiled code and by torch's own linear maps. A whole model's token is composed: six times the
layer, as many as the decoder of 6 + 6 layers has, and what a token takes outside the layers, the output layer above
all.

`long`: a token behind a source of 16,384 tokens with attention among tokens that are hashed alike, over that with
attention to all keys, in a Terraformer of 6 decoder layers of width 1,024 in fp32, and the size of both caches.

Weights are random, and so are the encoder's output and the keys and values of the long source. All peers of a race lie
in memory and take turns, a token each; a figure is the median of core seconds. Each race writes its part of
training/results/seq2seq_limits.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.modules.decoding import OP_NAME
from hf_efficient.modules.lsh_layers import LshAttention
from hf_efficient.modules.quantization import SparseQuantizationConfig
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.lsh_hashing import hash_buckets

from .environment import RESULTS, describe, write_result
from .timing import core_time, interleave


RESULT = RESULTS / "seq2seq_limits.json"
WIDE, WIDE_DENSE, WIDE_LAYERS, WIDE_SOURCE = "terraformer-17b", "6+6x9216-dense", 6, 16
WIDE_TINY = {"hidden_size": 1152, "num_attention_heads": 12, "intermediate_size": 2048, "vocab_size": 320}
LONG_SOURCE, LONG_LAYERS = 16_384, 6
LONG_TINY = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256, "ff_rank": 8, "vocab_size": 320}
CPU = torch.device("cpu")


def filled(config: TerraformerConfig, dtype: torch.dtype) -> TerraformerForConditionalGeneration:
    """A model without the encoder's layers, whose weights repeat a million random numbers: drawing billions of them
    takes longer than the race."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = TerraformerForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.model.encoder.layers = torch.nn.ModuleList()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.tie_weights()
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        for part in tensor.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    return model


class Decoder:
    """
    A model, and the cache of a text that grows by a token a run, with the seconds that its layers took.

    Args:
        model (`TerraformerForConditionalGeneration`): any.
        source (`int`): tokens of the source.
        backend (`str`, defaults to `"auto"`): `"reference"` runs layers as they are written.
    """

    def __init__(self, model: TerraformerForConditionalGeneration, source: int, backend: str = "auto"):
        self.model: Any = model
        self.backend = backend
        config = model.config
        numbers = torch.Generator().manual_seed(1)
        streams = [torch.randn(1, source, config.hidden_size, generator=numbers).to(model.dtype) for _ in range(2)]
        self.encoded = dict(zip(("last_hidden_state", "second_stream"), streams, strict=True))
        self.cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self.token = torch.zeros(1, 1, dtype=torch.long)
        self.of_layers: list[float] = []

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits of the next token."""
        decoder = self.model.model.decoder
        stack, layers, seconds = decoder.decoder, type(decoder)._run_layers.__get__(decoder), []

        def timed(run: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                start = core_time(CPU)
                found = run(*arguments, **options)
                seconds.append(core_time(CPU) - start)
                return found

            return call

        decoder.__dict__ |= {"decoder": timed(stack), "_run_layers": timed(layers)}
        try:
            with use_backend(self.backend):
                logits = self.model(decoder_input_ids=self.token, encoder_outputs=self.encoded, cache=self.cache).logits
        finally:
            decoder.__dict__["decoder"] = stack
            del decoder.__dict__["_run_layers"]
        self.of_layers.append(sum(seconds))
        return logits

    def cache_bytes(self) -> int:
        """Count the bytes of keys and values, of source and target."""
        parts: Any = (self.cache.cross_attention_cache, self.cache.self_attention_cache)
        return sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)


@torch.no_grad()
def fill_source(decoder: Decoder, source: int) -> None:
    """Let the cache hold a source of random keys and values, instead of reading one of that length."""
    decoder.step()
    numbers = torch.Generator().manual_seed(2)
    held: Any = decoder.cache.cross_attention_cache.layers
    for layer in decoder.model.model.decoder.layers:
        for attention in (half.attention for half in layer.attentions):
            of_layer = held[attention.layer_idx]
            heads, size = of_layer.values.shape[1], of_layer.values.shape[3]
            keys, of_layer.values = torch.randn(2, 1, heads, source, size, generator=numbers).unbind()
            of_layer.keys = keys
            if isinstance(attention, LshAttention):
                buckets = hash_buckets(keys, attention._rotations(keys.device), attention.factors)
                digits = attention.digits(attention.eval_rounds)
                of_layer.keys = digits.write(keys, buckets, torch.ones(1), None)


def race(decoders: dict[str, Decoder], repeats: int, title: str) -> list[dict[str, Any]]:
    """Let decoders take turns; the seconds of each one's token and of the layers in it."""
    seconds = interleave({name: one.step for name, one in decoders.items()}, repeats, CPU, title, warmup=4)
    entries = []
    for name, one in decoders.items():
        one.step()
        found: dict[str, Any] = {"name": name, "backend": last_backend(OP_NAME), "cache_bytes": one.cache_bytes()}
        found |= {"seconds": statistics.median(seconds[name]), "repetitions": seconds[name]}
        entries.append({**found, "of_layers": statistics.median(one.of_layers[4:-1])})
    return entries


def wide(form: str, repeats: int, tiny: bool) -> dict[str, Any]:
    """One layer of the wide form, in `bf16` or `int8`, beside its dense twin, and whole tokens composed of them."""
    fields = {"num_encoder_layers": 1, "num_decoder_layers": 1, **(WIDE_TINY if tiny else {})}
    sparse = filled(TerraformerConfig.preset(WIDE, **fields), torch.bfloat16)
    if form == "int8":  # its floats are gone before the dense model needs room
        sparse.quantize_layers(SparseQuantizationConfig("int8"))
    dense = filled(TerraformerConfig.preset(WIDE_DENSE, **fields), torch.bfloat16)
    decoders = {
        "dense bf16": Decoder(dense, WIDE_SOURCE),
        "dense bf16 in torch": Decoder(dense, WIDE_SOURCE, "reference"),
        f"sparse {form}": Decoder(sparse, WIDE_SOURCE),
    }
    ours, rival, _ = entries = race(decoders, repeats, f"17B {form}")
    for entry in entries:
        entry["rest"] = entry["seconds"] - entry["of_layers"]
        entry["composed"] = WIDE_LAYERS * entry["of_layers"] + entry["rest"]
    columns = ["layer", "ms", "ms outside the layers", "ms a token of 6 + 6 layers", "times faster than in torch"]
    rows, summary = [], []
    for entry in entries:
        times = rival["composed"] / entry["composed"]
        milliseconds = [1000 * entry[name] for name in ("of_layers", "rest", "composed")]
        rows.append([entry["name"], *(f"{value:.2f}" for value in milliseconds), f"{times:.1f}"])
        if entry["name"].startswith("sparse"):
            name = f"17B, {entry['name']}"
            summary += [
                {"name": f"{name}, against dense bf16 in torch", "value": times,
                 "unit": "times", "goal": "at least 37"},
                {"name": f"{name}, against dense bf16", "value": ours["composed"] / entry["composed"],
                 "unit": "times", "goal": None},
                {"name": f"{name}, a token", "value": 1000 * entry["composed"], "unit": "ms", "goal": "below 100"},
            ]  # fmt: skip
    return {"table": {"columns": columns, "rows": rows}, "summary": summary, "entries": entries}


def long(repeats: int, tiny: bool) -> dict[str, Any]:
    """A token behind a long source, by attention to all keys and to those that are hashed alike."""
    source = 512 if tiny else LONG_SOURCE
    fields: dict[str, Any] = {"num_encoder_layers": 1, "num_decoder_layers": LONG_LAYERS}
    fields |= {"max_position_embeddings": source, **(LONG_TINY if tiny else {})}
    if tiny:
        fields |= {"num_decoder_layers": 1, "lsh_chunk_length": 16}
    decoders = {}
    for name, kind in (("all keys", "none"), ("LSH", "lsh")):
        config = TerraformerConfig.preset("terraformer-medium", decoder_long_attention=kind, **fields)
        decoders[name] = Decoder(filled(config, torch.float32), 1)
        fill_source(decoders[name], source)
    full, hashed = entries = race(decoders, repeats, f"{source} tokens")
    ratio = hashed["seconds"] / full["seconds"]
    columns = ["attention", "ms a token", "of that to all keys", "MB of the cache"]
    rows = [
        [entry["name"], f"{1000 * entry['seconds']:.1f}", f"{entry['seconds'] / full['seconds']:.2f}",
         f"{entry['cache_bytes'] / 1e6:,.0f}"]
        for entry in entries
    ]  # fmt: skip
    name = f"LSH over attention to all keys, a source of {source:,} tokens"
    summary = [{"name": name, "value": ratio, "unit": "times the time", "goal": "at most 0.4"}]
    return {"table": {"columns": columns, "rows": rows}, "summary": summary, "entries": entries}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run seq2seq_limits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("race", choices=("wide-bf16", "wide-int8", "long"))
    parser.add_argument("--repeats", type=int, default=15, help="tokens of each peer (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.race == "long":
        found = {**long(args.repeats, args.tiny), **describe()}
    else:
        found = {**wide(args.race.removeprefix("wide-"), args.repeats, args.tiny), **describe()}
    print(" | ".join(found["table"]["columns"]))
    for row in found["table"]["rows"]:
        print(" | ".join(row))
    races = json.loads(args.result.read_text())["races"] if args.result.exists() else {}
    races |= {args.race: found}
    summary = [figure for one in races.values() for figure in one["summary"]]
    write_result(args.result, {"summary": summary, "races": races, **describe()})


if __name__ == "__main__":
    main()
