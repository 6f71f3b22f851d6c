"""Conversion of trax's weight files: there and back, for every kind of layer, and files that do not fit."""

import re

import pytest
import torch
from torch import Tensor

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.models.scaling_transformer.convert_scaling_transformer import (
    CONVERTER,
    build_model,
    convert_state_dict,
    infer_config,
    name_leaves,
    restore_state_dict,
)
from hf_efficient.utils.weight_stream import read_weight_stream, write_weight_stream


BASE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 19,
}
SPARSE_FF = {"ff_sparsity": 5, "ff_rank": 3}
CONV = {"attention_type": "multiplicative_conv", "attention_sparsity": 4}
KINDS = {
    "dense": {},
    "rms norm, no positions": {"layer_norm_center": False, "position_embedding_type": "none"},
    "sparse ff, low-rank positions": {**SPARSE_FF, "position_embedding_type": "low_rank", "position_rank": 5},
    "recurrences": {**SPARSE_FF, "ff_sru_layers": 2, "ff_sru_units": 7},
    "recurrences as wide as the model": {"ff_sru_layers": 1, "ff_sru_units": 16},
    "multiplicative": {"attention_type": "multiplicative", "attention_sparsity": 4},
    "modular": {"attention_type": "multiplicative_modular", "attention_sparsity": 4},
    "conv": {**CONV, "lm_head_type": "multiplicative", "loss_sparsity": 4},
    "shared conv": {**CONV, "attention_share_qk": True, "attention_window": 1},
    "conv with outputs": {**CONV, "attention_output": "multiplicative_conv", "attention_value_input": "by_module"},
    "conv with outputs, values concatenated": {**CONV, "attention_output": "multiplicative_conv"}
    | {"attention_value_input": "concatenated"},
    "conv with a multiplicative output": {**CONV, "attention_output": "multiplicative"},
    "conv with a conv output": {**CONV, "attention_output": "conv"},
    "conv of one module": {**CONV, "attention_kernel_width": 1},
    "shared conv of one module": {**CONV, "attention_kernel_width": 1, "attention_share_qk": True},
    "shared conv of one module, conv output": {**CONV, "attention_kernel_width": 1, "attention_share_qk": True}
    | {"attention_output": "conv"},
    "shared conv of one module, both outputs": {**CONV, "attention_kernel_width": 1, "attention_share_qk": True}
    | {"attention_output": "multiplicative_conv"},
    "conv of one module, multiplicative output": {**CONV, "attention_kernel_width": 1}
    | {"attention_output": "multiplicative"},
    "conv of one module, both inputs": {**CONV, "attention_kernel_width": 1, "attention_value_input": "by_module"},
    "shared conv of one module, both inputs": {**CONV, "attention_kernel_width": 1, "attention_share_qk": True}
    | {"attention_value_input": "by_module", "attention_output": "conv"},
    "low-rank positions as wide as the model": {"position_embedding_type": "low_rank", "position_rank": 16},
    "one position": {"max_position_embeddings": 1},
    "one low-rank position": {"max_position_embeddings": 1, "position_embedding_type": "low_rank", "position_rank": 4},
    "two bases": {"position_embedding_type": "fixed_base", "position_bases": [11, 13]},
    "as many ids as units": {"vocab_size": 16},
    "as many ids as units, einsum": {"vocab_size": 16, "lm_head_type": "einsum"},
    "three ids for each unit of a low-rank head": {"lm_head_type": "low_rank", "lm_head_rank": 8},
    "dense head without bias": {"lm_head_bias": False},
    "fixed bases": {"position_embedding_type": "fixed_base", "lm_head_type": "low_rank", "lm_head_rank": 6},
    "einsum": {"lm_head_type": "einsum"},
    "two heads": {"lm_head_type": "multiplicative", "loss_sparsity": 3, "lm_head_sparse_probability": 0.5},
    "recurrences, two heads": {"lm_head_type": "multiplicative", "loss_sparsity": 3, "lm_head_sparse_probability": 0.5}
    | {"ff_sru_layers": 1, "ff_sru_units": 5},
    "head without bias": {"lm_head_type": "multiplicative", "loss_sparsity": 3, "lm_head_bias": False},
}
# What the names of leaves do not tell, besides the number of heads.
UNTOLD = (
    *("num_attention_heads", "max_position_embeddings", "position_rank", "ff_sru_units"),
    *("attention_value_input", "attention_share_qk", "lm_head_type", "lm_head_bias", "position_bases"),
)
# Those that have to be said where shapes fit several of their values.
WANTED = ("attention_value_input", "attention_share_qk", "lm_head_bias", "position_bases")


