"""Original checkpoints in and out, files that must not be trusted, and the command line."""

import argparse

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_efficient.models.tupe import convert_tupe
from hf_efficient.models.tupe.configuration_tupe import TupeConfig
from hf_efficient.models.tupe.convert_tupe import (
    CONVERTER,
    build_model,
    convert_state_dict,
    infer_config,
    restore_state_dict,
)
from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM, TupeForSequenceClassification, TupeModel
from tests.helpers.comparison import assert_equal
from tests.helpers.processes import run_program


ENCODER = "decoder.sentence_encoder."
VARIANTS = [
    pytest.param(TupeForMaskedLM, {}, id="masked-lm"),
    pytest.param(TupeForMaskedLM, {"relative_attention": False, "normalize_before": True}, id="tupe-a-prenorm"),
    pytest.param(TupeForSequenceClassification, {"num_labels": 5, "embedding_norm": False}, id="classification"),
    pytest.param(TupeModel, {}, id="encoder"),
]


@pytest.fixture
def make_original(make_model):
    """`make_original(cls, separate_qkv=False, **fields)`: a model and its weights under the original's names."""

    def make(cls=TupeForMaskedLM, separate_qkv=False, **fields):
        model = make_model(cls, mask_token_id=39, **fields)
        return model, restore_state_dict(model.state_dict(), model.config, separate_qkv)

    return make


@pytest.mark.parametrize("separate_qkv", [False, True], ids=["packed", "separate"])
@pytest.mark.parametrize(("cls", "fields"), VARIANTS)
def test_both_directions_are_exact(make_original, cls, fields, separate_qkv):
    model, original = make_original(cls, separate_qkv, **fields)
    assert_equal("tensor", convert_state_dict(original, model.config), model.state_dict())
    again = convert_state_dict(original, model.config)
    assert_equal("tensor", restore_state_dict(again, model.config, separate_qkv), original)
    packed = [name for name in original if "in_proj" in name]
    assert len(packed) == (0 if separate_qkv else 4)
    if cls is not TupeModel:
        assert all(name.startswith(("decoder.", "classification_heads.")) for name in original)


def test_packed_projection_is_stacked_in_the_order_q_k_v(make_original):
    model, original = make_original(TupeModel)
    layer = model.layers[1].self_attn
    weights = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    assert torch.equal(original["layers.1.self_attn.in_proj_weight"], weights)
    assert original["layers.1.self_attn.in_proj_bias"].shape == (45,)


