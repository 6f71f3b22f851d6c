"""What `export`, `push_to_hub` and the command line write, refuse and leave behind."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from hf_efficient.hub import export, exporting, push_to_hub
from hf_efficient.hub.__main__ import main
from hf_efficient.hub.model_card import read_results
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.utils.model_files import ModelFileError
from tests.helpers.comparison import assert_close
from tests.helpers.hostile_files import write_archive
from tests.hub.remote_client import outputs_of


SEQUENCE = "AutoModelForSequenceClassification"
CODE = {"configuration_tupe.py", "modeling_tupe.py", "position_bias.py", "backend.py"}
RESULTS = [
    {"task": "sst2", "metrics": {"accuracy": [0.91, 0.9, 0.93]}, "seeds": [0, 1, 2]},
    {
        "task": "mrpc",
        "dataset": {"type": "nyu-mll/glue", "name": "GLUE MRPC", "config": "mrpc"},
        "metrics": {"f1": 0.875, "accuracy": [0.5, 0.75], "undefined": None},
    },
]


def test_the_folder(make_model, tokenizer, tmp_path):
    model = make_model(SEQUENCE)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"results": RESULTS}))
    folder = export(model, tokenizer, tmp_path / "new" / "tupe", results, license="mit", language="en")

    written = {path.name for path in folder.iterdir()}
    assert written >= CODE | {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["tupe"]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items() if name in weights)

    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_tupe.TupeConfig"
    assert auto_map["AutoModelForMultipleChoice"] == "modeling_tupe.TupeForMultipleChoice"
    assert len(auto_map) == 8
    # Exporting leaves no trace in the model or its classes: they do not count as remote code from here on
    assert not hasattr(model.config, "auto_map")
    assert type(model)._auto_class is None
    assert type(model.config)._auto_class is None

    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.license, card.data.language) == ("text-classification", "mit", "en")
    assert card.data.model_name == "tupe"
    rows = [(r.dataset_type, r.dataset_config, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert rows == [
        ("sst2", None, "accuracy", 0.91),
        ("nyu-mll/glue", "mrpc", "f1", 0.875),
        ("nyu-mll/glue", "mrpc", "accuracy", 0.625),
    ]
    assert "| sst2 | validation | accuracy, median of 3 seeds (0.9 to 0.93) | 0.91 |" in card.text
    assert f"{model.num_parameters():,} parameters" in card.text


def test_the_folder_of_a_language_model(make_model, tokenizer, tmp_path):
    """All modules of the family lie in it, and the card loads it as what it is, not as AutoModelForPreTraining."""
    folder = export(make_model("AutoModelForCausalLM", family="srupp"), tokenizer, tmp_path / "srupp")
    code = {path.name for path in folder.glob("*.py")}
    assert code >= {"backend.py", "sru.py", "configuration_srupp.py", "masking_srupp.py", "modeling_srupp.py"}
    assert not any("convert" in name or "tupe" in name for name in code)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == auto_map["AutoModelForPreTraining"] == "modeling_srupp.SruppForCausalLM"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert 'AutoModelForCausalLM.from_pretrained("srupp", trust_remote_code=True)' in card.text


def test_a_failed_export_leaves_nothing(make_model, tokenizer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export(make_model(SEQUENCE), tokenizer, tmp_path / "tupe")
    assert not list(tmp_path.iterdir())


def test_refusals(make_model, tmp_path):
    model = make_model(SEQUENCE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export(model, None, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"

    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(TypeError, match=r"BertModel is not a class of hf_efficient.*TupeForMaskedLM"):
        export(bert, None, tmp_path / "bert")
    with pytest.raises(TypeError, match="is not a class of hf_efficient"):
        export(type("Mine", (type(model),), {})(model.config), None, tmp_path / "subclass")
    for results in ({"metrics": {"f1": 1.0}}, [{"task": "sst2"}], {"task": "sst2", "metrics": {"f1": "good"}}):
        with pytest.raises(ValueError, match=r"has the form|neither a number"):
            export(model, None, tmp_path / "results", results)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_results_without_a_task_type():
    (result,) = read_results({"task": "cola", "metrics": {"mcc": 0}})
    assert (result.task_type, result.metric_value, result.metric_name) == ("other", 0, "mcc")


def test_push_makes_one_commit_of_an_export(make_model, tokenizer, monkeypatch):
    calls: list[tuple] = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create_repo", repo_id, private, exist_ok))

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls.append(("create_branch", repo_id, branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            files = {path.name: path.read_text() for path in folder_path.iterdir() if path.suffix in (".md", ".py")}
            calls.append(("upload_folder", repo_id, revision, commit_message, files))
            return SimpleNamespace(commit_url="https://example.org/commit")

    monkeypatch.setattr(exporting, "HfApi", Api)
    model = make_model("AutoModelForMaskedLM")
    push_to_hub(model, tokenizer, "org/tupe", revision="v1", private=True, token="hf_x", commit_message="first")
    assert calls[:3] == [
        ("token", "hf_x"),
        ("create_repo", "org/tupe", True, True),
        ("create_branch", "org/tupe", "v1", True),
    ]
    assert calls[3][:4] == ("upload_folder", "org/tupe", "v1", "first")
    files = calls[3][4]
    assert set(files) >= CODE
    assert 'AutoModelForMaskedLM.from_pretrained("org/tupe", trust_remote_code=True)' in files["README.md"]

    calls.clear()
    assert push_to_hub(model, None, "org/tupe").commit_url == "https://example.org/commit"
    assert [call[0] for call in calls] == ["token", "create_repo", "upload_folder"]
    with pytest.raises(ValueError, match="has the form"):
        push_to_hub(model, None, "org/tupe", {"task": "sst2"})
    assert len(calls) == 3  # nothing is sent when the export fails


def test_command_line(make_model, tokenizer, tmp_path, capsys, monkeypatch):
    model = make_model("AutoModelForMaskedLM")
    model.save_pretrained(tmp_path / "run")
    main(["export", "--model", str(tmp_path / "run"), "--output", str(tmp_path / "bare")])
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (tmp_path / "bare" / "README.md").read_text()

    tokenizer.save_pretrained(tmp_path / "run")
    results = tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    options = ["--output", str(tmp_path / "out"), "--results", str(results), "--license", "mit"]
    main(["export", "--model", str(tmp_path / "run"), *options])
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    ids = tokenizer("the cat").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat").input_ids == ids

    pushed = {}
    commit = SimpleNamespace(commit_url="https://example.org/commit")
    monkeypatch.setattr(
        "hf_efficient.hub.__main__.push_to_hub", lambda *args, **kwargs: pushed.update(kwargs) or commit
    )
    main(["push", "--model", str(tmp_path / "run"), "--repo_id", "org/x", "--private", "true", "--revision", "v2"])
    assert (pushed["private"], pushed["revision"], pushed["results"]) == (True, "v2", None)

    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelFileError, match="no class of hf_efficient"):
        main(["export", "--model", str(tmp_path / "bert"), "--output", str(tmp_path / "no")])


def test_command_line_merges_an_adapter(make_model, tokenizer, tmp_path):
    make_model(SEQUENCE).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    main(["export", "--model", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close("outputs", outputs_of(merged), outputs_of(adapted.base_model.model), 1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "modeling_tupe.py").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_command_line_says_how_to_export_what_is_no_model(make_model, tmp_path):
    model = make_model("AutoModelForMaskedLM")
    MaskedLMObjective(model=model).save_pretrained(tmp_path / "objective")
    model.save_pretrained(tmp_path / "run" / "checkpoint-9")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    write_archive(tmp_path / "pickled" / "pytorch_model.bin", tmp_path / "ran")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name, message in (
        ("objective", r"checkpoint of pretraining: .* A run that has ended leaves the encoder in its output_dir"),
        ("run", r"run has no config\.json\. The model in it is .*checkpoint-9: give that folder"),
        ("pickled", r"pytorch_model\.bin is damaged, or holds more than tensors"),
        ("adapter", r"does not name the base model"),
    ):
        with pytest.raises(ModelFileError, match=message):
            main(["export", "--model", str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_an_exported_folder_is_exported_again(make_model, tokenizer, tmp_path):
    first = export(make_model(SEQUENCE), tokenizer, tmp_path / "first")
    main(["export", "--model", str(first), "--output", str(tmp_path / "second")])
    written = {path.name for path in (tmp_path / "second").iterdir()}
    assert written == {path.name for path in first.iterdir()}