def make(**fields) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**{**BASE, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def arrays_of(model: ScalingTransformerForCausalLM) -> dict[str, Tensor]:
    return restore_state_dict(model.state_dict(), model.config)


def told_of(model: ScalingTransformerForCausalLM) -> dict:
    return {name: getattr(model.config, name) for name in UNTOLD}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_get_their_names_and_values_come_back(tmp_path, kind):
    model = make(**KINDS[kind])
    leaves = arrays_of(model)
    path = tmp_path / "model.weights.npy.gz"
    write_weight_stream(path, leaves.values())
    named = name_leaves(read_weight_stream(path), **told_of(model))
    assert list(named) == list(leaves)
    assert all(torch.equal(named[name], leaves[name]) for name in leaves)
    converted = convert_state_dict(named, model.config)
    expected = model.state_dict()
    assert set(converted) == set(expected)
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_tell_the_config(kind):
    model = make(**KINDS[kind])
    config = infer_config(arrays_of(model), **told_of(model))
    expected = {**model.config.to_dict(), "dtype": None, "transformers_version": None, "architectures": None}
    found = {**config.to_dict(), "dtype": None, "transformers_version": None, "architectures": None}
    assert found == expected
    ids = torch.randint(0, 16, (2, min(7, model.config.max_position_embeddings)))
    with torch.no_grad():
        assert torch.equal(build_model(arrays_of(model), config)(ids).logits, model(ids).logits)


def test_the_command_line_makes_a_folder(tmp_path, capsys):
    model = make(**SPARSE_FF, **CONV)
    write_weight_stream(tmp_path / "model.weights.npy.gz", arrays_of(model).values())
    options = ["--checkpoint", str(tmp_path / "model.weights.npy.gz"), "--output_dir", str(tmp_path / "converted")]
    CONVERTER.run([*options, "--set", "num_attention_heads=2"])
    loaded = ScalingTransformerForCausalLM.from_pretrained(tmp_path / "converted")
    ids = torch.randint(0, 24, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    said = capsys.readouterr().out
    assert "Wrote ScalingTransformerForCausalLM with" in said
    assert "hidden_act relu" in said
    assert "num_attention_heads" not in said


# Beginning and end of the names, in the order of the stream.
ORDERS = {
    "fixed bases": (
        [
            "embedding",
            *(f"position.base.{base}.{digit}" for base in range(4) for digit in range(8)),
            "position.start_vec",
            "blocks.0.attn_norm.scale",
        ],
        ["final_norm.bias", *(f"lm_head.{side}.{leaf}" for side in ("in", "out") for leaf in ("kernel", "bias"))],
    ),
    "modular": (
        [
            *("embedding", "position_table", "blocks.0.attn_norm.scale", "blocks.0.attn_norm.bias"),
            *(f"blocks.0.attn.{q}.{x}" for q in "qkvo" for x in ("gating", "projection", "module_kernel", "bias")),
        ],
        ["blocks.2.ff.out.bias", "final_norm.scale", "final_norm.bias", "lm_head.kernel", "lm_head.bias"],
    ),
    "recurrences, two heads": (
        ["embedding", "position_table"],
        [
            *("blocks.2.ff.sru_branch.sru.0.kernel", "blocks.2.ff.sru_branch.sru.0.bias"),
            *("blocks.2.ff.sru_branch.out_proj.kernel", "blocks.2.ff.sru_branch.out_proj.bias"),
            *("final_norm.scale", "final_norm.bias"),
            *(f"lm_head.sparse.{leaf}" for leaf in ("gating", "projection", "bias")),
            *("lm_head.dense.kernel", "lm_head.dense.bias"),
        ],
    ),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_leaves_come_in_the_order_of_trax(kind):
    names = list(arrays_of(make(**KINDS[kind])))
    first, last = ORDERS[kind]
    assert names[: len(first)] == first
    assert names[-len(last) :] == last


def test_an_inner_bias_cannot_be_restored():
    model = make(**SPARSE_FF, ff_inner_bias=True)
    with pytest.raises(ValueError, match=r"trax has no leaf for model\.layers\.0.*inner_bias.*ff_inner_bias=True"):
        arrays_of(model)


UNTOLD_BY_SHAPES = {
    "values of both inputs": ({**CONV, "attention_value_input": "concatenated"}, "attention_value_input"),
    "a square head": ({"vocab_size": 16, "lm_head_type": "einsum"}, "lm_head_type"),
    "two bases": (KINDS["two bases"], "position_bases"),
    "three convolutions of one module": ({**CONV, "attention_kernel_width": 1}, "attention_share_qk"),
    "a head without bias": ({"lm_head_bias": False}, "lm_head_bias"),
    "a multiplicative head without bias": (KINDS["head without bias"], "lm_head_bias"),
}


@pytest.mark.parametrize("case", UNTOLD_BY_SHAPES)
def test_what_shapes_do_not_tell_is_asked_for(case):
    fields, wanted = UNTOLD_BY_SHAPES[case]
    model = make(**fields)
    leaves = list(arrays_of(model).values())
    told = {"num_attention_heads": 2}
    with pytest.raises(ValueError, match=f"--set {wanted}="):
        infer_config(name_leaves(leaves, **told), **told)
    told[wanted] = getattr(model.config, wanted)
    named = name_leaves(leaves, **told)
    ids = torch.randint(0, 16, (2, 5))
    with torch.no_grad():
        assert torch.equal(build_model(named, infer_config(named, **told))(ids).logits, model(ids).logits)


def test_the_command_line_says_what_shapes_do_not_tell(tmp_path):
    model = make(vocab_size=16, lm_head_type="einsum", lm_head_bias=False, **CONV, attention_value_input="concatenated")
    write_weight_stream(tmp_path / "model.weights.npy", arrays_of(model).values())
    options = ["--checkpoint", str(tmp_path / "model.weights.npy"), "--output_dir", str(tmp_path / "converted")]
    said = ["num_attention_heads=2", "attention_value_input=concatenated", "lm_head_type=einsum", "lm_head_bias=false"]
    CONVERTER.run([*options, "--set", *said])
    loaded = ScalingTransformerForCausalLM.from_pretrained(tmp_path / "converted")
    ids = torch.randint(0, 16, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_output_decides_on_three_convolutions_as_well():
    model = make(**KINDS["shared conv of one module, conv output"])
    assert list(name_leaves(arrays_of(model).values(), attention_output="conv")) == list(arrays_of(model))


def test_an_override_that_does_not_fit_is_named():
    leaves = arrays_of(make())
    config = infer_config(leaves, num_attention_heads=2, lm_head_type="einsum")
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(16, 24\), not \(24, 16\)"):
        build_model(leaves, config)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("two heads", "lm_head_sparse_probability 0.5"),
        ("fixed bases", r"position_bases \[11, 13, 14, 15\]"),
        ("sparse ff, low-rank positions", "ff_multiply_by_controller False"),
    ],
)
def test_guesses_are_said(tmp_path, capsys, kind, said):
    write_weight_stream(tmp_path / "model.weights.npy", arrays_of(make(**KINDS[kind])).values())
    options = ["--checkpoint", str(tmp_path / "model.weights.npy"), "--output_dir", str(tmp_path / "converted")]
    CONVERTER.run([*options, "--set", "num_attention_heads=2"])
    assert re.search(said, capsys.readouterr().out)


def too_many(leaves):
    return [*leaves, torch.zeros(3)]


FAULTS = {
    "cut off": (lambda leaves: leaves[:30], "cut off, or of another kind of model"),
    "one array too many": (too_many, "1 arrays are left over"),
    "without its beginning": (lambda leaves: leaves[2:], "must be the embedding"),
    "without its last array": (lambda leaves: leaves[:-1], "weights end before lm_head.bias.*lm_head_bias=false"),
    "without its output layer": (lambda leaves: leaves[:-2], "are no norm and output layer: they are cut off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_named(tmp_path, fault):
    change, message = FAULTS[fault]
    path = tmp_path / "model.weights.npy.gz"
    write_weight_stream(path, change(list(arrays_of(make(**SPARSE_FF)).values())))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        CONVERTER.run(["--checkpoint", str(path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


RIGHT = re.compile("left over|missing|cut off|must be the embedding|--set")
# Without an array or with one more these are whole models of another kind: with other positions or none,
# and without the dense one of two output layers.
OTHER_KINDS = {
    "without position_table",
    "without position_projection",
    "twice embedding",
    "cut before lm_head.dense.kernel",
}


def damage(leaves: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    arrays = list(leaves.values())
    return {
        f"{what} {name}": given
        for place, name in enumerate(leaves)
        for what, given in {
            "without": [*arrays[:place], *arrays[place + 1 :]],
            "twice": [*arrays[:place], arrays[place], *arrays[place:]],
            "cut before": arrays[:place],
        }.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_that_is_missing_or_too_many_is_noticed(kind):
    model = make(**KINDS[kind])
    told = {name: value for name, value in KINDS[kind].items() if name in WANTED}
    told |= {"lm_head_type": model.config.lm_head_type} if model.config.vocab_size == 16 else {}
    unnoticed, wrong = set(), {}
    for what, given in damage(arrays_of(model)).items():
        try:
            named = name_leaves(given, **told)
            build_model(named, infer_config(named, num_attention_heads=2, **told))
            unnoticed.add(what)
        except ValueError as error:
            if not RIGHT.search(str(error)):
                wrong[what] = str(error)
    assert not wrong
    # Queries look like an output layer, and the norm before them like the last, where there are as many ids as units.
    shorter = {f"cut before blocks.{block}.attn.k.kernel" for block in (1, 2) if model.config.vocab_size == 16}
    assert unnoticed <= OTHER_KINDS | shorter


def test_a_probability_that_is_given_asks_for_both_output_layers():
    arrays = list(arrays_of(make(**KINDS["two heads"])).values())
    assert "lm_head.dense.bias" in name_leaves(arrays, lm_head_sparse_probability=0.5)
    with pytest.raises(ValueError, match=r"end before lm_head\.dense\.kernel"):
        name_leaves(arrays[:-2], lm_head_sparse_probability=0.5)
