"""What is saved comes back in a fresh process with the same outputs, and how new models begin."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hf_efficient.models.srupp.modeling_srupp import (
    SruppForCausalLM,
    SruppForMaskedLM,
    SruppForQuestionAnswering,
    SruppForSequenceClassification,
    SruppForTokenClassification,
    SruppModel,
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

ADAPTIVE = {"adaptive_cutoffs": [20, 33], "tie_word_embeddings": True, "tie_adaptive_projections": True}
HEADS = {
    "trunk": (SruppModel, "AutoModel", {"rescale": True, "attention_layers": [1]}),
    "causal-lm": (SruppForCausalLM, "AutoModelForCausalLM", {"num_attention_heads": 1}),
    "tied": (SruppForCausalLM, "AutoModelForCausalLM", {"tie_word_embeddings": True, "lm_head_bias": False}),
    "adaptive": (SruppForCausalLM, "AutoModelForCausalLM", ADAPTIVE),
    "sru": (SruppForCausalLM, "AutoModelForCausalLM", {"projection_size": [0, 10, 0], "attention_layers": []}),
    "masked-lm": (SruppForMaskedLM, "AutoModelForMaskedLM", {"bidirectional": True, "embedding_size": 14}),
    "classes": (SruppForSequenceClassification, "AutoModelForSequenceClassification", {"num_labels": 5}),
    "tokens": (SruppForTokenClassification, "AutoModelForTokenClassification", {"bidirectional": True}),
    "answers": (SruppForQuestionAnswering, "AutoModelForQuestionAnswering", {"layer_norm": True}),
}


def test_fresh_process_gives_the_same_outputs(make_model, make_ids, tmp_path):
    inputs = {"input_ids": make_ids(2, 7), "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])}
    expected, jobs = {}, {}
    for name, (cls, auto_class, fields) in HEADS.items():
        model = make_model(cls, dtype=torch.float32, **fields)
        with torch.no_grad():
            expected[name] = model(**inputs)[0]
        model.save_pretrained(tmp_path / name)
        save_file(inputs, tmp_path / name / "inputs.safetensors")
        jobs[str(tmp_path / name)] = auto_class
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "jobs.json", tmp_path / "report.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for name, (cls, _, _) in HEADS.items():
        assert report[str(tmp_path / name)] == [cls.__name__, False, [], []], name
        # Not to the bit: weights in a mapped file are aligned otherwise, and some processors add up otherwise then.
        assert_close(name, load_file(tmp_path / name / "again.safetensors")["output"], expected[name], 1e-5)


def test_a_language_model_becomes_a_classifier_with_only_the_head_new(make_model, tmp_path, caplog):
    source = make_model(SruppForCausalLM, dtype=torch.float32)
    source.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        SruppForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


def assert_uniform(tensor, bound):
    """Within the bound, near it, and of its spread."""
    assert tensor.abs().max() <= bound
    assert tensor.abs().max() > 0.95 * bound
    assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("heads", [1, 4])
def test_new_models_begin_as_the_original_s(make_config, heads):
    width, size, fields = 64, 32, {"dropout": 0.36, "highway_bias": -3.0, "weight_c_init": 0.5}
    config = make_config(
        hidden_size=width, projection_size=size, num_attention_heads=heads, attention_layers=[0], **fields
    )
    model = SruppForCausalLM(config)
    for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert_uniform(matrix, (3 / width) ** 0.5)
    assert (model.lm_head.bias == 0).all()
    for index, layer in enumerate(model.model.layers):
        projection = layer.projection
        assert_uniform(projection.down_proj.weight, (6 / (width + size)) ** 0.5)
        assert_uniform(projection.out_proj.weight, (6 / (size + 3 * width)) ** 0.5 * 0.8)  # sqrt(1 - 0.36)
        assert_uniform(layer.weight_c, 0.5)
        assert torch.equal(layer.bias, torch.tensor([[0.0], [-3.0]]).expand(2, width))
        assert (projection.norm.weight == 1).all()
        assert (projection.norm.bias == 0).all()
        if index == 0:
            keys = projection.attention.q_proj if heads == 1 else projection.attention.k_proj
            for matrix in (keys.weight, projection.attention.v_proj.weight):  # Xavier of one matrix, 2 d' by d'
                assert_uniform(matrix, (6 / (3 * size)) ** 0.5)
            assert projection.attention.alpha == 0


def test_other_beginnings(make_config):
    plain = SruppModel(make_config(hidden_size=64, projection_size=0, attention_layers=[], dropout=0.36))
    assert_uniform(plain.layers[0].projection.out_proj.weight, (6 / (64 + 3 * 64)) ** 0.5)  # SRU: no factor
    first = SruppModel(make_config(hidden_size=64, embedding_size=48)).layers[0].projection.out_proj
    assert first.weight.shape[0] == 4 * 64
    assert_uniform(first.weight, (6 / (10 + 4 * 64)) ** 0.5)
    frozen = SruppModel(make_config(use_peephole=False)).layers[0].weight_c
    assert not frozen.requires_grad
    assert (frozen == 0).all()
    rescaled = SruppModel(make_config(rescale=True, highway_bias=-1.0)).layers[0]
    assert rescaled.scale == pytest.approx(math.sqrt(1 + 2 / math.e))
    adaptive = SruppForCausalLM(make_config(hidden_size=64, embedding_size=64, adaptive_cutoffs=[20, 33]))
    for table in adaptive.lm_head.tables[:2]:  # by the model's width, not the table's
        assert_uniform(table.weight, (3 / 64) ** 0.5)
    assert_uniform(adaptive.lm_head.projections[0].weight, (6 / 128) ** 0.5)
    assert all((bias == 0).all() for bias in adaptive.lm_head.biases)
    assert_uniform(adaptive.lm_head.cluster_weight, (3 / 64) ** 0.5)
