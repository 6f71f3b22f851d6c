"""Program of test_generation_memory: many calls of `generate` in a fresh process, and how far its memory grows."""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch

from hf_efficient import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    SparseQuantizationConfig,
    SruppConfig,
    SruppForCausalLM,
)


SIZES = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SPARSE = {
    "intermediate_size": 128,
    "ff_sparsity": 8,
    "ff_rank": 4,
    "attention_type": "multiplicative_conv",
    "attention_sparsity": 8,
    "lm_head_type": "multiplicative",
    "loss_sparsity": 4,
}


def quantized(config: ScalingTransformerConfig, weights: str) -> ScalingTransformerForCausalLM:
    """Build a model whose weights are quantised on loading."""
    with tempfile.TemporaryDirectory() as folder:
        ScalingTransformerForCausalLM(config).save_pretrained(folder)
        options = {"quantization_config": SparseQuantizationConfig(weights)}
        return ScalingTransformerForCausalLM.from_pretrained(folder, **options)


def make_models():
    """Build a tiny model of each kind that decodes in a way of its own."""
    torch.manual_seed(0)
    dense, sparse = ScalingTransformerConfig(**SIZES), ScalingTransformerConfig(**SIZES, **SPARSE)
    return {
        "dense": ScalingTransformerForCausalLM(dense),
        "sparse": ScalingTransformerForCausalLM(sparse),
        "sparse-bf16": ScalingTransformerForCausalLM(sparse).bfloat16(),
        "sparse-int8": quantized(sparse, "int8"),
        "dense-int4": quantized(dense, "int4"),
        "srupp": SruppForCausalLM(SruppConfig(**SIZES, projection_size=16)),
    }


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


# After as many calls each length has met each number of rows and each end, and libraries have what they keep by shape.
ROUND = 7 * 2 * 3


def generate(model, calls: int) -> None:
    """Call `generate` with prompts of several lengths, one row or two, one of them padded, and several ends."""
    for call in range(calls):
        length, rows = 1 + call % 7, 1 + call % 2
        ids = torch.full((rows, length), call % SIZES["vocab_size"])
        mask = torch.ones_like(ids)
        if rows == 2 and length > 1:
            mask[1, 0] = 0
        model.generate(ids, attention_mask=mask, max_new_tokens=2 + call % 3, do_sample=call % 5 == 0)


def main() -> None:
    """Print as JSON, by kind, the bytes and the tensors that came to stay after a first round of calls."""
    calls, found = int(sys.argv[1]), {}
    for name, model in make_models().items():
        model.eval().generation_config.pad_token_id = 0
        generate(model, ROUND)
        before, tensors = resident_bytes(), live_tensors()
        generate(model, calls)
        found[name] = {"bytes": resident_bytes() - before, "tensors": live_tensors() - tensors}
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
