"""Every error says what was wrong, and configs derive what they are not given."""

import functools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import DynamicCache

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppForMaskedLM, SruppModel


IDS = torch.arange(10).view(2, 5)
MEMORY = "memory"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either input_ids or inputs_embeds: exactly one"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 18)}, "exactly one"),
        ({"input_ids": IDS[0]}, r"shape \(batch, length\).*got \(5,\).*x\[None\]"),
        ({"inputs_embeds": torch.zeros(5, 18)}, "add the batch dimension"),
        ({"input_ids": IDS[:, :0]}, "length 0; give at least one token"),
        ({"inputs_embeds": torch.zeros(2, 5, 17)}, "17 wide, but embedding_size is 18"),
        ({"input_ids": IDS + 32}, r"holds 41, outside the vocabulary of 41 ids \(0 to 40\)"),
        ({"input_ids": IDS - 1}, "holds -1, outside"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"shape \(2, 4\), but must have shape \(2, 5\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 6), "memory": MEMORY}, r"\(2, 5\) or \(2, 8\)"),
        ({"input_ids": IDS, "position_ids": torch.arange(5)[None], "memory": MEMORY}, "position_ids.*do not fit"),
        ({"input_ids": IDS, "position_ids": torch.arange(5)[None], "return_memory": True}, "position_ids.*do not fit"),
        ({"input_ids": IDS[:1], "memory": MEMORY}, r"cell_states\[0\] must have shape \(1, 18\); got \(2, 18\)"),
        ({"input_ids": IDS, "memory": MEMORY, "cache": DynamicCache()}, "not both"),
    ],
)
def test_inputs(make_model, inputs, message):
    model = make_model(dtype=torch.float32)
    if inputs.get("memory") is MEMORY:
        inputs = inputs | {"memory": model(IDS[:, :3], return_memory=True).memory}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_mask_that_fits_neither_input_nor_cache(make_model):
    model = make_model(dtype=torch.float32)
    cache = model(IDS).cache
    with pytest.raises(ValueError, match=r"shape \(2, 6\), but must have shape \(2, 3\) or \(2, 8\)"):
        model(IDS[:, :3], attention_mask=torch.ones(2, 6), cache=cache)


def test_memory_of_another_model(make_model):
    make = functools.partial(make_model, dtype=torch.float32)
    memory = make()(IDS, return_memory=True).memory
    with pytest.raises(ValueError, match="3 states and 3 inputs, but the model has 2 layers"):
        make(num_hidden_layers=2)(IDS, memory=memory)
    with pytest.raises(ValueError, match=r"cell_states\[0\] must have shape \(2, 20\)"):
        make(hidden_size=20)(IDS, memory=memory)
    shorter = memory._replace(layer_inputs=(*memory.layer_inputs[:2], memory.layer_inputs[2][:, 1:]))
    with pytest.raises(ValueError, match=r"layer_inputs\[2\] must have shape \(2, 5, 18\); got \(2, 4, 18\)"):
        make()(IDS, memory=shorter)
    absent = memory._replace(layer_inputs=(*memory.layer_inputs[:2], None))
    with pytest.raises(ValueError, match=r"layer_inputs\[2\].*got None"):
        make()(IDS, memory=absent)
    unused = make(attention_layers=[0, 1])
    assert unused(IDS, memory=absent).last_hidden_state.isfinite().all()


def test_memory_of_another_dtype(make_model):
    """The states may be of any; autocast makes the rest agree."""
    model, wide = make_model(dtype=torch.float32), make_model()
    memory = wide(IDS, return_memory=True).memory
    with pytest.raises(ValueError, match=r"layer_inputs\[0\] is of torch.float64, .* computes in torch.float32"):
        model(IDS, memory=memory)
    expected = wide(IDS, memory=memory).last_hidden_state
    memory = memory._replace(layer_inputs=tuple(tensor.float() for tensor in memory.layer_inputs))
    torch.testing.assert_close(model(IDS, memory=memory).last_hidden_state.double(), expected, atol=1e-4, rtol=1e-4)
    memory = memory._replace(layer_inputs=tuple(tensor.bfloat16() for tensor in memory.layer_inputs))
    with pytest.raises(ValueError, match=r"torch.bfloat16, .* torch.float32"):
        model(IDS, memory=memory)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS, memory=memory).last_hidden_state.isfinite().all()


