"""The configuration: the paper's sizes, names of the original, bad values, round trips, and initial weights."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from hf_efficient.models.tupe.configuration_tupe import TupeConfig
from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
    TupeModel,
)


def count(config, cls=TupeForMaskedLM):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls(config).parameters())


def test_base_has_the_size_of_the_released_model():
    """The numbers that were counted in the original: with the masked-LM head, and the position part alone."""
    assert count(TupeConfig()) == 112_424_589
    with torch.device("meta"):
        position = TupeModel(TupeConfig()).position_bias
    plain_table = 512 * 768
    assert sum(parameter.numel() for parameter in position.parameters()) - plain_table == 1_183_884


def test_large_has_the_size_that_its_parts_add_up_to():
    width, layers, heads, feed_forward, vocabulary, positions = 1024, 24, 16, 4096, 32769, 512
    linear = width * width + width
    layer = 4 * linear + 2 * (2 * width) + 2 * width * feed_forward + feed_forward + width
    position = (positions + 1) * width + 2 * width + 2 * linear + 33 * heads
    head = linear + 2 * width + vocabulary
    expected = vocabulary * width + 2 * width + layers * layer + position + head
    assert count(TupeConfig.preset("large")) == expected
    assert TupeConfig.preset("large", num_hidden_layers=3).num_hidden_layers == 3


def test_making_a_config_says_nothing(caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        TupeConfig()
        TupeConfig.preset("large")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"hidden_size": 16}, r"hidden_size \(16\) must be a multiple of num_attention_heads \(12\)", id="h"
        ),
        pytest.param({"num_attention_heads": 0}, "num_attention_heads must be at least 1", id="no-heads"),
        pytest.param({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1", id="no-positions"),
        pytest.param({"vocab_size": 0}, "vocab_size must be at least 1", id="no-vocabulary"),
        pytest.param({"attention_scale_factor": 0}, "attention_scale_factor must be positive", id="scale-0"),
        pytest.param({"relative_attention_num_buckets": 30}, "multiple of 4 and at least 8, not 30", id="buckets-30"),
        pytest.param({"relative_attention_num_buckets": 4}, "multiple of 4 and at least 8, not 4", id="buckets-4"),
        pytest.param({"relative_attention_max_distance": 8}, r"max_distance \(8\) must exceed the 8", id="distance-8"),
        pytest.param({"pad_token_id": 40000}, "pad_token_id is 40000, outside the vocabulary of 32769", id="pad"),
        pytest.param({"cls_token_id": -1}, "cls_token_id is -1, outside", id="cls"),
        pytest.param({"mask_token_id": 32769}, "mask_token_id is 32769, outside", id="mask"),
        pytest.param({"hidden_size": "768"}, "hidden_size", id="text-for-a-number"),
        pytest.param({"hidden_dropout_prob": None}, "hidden_dropout_prob", id="none-for-a-number"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(Exception, match=message) as raised:  # strict dataclasses wrap the ValueError
        TupeConfig(**fields)
    assert "Strict" in type(raised.value).__name__ or isinstance(raised.value, ValueError)


def test_round_trip_through_a_file(tmp_path):
    config = TupeConfig(
        hidden_size=24, num_attention_heads=3, untie_cls=False, classifier_dropout=None, dtype="bfloat16", num_labels=5
    )
    config.save_pretrained(tmp_path)
    for again in (TupeConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is TupeConfig
        # What from_pretrained notes about the file is no setting.
        assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_names_of_the_original_mean_the_same():
    config = TupeConfig(rel_pos=False, max_positions=77, embedding_normalize=False, rel_pos_bins=16, max_rel_pos=50)
    assert not config.relative_attention
    assert not config.embedding_norm
    assert config.max_position_embeddings == config.max_positions == 77
    assert config.relative_attention_num_buckets == config.rel_pos_bins == 16
    assert config.relative_attention_max_distance == config.max_rel_pos == 50
    assert TupeConfig(attn_scale_factor=1).attention_scale_factor == 1
    assert "rel_pos" not in config.to_dict()


@pytest.mark.parametrize(
    "cls",
    [
        TupeForMaskedLM,
        TupeForSequenceClassification,
        TupeForTokenClassification,
        TupeForQuestionAnswering,
        TupeForMultipleChoice,
    ],
)
def test_initial_weights(make_config, cls):
    """Normal with deviation 0.02; zero biases and padding row; LayerNorms 1 and 0."""
    config = make_config(hidden_size=96, intermediate_size=192, vocab_size=500, num_hidden_layers=1)
    seen = set()
    for name, module in cls(config).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight.detach()
            if isinstance(module, nn.Linear):
                assert (module.bias == 0).all(), name
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                assert module.padding_idx == config.pad_token_id
                assert (weight[config.pad_token_id] == 0).all()
            tolerance = 0.02 * 4 / (2 * weight.numel()) ** 0.5 + 1e-4
            assert weight.std().item() == pytest.approx(0.02, abs=tolerance), name
            assert abs(weight.mean().item()) < 0.02 * 4 / weight.numel() ** 0.5, name
            seen.add(name)
    assert {"model.position_bias.relative_attention_bias", "model.position_bias.position_embeddings"} <= seen


def test_every_parameter_is_initialised_after_meta_construction(make_config, tmp_path):
    """A head that the checkpoint lacks is drawn as at construction, not left as it came from memory."""
    TupeForMaskedLM(make_config()).save_pretrained(tmp_path)
    model = TupeForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.classifier.dense.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (model.classifier.dense.bias == 0).all()
    assert (model.classifier.out_proj.bias == 0).all()
