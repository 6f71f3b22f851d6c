"""Whole models in 16 bits, cast or under autocast: outputs near those of float64, gradients that reversible layers make
no worse, and generation."""

import copy

import pytest
import torch

from tests.helpers.comparison import named_gradients, relative_error
from tests.helpers.families import FF, QKV, TERRAFORMER


LSH = {"encoder_long_attention": "lsh", "decoder_long_attention": "lsh", "lsh_chunk_length": 4}
MIXED = {"encoder_long_attention": "mixed", "decoder_long_attention": "mixed", "lsh_full_length": 6}
KINDS = {
    "standard": TERRAFORMER.variants["all-sru"],
    "lsh": {**LSH, **FF, **QKV, "ff_sru_layers": 1},
    "mixed": {**LSH, **MIXED},
    "forgetting": TERRAFORMER.variants["forgetting"],
    "cross": {**TERRAFORMER.variants["cross-sparse"], "encoder_long_attention": "lsh", "lsh_chunk_length": 4},
}
# Median error of outputs, relative: some roundings of 8 and of 11 bits. Where one decides on a unit or a bucket, a few
# outputs are farther off.
NEAR = {torch.bfloat16: 0.03, torch.float16: 0.004}
RUNS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "bfloat16 autocast": (torch.bfloat16, True),
}


@pytest.fixture(params=KINDS)
def make_pair(request, make_model):
    """A model in 16 bits, or in float32 for autocast, and one in float64 with its weights."""

    def make(dtype, autocast):
        exact = make_model(dtype=torch.float64, **KINDS[request.param])
        stored = torch.float32 if autocast else dtype
        model = copy.deepcopy(exact).to(stored)
        with torch.no_grad():
            for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
        return model, exact

    return make


@pytest.mark.parametrize(("dtype", "autocast"), RUNS.values(), ids=RUNS)
def test_whole_models(make_pair, make_batch, dtype, autocast):
    (model, exact), batch = make_pair(dtype, autocast), make_batch([5, 13, 1])

    def cast():
        return torch.autocast("cpu", dtype, enabled=autocast)

    with torch.no_grad(), cast():
        found = model(**batch.source, decoder_input_ids=batch.targets).logits
        expected = exact(**batch.source, decoder_input_ids=batch.targets).logits
    assert (found - expected).abs().median() < NEAR[dtype] * expected.square().mean().sqrt()
    with cast():
        written = model.generate(**batch.source, max_new_tokens=4, num_beams=2, eos_token_id=None)
    assert written.shape == (3, 5)

    def gradients(one, reversible):
        one.config.reversible = reversible
        one.zero_grad()
        torch.manual_seed(0)  # of noise and dropout
        one(**batch.source, labels=batch.targets).loss.backward()
        return named_gradients(one)

    right = gradients(exact.train(), reversible=False)
    model.train()
    with cast():
        ordinary, rebuilt = (gradients(model, reversible) for reversible in (False, True))
    assert rebuilt.keys() == right.keys()
    for name, gradient in right.items():
        assert rebuilt[name].isfinite().all(), name
        errors = [relative_error(of[name], gradient) for of in (rebuilt, ordinary)]
        assert errors[0] <= 2 * errors[1] + 1e-3, (name, errors)
