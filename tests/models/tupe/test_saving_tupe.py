"""Weights that are tied, encoders that go from head to head, and the attention that is chosen at loading."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForMaskedLM

from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM, TupeForSequenceClassification, TupeModel


def saved_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_tied_weights_are_saved_once_and_tied_again(make_model, tmp_path):
    make_model(TupeForMaskedLM).save_pretrained(tmp_path / "tied")
    make_model(TupeForMaskedLM, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    difference = saved_names(tmp_path / "untied") - saved_names(tmp_path / "tied")
    assert difference == {"lm_head.decoder.weight"}
    tied = TupeForMaskedLM.from_pretrained(tmp_path / "tied")
    assert tied.lm_head.decoder.weight is tied.model.embed_tokens.weight
    untied = TupeForMaskedLM.from_pretrained(tmp_path / "untied")
    assert not torch.equal(untied.lm_head.decoder.weight, untied.model.embed_tokens.weight)


def test_an_encoder_comes_out_of_any_head_and_goes_into_any(make_model, make_inputs, tmp_path):
    source = make_model(TupeForSequenceClassification, num_labels=3)
    source.save_pretrained(tmp_path / "head")
    encoder, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    inputs = make_inputs(7, 5)
    assert torch.equal(encoder(**inputs)[0], source.model(**inputs)[0])
    encoder.save_pretrained(tmp_path / "encoder")
    head, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert {name.partition(".")[0] for name in info["missing_keys"]} == {"lm_head"}
    assert torch.equal(head.model(**inputs)[0], source.model(**inputs)[0])


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"], ids=["auto", "sdpa", "eager"])
def test_attention_is_chosen_at_loading_and_not_saved(make_model, tmp_path, attention):
    make_model(attention="eager").save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()
    assert "tupe_auto" not in (tmp_path / "config.json").read_text()
    model = TupeModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == (attention or "tupe_auto")


def test_an_attention_without_a_bias_is_refused(make_config):
    with pytest.raises((ValueError, ImportError), match=r"[Ff]lash"):
        TupeModel._from_config(make_config(), attn_implementation="flash_attention_2")


def test_half_precision_comes_back_as_saved(make_model, make_inputs, tmp_path):
    make_model(TupeForMaskedLM).bfloat16().save_pretrained(tmp_path)
    model = TupeForMaskedLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**make_inputs(7, 5)).logits.dtype == torch.bfloat16
    assert TupeForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
