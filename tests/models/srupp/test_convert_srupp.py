"""Original checkpoints in and out, tensor by tensor. Their outputs and gradients are compared in tests/golden."""

import pytest
import torch

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.convert_srupp import (
    build_model,
    check_config,
    convert_state_dict,
    infer_config,
    restore_state_dict,
    unknown_fields,
)
from hf_efficient.models.srupp.modeling_srupp import SruppForTokenClassification, SruppModel
from tests.helpers.comparison import assert_equal


def test_both_directions_are_exact(make_original, variant):
    model, original = make_original(**variant)
    assert_equal("tensor", convert_state_dict(original, model.config), model.state_dict())
    assert all(name.startswith(("rnn.", "embedding_layer.", "output_layer.")) for name in original)
    assert sum(name.endswith("scale_x") for name in original) == 3
    halves = {name: tensor.half() for name, tensor in original.items()}
    assert_equal("tensor", restore_state_dict(convert_state_dict(halves, model.config), model.config), halves)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("fields", [{}, {"attention_layers": [], "projection_size": [0, 7, 10]}], ids=["srupp", "sru"])
def test_stacks_cells_and_modules_are_exact(make_original, fields, bidirectional):
    if fields:
        fields = {**fields, "attention_layer_norm": False, "projection_dropout": 0.0}
    model, original = make_original(SruppModel, bidirectional=bidirectional, embedding_size=14, **fields)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("embed_tokens")}
    assert_equal("tensor", convert_state_dict(original, model.config), expected)
    cell = {n.removeprefix("rnn_lst.0."): t for n, t in original.items() if n.startswith("rnn_lst.0.")}
    converted = convert_state_dict(cell, model.config)
    assert_equal("tensor", converted, model.layers[0].state_dict())
    assert_equal("tensor", restore_state_dict(converted, model.config), cell)
    old = restore_state_dict(expected, model.config, sru_2=True) if fields else original
    assert_equal("tensor", convert_state_dict(old, model.config), expected)
    if fields:
        assert old["rnn_lst.0.weight"].shape == (14, 72)
        assert old["rnn_lst.1.weight_proj"].shape == (18, 7)
    else:
        module = {n.removeprefix("transform_module."): t for n, t in cell.items() if n.startswith("transform_module.")}
        converted = convert_state_dict(module, model.config)
        assert_equal("tensor", converted, model.layers[0].projection.state_dict())
        assert_equal("tensor", restore_state_dict(converted, model.config), module)


@pytest.mark.parametrize("tied", [False, True])
def test_word_models_are_exact(make_original, tied, word_fields):
    model, original = make_original(**word_fields, tie_adaptive_projections=tied)
    assert_equal("tensor", convert_state_dict(original, model.config), model.state_dict())
    assert original["output_layer.out_layers.0.weight"].shape == (13, 17)
    assert original["output_layer.out_layers.2.weight"].shape == (11, 1)
    rows = original["output_layer.out_layers.0.weight"][11:]
    assert torch.equal(rows, model.lm_head.cluster_weight)
    told = infer_config(original)
    assert (told.adaptive_cutoffs, told.vocab_size, told.adaptive_divisor) == ([11, 30], 41, 4)
    assert told.tie_adaptive_projections == tied
    rebuilt = build_model(original, SruppConfig(**{**told.to_dict(), "num_attention_heads": 2}))
    assert rebuilt.num_parameters() == model.num_parameters()
    assert_equal("tensor", rebuilt.state_dict(), model.state_dict())
    if not tied:
        with pytest.raises(ValueError, match="differs from the embedding's: set tie_adaptive_projections=False"):
            convert_state_dict(original, SruppConfig(**{**told.to_dict(), "tie_adaptive_projections": True}))


def test_rows_of_the_last_map_are_planar(make_original):
    model, original = make_original(bidirectional=True, cls=SruppModel)
    theirs = original["rnn_lst.1.transform_module.linear3.weight"]
    ours = model.layers[1].projection.out_proj.weight
    for direction, part, unit in [(0, 0, 0), (0, 2, 5), (1, 0, 8), (1, 1, 3)]:
        assert torch.equal(theirs[(direction * 9 + unit) * 3 + part], ours[(direction * 3 + part) * 9 + unit])


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_come_before_values(make_original, heads):
    model, original = make_original(num_attention_heads=heads)
    attention = model.model.layers[0].projection.attention
    keys, values = original["rnn.rnn_lst.0.transform_module.linear2.weight"].split(10)
    assert torch.equal(values, attention.v_proj.weight)
    assert torch.equal(keys, attention.q_proj.weight.T if heads == 1 else attention.k_proj.weight)


def test_tensors_tell_the_config(make_original, variant):
    model, original = make_original(**variant)
    untold = ("num_attention_heads", "normalize_after", "recurrence_activation", "attention_normalize_after")
    untold = {name: getattr(model.config, name) for name in untold}
    told = infer_config(original, **untold, has_skip_term=model.config.has_skip_term)
    assert told.rescale == model.config.rescale
    assert told.highway_bias == (0.0 if variant.get("projection_size") == 0 else -2.0)
    if variant.get("tie_word_embeddings"):  # the original has no such model; it is untied from here on
        assert not told.tie_word_embeddings
    rebuilt = build_model(original, told)
    ids = torch.tensor([[1, 2, 40]])
    with torch.no_grad():
        assert torch.equal(rebuilt(ids).logits, model(ids).logits)


