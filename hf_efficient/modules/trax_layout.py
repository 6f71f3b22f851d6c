"""Names and layouts of the weights of sparse layers in the authors' library (trax), and here.

A weight of trax is called a leaf. Rules say for each leaf of a part what it is called here, and how its values are laid
out there and here; a family puts them together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def _reordered(*dims: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A permutation of dimensions, and its inverse."""
    inverse = [dims.index(dim) for dim in range(len(dims))]
    return lambda tensor: tensor.permute(dims).contiguous(), lambda tensor: tensor.permute(inverse).contiguous()


def _gates_reversed(tensor: Tensor) -> Tensor:
    """The original's order is output gate, forget gate, candidate; ours begins with the candidate. Its own inverse."""
    return torch.cat(tensor.chunk(3)[::-1])


class Rule(NamedTuple):
    """Name of a leaf of a part here, and the layout of its values, there and back."""

    original: str
    ours: str
    convert: Callable[[Tensor], Tensor] = _same
    restore: Callable[[Tensor], Tensor] = _same


def dense_rules(original: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{original}.kernel", f"{ours}.weight", _transposed, _transposed),
        Rule(f"{original}.bias", f"{ours}.bias"),
    ]


def multiplicative_rules(original: str, ours: str) -> list[Rule]:
    names = {"gating": "gating", "projection": "projection", "module_kernel": "kernel", "bias": "bias"}
    return [Rule(f"{original}.{there}", f"{ours}.{here}") for there, here in names.items()]


def conv_rules(original: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{original}.kernel", f"{ours}.kernel", *_reordered(3, 2, 0, 1)),
        Rule(f"{original}.bias", f"{ours}.bias"),
    ]


def norm_rules(original: str, ours: str) -> list[Rule]:
    return [Rule(f"{original}.scale", f"{ours}.weight"), Rule(f"{original}.bias", f"{ours}.bias")]


def attention_rules(config: Any, original: str = "attn", ours: str = "attention") -> list[Rule]:
    """Rules for the leaves of an attention, by their names without those of layers."""
    if config.attention_type == "multiplicative_conv":
        projections = f"{ours}.projections"
        queries = "conv_qk" if config.attention_share_qk else "conv_q"
        return [
            *multiplicative_rules(f"{original}.shared_mult", f"{projections}.shared"),
            *conv_rules(f"{original}.{queries}", f"{projections}.query_conv"),
            *conv_rules(f"{original}.conv_k", f"{projections}.key_conv"),
            *conv_rules(f"{original}.conv_v", f"{projections}.value_conv"),
            *multiplicative_rules(f"{original}.out_mult", f"{ours}.o_proj"),
            *conv_rules(f"{original}.out_conv", f"{ours}.output_conv"),
        ]
    part = dense_rules if config.attention_type == "dense" else multiplicative_rules
    return [rule for letter in "qkvo" for rule in part(f"{original}.{letter}", f"{ours}.{letter}_proj")]


def feed_forward_rules(layers: int, original: str = "ff", ours: str = "feed_forward") -> list[Rule]:
    """Rules for the leaves of a feed-forward block with so many recurrences, by their names without those of layers."""
    sparse, branch = f"{original}.sparse_ff", f"{original}.sru_branch"
    rules = [
        *norm_rules(f"{original}.norm", f"{ours}.norm"),
        *dense_rules(f"{original}.in", f"{ours}.up_proj"),
        *dense_rules(f"{original}.out", f"{ours}.down_proj"),
        Rule(f"{sparse}.controller.m1", f"{ours}.sparse.controller_down", _transposed, _transposed),
        Rule(f"{sparse}.controller.m2", f"{ours}.sparse.controller_up", *_reordered(1, 2, 0)),
        Rule(f"{sparse}.controller.bias", f"{ours}.sparse.controller_bias"),
        Rule(f"{sparse}.w1", f"{ours}.sparse.up", *_reordered(1, 2, 0)),
        Rule(f"{sparse}.w2", f"{ours}.sparse.down", *_reordered(1, 0, 2)),
        Rule(f"{sparse}.b2", f"{ours}.sparse.bias"),
        *norm_rules(f"{branch}.norm", f"{ours}.sru.norm"),
        *dense_rules(f"{branch}.in_proj", f"{ours}.sru.in_proj"),
    ]
    for layer in range(layers):
        there, here = f"{branch}.sru.{layer}", f"{ours}.sru.layers.{layer}"
        rules += [
            Rule(
                f"{there}.kernel",
                f"{here}.weight",
                lambda kernel: _gates_reversed(kernel.T).contiguous(),
                lambda weight: _gates_reversed(weight).T.contiguous(),
            ),
            Rule(f"{there}.bias", f"{here}.bias", _gates_reversed, _gates_reversed),
        ]
    return [*rules, *dense_rules(f"{branch}.out_proj", f"{ours}.sru.out_proj")]


def head_rules(config: Any) -> list[Rule]:
    """Rules for the leaves of the output layer."""
    kind, name = config.lm_head_type, "lm_head"
    if kind == "einsum":
        return [Rule("lm_head.kernel", "lm_head.weight"), Rule("lm_head.bias", "lm_head.bias")]
    if kind == "low_rank":
        return [*dense_rules("lm_head.in", "lm_head.in_proj"), *dense_rules("lm_head.out", "lm_head.out_proj")]
    if kind == "multiplicative" and config.lm_head_sparse_probability is not None:
        return [
            *multiplicative_rules("lm_head.sparse", "lm_head.sparse"),
            *dense_rules("lm_head.dense", "lm_head.dense"),
        ]
    return multiplicative_rules(name, name) if kind == "multiplicative" else dense_rules(name, name)


BASE = "position.base.{}.{}"
START = "position.start_vec"
DIGITS, DEFAULT_BASES = 8, 4


def _digit(base: int, digit: int) -> Callable[[Tensor], Tensor]:
    return lambda vectors: vectors[base, digit].unsqueeze(0)


def position_rules(bases: int, original: str = "", ours: str = "model.positions") -> list[Rule]:
    """Rules for position vectors of any kind. In fixed bases many leaves are one tensor here: those rules only restore,
    and [`convert_bases`] converts."""
    return [
        Rule(f"{original}position_table", f"{ours}.table"),
        Rule(f"{original}position_projection", f"{ours}.projection"),
        *(
            Rule(original + BASE.format(base, digit), f"{ours}.vectors", restore=_digit(base, digit))
            for base in range(bases)
            for digit in range(DIGITS)
        ),
        Rule(original + START, f"{ours}.start", torch.flatten, lambda start: start.view(1, 1, -1)),
    ]


def convert_bases(leaves: dict[str, Tensor], original: str = "", ours: str = "model.positions") -> dict[str, Tensor]:
    """The tensor that many leaves of positions in fixed bases are here; empty where there are none."""
    if original + START not in leaves:
        return {}
    bases = sum(name.startswith(f"{original}position.base.") for name in leaves) // DIGITS
    digits = range(DIGITS)
    vectors = [torch.cat([leaves[original + BASE.format(base, digit)] for digit in digits]) for base in range(bases)]
    return {f"{ours}.vectors": torch.stack(vectors)}
