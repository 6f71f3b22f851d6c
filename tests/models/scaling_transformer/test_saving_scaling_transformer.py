"""What is saved comes back in a fresh process with the same outputs, in the dtype that is asked for."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import (
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
    ScalingTransformerModel,
)
from tests.helpers.comparison import assert_close


FRESH_PROCESS = """
import json, sys, warnings
import torch, transformers
import hf_efficient
from safetensors.torch import load_file, save_file

warnings.simplefilter("error")
torch.set_num_threads(1)
report = {}
for folder, auto_class in json.load(open(sys.argv[1])).items():
    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        outputs = model(**load_file(f"{folder}/inputs.safetensors"))
    save_file({"output": outputs[0].contiguous()}, f"{folder}/again.safetensors")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    report[folder] = [type(model).__name__, model.training, missing, unexpected]
json.dump(report, open(sys.argv[2], "w"))
"""
CLASSES = {"seq": ScalingTransformerForSequenceClassification, "trunk": ScalingTransformerModel}
AUTO = {
    ScalingTransformerForCausalLM: "AutoModelForCausalLM",
    ScalingTransformerForSequenceClassification: "AutoModelForSequenceClassification",
    ScalingTransformerModel: "AutoModel",
}


def test_fresh_process_gives_the_same_outputs(make_model, make_ids, tmp_path):
    from tests.models.scaling_transformer.conftest import VARIANTS

    inputs = {"input_ids": make_ids(2, 7), "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])}
    names = ("dense", "all-sru", "by-module-conv-fixed-base", "concatenated-shared-qk", "modular-sru")
    cases = {name: (ScalingTransformerForCausalLM, VARIANTS[name]) for name in names}
    cases |= {name: (cls, {**VARIANTS["all-sru"], "num_labels": 5}) for name, cls in CLASSES.items()}
    expected, jobs = {}, {}
    for name, (cls, fields) in cases.items():
        model = make_model(cls, dtype=torch.float32, **fields)
        with torch.no_grad():
            expected[name] = model(**inputs)[0]
        model.save_pretrained(tmp_path / name)
        save_file(inputs, tmp_path / name / "inputs.safetensors")
        jobs[str(tmp_path / name)] = AUTO[cls]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "jobs.json", tmp_path / "report.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for name, (cls, _) in cases.items():
        assert report[str(tmp_path / name)] == [cls.__name__, False, [], []], name
        assert_close(name, load_file(tmp_path / name / "again.safetensors")["output"], expected[name], 1e-5)


def test_a_language_model_becomes_a_classifier_with_only_the_head_new(make_model, tmp_path, caplog):
    source = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, ff_sparsity=5, ff_rank=3)
    source.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        ScalingTransformerForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


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


SPARSE_LOSS = {"lm_head_type": "multiplicative", "loss_sparsity": 3}
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
        ({}, {"new_num_tokens": 50, "pad_to_multiple_of": 1.5}, "pad_to_multiple_of must be a whole number from 1"),
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
