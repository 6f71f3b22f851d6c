"""Named presets have the parameter counts of the published models, to the last one."""

import pytest
import torch

from hf_efficient.auto import FAMILIES
from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM


# Counted from the paper's formula; each rounds to the published number of millions.
PARAMETERS = {
    "enwik8-42m": (42_345_815, 42),
    "enwik8-base": (107_566_295, 108),
    "enwik8-base-k5": (98_129_103, 98),
    "enwik8-large": (190_607_575, 191),
    "enwik8-large-ratio8": (194_993_815, 195),
    "wikitext103-base": (147_676_036, 148),
    "wikitext103-large": (231_690_116, 232),
    "wikitext103-large-ratio8": (233_741_476, 234),
    "wikitext103-large-ratio8-k5": (224_884_892, 225),
    "billionword-base": (328_313_803, 328),
    "billionword-large": (465_318_339, 465),
}


def test_each_preset_has_its_count():
    assert SruppConfig.presets() == list(PARAMETERS) == FAMILIES["srupp"].presets
    assert FAMILIES["tupe"].presets == ["base", "large"]


@pytest.mark.parametrize("name", SruppConfig.presets())
def test_a_preset_has_as_many_parameters_as_published(name):
    config = SruppConfig.preset(name)
    with torch.device("meta"):
        model = SruppForCausalLM(config)
    count, millions = PARAMETERS[name]
    assert model.num_parameters() == count
    assert round(count / 1e6) == millions
    assert config.num_hidden_layers == 10
    assert config.num_attention_heads == 1
    assert config.attention_layer_indices == (
        [4, 9] if "k5" in name or name == "billionword-large" else list(range(10))
    )


def test_a_preset_takes_overrides_and_an_unknown_one_is_refused():
    config = SruppConfig.preset("enwik8-base", num_hidden_layers=2, vocab_size=7)
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (2, 7, 3072)
    assert SruppConfig.preset_fields("enwik8-base")["vocab_size"] == 205
    with pytest.raises(ValueError, match=r"no preset 'enwik9'.*enwik8-base"):
        SruppConfig.preset("enwik9")
