"""An encoder that is loaded for a task: what is said of weights that begin at random."""

import logging
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_efficient.data.task_labels import CLASSIFICATION
from hf_efficient.trainer.finetuning import FinetuningTask
from hf_efficient.trainer.task_model import load_model
from tests.training.tiny_glue import GOOD, make_tokenizer, save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_encoder(str(folder), make_tokenizer([" ".join(GOOD)]))
    return folder


def load(folder, caplog, names=("no", "yes")):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model, _ = load_model(str(folder), str(folder), FinetuningTask("toy", CLASSIFICATION, ("text",), names, ()))
    return model, [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_new_head_is_one_line_and_a_trained_one_none(encoder, tmp_path, caplog):
    model, said = load(encoder, caplog)
    ((level, line),) = said
    assert level == "INFO"
    assert line.startswith("New for this task, and random until they are trained: classifier.")
    model.save_pretrained(tmp_path)
    for file in encoder.glob("token*"):
        shutil.copy(file, tmp_path)
    assert load(tmp_path, caplog)[1] == []
    said = load(tmp_path, caplog, names=("a", "b", "c"))[1]
    ((level, line),) = said
    assert (level, "classifier." in line) == ("INFO", True)


def test_an_encoder_that_lacks_weights_is_a_warning(encoder, tmp_path, caplog):
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    lost = sorted(name for name in weights if "layer.0" in name)
    save_file({name: value for name, value in weights.items() if name not in lost}, tmp_path / "model.safetensors")
    _, said = load(tmp_path, caplog)
    warnings = [line for level, line in said if level == "WARNING"]
    assert len(warnings) == 1
    assert f"lack {len(lost)} weights of the encoder" in warnings[0]
    assert lost[0] in warnings[0]


def test_the_table_of_transformers_is_shown_where_its_error_points_to_it(encoder, monkeypatch, caplog):
    def fail(*args, **options):
        logging.getLogger("transformers.modeling_utils").warning("Toy LOAD REPORT from: here")
        raise RuntimeError("For details look at the above report!")

    monkeypatch.setattr("hf_efficient.trainer.task_model.AutoModelForSequenceClassification.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="above report"):
        load(encoder, caplog)
    assert "Toy LOAD REPORT" in caplog.text
