"""Checkpoints of objectives in transformers' Auto classes: the encoder's weights, in a model of its own kind."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_efficient.objectives import auto
from tests.helpers.processes import ROOT
from tests.objectives.discriminator_models import KINDS, SAVED, make_objective
from tests.objectives.encoders import make_batch
from tests.objectives.notes.note_models import make_mlm


@pytest.fixture(scope="module", params=[*KINDS, "mlm"])
def checkpoint(request, tmp_path_factory):
    """An objective around BERT, and the folder that it is saved in."""
    objective = make_mlm("bert") if request.param == "mlm" else make_objective(request.param, "bert").float()
    folder = tmp_path_factory.mktemp(request.param)
    objective.save_pretrained(folder)
    return objective, folder


def assert_has_encoder(model, objective):
    trained = dict(objective.encoder.named_parameters())
    own = {name: parameter for name, parameter in model.base_model.named_parameters() if "pooler" not in name}
    assert own.keys() == trained.keys()
    for name, parameter in own.items():
        assert torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("auto_class", auto.AUTO_CLASSES, ids=lambda kind: kind.__name__)
def test_every_auto_class_finds_the_encoder(auto_class, checkpoint, tmp_path):
    objective, folder = checkpoint
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == auto_class.__name__.replace("AutoModelFor", "BertFor").replace(
        "AutoModel", "BertModel"
    )
    assert not model.training
    assert_has_encoder(model, objective)
    assert all(name.startswith(("bert.pooler.", "pooler.", "c", "qa_")) for name in info["missing_keys"])
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"
    assert_has_encoder(auto_class.from_pretrained(tmp_path), objective)


def test_a_masked_language_model_keeps_its_head(checkpoint):
    objective, folder = checkpoint
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    if hasattr(objective, "model"):
        assert not info["missing_keys"]
        inputs = {"input_ids": torch.arange(5, 15).view(2, 5)}
        assert torch.equal(model(**inputs).logits, objective.model.eval()(**inputs).logits)
    else:
        assert any("predictions" in name for name in info["missing_keys"])


def test_arguments_are_the_encoders(checkpoint):
    _, folder = checkpoint
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, hidden_dropout_prob=0.25, attn_implementation="eager", dtype=torch.bfloat16
    )
    assert model.classifier.out_features == model.config.num_labels == 3
    assert model.config.hidden_dropout_prob == model.dropout.p == 0.25
    assert model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (again.config.num_labels, again.config.hidden_dropout_prob) == (2, 0.0)
    with pytest.raises(TypeError, match="no_such_option"):
        AutoModel.from_pretrained(folder, no_such_option=1)


def test_a_new_model_for_a_config_of_the_objective(checkpoint):
    objective, _ = checkpoint
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        model = auto_class.from_config(objective.config)
        assert model.config.model_type == "bert"
        assert model.config.hidden_size == objective.encoder.config.hidden_size


PROGRAM = """
import sys
{}
from transformers import AutoModelForSequenceClassification
print(type(AutoModelForSequenceClassification.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.parametrize("known_by", ["hf_efficient.objectives", "training.finetune_glue"])
def test_one_import_makes_checkpoints_known(known_by, tmp_path):
    """In a fresh process; fine-tuning does so by itself."""
    make_objective("replaced_token", "tupe").save_pretrained(tmp_path)
    command = [sys.executable, "-c", PROGRAM.format(f"import {known_by}"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["TupeForSequenceClassification"], done.stderr


READ_AGAIN = """
import importlib, sys, torch, hf_efficient
batch = torch.load(sys.argv[1])
for module, name, folder in zip(*[iter(sys.argv[2:])] * 3):
    objective = getattr(importlib.import_module(module), name)
    objective, info = objective.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    print(repr(objective(**batch).loss.item()))
"""


def test_whole_objectives_are_read_in_a_fresh_process(tmp_path):
    """One process for both kinds."""
    batch = make_batch()
    torch.save(batch, tmp_path / "batch.pt")
    command, expected = [sys.executable, "-c", READ_AGAIN, str(tmp_path / "batch.pt")], []
    for kind, options in SAVED.items():
        objective = make_objective(kind, "tupe", **options).float()
        objective.enable_discriminator(True)
        objective.save_pretrained(tmp_path / kind)
        command += [type(objective).__module__, type(objective).__name__, str(tmp_path / kind)]
        expected.append(objective(**batch).loss.item())
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected, rel=1e-5)
