"""
Units that a sparse Scaling Transformer chooses in 16 bits as in float32, and in decoding as in one forward pass.

    python -m training.benchmarks.equal_winners --text enwiki.xml.xz

Takes the sparsest model of `sparse_quality`, of 5 M parameters, as it begins and after some steps of training in
float32, and counts on validation text the winners that are the same, layer by layer. Controllers compute in float32
whatever the dtype: what differs are rounded weights and the rounded input. Writes training/results/equal_winners.json.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_efficient.modules.unit_usage import sparse_feed_forwards
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.sparse_ff import OP_NAME
from hf_efficient.utils.cache_naming import cache_kwarg

from .environment import RESULTS, describe, write_result
from .lm_comparison import read_bytes, split
from .sparse_quality import TITLES, build


RESULT = RESULTS / "equal_winners.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KIND = "all"


@contextmanager
def watched_winners(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect the winners of each sparse feed-forward layer of a model, call by call, inside the `with` block."""
    layers = list(sparse_feed_forwards(model).values())
    found: list[list[Tensor]] = [[] for _ in layers]
    for layer, calls in zip(layers, found, strict=True):
        layer.observer = lambda chosen, passes, calls=calls: calls.append(chosen)
    try:
        yield found
    finally:
        for layer in layers:
            layer.observer = None


@torch.no_grad()
def winners(model: Any, ids: Tensor, decode: bool = False) -> list[Tensor]:
    """
    Choose units for a text, by one forward pass or token by token.

    Args:
        model (`PreTrainedModel`): a language model with sparse feed-forward layers; put into evaluation mode.
        ids (`Tensor` of shape `(batch, length)`): the text.
        decode (`bool`, defaults to `False`): feed each row by itself, one token at a time, with a cache.

    Returns:
        `list[Tensor]`: of each layer, `(batch * length, blocks)`.
    """
    model.eval()
    with watched_winners(model) as found:
        if not decode:
            model(ids, use_cache=False)
        for row in ids if decode else ():
            cache = None
            for token in row:
                cache = model(token.view(1, 1), use_cache=True, **cache_kwarg(cache)).cache
    return [torch.cat(calls) for calls in found]


def share_of_equal(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Share of winners that are the same, layer by layer."""
    return [(one == other).double().mean().item() for one, other in zip(found, expected, strict=True)]


def equal_winners(model: nn.Module, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """
    Share of winners that are the same in float32 and in another dtype, layer by layer.

    Args:
        model (`PreTrainedModel`): see [`winners`]; it is left as it is.
        ids (`Tensor` of shape `(batch, length)`): a text.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): the other one.
    """
    found, expected = (winners(copy.deepcopy(model).to(one), ids) for one in (dtype, torch.float32))
    return share_of_equal(found, expected)


def compare(model: nn.Module, ids: Tensor) -> dict[str, list[float]]:
    """Compare dtypes, decoding and, where there is a kernel, backends; shares by layer."""
    models = {name: copy.deepcopy(model).to(dtype) for name, dtype in DTYPES.items()}
    forward = {name: winners(one, ids) for name, one in models.items()}
    shares = {f"{name} / float32": share_of_equal(forward[name], forward["float32"]) for name in list(DTYPES)[1:]}
    if last_backend(OP_NAME) != "reference":
        with use_backend("reference"):
            in_torch = winners(models["float32"], ids)
        shares["kernel / plain torch, float32"] = share_of_equal(forward["float32"], in_torch)
    for name, one in models.items():
        shares[f"decode / forward, {name}"] = share_of_equal(winners(one, ids, decode=True), forward[name])
    return shares


def train(model: nn.Module, data: np.ndarray, args: argparse.Namespace) -> float:
    """Train a model on random segments; return bits per byte of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.1)
    draw, losses = np.random.default_rng(args.seed), []
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 20)
        starts = draw.integers(len(data) - args.length, size=args.batch_size)
        rows = torch.from_numpy(np.stack([data[start : start + args.length] for start in starts])).long()
        loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / np.log(2))
    return float(np.mean(losses[-max(1, args.steps // 10) :]))


def summary_of(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """List what was measured with its goal, for cards."""
    return [
        {
            "name": f"equal winners, {pair}, {state}",
            "value": float(np.mean(shares)),
            "unit": f"of all; {min(shares):.4f} in the layer with fewest",
            "goal": None if "16" in pair else "1",
        }
        for state, pairs in found.items()
        for pair, shares in pairs.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.equal_winners",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="bytes to train on and choose for, or an .xz of them")
    parser.add_argument("--steps", type=int, default=200, help="of training (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="of training (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes in a row (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="of validation text (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of AdamW (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data, validation = split(read_bytes(args.text))
    ids = torch.from_numpy(validation[: args.rows * args.length].copy()).long().view(args.rows, args.length)
    model = build(KIND, args.length)
    found = {"new": compare(model, ids)}
    bits = train(model, data, args)
    found[f"after {args.steps} steps"] = compare(model, ids)
    rows = summary_of(found)
    write_result(
        args.result,
        {
            "summary": rows,
            "model": {"kind": TITLES[KIND], "parameters": model.num_parameters(), "bits_per_byte": bits},
            "tokens": ids.numel(),
            "backend": last_backend(OP_NAME),
            "shares_by_layer": found,
            **describe(),
        },
    )
    print(f"{model.num_parameters():,} parameters, {bits:.2f} bits per byte when trained")
    for row in rows:
        print(f"{row['name']:60} {row['value']:.4f} {row['unit']}")


if __name__ == "__main__":
    main()
