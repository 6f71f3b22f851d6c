"""Caches, memories and ways of drafting that do not belong to the model are refused before anything is computed."""

import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppForMaskedLM


IDS = torch.arange(10).view(2, 5) + 3


@pytest.fixture
def make(make_model):
    return functools.partial(make_model, SruppForCausalLM, dtype=torch.float32)


@torch.no_grad()
def cache_of(model, ids=IDS):
    return model(ids, use_cache=True).cache


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 4}, "DynamicCache of 4 layers, without a place .* 3 layers"),
        ({"hidden_size": 20}, r"states of shape \(2, 20\) .* want \(2, 18\)"),
        ({"num_attention_heads": 5}, r"keys of shape \(2, 5, 5, 2\) .* 2 heads of size 5"),
        ({"projection_size": 12}, r"keys of shape \(2, 2, 5, 6\) .* 2 heads of size 5"),
    ],
)
def test_a_cache_of_another_model(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make()(IDS, cache=cache_of(make(**fields)))


def test_a_cache_of_another_dtype_batch_or_kind(make):
    model = make()
    with pytest.raises(ValueError, match=r"keys of torch.float64, but the model computes in torch.float32"):
        model(IDS, cache=cache_of(make().double()))
    with pytest.raises(ValueError, match=r"states of shape \(2, 18\) .* want \(1, 18\)"):
        model(IDS[:1], cache=cache_of(model))
    with pytest.raises(TypeError, match=r"cache must be a Cache of transformers, .*not tuple"):
        model(IDS, cache=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(TypeError, match=r"memory must be what a call returned as output.memory, not tuple"):
        model(IDS, memory=(1, 2))


def test_a_cache_without_a_place_for_states(make, make_model):
    for call in (make().__call__, functools.partial(make().generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"make it by DynamicCache\(config=model.config\)"):
            call(IDS, cache=DynamicCache())
    encoder = make_model(SruppForMaskedLM, dtype=torch.float32, bidirectional=True)
    with pytest.raises(ValueError, match="keeps no cache"):
        encoder(IDS, cache=DynamicCache(config=encoder.config))


def test_prefix_tuning_says_what_to_take_instead(make):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(make(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"Prefix tuning, .* take LoRA or prompt tuning"):
        tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS))


def test_prompt_tuning_works(make):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(make(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.shape == (2, 7, 41)


def test_early_exit_leaves_the_model_as_it_was(make):
    model = make()
    expected = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="assistant_early_exit does not work with Srupp"):
        model.generate(IDS[:1], max_new_tokens=4, do_sample=False, assistant_early_exit=2)
    assert model.config.num_hidden_layers == 3
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=4, do_sample=False), expected)


def test_layers_that_the_config_does_not_count(make):
    model = make()
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match=r"has 2 layers, but config.num_hidden_layers is 3"):
        model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0, 1, 2], [2]], ids=["all-attend", "last-attends"])
def test_a_static_cache_that_is_full(make, layers):
    model = make(attention_layers=layers)
    cache = StaticCache(config=model.config, max_cache_len=6)
    model(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"The cache holds 5 tokens of 6, and 2 more do not fit.*max_cache_len"):
        model(IDS[:, :2], cache=cache)
    assert model(IDS[:, :1], cache=cache).logits.isfinite().all()
