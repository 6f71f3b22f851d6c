"""Every error says what was wrong and what to do."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import DynamicCache, StaticCache

from hf_efficient.models.scaling_transformer.configuration_scaling_transformer import ScalingTransformerConfig
from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import (
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
    ScalingTransformerModel,
)


IDS = torch.arange(10).view(2, 5)
FF = {"ff_sparsity": 5, "ff_rank": 3}
QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
HYBRID = {**FF, **QKV, "ff_sru_layers": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_attention_heads": 5}, r"hidden_size \(24\) must be a multiple of num_attention_heads \(5\)"),
        ({**FF, "ff_sparsity": 4}, r"intermediate_size \(30\) must be a multiple of ff_sparsity \(4\)"),
        (
            {"ff_sparsity": 5},
            r"wants ff_rank.*hidden_size // ff_sparsity \(4\).*intermediate_size // ff_sparsity \(6\)",
        ),
        ({"ff_rank": 3}, "ff_rank and the other settings of a controller want ff_sparsity"),
        ({"ff_inner_bias": True}, "want ff_sparsity"),
        ({"ff_temperature": 0.2}, "want ff_sparsity.*leave out ff_temperature"),
        ({"ff_hard_probability": 0.0, "ff_scaled_init": True}, "leave out ff_hard_probability, ff_scaled_init"),
        ({**FF, "ff_rank": 0}, "ff_rank must be at least 1"),
        ({**FF, "hidden_act": "tanh"}, "hidden_act"),
        ({"hidden_act": "rellu"}, "Did you mean 'relu'"),
        ({**FF, "ff_temperature": 0.0}, "ff_temperature must be"),
        ({**FF, "ff_hard_probability": 1.5}, "ff_hard_probability must be"),
        ({**QKV, "attention_sparsity": 7}, r"hidden_size \(24\) must be a multiple of attention_sparsity \(7\)"),
        ({**QKV, "attention_kernel_width": 4}, "attention_kernel_width must be odd, not 4"),
        ({**QKV, "attention_window": 0}, "attention_window must be at least 1"),
        ({**QKV, "attention_sparsity": None}, "wants attention_sparsity, the number of modules"),
        ({"attention_sparsity": 6}, "attention_sparsity wants an attention_type.*'multiplicative_conv'"),
        ({"attention_type": "convolution"}, "attention_type"),
        ({"attention_output": "conv"}, r"belong to attention_type='multiplicative_conv', not to 'dense'"),
        ({"attention_type": "multiplicative", "attention_sparsity": 6, "attention_share_qk": True}, "belong to"),
        ({"position_embedding_type": "fixed_base", "hidden_size": 20}, "hidden_size in multiples of 8, not 20"),
        ({"position_bases": [11, 1]}, "position_bases must be numbers from 2"),
        ({"position_bases": [11, 235]}, r"position_bases must be at most 234.*got \[11, 235\]"),
        (
            {"position_embedding_type": "fixed_base", "position_bases": [9, 2], "max_position_embeddings": 257},
            r"smallest of position_bases \(2\) say 256 positions, fewer than max_position_embeddings \(257\)",
        ),
        ({"position_max_offset": 70}, r"position_max_offset \(70\) leaves nothing of max_position_embeddings \(70\)"),
        ({"lm_head_type": "multiplicative"}, "wants loss_sparsity"),
        (
            {"lm_head_type": "multiplicative", "loss_sparsity": 4},
            r"vocab_size \(42\).*loss_sparsity \(4\).*it 44, with 2",
        ),
        ({"loss_sparsity": 3}, "loss_sparsity and lm_head_sparse_probability want lm_head_type='multiplicative'"),
        ({"lm_head_sparse_probability": 0.5}, "want lm_head_type='multiplicative'"),
        ({"lm_head_type": "low_rank"}, "wants lm_head_rank"),
        ({"lm_head_rank": 3}, "and no other type does"),
        ({"lm_head_type": "low_rank", "lm_head_rank": 3, "lm_head_bias": False}, "lm_head_bias=False is not to be had"),
        ({"lm_head_type": "low_rank", "lm_head_rank": 3, "tie_word_embeddings": True}, "tie_word_embeddings wants"),
        ({"is_causal": False}, "is_causal must be True"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"pad_token_id": 42}, "pad_token_id"),
    ],
)
def test_configs(make_config, fields, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        make_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"ff_temperature": 0.1, "ff_hard_probability": 0.3},
        {"position_bases": [234]},
        {"position_bases": [2], "position_embedding_type": "fixed_base", "max_position_embeddings": 256},
        # Positions without a table read no offset, whatever it is.
        {"position_embedding_type": "fixed_base", "position_max_offset": 70},
        {"position_embedding_type": "none", "position_max_offset": 12, "position_zero_probability": 0.5},
    ],
    ids=["defaults-of-a-controller", "largest-base", "smallest-reach", "fixed-base-offset", "no-positions-offset"],
)
def test_configs_at_the_edge_are_trained(make_config, fields):
    model = ScalingTransformerForCausalLM(make_config(**fields)).train()
    length = min(model.config.max_position_embeddings, 256)
    loss = model(torch.ones(2, length).long(), labels=torch.ones(2, length).long()).loss
    loss.backward()
    assert loss.isfinite()


def test_a_config_that_was_changed_to_nonsense_builds_no_model(make_config):
    config = make_config(**FF)
    config.__dict__["ff_sparsity"] = 4
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="must be a multiple of ff_sparsity"):
        ScalingTransformerForCausalLM(config)


@pytest.mark.parametrize("fields", [{}, HYBRID], ids=["dense", "hybrid"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 24)}, "exactly one"),
        ({"input_ids": IDS[0]}, r"shape \(batch, length\).*got \(5,\)"),
        ({"input_ids": IDS[:, :0]}, "length 0; give at least one token"),
        ({"inputs_embeds": torch.zeros(2, 0, 24)}, "length 0; give at least one token"),
        ({"inputs_embeds": torch.zeros(2, 5, 23)}, "23 wide, but hidden_size is 24"),
        ({"input_ids": IDS + 33}, r"holds 42, outside the vocabulary of 42 ids \(0 to 41\)"),
        ({"input_ids": IDS - 1}, "holds -1, outside"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"shape \(2, 4\), but must have shape \(2, 5\)"),
        (
            {"input_ids": torch.zeros(1, 71).long()},
            r"position 70, but the table of positions .*=70\) ends at 69: shorten",
        ),
        ({"input_ids": IDS, "position_ids": torch.arange(66, 71).expand(2, -1)}, "reaches position 70"),
        ({"input_ids": IDS, "position_ids": torch.arange(-1, 4).expand(2, -1)}, "position_ids hold -1"),
        ({"input_ids": IDS, "cache": [1]}, "cache must be a Cache"),
    ],
)
def test_inputs(make_model, fields, inputs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_model(dtype=torch.float32, **fields)(**inputs)


def test_positions_that_digits_cannot_say(make_model):
    model = make_model(position_embedding_type="fixed_base", position_bases=[2, 3])
    assert model(IDS, position_ids=torch.arange(251, 256).expand(2, -1)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="reaches position 256, but the digits of the smallest base end at 255"):
        model(IDS, position_ids=torch.arange(252, 257).expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, HYBRID], ids=["dense", "hybrid"])
def test_what_is_full_says_so(make_model, fields):
    """A static cache would silently lose its last key, a table of positions has no more rows."""
    model = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **fields)
    cache = StaticCache(config=model.config, max_cache_len=6)
    model(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"The cache holds 5 tokens of 6, and 2 more do not fit.*max_cache_len"):
        model(IDS[:, :2], cache=cache)
    assert model(IDS[:, :1], cache=cache).logits.shape == (2, 1, 42)
    with pytest.raises(ValueError, match="holds 6 tokens of 6, and 1 more do not fit"):
        model(IDS[:, :1], cache=cache)
    with pytest.raises(ValueError, match="reaches position 70"):
        model.generate(IDS, max_new_tokens=70, do_sample=False)


@torch.no_grad()
def test_caches_of_others(make_model):
    dense, hybrid = make_model(), make_model(**HYBRID)
    for model, other in ((dense, hybrid), (hybrid, dense), (dense, make_model(num_hidden_layers=3))):
        with pytest.raises(ValueError, match=r"make it by DynamicCache\(config=model.config\)"):
            model(IDS, cache=DynamicCache(config=other.config))
    for fields in ({}, HYBRID):
        model = make_model(**fields)
        with pytest.raises(ValueError, match="begins with a cache of its own"):
            model(IDS, cache=make_model(**{**fields, "num_attention_heads": 2})(IDS).cache)
    with pytest.raises(ValueError, match="cache holds keys of 2 rows, but the input has 1"):
        dense(IDS[:1], cache=dense(IDS).cache)
    with pytest.raises(ValueError, match="each batch, and each model, begins with a cache of its own"):
        hybrid(IDS[:1], cache=hybrid(IDS).cache)
    with pytest.raises(ValueError, match="A document begins within a row that goes on from a cache"):
        hybrid(IDS, cache=hybrid(IDS).cache, position_ids=torch.tensor([[5, 6, 0, 1, 2]]))


@pytest.mark.parametrize("cls", [ScalingTransformerModel, ScalingTransformerForCausalLM])
def test_keywords_that_nothing_reads(make_model, cls):
    with pytest.raises(TypeError, match="attention_maks"):
        make_model(cls)(IDS, attention_maks=torch.ones(2, 5))


def test_flash_attention_is_refused(make_config):
    with pytest.raises((ValueError, ImportError), match=r"[Ff]lash"):
        ScalingTransformerModel._from_config(make_config(), attn_implementation="flash_attention_2")


def test_sizes_of_a_vocabulary(make_model):
    model = make_model(ScalingTransformerForCausalLM, lm_head_type="multiplicative", loss_sparsity=3)
    with pytest.raises(ValueError, match="42 ids cannot be resized to 45: its modules share the vocabulary evenly"):
        model.resize_token_embeddings(43, pad_to_multiple_of=5)
    assert model.resize_token_embeddings(42) is model.get_input_embeddings()
    assert model(IDS).logits.shape == (2, 5, 42)


def test_unknown_presets():
    with pytest.raises(ValueError, match=r"no preset '24x1024-sparse'.*24x1024-all"):
        ScalingTransformerConfig.preset("24x1024-sparse")


def test_a_classifier_without_a_mask_takes_no_id_for_padding(make_model):
    """Id 0 starts the original's texts and pads them."""
    model = make_model(ScalingTransformerForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = torch.tensor([[5, 7, 0, 0]])
    torch.testing.assert_close(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)
    padded = model(ids, attention_mask=torch.tensor([[1, 1, 0, 0]])).logits
    torch.testing.assert_close(padded, model(ids[:, :2]).logits)
    assert not torch.allclose(padded, model(ids).logits)
