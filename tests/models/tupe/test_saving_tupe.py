"""What is saved comes back in a fresh process with the same logits: every head, tied and untied weights."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
    TupeModel,
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

HEADS = {
    "encoder": (TupeModel, "AutoModel", {}),
    "masked-lm": (TupeForMaskedLM, "AutoModelForMaskedLM", {}),
    "masked-lm-untied": (TupeForMaskedLM, "AutoModelForMaskedLM", {"tie_word_embeddings": False}),
    "pretraining": (TupeForPreTraining, "AutoModelForPreTraining", {"untie_cls": False}),
    "classification": (TupeForSequenceClassification, "AutoModelForSequenceClassification", {"num_labels": 5}),
    "tokens": (TupeForTokenClassification, "AutoModelForTokenClassification", {"relative_attention": False}),
    "answers": (TupeForQuestionAnswering, "AutoModelForQuestionAnswering", {"normalize_before": True}),
    "choice": (TupeForMultipleChoice, "AutoModelForMultipleChoice", {"embedding_norm": False}),
}


def test_fresh_process_gives_the_same_logits(make_model, make_inputs, tmp_path):
    inputs, expected, jobs = make_inputs(7, 5), {}, {}
    for name, (cls, auto_class, fields) in HEADS.items():
        model = make_model(cls, **fields)
        given = {key: tensor[None].contiguous() if name == "choice" else tensor for key, tensor in inputs.items()}
        with torch.no_grad():
            expected[name] = model(**given)[0]
        model.save_pretrained(tmp_path / name)
        save_file(given, tmp_path / name / "inputs.safetensors")
        assert not list((tmp_path / name).glob("*.bin"))
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


def test_a_pretrained_folder_fine_tunes_with_only_the_classifier_new(make_model, tmp_path):
    source = make_model(TupeForMaskedLM)
    source.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert isinstance(model, TupeForSequenceClassification)
    assert set(info["missing_keys"]) == {
        f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("weight", "bias")
    }
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} <= {"lm_head"}
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


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


def test_loading_says_nothing_when_all_fits(make_model, tmp_path, caplog):
    make_model(TupeForMaskedLM).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        TupeForMaskedLM.from_pretrained(tmp_path)
    assert not caplog.records


def test_half_precision_comes_back_as_saved(make_model, make_inputs, tmp_path):
    make_model(TupeForMaskedLM).bfloat16().save_pretrained(tmp_path)
    model = TupeForMaskedLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**make_inputs(7, 5)).logits.dtype == torch.bfloat16
    assert TupeForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
