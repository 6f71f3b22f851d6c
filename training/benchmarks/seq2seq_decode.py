"""
Decoding of encoder-decoders at batch 1 on one core, in fp32: the sparse ones of the article beside their dense twin.

    python -m training.benchmarks run seq2seq_decode
    python -m training.benchmarks run seq2seq_decode --repeats 5

24 decoder layers of width 1,024 with random weights, and one encoder layer, which decoding does not run; all models lie
in memory and take turns, a token each. A figure is the median of the core seconds of a token
behind a source of 16 tokens. Bytes are those of weights that a token reads, without keys and values. Writes
training/results/seq2seq_decode.json.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.modules.decoding import OP_NAME
from hf_efficient.ops.backend import last_backend

from .decoding.counting import own_bytes
from .environment import RESULTS, describe, write_result
from .timing import core_time, interleave, medians


RESULT = RESULTS / "seq2seq_decode.json"
DENSE = "24+24x1024-dense"
# Presets, and how many times faster than the dense twin each is to be.
MODELS = {DENSE: None, "24+24x1024-all": 3.0, "24+24x1024-all-cross": 6.0, "terraformer-medium": 6.0}
SOURCE, READ_BYTES = 16, 1 << 28


class Decoder:
    """
    A model of random weights, and the cache of a text that grows by a token a run.

    Args:
        preset (`str`): of [`TerraformerConfig`].
        fields (`Any`): of the config, in the place of the preset's.
    """

    def __init__(self, preset: str, **fields: Any):
        torch.manual_seed(0)
        config = TerraformerConfig.preset(preset, num_encoder_layers=1, **fields)
        self.model = TerraformerForConditionalGeneration(config).eval().requires_grad_(False)
        self.encoded = self.model.model.encoder(torch.randint(1, config.vocab_size, (1, SOURCE)))
        self.cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self.token = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits of the next token."""
        model: Any = self.model
        return model(decoder_input_ids=self.token, encoder_outputs=self.encoded, cache=self.cache).logits

    def bytes_read(self) -> int:
        """Count the bytes of weights that a token reads: those of the decoder and the output layer, without maps of the
        source, which the first token read, and one row of the embeddings."""
        total = 0
        for name, module in self.model.named_modules():
            of_source = "cross_attention.k_proj" in name or "cross_attention.v_proj" in name
            is_table = name == "model.encoder.embed_tokens"
            if is_table or (name.startswith(("model.decoder", "lm_head")) and not of_source):
                total += own_bytes(module)
        return total


def read_bandwidth(repeats: int) -> float:
    """Measure the bytes that a core reads from memory in a second."""
    numbers = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(repeats):
        start = core_time(torch.device("cpu"))
        numbers.sum()
        seconds.append(core_time(torch.device("cpu")) - start)
    return READ_BYTES / statistics.median(seconds)


def measure(repeats: int, **fields: Any) -> list[dict[str, Any]]:
    """Let all models take turns, some tokens each; return what each takes."""
    decoders = {name: Decoder(name, **fields) for name in MODELS}
    bandwidth = read_bandwidth(repeats)
    steps = {name: decoder.step for name, decoder in decoders.items()}
    runs = interleave(steps, repeats, torch.device("cpu"), "tokens", warmup=4)
    seconds = medians(runs)
    entries = []
    for name, decoder in decoders.items():
        decoder.step()
        total = decoder.bytes_read()
        entries.append(
            {
                "model": name,
                "backend": last_backend(OP_NAME),
                "seconds": seconds[name],
                "repetitions": runs[name],
                "bytes": total,
                "share_of_bandwidth": total / seconds[name] / bandwidth,
                "times_faster": seconds[DENSE] / seconds[name],
                "goal": MODELS[name],
            }
        )
    return entries


def report(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the table for pages, and the figures that have goals."""
    dense = entries[0]
    rows = [
        [
            entry["model"],
            f"{entry['bytes'] / 1e6:,.0f}",
            f"{dense['bytes'] / entry['bytes']:.1f}",
            f"{1000 * entry['seconds']:.1f}",
            f"{entry['share_of_bandwidth']:.2f}",
            f"{entry['times_faster']:.1f}",
        ]
        for entry in entries
    ]
    columns = ["model", "MB a token", "times fewer", "ms a token", "of the read bandwidth", "times faster"]
    summary = [
        {"name": f"{entry['model']} against its dense twin", "value": entry["times_faster"], "unit": "times",
         "goal": f"at least {entry['goal']:g}"}
        for entry in entries
        if entry["goal"] is not None
    ]  # fmt: skip
    return {"table": {"columns": columns, "rows": rows}, "summary": summary, "entries": entries}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run seq2seq_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=30, help="tokens of each model (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = report(measure(args.repeats))
    print(" | ".join(found["table"]["columns"]))
    for row in found["table"]["rows"]:
        print(" | ".join(row))
    write_result(args.result, {**found, **describe()})


if __name__ == "__main__":
    main()
