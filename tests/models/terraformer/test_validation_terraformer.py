"""Settings and inputs that make no sense, and errors that say what to do."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_efficient.models.terraformer.modeling_terraformer import (
    TerraformerForCausalLM,
    TerraformerForConditionalGeneration,
    TerraformerModel,
)
from tests.helpers.families import CROSS, FF


LONE = {"is_encoder_decoder": False, "num_encoder_layers": 0}
SETTINGS = [
    ({"num_encoder_layers": 0}, "a model has encoder layers if, and only if, it is an encoder-decoder"),
    ({"is_encoder_decoder": False}, "a model has encoder layers if, and only if, it is an encoder-decoder"),
    ({"num_hidden_layers": 3}, r"num_hidden_layers \(3\) is the number of the decoder's attentions, here 4"),
    ({"decoder_type": "cross_attention"}, "does not go with attentions_per_layer"),
    ({**CROSS, "forget_every": 1}, "does not go with forget_every"),
    ({**CROSS, "cross_query_type": "multiplicative_conv"}, "wants cross_query_sparsity"),
    ({**CROSS, "cross_output_sparsity": 3}, "cross_output_type='multiplicative_conv' wants cross_output_sparsity"),
    ({"half_width_layers": 1, **FF}, "half_width_layers wants a dense feed-forward layer"),
    ({"half_width_layers": 1, "position_embedding_type": "fixed_base"}, "the digits of positions"),
    ({"half_width_layers": 1, "num_attention_heads": 8}, r"a multiple of num_attention_heads \(8\), not 24"),
    (
        {"position_shared_start": True, "position_embedding_type": "none"},
        "position_shared_start is of an encoder-decoder",
    ),
    ({"half_width_layers": 3}, r"half_width_layers \(3\) is beyond the decoder's 2 layers"),
    ({"double_width_after": 2}, r"double_width_after \(2\) is beyond the decoder's 2 layers"),
    ({"tie_word_embeddings": True, "stream_output": "concatenate"}, "wants an output layer as wide as the embeddings"),
    ({"decoder_start_token_id": 42}, "decoder_start_token_id is 42, outside the vocabulary"),
    ({"encoder_swaps": 0}, "encoder_swaps must be at least 1, not 0"),
    ({"stream_output": "sum"}, "stream_output is 'sum'"),
]


@pytest.mark.parametrize(("fields", "message"), SETTINGS)
def test_settings_that_do_not_fit(make_config, fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make_config(**fields)


def test_a_class_of_the_other_kind(make_config):
    with pytest.raises(ValueError, match="A causal Terraformer has no encoder: give is_encoder_decoder=False"):
        TerraformerForCausalLM(make_config())
    for cls in (TerraformerModel, TerraformerForConditionalGeneration):
        with pytest.raises(ValueError, match="without an encoder take TerraformerForCausalLM"):
            cls(make_config(**LONE))


TARGET = torch.tensor([[5, 6], [7, 8]])
INPUTS = [
    ({"input_ids": torch.zeros(2, 0).long()}, "The source has length 0"),
    ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "Row 1 of the source has no token"),
    ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "Row 0 of the source has padding between its tokens"),
    ({"input_ids": torch.ones(2, 71).long()}, r"table of positions \(max_position_embeddings=70\) ends at 69: shorten"),
    ({"decoder_input_ids": torch.ones(2, 71).long()}, r"max_position_embeddings=70\) ends at 69: shorten the text"),
    ({"decoder_input_ids": None}, "Give either decoder_input_ids or decoder_inputs_embeds"),
    ({"decoder_input_ids": torch.ones(2, 0).long()}, "The input has length 0: give decoder_input_ids"),
    ({"decoder_input_ids": TARGET[:1]}, "have 2 rows, but decoder_input_ids 1: give one target for each source"),
    ({"decoder_input_ids": TARGET + 40}, "decoder_input_ids holds 48, outside the vocabulary of 42 ids"),
    ({"decoder_attention_mask": torch.ones(2, 3)}, r"decoder_attention_mask has shape \(2, 3\)"),
    ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask must have shape \(batch, length\)"),
    ({"decoder_attention_mask": torch.ones(2, 1, 2, 2)}, r"decoder_attention_mask must have shape \(batch, length\)"),
    ({"labels": torch.ones(2, 2, 2).long(), "decoder_input_ids": None}, "labels must have shape"),
    ({"labels": TARGET + 40, "decoder_input_ids": None}, "labels hold 45, outside the classes"),
]


@pytest.mark.parametrize("fields", [{}, CROSS], ids=["joined", "cross"])
@pytest.mark.parametrize(("given", "message"), INPUTS)
def test_inputs_that_do_not_fit(make_model, fields, given, message):
    right = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 4]]), "decoder_input_ids": TARGET}
    model = make_model(**fields)
    with pytest.raises(ValueError, match=message):
        model(**{**right, **given})


SOURCES = [
    (torch.zeros(2, 0), "The source has length 0: give input_ids"),
    (
        torch.tensor([[1, 0, 1], [1, 1, 1]]),
        "Row 0 of the source has padding between its tokens: put it before or behind",
    ),
    (torch.tensor([[1, 1, 1], [0, 0, 0]]), "Row 1 of the source has no token: leave it out"),
    (torch.ones(2, 71), r"max_position_embeddings=70\) ends at 69: shorten the text"),
]


@pytest.mark.parametrize("fields", [{}, CROSS], ids=["joined", "cross"])
@pytest.mark.parametrize(("mask", "message"), SOURCES, ids=["empty", "pads inside", "no token", "too long"])
def test_generate_refuses_sources_as_a_call_does(make_model, fields, mask, message):
    with pytest.raises(ValueError, match=message):
        make_model(**fields).generate(mask.long() + 4, attention_mask=mask.long(), max_new_tokens=2)


def test_encoder_outputs_without_the_second_stream(make_model):
    model = make_model()
    encoded = model.get_encoder()(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="encoder_outputs lack second_stream"):
        model(encoder_outputs=(encoded.last_hidden_state,), decoder_input_ids=TARGET[:1])


@pytest.mark.parametrize("fields", [{}, CROSS], ids=["joined", "cross"])
@pytest.mark.parametrize("length", [2, 5])
def test_a_mask_that_does_not_fit_the_source_in_the_cache(make_model, fields, length):
    model, source = make_model(**fields), torch.tensor([[5, 6, 7], [8, 9, 4]])
    cache = model(source, decoder_input_ids=TARGET, use_cache=True).cache
    with pytest.raises(ValueError, match=f"attention_mask covers {length} tokens, but the source in the cache has 3"):
        model(attention_mask=torch.ones(2, length), decoder_input_ids=TARGET, cache=cache)


@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
def test_labels_without_the_tokens_that_move_them(make_model, name):
    model = make_model()
    setattr(model.config, name, None)
    with pytest.raises(ValueError, match="must name tokens, not"):
        model(torch.tensor([[5, 6, 7], [8, 9, 4]]), labels=TARGET)
