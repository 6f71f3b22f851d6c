"""The cache has one name in this package, and reaches transformers under the name of the installed release."""

import logging

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from hf_efficient import SruppConfig, SruppForCausalLM, SruppForSequenceClassification
from hf_efficient.utils.cache_naming import CACHE_NAME, OLD_CACHE_NAME, rename_cache_kwarg


def tiny(cls=SruppForCausalLM, **fields):
    torch.manual_seed(0)
    config = SruppConfig(
        vocab_size=29, hidden_size=12, projection_size=6, num_hidden_layers=2, pad_token_id=0, **fields
    )
    model = cls(config).eval()
    for layer in model.model.layers:
        torch.nn.init.ones_(layer.projection.attention.alpha)
    return model


def make_ids(length):
    return torch.randint(1, 29, (2, length), generator=torch.Generator().manual_seed(1))


def test_generate_hands_on_a_cache_that_grows():
    """A forward that does not see the cache begins anew at every token, and writes another text without an error."""
    model, ids, calls = tiny(), make_ids(5), []

    def watch(module, args, kwargs):
        cache = rename_cache_kwarg(kwargs)["cache"]
        calls.append((cache, kwargs["input_ids"].shape[1], int(cache.get_seq_length())))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert [(fed, held) for _, fed, held in calls] == [(5, 0), (1, 5), (1, 6), (1, 7)]
    assert all(cache is calls[0][0] for cache, _, _ in calls)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("cls", [SruppForCausalLM, SruppForSequenceClassification])
def test_every_name_reaches_the_model(cls):
    model, ids = tiny(cls), make_ids(7)
    outputs = []
    for name in ("cache", OLD_CACHE_NAME, "cache_params"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], **{name: cache})
        assert cache.get_seq_length() == 4
        outputs.append(model(ids[:, 4:], **{name: cache}).logits)
        assert cache.get_seq_length() == 7
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["cache", OLD_CACHE_NAME])
def test_generate_takes_a_filled_cache_by_either_name(name):
    model, ids = tiny(), make_ids(6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
    fed = []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    output = model.generate(ids, max_new_tokens=3, do_sample=False, **{name: cache})
    assert fed == [2, 1, 1]
    assert torch.equal(output, model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))


@pytest.mark.parametrize("cls", [SruppForCausalLM, SruppForSequenceClassification])
def test_outputs_hold_the_cache_under_both_names(cls):
    output = tiny(cls)(make_ids(3), use_cache=True)
    assert output.cache.get_seq_length() == 3
    assert output[CACHE_NAME] is output.cache


def test_two_caches_are_refused():
    model, cache = tiny(), DynamicCache()
    with pytest.raises(ValueError, match="names of one argument"):
        model(make_ids(3), cache=cache, past_key_values=cache)


def test_no_warning_says_that_a_name_is_deprecated(caplog, monkeypatch):
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    model = tiny()
    with caplog.at_level(logging.WARNING):
        model.generate(make_ids(5), max_new_tokens=3, do_sample=False)
        model.generate(
            make_ids(5), max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True
        )
        output = model(make_ids(4), use_cache=True)
        model(make_ids(1), cache=output.cache)
    assert "deprecated" not in caplog.text


def test_checkpointed_training_drops_a_cache_that_recomputation_would_fill_twice():
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cache = DynamicCache(config=model.config)
    model(make_ids(4), labels=make_ids(4), cache=cache).loss.backward()
    assert cache.get_seq_length() == 0


@pytest.mark.skipif(CACHE_NAME == OLD_CACHE_NAME, reason="the name of this release of transformers")
def test_the_old_name_is_deprecated():
    model = tiny()
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated. Use `cache` instead"):
        model(make_ids(3), past_key_values=DynamicCache(config=model.config))
