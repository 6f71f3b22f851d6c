"""The built kernel against a plain loop in float64, with nothing but torch.

    python kernels/build.py
    python -m pytest kernels/sparse-ff/tests

This folder is run alone and has an `__init__.py`: without it pytest would name this module `kernels.<...>`, and its own
empty package of that name would stand where the `kernels` library should.
"""

import importlib
import os
import runpy
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the `kernels` library is imported

import torch
from kernel_testing.guarded_memory import GuardedTensor
from kernel_testing.loading import HAS_KERNELS, load_for_tests


KERNEL = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
TOKENS = (1, 2, 8, 9, 33)

kernel = load_for_tests(KERNEL, DEVICE.type)
example = runpy.run_path(str(KERNEL / "example.py"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_weights(width=63, blocks=3, units=5, rank=7, dtype=torch.float32):
    return [tensor.to(dtype) for tensor in example["make_weights"](width, blocks, units, rank, DEVICE)]


def check(x, weights, *options):
    y, winners = kernel.sparse_feed_forward(x, *weights, *options)
    expected, chosen = example["plain_loop"](x, *weights, *options)
    assert torch.equal(winners, chosen)
    limit = LIMITS[x.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit * expected.abs().max().item())


@pytest.mark.kernels_ci
@pytest.mark.skipif(not HAS_KERNELS, reason="no `kernels` library")
def test_the_kernels_library_is_not_hidden():
    assert hasattr(importlib.import_module("kernels"), "get_local_kernel")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("width", "units", "rank"), [(1, 1, 1), (5, 3, 7), (64, 16, 16), (500, 2, 64)])
def test_equals_a_plain_loop(width, units, rank, dtype):
    weights = make_weights(width, 3, units, rank, dtype)
    for tokens in TOKENS:
        check(torch.randn(tokens, width, device=DEVICE).to(dtype), weights)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("multiply", [False, True], ids=["alone", "by-controller"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
def test_options(activation, multiply):
    check(torch.randn(3, 63, device=DEVICE), make_weights(), activation, multiply)
    *rest, _, _ = make_weights()
    check(torch.randn(9, 63, device=DEVICE), [*rest, None, None], activation, multiply)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_records_of_a_unit_are_read_in_place(misaligned):
    """Both rows of a unit in one record; NaN beside them."""
    weights, x = make_weights(width=64, rank=8), torch.randn(9, 64, device=DEVICE)
    expected = kernel.sparse_feed_forward(x, *weights)
    records = torch.full((3, 5, 2 * 64 + 4), float("nan"), device=DEVICE)
    records[..., :64], records[..., 64:128] = weights[3], weights[4]
    guarded = GuardedTensor(records.shape, torch.float32, misaligned, records, DEVICE)
    weights[3:5] = guarded.tensor.narrow(-1, 0, 64), guarded.tensor.narrow(-1, 64, 64)
    y, winners = kernel.sparse_feed_forward(x, *weights)
    assert torch.equal(winners, expected[1])
    torch.testing.assert_close(y, expected[0])
    guarded.check("records")


@pytest.mark.kernels_ci
def test_of_equal_logits_the_first_wins():
    weights, x = make_weights(units=40), torch.randn(9, 63, device=DEVICE)
    weights[1].zero_()
    weights[2].zero_()[:, 20:] = 1.0
    assert (kernel.sparse_feed_forward(x, *weights)[1] == 20).all()


@pytest.mark.kernels_ci
def test_winners_that_relu_kills_are_not_read():
    weights = make_weights()
    weights[6].fill_(-1e4)
    weights[4].fill_(float("nan"))
    y, _ = kernel.sparse_feed_forward(torch.randn(9, 63, device=DEVICE), *weights)
    assert torch.equal(y, weights[5].expand(9, 63))


def test_opcheck():
    torch.library.opcheck(
        kernel.ops.forward.default, (torch.randn(3, 63, device=DEVICE), *make_weights(), "gelu", True)
    )


@pytest.mark.kernels_ci
def test_errors_name_what_is_wrong():
    weights, x = make_weights(), torch.randn(3, 63, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"controller_down must have shape \(7, 62\), not \(7, 63\)"):
        kernel.sparse_feed_forward(x[:, 1:], *weights)
    with pytest.raises(RuntimeError, match="activation must be relu, gelu, gelu_new or silu, not tanh"):
        kernel.sparse_feed_forward(x, *weights, activation="tanh")
    with pytest.raises(RuntimeError, match="has no gradient"):
        kernel.sparse_feed_forward(x.requires_grad_(), *weights)
