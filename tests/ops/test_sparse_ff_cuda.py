"""The sparse feed-forward on a GPU: the public op, a compiled call, and a model that generates with it."""

import pytest
import torch

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.sparse_ff import OP_NAME, sparse_ff
from tests.ops.test_sparse_ff_kernel import in_float64, make_weights


pytestmark = pytest.mark.gpu


def call(x, weights):
    with use_backend("cuda"), torch.no_grad():
        found = sparse_ff(x.cuda(), **{name: None if one is None else one.cuda() for name, one in weights.items()})
    assert last_backend(OP_NAME) == "cuda"
    return found


@pytest.mark.parametrize("tokens", [1, 5, 63])
@pytest.mark.parametrize("width", [63, 500])
def test_the_public_op_against_float64(width, tokens):
    weights, x = make_weights(width), torch.randn(tokens, width)
    y, winners = call(x, weights)
    expected, margin = in_float64(x, weights, winners.cpu())
    assert margin > -1e-4
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_results_are_the_same_each_time_and_compiled():
    weights, x = make_weights(500), torch.randn(5, 500)
    expected = call(x, weights)
    on_gpu = {name: None if one is None else one.cuda() for name, one in weights.items()}
    compiled = torch.compile(sparse_ff, fullgraph=True)
    with use_backend("cuda"), torch.no_grad():
        for found in (call(x, weights), compiled(x.cuda(), **on_gpu)):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_generates_what_plain_torch_generates():
    torch.manual_seed(0)
    config = ScalingTransformerConfig.preset("24x1024-all", num_hidden_layers=2, max_position_embeddings=64)
    model = ScalingTransformerForCausalLM(config).cuda().eval()
    ids = torch.randint(1, config.vocab_size, (2, 7), device="cuda")
    found = {}
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            found[backend] = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
            assert last_backend(OP_NAME) == backend
    assert torch.equal(found["cuda"], found["reference"])
