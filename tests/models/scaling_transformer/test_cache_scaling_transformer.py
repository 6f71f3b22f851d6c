"""Which units decoding chooses, and caches of models that keep keys and values alone."""

import pytest
import torch
from transformers import DynamicCache

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.modules.sparse_layers import SparseFeedForward
from tests.helpers.families import in_chunks


def chosen_in_steps_and_at_once(model, ids):
    """For each sparse layer the winners of decoding and of the whole, `(batch, length, blocks)`, after their logits."""
    chosen = []
    for layer in model.modules():
        if isinstance(layer, SparseFeedForward):
            layer.observer = lambda winners, passes: chosen.append(winners)
    batch, length = ids.shape
    logits = [model(ids).logits]
    whole = [winners.view(batch, length, -1) for winners in chosen]
    chosen.clear()
    logits.append(in_chunks(model, ids, [1] * length, DynamicCache(config=model.config)))
    steps = [torch.stack(chosen[layer :: len(whole)], 1).view_as(winners) for layer, winners in enumerate(whole)]
    return logits, list(zip(steps, whole, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("batch", range(1, 9))
def test_steps_choose_the_units_of_the_whole(make_model, make_ids, variant, batch):
    """In float32, for all batches that a kernel decodes."""
    if "ff_sparsity" not in variant:
        pytest.skip("chooses nothing")
    model, ids = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **variant), make_ids(batch, 7)
    (whole, steps), chosen = chosen_in_steps_and_at_once(model, ids)
    torch.testing.assert_close(steps, whole, atol=2e-5, rtol=2e-5)
    for found, expected in chosen:
        assert torch.equal(found, expected)


@torch.no_grad()
def test_steps_in_bfloat16_choose_nearly_all_units_of_the_whole(make_config):
    """Both round the multiplicative layers in one place; in two, 1 % of the first layer's units would be others."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "ff_sparsity": 32, "ff_rank": 16}
    torch.manual_seed(0)
    config = make_config(**sizes, attention_type="multiplicative_conv", attention_sparsity=16)
    model = ScalingTransformerForCausalLM(config).eval().to(torch.bfloat16)
    _, chosen = chosen_in_steps_and_at_once(model, torch.randint(0, 42, (4, 60)))
    found, expected = chosen[0]
    assert (found == expected).float().mean() > 0.995


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"ff_sparsity": 5, "ff_rank": 3}], ids=["dense", "ff"])
def test_a_cache_that_grows_layer_by_layer(make_model, make_ids, fields):
    model, ids = make_model(ScalingTransformerForCausalLM, **fields), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        cache = DynamicCache()
        steps = [model(ids[:, :4], cache=cache, **{name: value[:, :4] for name, value in inputs.items()}).logits]
        steps += [
            model(ids[:, end - 1 : end], cache=cache, **{name: value[:, :end] for name, value in inputs.items()}).logits
            for end in range(5, 10)
        ]
        found, expected = torch.cat(steps, dim=1), model(ids, **inputs).logits
        real = mask.bool() if inputs else torch.ones_like(mask).bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-10, rtol=1e-10)
    assert len(cache.layers) == 2
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=DynamicCache()), greedy)


@torch.no_grad()
def test_a_cache_of_another_depth_or_without_states(make_model, make_ids):
    dense, shallow, ids = make_model(), make_model(num_hidden_layers=1), make_ids(2, 9)
    cache = shallow(ids, cache=DynamicCache()).cache
    with pytest.raises(ValueError, match=r"of 1 layers, but the model has 2 layers.*by DynamicCache\(config") as raised:
        dense(ids, cache=cache)
    assert "Prefix tuning" not in str(raised.value)
    recurrent = make_model(ff_sru_layers=1)
    with pytest.raises(ValueError, match=r"without a place for the states of this model's 2 layers.*Prefix tuning"):
        recurrent(ids, cache=DynamicCache())
