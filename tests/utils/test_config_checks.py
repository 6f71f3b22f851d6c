"""Configs of nonsense are refused with the field, its value and what it may be; the others stay silent."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_efficient import SruppConfig, TupeConfig
from hf_efficient.objectives.meta_controller import MetaControllerObjectiveConfig
from hf_efficient.objectives.mlm import MaskedLMObjectiveConfig
from hf_efficient.objectives.replaced_token import ReplacedTokenObjectiveConfig


CLASSES = [
    SruppConfig,
    TupeConfig,
    MaskedLMObjectiveConfig,
    MetaControllerObjectiveConfig,
    ReplacedTokenObjectiveConfig,
]
SIZES = {
    SruppConfig: (
        *("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers", "num_attention_heads"),
        *("attention_every_n_layers", "adaptive_embedding_size", "adaptive_divisor"),
    ),
    TupeConfig: (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        "max_position_embeddings",
    ),
    ReplacedTokenObjectiveConfig: (
        *("generator_divider", "generator_hidden_size", "generator_num_hidden_layers", "generator_num_attention_heads"),
    ),
}
RATES = {
    SruppConfig: (
        *("dropout", "projection_dropout", "attention_dropout", "input_dropout", "embedding_dropout"),
        "classifier_dropout",
    ),
    TupeConfig: ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "classifier_dropout"),
}
FROM_ZERO = {
    SruppConfig: ("layer_norm_eps", "weight_c_init"),
    TupeConfig: ("layer_norm_eps", "initializer_range"),
    ReplacedTokenObjectiveConfig: ("initializer_range", "discriminator_weight", "discriminator_start_loss"),
    MetaControllerObjectiveConfig: ("loss_weight",),
}


ERRORS = (ValueError, StrictDataclassError)  # the latter wraps what a validator of the class raises


def fields_of(table):
    return [
        pytest.param(config_class, name, id=f"{config_class.__name__}-{name}")
        for config_class, names in table.items()
        for name in names
    ]


def refuses(config_class, message, **fields):
    with pytest.raises(ERRORS, match=message):
        config_class(**fields)


@pytest.mark.parametrize(("config_class", "name"), fields_of(SIZES))
def test_sizes(config_class, name):
    for value in (0, -1):
        refuses(config_class, f"{name} must be at least 1, not {value}", **{name: value})


@pytest.mark.parametrize(("config_class", "name"), fields_of(RATES))
def test_rates_of_dropout(config_class, name):
    for value in (1.0, 1.5, -0.1):
        refuses(config_class, f"{name} must be at least 0 and below 1, not {value}", **{name: value})
    refuses(config_class, f"{name} must be finite and at least 0 and below 1, not nan", **{name: math.nan})
    assert getattr(config_class(**{name: 0.99}), name) == 0.99


@pytest.mark.parametrize(("config_class", "name"), fields_of(FROM_ZERO))
def test_numbers_from_zero(config_class, name):
    refuses(config_class, f"{name} must be at least 0, not -0.5", **{name: -0.5})
    for value in (math.nan, math.inf):
        refuses(config_class, f"{name} must be finite and at least 0, not {value}", **{name: value})
    assert getattr(config_class(**{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("config_class", CLASSES)
def test_labels_and_problems(config_class):
    for number in (0, -1):
        refuses(config_class, f"num_labels must be at least 1, not {number}", num_labels=number)
    refuses(config_class, "num_labels must be at least 1, not 0", id2label={})
    refuses(
        config_class,
        "problem_type.*'regresion'.*'regression'|problem_type.*'regression'.*got regresion",
        problem_type="regresion",
    )
    config = config_class(num_labels=3, problem_type="multi_label_classification")
    assert list(config.id2label) == [0, 1, 2]


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (SruppConfig, {"highway_bias": math.nan}, "highway_bias must be finite, not nan"),
        (SruppConfig, {"highway_bias": -math.inf}, "highway_bias must be finite, not -inf"),
        (SruppConfig, {"attention_last_n_layers": -3}, "attention_last_n_layers must be at least 0, not -3"),
        (SruppConfig, {"attention_layers": [1, 3, 1]}, "attention_layers names layer 1 more than once"),
        (
            SruppConfig,
            {"num_hidden_layers": 2, "attention_layers": [1, -1]},
            r"attention_layers names layer 1 more than once: \[1, -1\]",
        ),
        (
            SruppConfig,
            {"num_hidden_layers": 2, "attention_layers": [0, -2]},
            r"attention_layers names layer 0 more than once: \[0, -2\]",
        ),
        (SruppConfig, {"attention_last_n_layers": 99}, "attention_last_n_layers is 99, but there are 10 layers"),
        (SruppConfig, {"recurrence_activation": "tahn"}, "'identity' or 'tanh'. Did you mean 'tanh'"),
        (SruppConfig, {"pad_token_id": -1}, "pad_token_id is -1, outside the vocabulary of 256"),
        (TupeConfig, {"hidden_act": "gleu"}, "hidden_act is 'gleu', but must be .*'gelu_new'.*Did you mean 'gelu'"),
        (TupeConfig, {"pooler_activation": "tahn"}, "pooler_activation is 'tahn'.*Did you mean 'tanh'"),
        (
            TupeConfig,
            {"attention_scale_factor": math.nan},
            "attention_scale_factor must be finite and positive, not nan",
        ),
        (ReplacedTokenObjectiveConfig, {"temperature": math.inf}, "temperature must be finite and positive, not inf"),
        (ReplacedTokenObjectiveConfig, {"target_fraction": 1.1}, "target_fraction must be positive and at most 1"),
        (ReplacedTokenObjectiveConfig, {"initial_replaced_fraction": 1.0}, "must lie between 0 and 1, not 1.0"),
        (
            ReplacedTokenObjectiveConfig,
            {"discriminator_warmup_steps": -1},
            "discriminator_warmup_steps must be at least 0",
        ),
        (MetaControllerObjectiveConfig, {"num_candidates": 1}, "num_candidates must be at least 2, not 1"),
    ],
)
def test_single_fields(config_class, fields, message):
    refuses(config_class, message, **fields)


@pytest.mark.parametrize("config_class", [SruppConfig, TupeConfig])
def test_a_change_that_makes_nonsense_is_not_saved(config_class, tmp_path):
    config = config_class()
    config.num_hidden_layers = 0
    with pytest.raises(ERRORS, match="num_hidden_layers must be at least 1, not 0"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("config_class", [SruppConfig, TupeConfig])
def test_nonsense_in_a_file_is_refused(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": -1}))
    with pytest.raises(ERRORS, match="num_hidden_layers must be at least 1, not -1"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ERRORS, match="num_labels must be at least 1"):
        config_class.from_dict({"num_labels": 0})


@pytest.mark.parametrize("config_class", CLASSES)
def test_defaults_are_silent(config_class, capfd, recwarn):
    config_class()
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_shallower_config_attends_in_the_layers_that_it_has():
    config = SruppConfig(attention_last_n_layers=3)
    assert config.scale_down(num_hidden_layers=2).attention_layer_indices == [0, 1]
    assert config.scale_down(num_hidden_layers=5).attention_layer_indices == [2, 3, 4]
