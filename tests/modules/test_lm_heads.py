"""Output layers of language models."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from hf_efficient.modules.lm_heads import LowRankHead, MixedHead, build_lm_head
from hf_efficient.modules.sparse_layers import MultiplicativeDense
from tests.helpers.comparison import assert_close


def filled(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def config(**fields):
    defaults = {"hidden_size": 6, "vocab_size": 12, "lm_head_bias": True, "lm_head_sparse_probability": None}
    return SimpleNamespace(**{**defaults, **fields})


def test_low_rank():
    head, x = filled(LowRankHead(6, 12, 3)), torch.randn(2, 5, 6).double()
    expected = (x @ head.in_proj.weight.T + head.in_proj.bias) @ head.out_proj.weight.T + head.out_proj.bias
    assert_close("logits", head(x), expected, 1e-12)


@pytest.mark.parametrize(
    ("fields", "kind", "parameters"),
    [
        ({"lm_head_type": "dense"}, nn.Linear, 6 * 12 + 12),
        ({"lm_head_type": "einsum", "lm_head_bias": False}, nn.Linear, 6 * 12),
        ({"lm_head_type": "multiplicative", "loss_sparsity": 4}, MultiplicativeDense, 4 * 6 + 6 * 3 + 12),
        ({"lm_head_type": "multiplicative", "loss_sparsity": 4, "lm_head_bias": False}, MultiplicativeDense, 42),
        ({"lm_head_type": "low_rank", "lm_head_rank": 2}, LowRankHead, 6 * 2 + 2 + 2 * 12 + 12),
        (
            {"lm_head_type": "multiplicative", "loss_sparsity": 4, "lm_head_sparse_probability": 0.5},
            MixedHead,
            54 + 84,
        ),
    ],
)
def test_kinds(fields, kind, parameters):
    head = build_lm_head(config(**fields))
    assert type(head) is kind
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters
    assert filled(head)(torch.randn(2, 6).double()).shape == (2, 12)


def test_a_mixed_layer_uses_either_in_training_and_the_sparse_one_in_evaluation():
    head, x = filled(MixedHead(6, 12, 4, 0.7)), torch.randn(2, 5, 6).double()
    used = 0
    with torch.no_grad():
        sparse, dense = head.sparse(x), head.dense(x)
        for _ in range(500):
            logits = head.train()(x)
            is_sparse = torch.allclose(logits, sparse)
            assert is_sparse or torch.allclose(logits, dense)
            used += is_sparse
        assert_close("evaluation", head.eval()(x), sparse, 1e-12)
    assert binomtest(used, 500, 0.7).pvalue > 1e-3


@pytest.mark.parametrize("distributed", [False, True], ids=["alone", "distributed"])
@pytest.mark.parametrize(("probability", "chosen"), [(1.0, "sparse"), (0.0, "dense")])
def test_the_layer_that_is_not_used_has_no_gradient_but_zeros_in_distributed_training(
    monkeypatch, probability, chosen, distributed
):
    """Distributed training would wait for it; alone it would cost a pass over the large matrix."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: distributed)
    head = filled(MixedHead(6, 12, 4, probability)).train()
    head(torch.randn(2, 6).double()).square().sum().backward()
    for name, parameter in head.named_parameters():
        if name.startswith(chosen):
            assert parameter.grad.any(), name
        elif distributed:
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
