"""Conversion of trax's weight files to this family: there and back, for every kind of model, and files that do not
fit."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_efficient.models.terraformer.convert_terraformer import (
    CONVERTER,
    build_model,
    infer_config,
    name_leaves,
    restore_state_dict,
)
from hf_efficient.models.terraformer.modeling_terraformer import (
    TerraformerForCausalLM,
    TerraformerForConditionalGeneration,
)
from hf_efficient.utils.weight_stream import read_weight_stream, write_weight_stream
from tests.golden.scaling_cases import TRAINED
from tests.golden.terraformer_cases import shifted
from tests.helpers.families import CROSS, QKV, TERRAFORMER, TERRAFORMER_LM
from tests.helpers.processes import ROOT


LSH = {"decoder_long_attention": "lsh", "lsh_chunk_length": 4}
KINDS = {
    **{f"encoder-decoder {name}": (TERRAFORMER, fields) for name, fields in TERRAFORMER.variants.items()},
    **{f"language model {name}": (TERRAFORMER_LM, fields) for name, fields in TERRAFORMER_LM.variants.items()},
    "one attention a layer": (TERRAFORMER, {"attentions_per_layer": 1, "num_encoder_layers": 1}),
    "no positions": (TERRAFORMER, {"position_embedding_type": "none"}),
    "no positions, cross": (TERRAFORMER, {**CROSS, "position_embedding_type": "none"}),
    "fixed bases": (TERRAFORMER, {**QKV, "position_embedding_type": "fixed_base"}),
    "fixed bases, cross": (TERRAFORMER, {**CROSS, "position_embedding_type": "fixed_base"}),
    "low rank, cross": (TERRAFORMER, {**CROSS, "position_embedding_type": "low_rank", "position_rank": 5}),
    "RMS norm": (TERRAFORMER, {"layer_norm_center": False}),
    "RMS norm, cross": (TERRAFORMER, {**CROSS, "layer_norm_center": False}),
    "as many ids as units": (TERRAFORMER, {"vocab_size": 24}),
    "as many ids as units, cross": (TERRAFORMER, {**CROSS, "vocab_size": 24}),
    "no queries' map": (TERRAFORMER, {**CROSS, "cross_query_type": "none"}),
    "no output's map": (TERRAFORMER, {**CROSS, "cross_output_type": "none"}),
    "sparse output": (TERRAFORMER, {**CROSS, "cross_output_type": "multiplicative_conv", "cross_output_sparsity": 3}),
    "forgetting, average": (TERRAFORMER, {"forget_every": 1, "num_encoder_layers": 4, "encoder_keeps_streams": False}),
    "queries are keys": (TERRAFORMER, {**LSH, "attention_share_qk": True}),
    "a convolution for queries and keys": (TERRAFORMER, {**LSH, **QKV, "attention_share_qk": True}),
    "a head each": (TERRAFORMER_LM, {"attention_bias": False, "head_dim": 7, "stream_output": "concatenate"}),
    "a head each, queries are keys": (TERRAFORMER_LM, {**LSH, "attention_bias": False, "attention_share_qk": True}),
}
# What shapes do not tell, and has to be said where they fit several values; and what changes nothing that is converted.
WANTED = ("cross_query_type", "forget_every", "decoder_long_attention", "lsh_chunk_length")
ALIKE = {"one attention a layer", "no positions"}


def make(kind: str):
    family, fields = KINDS[kind]
    fields = {"dtype": torch.float32, "attention": "eager", **fields}
    cls = TerraformerForConditionalGeneration if family is TERRAFORMER else TerraformerForCausalLM
    return family.make_model(cls, **fields)


def told_of(model, kind: str) -> dict:
    config, names = model.config, ["num_attention_heads", "encoder_swaps", "hidden_act"]
    names += [name for name in WANTED if getattr(config, name) != getattr(type(config), name) or "quer" in name]
    names += ["num_encoder_layers"] if kind in ALIKE else []
    names += ["lm_head_type"] if "as many ids" in kind else []
    return {name: getattr(config, name) for name in names}


def logits_of(model) -> Tensor:
    ids = TERRAFORMER.make_ids(2, 9) % 20
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **more).logits


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_get_their_names_and_values_come_back(kind):
    model = make(kind)
    leaves = restore_state_dict(model.state_dict(), model.config)
    told = told_of(model, kind)
    named = name_leaves(leaves.values(), **told)
    assert list(named) == list(leaves)
    config = infer_config(named, **told)
    converted = build_model(named, config)
    back = restore_state_dict(converted.state_dict(), config)
    assert list(back) == list(leaves)
    assert all(torch.equal(back[name], leaf) for name, leaf in leaves.items())
    torch.testing.assert_close(logits_of(converted), logits_of(model), atol=1e-5, rtol=1e-5)


CONVERT_AND_LOAD = """
import runpy, sys, torch
from safetensors.torch import load_file, save_file
import hf_efficient
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

