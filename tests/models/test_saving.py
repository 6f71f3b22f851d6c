"""What is saved comes back in a fresh process with the same outputs: every head, tied and untied weights."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.helpers.comparison import assert_close
from tests.helpers.families import FAMILIES, SCALING_TRANSFORMER, TERRAFORMER, TERRAFORMER_LM, subjects


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
SPARSE = SCALING_TRANSFORMER.variants
# For each kind of model how its Auto class ends, and fields of its config.
KINDS = {
    "srupp": {
        "trunk": ("Model", {"rescale": True, "attention_layers": [1]}),
        "causal-lm": ("ForCausalLM", {"num_attention_heads": 1}),
        "tied": ("ForCausalLM", {"tie_word_embeddings": True, "lm_head_bias": False}),
        "adaptive": ("ForCausalLM", ADAPTIVE),
        "sru": ("ForCausalLM", {"projection_size": [0, 10, 0], "attention_layers": []}),
        "masked-lm": ("ForMaskedLM", {"bidirectional": True, "embedding_size": 14}),
        "classes": ("ForSequenceClassification", {"num_labels": 5}),
        "tokens": ("ForTokenClassification", {"bidirectional": True}),
        "answers": ("ForQuestionAnswering", {"layer_norm": True}),
    },
    "scaling_transformer": {
        "trunk": ("Model", SPARSE["all-sru"]),
        "dense": ("ForCausalLM", {}),
        "all-sru": ("ForCausalLM", SPARSE["all-sru"]),
        "by-module-conv-fixed-base": ("ForCausalLM", SPARSE["by-module-conv-fixed-base"]),
        "concatenated-shared-qk": ("ForCausalLM", SPARSE["concatenated-shared-qk"]),
        "modular-sru": ("ForCausalLM", SPARSE["modular-sru"]),
        "classes": ("ForSequenceClassification", {**SPARSE["all-sru"], "num_labels": 5}),
    },
    "terraformer": {
        "trunk": ("Model", TERRAFORMER.variants["all-sru"]),
        "average-forgetting": (
            "ForSeq2SeqLM",
            {**TERRAFORMER.variants["forgetting"], "encoder_keeps_streams": False, "double_width_after": 1},
        ),
        "half-width": ("ForSeq2SeqLM", TERRAFORMER.variants["half-width"]),
        "cross-tied": ("ForSeq2SeqLM", TERRAFORMER.variants["cross"]),
        "cross-sparse": ("ForSeq2SeqLM", TERRAFORMER.variants["cross-sparse"]),
        "classes": ("ForSequenceClassification", {**TERRAFORMER.variants["all-sru"], "num_labels": 5}),
    },
    "terraformer_lm": {
        "reformer": ("ForCausalLM", TERRAFORMER_LM.variants["reformer"]),
        "forgetting-double": ("ForCausalLM", TERRAFORMER_LM.variants["forgetting-double"]),
    },
    "tupe": {
        "trunk": ("Model", {}),
        "masked-lm": ("ForMaskedLM", {}),
        "masked-lm-untied": ("ForMaskedLM", {"tie_word_embeddings": False}),
        "pretraining": ("ForPreTraining", {"untie_cls": False}),
        "classes": ("ForSequenceClassification", {"num_labels": 5}),
        "tokens": ("ForTokenClassification", {"relative_attention": False}),
        "answers": ("ForQuestionAnswering", {"normalize_before": True}),
        "choice": ("ForMultipleChoice", {"embedding_norm": False}),
    },
}
MASK = torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])


def test_fresh_process_gives_the_same_outputs(tmp_path):
    """One process for all, by the Auto class that stands for each model; no warning, and no key that does not fit."""
    expected, jobs, reports = {}, {}, {}
    for family in FAMILIES.values():
        for kind, (ending, fields) in KINDS[family.name].items():
            folder = tmp_path / f"{family.name}-{kind}"
            auto_class = f"AutoModel{'' if ending == 'Model' else ending}"
            name = family.family.classes[auto_class]
            model = family.make_model(family.family.load(name), dtype=torch.float32, **fields)
            inputs = {"input_ids": family.make_ids(2, 7), "attention_mask": MASK}
            if family.name == "terraformer" and "classes" not in kind:
                inputs["decoder_input_ids"] = family.make_ids(2, 6)
            if kind == "choice":
                inputs = {name: tensor[None].contiguous() for name, tensor in inputs.items()}
            with torch.no_grad():
                expected[folder.name] = model(**inputs)[0]
            model.save_pretrained(folder)
            assert not list(folder.glob("*.bin"))
            save_file(inputs, folder / "inputs.safetensors")
            jobs[str(folder)] = auto_class
            reports[str(folder)] = [name, False, [], []]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "jobs.json", tmp_path / "report.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "report.json").read_text()) == reports
    found = {name: load_file(tmp_path / name / "again.safetensors")["output"] for name in expected}
    # Not to the bit: weights in a mapped file are aligned otherwise, and some processors add up otherwise then.
    assert_close("output", found, expected, 1e-5)


NORM = {"norm.weight", "norm.bias"}
# How the class of a language model ends, its fields, and what a classifier has of its own.
PRETRAINED = subjects(
    {
        "srupp": {"": ("ForCausalLM", {}, {"score.weight"})},
        "scaling_transformer": {"sparse": ("ForCausalLM", SPARSE["ff"], {"score.weight"})},
        "tupe": {
            "": (
                "ForMaskedLM",
                {},
                {f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("weight", "bias")},
            )
        },
        "terraformer": {
            "": (
                "ForConditionalGeneration",
                TERRAFORMER.variants["all-sru"],
                {"score.weight", "norm.weight", "norm.bias"},
            )
        },
    }
)


@pytest.mark.parametrize(("family", "pretrained"), PRETRAINED)
def test_a_language_model_becomes_a_classifier_with_only_the_head_new(family, pretrained, tmp_path):
    ending, fields, new = pretrained
    source = family.make_model(family.head(ending), dtype=torch.float32, **fields)
    source.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert isinstance(model, family.head("ForSequenceClassification"))
    assert set(info["missing_keys"]) == new
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} <= {"lm_head"}
    kept = source.model.state_dict()
    if family is TERRAFORMER:  # of which a classifier has the encoder alone
        kept = {name: tensor for name, tensor in kept.items() if name.startswith("encoder.")}
    for name, tensor in kept.items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("family", "pretrained"), PRETRAINED)
def test_loading_says_nothing_when_all_fits(family, pretrained, tmp_path, caplog):
    ending, fields, _ = pretrained
    family.make_model(family.head(ending), dtype=torch.float32, **fields).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        family.head(ending).from_pretrained(tmp_path)
    assert not caplog.records