def test_the_scale_of_the_highway_is_compared(make_original):
    for bias in (-2.0, -0.5, -1.23456, 0.123456789):
        model, original = make_original(rescale=True, highway_bias=bias)
        told = infer_config(original, num_attention_heads=2)
        assert told.highway_bias == pytest.approx(bias, abs=1e-6)
        assert_equal("tensor", restore_state_dict(convert_state_dict(original, told), told), original)
    wrong = SruppConfig(**{**model.config.to_dict(), "highway_bias": -2.0})
    with pytest.raises(ValueError, match=r"scales the highway by 1.806\d+, but rescale=True with highway_bias=-2.0"):
        convert_state_dict(original, wrong)
    with pytest.raises(ValueError, match="but rescale=False"):
        convert_state_dict(original, SruppConfig(**{**model.config.to_dict(), "rescale": False}))


def test_what_does_not_fit_the_config_is_named(make_config, make_original, word_fields):
    model, original = make_original()
    with pytest.raises(ValueError, match=r"num_hidden_layers 3 \(config: 10\).*vocab_size 41 \(config: 205\)"):
        check_config(original, SruppConfig.preset("enwik8-base"))
    with pytest.raises(ValueError, match=r"attention_layer_indices \[0, 1, 2\] \(config: \[2\]\)"):
        build_model(original, make_config(attention_layers=[2]))
    with pytest.raises(ValueError, match=r"vocab_size 41 \(config: 41\)|adaptive_cutoffs None \(config: \[11, 30\]\)"):
        build_model(original, make_config(**word_fields))
    check_config(original, model.config)
    for fields, message in [
        ({"attention_layers": [2]}, "Layer 0 of the checkpoint has attention, that of the config projection"),
        ({"num_hidden_layers": 2}, r"rnn_lst.2.* but num_hidden_layers is 2"),
        ({"hidden_size": 12}, r"has shape \(36,\); hidden_size 12"),
        ({"projection_size": 8}, r"linear2.weight of layer 0 has shape \(20, 10\); projection_size 8 needs \(16, 8\)"),
        ({"use_peephole": False}, "use_peephole is False, but weight_c of layer 0 is not zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_state_dict(original, make_config(**fields))


def test_tensors_of_other_models_are_named(make_original, word_fields):
    model, original = make_original()
    config = model.config
    with pytest.raises(ValueError, match=r"transformer.wte.weight has no place in an SRU"):
        convert_state_dict({**original, "transformer.wte.weight": torch.zeros(2)}, config)
    with pytest.raises(ValueError, match=r"gamma of layer 1 is no tensor of an SRU"):
        convert_state_dict({**original, "rnn.rnn_lst.1.gamma": torch.zeros(2)}, config)
    with pytest.raises(ValueError, match=r"linear4.weight of layer 1 is no tensor of an SRU"):
        convert_state_dict({**original, "rnn.rnn_lst.1.transform_module.linear4.weight": torch.zeros(2)}, config)
    with pytest.raises(ValueError, match=r"No SRU or SRU\+\+ checkpoint.*wte.weight"):
        infer_config({"wte.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"score.weight has no place in an original"):
        restore_state_dict(SruppForTokenClassification(config).state_dict(), config)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has no place in an original"):
        restore_state_dict(model.model.state_dict(), config)
    del original["output_layer.bias"]
    with pytest.raises(ValueError, match=r"missing \['lm_head.bias'\]"):
        build_model(original, config)
    words, original = make_original(**word_fields)
    with pytest.raises(ValueError, match=r"out_layers.0.weight has 13 rows; .* need 12"):
        convert_state_dict(original, SruppConfig(**{**words.config.to_dict(), "adaptive_cutoffs": [10, 30]}))


def test_a_stack_becomes_a_model_that_is_fed_embeddings(make_original):
    model, original = make_original(SruppModel, embedding_size=14)
    rebuilt = build_model(original, model.config)
    inputs = torch.randn(2, 5, 14)
    with torch.no_grad():
        ours, expected = (m(inputs_embeds=inputs).last_hidden_state for m in (rebuilt, model))
    assert torch.equal(ours, expected)
    cell = {n.removeprefix("rnn_lst.0."): t for n, t in original.items() if n.startswith("rnn_lst.0.")}
    assert build_model(cell, infer_config(cell, num_attention_heads=2)).config.num_hidden_layers == 1


def test_what_no_tensor_tells_is_listed(make_original):
    model, original = make_original(SruppModel, layer_norm=True)
    names = {text.split()[0] for text in unknown_fields(original, model.config)}
    assert {"num_attention_heads", "bidirectional", "has_skip_term", "normalize_after", "highway_bias"} < names
    model, original = make_original(rescale=True)
    names = {text.split()[0] for text in unknown_fields(original, model.config)}
    assert not names & {"bidirectional", "normalize_after", "highway_bias"}
