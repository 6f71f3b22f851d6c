"""Exported folders that are loaded and saved again, by whatever road, and then load where nothing is installed."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_efficient import TupeConfig
from hf_efficient.auto import FAMILIES
from hf_efficient.hub import export
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig
from hf_efficient.ops.backend import ENVIRONMENT_VARIABLE
from tests.helpers.comparison import assert_close
from tests.hub.remote_client import outputs_of


SEQUENCE = "AutoModelForSequenceClassification"
HEADS = {
    "tupe": SEQUENCE,
    "srupp": "AutoModelForCausalLM",
    "scaling_transformer": "AutoModelForCausalLM",
    "terraformer": "AutoModelForSeq2SeqLM",
}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")  # the stranger has no compiled kernels


def test_load_and_save_in_turn_then_load_elsewhere(stranger, make_model, tokenizer, tmp_path):
    """All families in the same two processes, each in folders of names of its own: these name the modules."""
    models = {family: make_model(HEADS[family], family=family) for family in FAMILIES}
    beside, elsewhere = {}, {}
    for family, model in models.items():
        source = str(export(model, tokenizer, tmp_path / f"exported-{family}"))
        folders = [str(tmp_path / f"{name}-{family}") for name in ("first", "second", "third", "fourth")]
        given = {"auto_class": HEADS[family]}
        beside[family] = {**given, "source": source, "folders": folders[:2]}
        elsewhere[family] = {**given, "source": folders[1], "folders": folders[2:], "by_class": [False, True]}
    saved = stranger("resave_all", installed=True, models=beside)
    answer = stranger("resave_all", models=elsewhere)
    assert not answer["package_seen"]
    for family, model in models.items():
        assert all(module.startswith("hf_efficient.") for module in saved[family]["modules"]), family
        assert all(module.startswith("transformers_modules.") for module in answer[family]["modules"]), family
        assert_close(family, answer[family]["outputs"], outputs_of(model), 1e-5)


def checkpoint_of_trainer(source, folder):
    model = AutoModelForSequenceClassification.from_pretrained(source)
    args = TrainingArguments(str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to=[])
    rows = [{"input_ids": [0, 5, 7, 2], "labels": 1}] * 8
    Trainer(model, args, train_dataset=rows).train()
    return model, folder / "checkpoint-1"


def adapter(source, folder):
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(source), lora)
    adapted.save_pretrained(folder)
    return adapted.base_model.model, folder


def merged_adapter(source, folder):
    model = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(source), adapter(source, folder / "adapter")[1]
    ).merge_and_unload()
    model.save_pretrained(folder)
    return model, folder


def model_of_an_objective(source, folder):
    objective = MaskedLMObjective(model=AutoModelForMaskedLM.from_pretrained(source))
    objective.model.save_pretrained(folder)
    return objective.model, folder


def encoder_of_a_saved_objective(source, folder):
    """An objective keeps its encoder's config within its own."""
    config = ReplacedTokenObjectiveConfig(encoder_config=TupeConfig.from_pretrained(source).to_dict())
    ReplacedTokenObjective(config).save_pretrained(folder / "objective")
    encoder = ReplacedTokenObjective.from_pretrained(folder / "objective").encoder
    encoder.save_pretrained(folder)
    return encoder, folder


ROADS = {
    checkpoint_of_trainer: SEQUENCE,
    adapter: SEQUENCE,
    merged_adapter: SEQUENCE,
    model_of_an_objective: "AutoModelForMaskedLM",
    encoder_of_a_saved_objective: "AutoModel",
}


def test_whatever_saves_a_model_saves_its_code(stranger, make_model, tokenizer, tmp_path):
    expected, folders = {}, {}
    for save, auto_class in ROADS.items():
        name = save.__name__
        head = "AutoModelForMaskedLM" if auto_class != SEQUENCE else SEQUENCE
        source = export(make_model(head), tokenizer, tmp_path / f"exported-{name}")
        model, folder = save(source, tmp_path / name)
        expected[name], folders[name] = outputs_of(model), [auto_class, str(folder)]
    answer = stranger("load_all", models=folders)
    for name, outputs in expected.items():
        assert_close(name, answer[name]["outputs"], outputs, 1e-5)


def test_what_was_not_exported_stays_without_code(make_model, tmp_path):
    make_model(SEQUENCE).save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_derived_config_takes_the_code_of_its_family_along(family, make_model, tmp_path):
    source = export(make_model(HEADS[family], family=family), None, tmp_path / "exported")
    base = FAMILIES[family].load(FAMILIES[family].config)
    derived = type("Derived", (base,), {})
    derived.from_pretrained(source).save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((source / "config.json").read_text())["auto_map"]
    code = {path.name for path in source.glob("*.py")}
    assert code == {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert {f"{name.partition('.')[0]}.py" for name in auto_map.values()} <= code

    renamed = type("Renamed", (base,), {"model_type": "renamed"})
    renamed.from_pretrained(source).save_pretrained(tmp_path / "renamed")
    assert "auto_map" not in json.loads((tmp_path / "renamed" / "config.json").read_text())
    assert not list((tmp_path / "renamed").glob("*.py"))


def test_code_that_was_registered_stays_named(make_model, tmp_path):
    source = export(make_model("AutoModel", family="tupe"), None, tmp_path / "exported")
    config = type("Derived", (TupeConfig,), {}).from_pretrained(source)
    config.auto_map["AutoModel"] = "mine.Mine"
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.py").write_text("class Mine: ...")
    config.save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "mine.Mine"
    assert auto_map["AutoConfig"].endswith(".TupeConfig")