folder, classes = sys.argv[1], {"transformer_copy": AutoModelForSeq2SeqLM, "reformerlm_copy": AutoModelForCausalLM}
for name, cls in classes.items():
    sys.argv[1:] = ["--checkpoint", f"{folder}/{name}.weights.npy.gz", "--output_dir", f"{folder}/{name}"]
    sys.argv += ["--set", "num_attention_heads=2"] if name == "transformer_copy" else []
    runpy.run_module("hf_efficient.models.terraformer.convert_terraformer", run_name="__main__")
    with torch.no_grad():
        logits = cls.from_pretrained(f"{folder}/{name}")(**load_file(f"{folder}/{name}.inputs")).logits[0]
    save_file({"logits": logits.contiguous()}, f"{folder}/{name}.logits")
"""


def test_recorded_checkpoints_give_their_logits_in_a_fresh_process(tmp_path):
    """Weights without names, through the command line, a folder and the automatic classes, and back."""
    expected, streams = {}, {}
    for name in ("transformer_copy", "reformerlm_copy"):
        content = load_file(TRAINED / f"{name}.safetensors")
        order = json.loads((TRAINED / f"{name}.json").read_text())["flat_weight_order"]
        streams[name] = [content[leaf] for leaf in order]
        write_weight_stream(tmp_path / f"{name}.weights.npy.gz", streams[name])
        golden = {key.partition(".")[2]: tensor[None] for key, tensor in content.items() if key.startswith("golden.")}
        expected[name] = golden.pop("logits")[0]
        if name == "transformer_copy":
            given = {"input_ids": golden["src_ids"], "decoder_input_ids": shifted(golden["tgt_ids"])}
        else:
            given = {"input_ids": shifted(golden["input_ids"])}
        save_file(given, tmp_path / f"{name}.inputs")
    command = [sys.executable, "-c", CONVERT_AND_LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    classes = {"transformer_copy": TerraformerForConditionalGeneration, "reformerlm_copy": TerraformerForCausalLM}
    for name, cls in classes.items():
        logits = load_file(tmp_path / f"{name}.logits")["logits"]
        torch.testing.assert_close(logits, expected[name], atol=2e-5, rtol=1e-4)
        model = cls.from_pretrained(tmp_path / name)
        back = restore_state_dict(model.state_dict(), model.config).values()
        for ours, leaf in zip(back, streams[name], strict=True):
            assert torch.equal(ours, leaf.reshape(ours.shape))


def leaves_of(kind: str) -> list[Tensor]:
    model = make(kind)
    return list(restore_state_dict(model.state_dict(), model.config).values())


FAULTS = {
    "cut off in the encoder": (lambda leaves: leaves[:30], "cut off, or of another kind of model"),
    "cut off in the decoder": (lambda leaves: leaves[:60], "cut off, or of another kind of model"),
    "one array too many": (lambda leaves: [*leaves, leaves[-1][:3]], "1 arrays are left over"),
    "without its beginning": (lambda leaves: leaves[3:], "must be the embedding"),
    "without its last array": (lambda leaves: leaves[:-1], "weights end before lm_head.bias.*lm_head_bias=false"),
    "without its output layer": (lambda leaves: leaves[:-2], "are no norm and output layer: they are cut off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_named(tmp_path, fault):
    change, message = FAULTS[fault]
    path = tmp_path / "model.weights.npy.gz"
    write_weight_stream(path, change(leaves_of("encoder-decoder dense")))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        CONVERTER.run(["--checkpoint", str(path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


RIGHT = re.compile("left over|missing|unexpected|cut off|must be the embedding|--set|another order")


def fault_of(arrays: list[Tensor], told: dict) -> str:
    try:
        named = name_leaves(arrays, **told)
        build_model(named, infer_config(named, **told))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["encoder-decoder all-sru", "encoder-decoder cross-sparse", "language model reformer"])
def test_every_array_that_is_missing_or_too_many_is_noticed(kind):
    leaves, told = leaves_of(kind), told_of(make(kind), kind)
    faults = {}
    for place in range(len(leaves)):
        faults["without", place] = fault_of([*leaves[:place], *leaves[place + 1 :]], told)
        faults["cut before", place] = fault_of(leaves[:place], told)
        faults["twice", place] = fault_of([*leaves[:place], leaves[place], *leaves[place:]], told)
    unnoticed = {what for what, fault in faults.items() if not RIGHT.search(fault)}
    # Without positions, or with those of two sides, it is a whole model of another kind.
    assert unnoticed <= {("without", 1), ("twice", 0), ("twice", 1)}, {what: faults[what] for what in unnoticed}


WANTED_BY_SHAPES = {
    "one attention a layer": "num_encoder_layers",
    "no queries' map": "cross_query_type",
    "as many ids as units": "lm_head_type",
    "queries are keys": "decoder_long_attention",
}


@pytest.mark.parametrize("kind", WANTED_BY_SHAPES)
def test_what_shapes_do_not_tell_is_asked_for(kind):
    wanted, leaves = WANTED_BY_SHAPES[kind], leaves_of(kind)
    told = {name: value for name, value in told_of(make(kind), kind).items() if name != wanted}
    with pytest.raises(ValueError, match=f"--set {wanted}="):
        infer_config(name_leaves(leaves, **told), **told)


def test_the_command_line_says_what_it_took_by_default(tmp_path, capsys):
    model = make("encoder-decoder all-sru")
    path = tmp_path / "model.weights.npy.gz"
    write_weight_stream(path, restore_state_dict(model.state_dict(), model.config).values())
    CONVERTER.run(["--checkpoint", str(path), "--output_dir", str(tmp_path / "out"), "--set", "num_attention_heads=4"])
    loaded = TerraformerForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits_of(loaded), logits_of(model))
    said = capsys.readouterr().out
    assert "Wrote TerraformerForConditionalGeneration with" in said
    assert "hidden_act relu" in said
    assert "num_attention_heads" not in said


def test_another_activation_can_be_set():
    """Reformer's default in trax is GELU, though its recorded checkpoint was trained with ReLU."""
    model = make("language model reformer")
    named = name_leaves(restore_state_dict(model.state_dict(), model.config).values())
    told = {"num_attention_heads": 4, "hidden_act": "gelu_pytorch_tanh"}
    other = build_model(named, infer_config(named, **told))
    model.config.hidden_act = "gelu_pytorch_tanh"
    expected = TerraformerForCausalLM(model.config).eval()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(other), logits_of(expected), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(other), logits_of(model), atol=1e-3)


def test_bfloat16_leaves_are_read(tmp_path):
    model = make("encoder-decoder cross-sparse")
    leaves = restore_state_dict(model.state_dict(), model.config)
    write_weight_stream(tmp_path / "model.npy", (leaf.bfloat16() for leaf in leaves.values()))
    told = told_of(model, "")
    named = name_leaves(read_weight_stream(tmp_path / "model.npy"), **told)
    weights = build_model(named, infer_config(named, **told)).state_dict()
    assert all(torch.equal(weights[name], tensor.bfloat16().float()) for name, tensor in model.state_dict().items())
