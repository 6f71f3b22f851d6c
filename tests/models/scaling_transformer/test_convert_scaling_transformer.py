"""Conversion of trax's weight files: there and back, for every kind of layer, and files that do not fit."""

import gzip
import io

import numpy as np
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
    "conv with a multiplicative output": {**CONV, "attention_output": "multiplicative"},
    "conv with a conv output": {**CONV, "attention_output": "conv"},
    "fixed bases": {"position_embedding_type": "fixed_base", "lm_head_type": "low_rank", "lm_head_rank": 6},
    "einsum": {"lm_head_type": "einsum"},
    "two heads": {"lm_head_type": "multiplicative", "loss_sparsity": 3, "lm_head_sparse_probability": 0.5},
    "head without bias": {"lm_head_type": "multiplicative", "loss_sparsity": 3, "lm_head_bias": False},
}
# What the names of leaves do not tell, besides the number of heads.
UNTOLD = ("num_attention_heads", "max_position_embeddings", "position_rank", "ff_sru_units")


def make(**fields) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**{**BASE, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# Parts of a leaf's name, in the order in which trax keeps them.
_ORDER = (
    *("embedding", "position_table", "position_projection", "position", "blocks", "final_norm", "lm_head"),
    *("attn_norm", "attn", "ff", "norm", "in", "out", "sparse_ff", "sru_branch", "in_proj", "sru", "out_proj"),
    *("q", "k", "v", "o", "shared_mult", "conv_qk", "conv_q", "conv_k", "conv_v", "out_mult", "out_conv"),
    *("sparse", "dense", "base", "start_vec", "controller", "m1", "m2", "w1", "w2", "b2"),
    *("gating", "projection", "module_kernel", "scale", "kernel", "bias"),
)


def stream_order(leaf: str) -> list[tuple[int, int]]:
    parts = leaf.split(".")
    return [(0, int(part)) if part.isdigit() else (1, _ORDER.index(part)) for part in parts]


def arrays_of(model: ScalingTransformerForCausalLM) -> dict[str, Tensor]:
    leaves = restore_state_dict(model.state_dict(), model.config)
    return {name: leaves[name] for name in sorted(leaves, key=stream_order)}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_get_their_names_and_values_come_back(kind):
    model = make(**KINDS[kind])
    leaves = arrays_of(model)
    named = name_leaves(leaves.values())
    assert list(named) == list(leaves)
    assert all(torch.equal(named[name], leaves[name]) for name in leaves)
    converted = convert_state_dict(named, model.config)
    expected = model.state_dict()
    assert set(converted) == set(expected)
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_tell_the_config(kind):
    model = make(**KINDS[kind])
    told = {name: getattr(model.config, name) for name in UNTOLD}
    config = infer_config(arrays_of(model), **told)
    expected = {**model.config.to_dict(), "dtype": None, "transformers_version": None, "architectures": None}
    found = {**config.to_dict(), "dtype": None, "transformers_version": None, "architectures": None}
    assert found == expected
    ids = torch.randint(0, 24, (2, 7))
    with torch.no_grad():
        assert torch.equal(build_model(arrays_of(model), config)(ids).logits, model(ids).logits)


def write(path, leaves: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    for tensor in leaves.values():
        np.save(buffer, tensor.numpy(), allow_pickle=False)
    path.write_bytes(gzip.compress(buffer.getvalue()))


def test_the_command_line_makes_a_folder(tmp_path, capsys):
    model = make(**SPARSE_FF, **CONV)
    write(tmp_path / "model.weights.npy.gz", arrays_of(model))
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


def too_many(leaves):
    return {**leaves, "more": torch.zeros(3)}


def without_embedding(leaves):
    return dict(list(leaves.items())[2:])


FAULTS = {
    "cut off": (lambda leaves: dict(list(leaves.items())[:30]), "cut off, or of another kind of model"),
    "one array too many": (too_many, "1 arrays are left over"),
    "without its beginning": (without_embedding, "must be the embedding"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_end_in_one_line(tmp_path, capsys, fault):
    change, message = FAULTS[fault]
    path = tmp_path / "model.weights.npy.gz"
    write(path, change(arrays_of(make(**SPARSE_FF))))
    with pytest.raises(SystemExit) as stopped:
        CONVERTER.run(["--checkpoint", str(path), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said.splitlines()[-1]
    assert str(path) in said
    assert not (tmp_path / "out").exists()