@pytest.mark.parametrize(("cls", "fields"), VARIANTS)
def test_shapes_tell_the_config_and_the_model(make_original, make_inputs, cls, fields):
    model, original = make_original(cls, **fields)
    heads = 3 if fields.get("relative_attention") is False else None
    config = infer_config(original, heads, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    told = {**model.config.to_dict(), "architectures": None, "classifier_dropout": 0.1, "_name_or_path": ""}
    assert {**config.to_dict(), "architectures": None, "_name_or_path": ""} == told
    rebuilt = build_model(original, config)
    assert type(rebuilt) is cls
    assert not rebuilt.training
    inputs = make_inputs(7, 5)
    with torch.no_grad():
        assert torch.equal(rebuilt(**inputs)[0], model(**inputs)[0])


def test_segments_of_the_large_branch_are_left_out(make_original):
    model, original = make_original(separate_qkv=True)
    original[ENCODER + "segment_embeddings.weight"] = torch.zeros(2, 15)
    assert_equal("tensor", convert_state_dict(original, model.config), model.state_dict())


def test_a_classifier_that_was_saved_with_its_unused_lm_head_is_a_classifier(make_original):
    model, original = make_original(TupeForSequenceClassification, num_labels=2)
    _, pretrained = make_original(TupeForMaskedLM)
    heads = {name: tensor for name, tensor in pretrained.items() if name.startswith("decoder.lm_head.")}
    rebuilt = build_model({**original, **heads}, infer_config(original))
    assert_equal("tensor", rebuilt.state_dict(), model.state_dict())


def test_tensors_of_other_models_are_named(make_original):
    model, original = make_original()
    with pytest.raises(ValueError, match=r"decoder.sentence_encoder.layers.0.attention.query.weight is no tensor of"):
        convert_state_dict({**original, ENCODER + "layers.0.attention.query.weight": torch.zeros(2)}, model.config)
    with pytest.raises(ValueError, match="in_proj_weight has 44 rows; hidden_size 15"):
        convert_state_dict({ENCODER + "layers.0.self_attn.in_proj_weight": torch.zeros(44, 15)}, model.config)
    with pytest.raises(ValueError, match=r"qa_outputs.weight has no place in an original"):
        restore_state_dict({"qa_outputs.weight": torch.zeros(2)}, model.config)
    with pytest.raises(ValueError, match=r"No TUPE checkpoint: it lacks embed_tokens.weight.*bert.embeddings.weight"):
        infer_config({"bert.embeddings.weight": torch.zeros(3, 3)})
    del original["decoder.lm_head.dense.bias"]
    with pytest.raises(ValueError, match=r"missing \['lm_head.dense.bias'\]"):
        build_model(original, model.config)


def test_tupe_a_needs_its_number_of_heads(make_original):
    _, original = make_original(relative_attention=False)
    with pytest.raises(ValueError, match="give num_attention_heads"):
        infer_config(original)
    assert infer_config(original, 5).num_attention_heads == 5
    arguments = {"encoder_attention_heads": 3, "max_rel_pos": None}
    assert infer_config(original, arguments=arguments).num_attention_heads == 3
    assert infer_config(original, 5, arguments).num_attention_heads == 5


def test_the_arguments_of_a_checkpoint_tell_what_its_shapes_do_not(make_original, tmp_path, capsys):
    _, original = make_original(relative_attention_max_distance=64)
    arguments = argparse.Namespace(
        encoder_attention_heads=3,
        encoder_embed_dim=15,
        max_rel_pos=64,
        activation_fn="gelu_accurate",
        dropout=0.2,
        attention_dropout=0.3,
        activation_dropout=0.4,
        pooler_dropout=0.5,
        pooler_activation_fn="relu",
        lr=[0.1],
    )
    torch.save({"model": original, "args": arguments}, tmp_path / "checkpoint.pt")
    command = ["--checkpoint", str(tmp_path / "checkpoint.pt"), "--output_dir"]
    CONVERTER.run([*command, str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "does not tell these, set to the paper's values: attention_scale_factor 2, pad_token_id 1, " in said
    assert "dropout" not in said
    config = TupeConfig.from_pretrained(tmp_path / "out")
    assert (config.relative_attention_max_distance, config.hidden_act) == (64, "gelu_pytorch_tanh")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.3)
    assert (config.activation_dropout, config.classifier_dropout) == (0.4, 0.5)
    assert config.pooler_activation == "relu"
    assert infer_config(original, None, vars(arguments), hidden_dropout_prob=0.0).hidden_dropout_prob == 0.0
    CONVERTER.run([*command, str(tmp_path / "other"), "--set", "relative_attention_max_distance=32"])
    assert TupeConfig.from_pretrained(tmp_path / "other").relative_attention_max_distance == 32
    with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
        CONVERTER.run([*command, str(tmp_path / "out")])


def test_command_line_writes_a_folder_that_loads(make_original, make_inputs, tmp_path, capsys):
    model, original = make_original()
    torch.save({"model": original, "args": argparse.Namespace(arch="tupe_base")}, tmp_path / "checkpoint_best.pt")
    places = ("--checkpoint", tmp_path / "checkpoint_best.pt", "--output_dir", tmp_path / "converted")
    run_program(convert_tupe, *places)
    said = capsys.readouterr().out
    assert "Wrote TupeForMaskedLM" in said
    assert "No tokenizer was saved" in said
    inputs = make_inputs(7, 5)
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        assert torch.equal(converted(**inputs).logits, model(**inputs).logits)
    assert "model.embed_tokens.weight" in load_file(tmp_path / "converted" / "model.safetensors")


def test_command_line_for_tupe_a_and_the_ablation(make_original, tmp_path, capsys):
    _, original = make_original(TupeForSequenceClassification, relative_attention=False, untie_cls=False, num_labels=2)
    save_file(original, tmp_path / "a.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "a.safetensors"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="give num_attention_heads"):
        CONVERTER.run(arguments)
    assert not (tmp_path / "out").exists()
    CONVERTER.run([*arguments, "--set", "num_attention_heads=3", "untie_cls=false"])
    assert "Wrote TupeForSequenceClassification" in capsys.readouterr().out
    converted = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert converted.config.num_attention_heads == 3
    assert not converted.config.untie_cls
    assert not converted.config.relative_attention
