"""Replay of the cases of LSH attention that trax recorded without weights."""

from typing import Any

import torch
from torch import Tensor

from hf_efficient.ops.lsh_attention import lsh_attention
from hf_efficient.ops.lsh_hashing import hash_buckets
from tests.golden.scaling_cases import Case


# Left pads at positions 0 and 1 are attended to.
NOT_WORTH_COPYING = {"left"}


def by_row(tensor: Tensor, heads: int) -> Tensor:
    """(rows times heads, ...) -> (rows, heads, ...)"""
    return tensor.unflatten(0, (-1, heads))


def factors_of(options: dict[str, Any]) -> list[int]:
    buckets = options["n_buckets"]
    return [buckets] if isinstance(buckets, int) else buckets


def form_of(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "chunk_length": options["chunk_len"],
        "chunks_before": options["n_chunks_before"],
        "chunks_after": options["n_chunks_after"],
        "causal": options["causal"],
        "layout": "original",
    }


def recorded_buckets(buckets: Tensor, options: dict[str, Any], mask: Tensor | None) -> Tensor:
    """Buckets as trax counts them: padding in one more, and rounds one after the other."""
    count = torch.tensor(factors_of(options)).prod().int()
    if mask is not None:
        buckets = buckets.masked_fill(~mask[:, None, None], int(count))
        count = count + 1
    return (buckets + count * torch.arange(buckets.shape[2])[:, None]).flatten(2).flatten(0, 1).int()


def keep_mask(keep: Tensor | None, rate: float) -> Tensor | None:
    return None if keep is None else keep / (1 - rate)


def lsh_core(case: Case) -> None:
    options, heads = case.options, case.options["n_heads"]
    query_key, value = (by_row(case.inputs[name], heads).clone().requires_grad_() for name in ("qk", "v"))
    rotations = case.inputs["rotations"]
    rotations = by_row(rotations, heads) if rotations.dim() == 4 else rotations
    buckets = hash_buckets(query_key, rotations, factors_of(options))
    for run in [name for name in case.outputs if not name.endswith("buckets")]:
        mask = case.inputs.get(f"mask_{run}")
        mask = None if mask is None else mask.bool()
        expected = case.outputs.get("buckets" if run == "y" else f"{run}_buckets")
        if expected is not None:
            assert torch.equal(recorded_buckets(buckets, options, mask), expected), f"{case.name}: buckets of {run}"
        dropout_mask = keep_mask(case.inputs.get(f"keep.{run}"), options.get("attention_dropout", 0.0))
        form = form_of(options)
        output = lsh_attention(query_key, value, buckets, mask=mask, dropout_mask=dropout_mask, **form)
        found, expected = output.flatten(0, 1), case.outputs[run]
        if run in NOT_WORTH_COPYING:
            assert not torch.allclose(found, expected, atol=1e-2)
            continue
        first = 3 if "forward_positions_0_to_2" in case.about["tolerance"] else 0
        if first:  # recorded in float32, in which trax loses digits where a token sees itself alone
            case.compare(f"{run}: first", found[:, :first], expected[:, :first], "forward_positions_0_to_2")
        case.compare(run, found[:, first:], expected[:, first:])
        if not case.group(f"{run}_grad."):
            continue
        grads = torch.autograd.grad(output, (query_key, value), by_row(case.inputs["cotangent"], heads))
        named = dict(zip(("qk", "v"), (grad.flatten(0, 1) for grad in grads), strict=True))
        case.compare_gradients(f"{run}_grad.", {}, named)
