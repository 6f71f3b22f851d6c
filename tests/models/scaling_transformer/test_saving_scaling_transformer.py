"""Loading in 16 bits, and vocabularies that are resized and saved."""

import pytest
import torch

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import (
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
    ScalingTransformerModel,
)
from tests.helpers.comparison import assert_close
from tests.helpers.families import SPARSE_LOSS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_16_bits(make_model, make_ids, tmp_path, dtype):
    fields = {"ff_sparsity": 5, "ff_rank": 3, "attention_type": "multiplicative_conv", "attention_sparsity": 6}
    make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **fields).save_pretrained(tmp_path)
    model = ScalingTransformerForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(make_ids(2, 7)).logits.dtype == dtype
    generated = model.generate(make_ids(2, 7), max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 10)
    model.save_pretrained(tmp_path / "again")
    assert next(ScalingTransformerForCausalLM.from_pretrained(tmp_path / "again").parameters()).dtype == dtype


WITHOUT_A_HEAD = [ScalingTransformerModel, ScalingTransformerForSequenceClassification]


@pytest.mark.parametrize("cls", WITHOUT_A_HEAD)
def test_a_resized_model_is_saved_and_loaded(make_model, make_ids, tmp_path, cls):
    """The config still speaks of an output layer that this class does not have."""
    model = make_model(cls, dtype=torch.float32, **SPARSE_LOSS)
    assert model.resize_token_embeddings(70, pad_to_multiple_of=3).num_embeddings == 72
    assert model.config.vocab_size == 72
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    ids = make_ids(2, 9)
    ids[0, 3] = 71
    assert_close("output", loaded(ids)[0], model(ids)[0], 1e-6)


@pytest.mark.parametrize("cls", WITHOUT_A_HEAD)
@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        (SPARSE_LOSS, {"new_num_tokens": 70}, r"42 ids cannot be resized to 70: .*Give pad_to_multiple_of=3"),
        (SPARSE_LOSS, {"pad_to_multiple_of": 50}, "42 ids cannot be resized to 50: .*Give pad_to_multiple_of=3"),
        ({"pad_token_id": 41}, {"new_num_tokens": 41}, "cannot be resized to 41: .*pad_token_id"),
        ({}, {"new_num_tokens": 0}, "new_num_tokens must be a whole number from 1"),
        ({}, {"new_num_tokens": 50.0}, "new_num_tokens must be a whole number from 1"),
        ({}, {"new_num_tokens": 50, "pad_to_multiple_of": 1.5}, "Please make sure to pass an integer"),
    ],
    ids=["new-size", "multiple", "padding-outside", "zero", "float", "float-multiple"],
)
def test_a_size_that_could_not_be_saved_changes_nothing(make_model, cls, fields, arguments, message):
    model = make_model(cls, **fields)
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(**arguments)
    assert (model.config.vocab_size, model.get_input_embeddings().num_embeddings) == (42, 42)


@pytest.mark.parametrize("mixed", [{}, {"lm_head_sparse_probability": 0.5}], ids=["sparse", "mixed"])
def test_the_model_under_a_multiplicative_output_layer_is_not_resized(make_model, tmp_path, mixed):
    model = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **SPARSE_LOSS, **mixed)
    for part in (model, model.model):
        with pytest.raises(
            ValueError, match=r"42 ids cannot be resized to 72: its modules.* so the model under it cannot"
        ):
            part.resize_token_embeddings(72)
        assert part.resize_token_embeddings(40, pad_to_multiple_of=6) is part.get_input_embeddings()
    model.save_pretrained(tmp_path)
    assert ScalingTransformerForCausalLM.from_pretrained(tmp_path).config.vocab_size == 42
    assert ScalingTransformerModel.from_pretrained(tmp_path).resize_token_embeddings(72).num_embeddings == 72
