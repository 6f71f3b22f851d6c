"""The share of units that a model in 16 bits chooses as it does in float32.

    python -m tests.helpers.equal_winners                       # a tiny model with the weights of a new one
    python -m tests.helpers.equal_winners FOLDER_OR_NAME TEXT_FILE [LENGTH]

Controllers compute in float32 whatever the dtype, so what differs is their input, and their rounded weights.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_efficient
from hf_efficient.modules.unit_usage import sparse_feed_forwards


@torch.no_grad()
def winners(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Units that each sparse layer chooses, `(tokens, blocks)`."""
    found: list[torch.Tensor] = []
    layers = sparse_feed_forwards(model).values()
    for layer in layers:
        layer.observer = lambda chosen, passes: found.append(chosen)
    try:
        model.eval()(ids, use_cache=False)
    finally:
        for layer in layers:
            layer.observer = None
    return found


def equal_winners(model, ids: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """
    Share of winners that are the same in float32 and in another dtype, layer by layer.

    Args:
        model (`PreTrainedModel`): has sparse feed-forward layers.
        ids (`Tensor` of shape `(batch, length)`): a text.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): the other one.
    """
    expected, found = (winners(copy.deepcopy(model).to(one), ids) for one in (torch.float32, dtype))
    return [(one == other).float().mean().item() for one, other in zip(found, expected, strict=True)]


def main(source: str | None = None, text: str | None = None, length: str = "512") -> None:
    if source is None or text is None:
        torch.manual_seed(0)
        fields = {"num_hidden_layers": 4, "vocab_size": 256, "hidden_size": 256, "intermediate_size": 1024}
        fields |= {"num_attention_heads": 4, "ff_sparsity": 16, "ff_rank": 16}
        fields |= {"attention_type": "multiplicative_conv", "attention_sparsity": 8}
        model = hf_efficient.ScalingTransformerForCausalLM(hf_efficient.ScalingTransformerConfig(**fields))
        ids = torch.randint(256, (4, int(length)))
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
        ids = AutoTokenizer.from_pretrained(source)(Path(text).read_text(), return_tensors="pt").input_ids
        ids = ids[:, : int(length)]
    for dtype in (torch.bfloat16, torch.float16):
        shares = equal_winners(model, ids, dtype)
        print(f"{dtype}: {sum(shares) / len(shares):.4f} in all; by layer {[round(share, 4) for share in shares]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