def test_memory_wants_an_attention_that_takes_masks(make_model):
    model = make_model(dtype=torch.float32)
    memory = model(IDS, return_memory=True).memory
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"eager and sdpa.*set_attn_implementation\('sdpa'\)"):
        model(IDS, memory=memory)


def test_flash_attention_is_refused(make_config):
    with pytest.raises((ValueError, ImportError), match=r"[Ff]lash"):
        SruppModel._from_config(make_config(), attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"attention_every_n_layers": 0}, "attention_every_n_layers must be at least 1"),
        ({"attention_every_n_layers": 2, "attention_last_n_layers": 1}, "or name the attention_layers"),
        ({"bidirectional": True, "hidden_size": 17}, "even hidden_size"),
        ({"bidirectional": True, "is_causal": True}, "cannot be causal"),
        ({"recurrence_activation": "relu"}, "'identity' or 'tanh'"),
        ({"projection_size": [10, 10]}, "one size, or 3 of them"),
        ({"projection_size": [10, -1, 10], "attention_layers": []}, "one size, or 3 of them"),
        ({"attention_layers": [3]}, "names layer 3, but there are 3 layers"),
        ({"attention_layers": [-4]}, "names layer -4"),
        ({"num_attention_heads": 3}, r"Layer 0 attends, so its projection_size \(10\) must be a positive multiple"),
        ({"projection_size": 0}, r"For plain SRU set attention_layers=\[\]"),
        ({"tie_word_embeddings": True, "embedding_size": 14}, r"embedding_size \(14\) equal to hidden_size"),
        ({"adaptive_cutoffs": []}, "must rise between 0 and vocab_size"),
        ({"adaptive_cutoffs": [20, 20]}, "must rise"),
        ({"adaptive_cutoffs": [41]}, "must rise"),
        ({"adaptive_cutoffs": [20, 33], "adaptive_embedding_size": 15}, "too small for 2 divisions by 4"),
        ({"adaptive_cutoffs": [20], "tie_adaptive_projections": True, "embedding_size": 14}, "Tied embeddings need"),
    ],
)
def test_configs(make_config, fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        make_config(**fields)


def test_heads_want_models_that_suit_them(make_config):
    with pytest.raises(ValueError, match="bidirectional=True"):
        SruppForMaskedLM(make_config())
    with pytest.raises(ValueError, match="must not see what it predicts"):
        SruppForCausalLM(make_config(bidirectional=True))


@pytest.mark.parametrize(
    ("fields", "attending"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"attention_every_n_layers": 5}, [4, 9]),
        ({"attention_every_n_layers": 10}, [9]),
        ({"attention_every_n_layers": 11}, []),
        ({"attention_last_n_layers": 2}, [8, 9]),
        ({"attention_last_n_layers": 0}, []),
        ({"attention_layers": [-1, 6]}, [6, 9]),  # the paper's best two, which no rule can express
        ({"attention_layers": [], "attention_every_n_layers": 2}, []),
    ],
)
def test_which_layers_attend(fields, attending):
    config = SruppConfig(**fields)
    assert config.attention_layer_indices == attending
    hybrid = attending or [0]
    assert config.layer_types == ["hybrid" if layer in hybrid else "linear_attention" for layer in range(10)]
    again = SruppConfig.from_dict(config.to_dict())
    assert again.attention_layer_indices == attending
    assert "layer_types" not in config.to_diff_dict()


def test_original_names_of_fields():
    config = SruppConfig(n_d=64, n_proj=16, depth=4, attn_heads=2, attn_every_n_layers=2)
    assert (config.hidden_size, config.projection_size, config.attention_layer_indices) == (64, 16, [1, 3])


def test_derived_fields(make_config):
    assert make_config().is_causal
    assert not make_config(bidirectional=True).is_causal
    assert make_config(embedding_size=14).input_sizes == [14, 18, 18]
    assert make_config(embedding_size=14, project_input=True).input_sizes == [18, 18, 18]
    assert make_config(projection_size=[0, 10, 4], attention_layers=[1]).projection_sizes == [0, 10, 4]
    assert make_config(adaptive_cutoffs=[20]).adaptive_embedding_size == 18
