"""pretrain.py from text to a folder that everything else loads."""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_efficient import TupeConfig
from hf_efficient.trainer import arguments
from tests.training import pretraining_runs
from tests.training.tiny_glue import make_tokenizer
from training import pretrain


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    pretraining_runs.write_corpus(folder / "corpus.txt")
    return folder


def test_from_text_to_pipelines(corpus, tmp_path, caplog):
    trainer = pretraining_runs.run_here(pretraining_runs.arguments(corpus, tmp_path, max_steps=40, eval_steps=10))
    logs = trainer.state.log_history
    held_out = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.3
    assert all("token_variance_fraction" in entry for entry in logs if "loss" in entry)
    assert json.loads((tmp_path / "history.json").read_text())["log_history"] == logs
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    caplog.clear()
    answers = pipeline("fill-mask", model=str(tmp_path))("the old [MASK] sees the dog.")
    assert abs(sum(answer["score"] for answer in answers)) <= 1
    assert not caplog.messages
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) == 80
    assert (model.config.pad_token_id, model.config.cls_token_id, model.config.mask_token_id) == (0, 2, 4)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(classifier.base_model.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "bert", "whole_word_mask": True},
        {"model_type": "roberta", "cross_documents": True, "algorithm": "bpe", "vocab_size": 270},
        {"model_type": "electra", "bf16": True, "validation_size": 0},
        {"model_type": "modernbert", "gradient_checkpointing": True},
    ],
    ids=["bert-whole-words", "roberta-cross-documents", "electra-bf16", "modernbert-checkpointing"],
)
def test_other_encoders_and_settings(corpus, tmp_path, changes):
    trainer = pretraining_runs.run_here(
        pretraining_runs.arguments(corpus, tmp_path, max_steps=3, eval_steps=3, save_strategy="no", **changes)
    )
    assert trainer.state.global_step == 3
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.model_type == changes["model_type"]
    assert any("eval_loss" in entry for entry in trainer.state.log_history) == ("validation_size" not in changes)


def test_finished_run_is_not_overwritten(corpus, tmp_path):
    argv = pretraining_runs.arguments(corpus, tmp_path, max_steps=2, save_steps=2)
    pretraining_runs.run_here(argv)
    before = pretraining_runs.history(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a run already.*--resume.*another output_dir"):
        pretraining_runs.run_here(argv)
    with pytest.raises(ValueError, match=r"learning_rate was 0.005 and is 0.5 now; rows_per_step was 6 and is 18 now"):
        pretraining_runs.run_here([*argv, "--resume", "--learning_rate", "0.5", "--gradient_accumulation_steps", "6"])
    pretraining_runs.run_here([*argv, "--resume"])
    assert pretraining_runs.history(tmp_path) == before


def test_weights_are_float32_whatever_the_config_says(corpus, tmp_path):
    config = TupeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, dtype="bfloat16"
    )
    config.save_pretrained(tmp_path / "config")
    assert '"bfloat16"' in (tmp_path / "config" / "config.json").read_text()
    trainer = pretraining_runs.run_here(
        pretraining_runs.arguments(
            corpus, tmp_path / "run", config=tmp_path / "config", config_overrides="vocab_size=96", max_steps=1
        )
    )
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    # More rows than the tokenizer has tokens, as asked for.
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").get_input_embeddings().weight.shape == (96, 16)


def test_a_failed_start_leaves_nothing_that_counts(corpus, tmp_path):
    """Its tokenizer least of all, although the run is started with --resume, as the README advises."""
    with pytest.raises(ValueError, match="can't take rows of 64 tokens"):
        pretraining_runs.run_here([*pretraining_runs.arguments(corpus, tmp_path, block_size=64), "--resume"])
    argv = pretraining_runs.arguments(corpus, tmp_path, vocab_size=90, max_steps=1, save_strategy="no")
    trainer = pretraining_runs.run_here([*argv, "--resume"])
    assert trainer.model.model.config.vocab_size == 90


def test_resumed_on_the_same_rows_and_config_only(tmp_path):
    pretraining_runs.write_corpus(tmp_path / "corpus.txt")
    preset = TupeConfig(vocab_size=80, max_position_embeddings=32)
    preset.save_pretrained(tmp_path / "config")

    def run(*more):
        settings = {"config": tmp_path / "config", "max_steps": 2, "save_steps": 2}
        return pretraining_runs.run_here([*pretraining_runs.arguments(tmp_path, tmp_path / "run", **settings), *more])

    run()
    preset.hidden_act = "relu"
    preset.save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match=r"started otherwise: config.hidden_act was 'gelu' and is 'relu' now\. Use"):
        run("--resume")
    preset.hidden_act = "gelu"
    preset.save_pretrained(tmp_path / "config")
    run("--resume")
    pretraining_runs.write_corpus(tmp_path / "corpus.txt", documents=70)
    with pytest.raises(ValueError, match=r"started otherwise: rows was '\w+' and is '\w+' now"):
        run("--resume")


def test_the_split_of_a_corpus_is_passed_on(corpus, monkeypatch):
    asked = []
    monkeypatch.setattr("hf_efficient.data.corpus.load_corpus", lambda source, **options: asked.append(options))
    arguments.CorpusArguments(corpus="some/dataset", corpus_split="validation").load()
    assert asked[0]["split"] == "validation"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "nsp"}, "`objective` must be one of mlm, replaced_token, meta_controller, not 'nsp'"),
        ({"config_overrides": "hidden_sizes=16"}, "A tupe config has no hidden_sizes"),
        ({"config_overrides": "hidden_size"}, "must look like 'name=value"),
        ({"block_size": 64}, "can't take rows of 64 tokens .its max_position_embeddings is 32"),
        ({"config_overrides": "vocab_size=79"}, "vocab_size=79 .--config_overrides. has no room for .* 80 tokens"),
        ({"validation_size": 0.000001}, "leaves 60 to train on and 0 to validate on"),
    ],
    ids=["objective", "config-field", "override-syntax", "block-size", "vocabulary", "validation-size"],
)
def test_errors_say_what_to_do(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretraining_runs.run_here(pretraining_runs.arguments(corpus, tmp_path, **changes))


def test_presets_and_precision(tmp_path, monkeypatch, caplog):
    presets = sorted((pretraining_runs.TRAINING / "configs").glob("tupe_*.json"))
    assert presets
    monkeypatch.setattr(arguments, "bf16_support", lambda: "the processor's AMX")
    for preset in presets:
        caplog.clear()
        with caplog.at_level("INFO", arguments.__name__):
            settings, args = pretrain.parse_arguments([str(preset), "--max_steps", "7", "--use_cpu"])
        values = json.loads(preset.read_text())
        assert settings.block_size == values["block_size"]
        assert args.learning_rate == values["learning_rate"]
        assert args.max_steps == 7
        assert args.bf16
        assert "bf16 autocast (fast with the processor's AMX; --no_auto_bf16 for fp32)" in caplog.text
    assert not pretrain.parse_arguments(["--no_auto_bf16", "--use_cpu"])[1].bf16
    monkeypatch.setattr(arguments, "bf16_support", lambda: None)
    assert not pretrain.parse_arguments(["--use_cpu"])[1].bf16
    (tmp_path / "preset.json").write_text('{"block_sizes": 3}')
    with pytest.raises(ValueError, match="do not exist: block_sizes"):
        pretrain.parse_arguments([str(tmp_path / "preset.json")])


def test_masks_of_evaluation_are_those_of_runs_with_other_seeds():
    tokenizer = make_tokenizer(["the film is a day and it was so very"])
    rows = [{"input_ids": [0, *([5, 6, 7, 8, 9, 10] * 5), 2]}, {"input_ids": [0, *range(5, 12), 2]}]
    batches = []
    for seed in (1, 2):
        collators = pretrain.make_collators(tokenizer, {"seed": seed})
        collators["collator"].set_epoch(3)
        batches.append({name: collator(rows)["labels"] for name, collator in collators.items()})
    assert torch.equal(batches[0]["eval_collator"], batches[1]["eval_collator"])
    assert not torch.equal(batches[0]["collator"], batches[1]["collator"])


@pytest.mark.parametrize(
    ("sizes", "rows", "steps"),
    [
        ({"gradient_accumulation_steps": 5}, 107, 15),  # 5 steps of 20 rows in each of 3 epochs
        ({}, 107, 78),
        ({"num_train_epochs": 0.5}, 100, 13),
        ({"gradient_accumulation_steps": 50}, 107, 3),  # an epoch that fills no step is one
        ({"max_steps": 7}, 107, 7),
    ],
    ids=["accumulated", "single-batches", "half-an-epoch", "few-rows", "max-steps"],
)
def test_the_steps_of_a_run_are_counted_before_it(tmp_path, sizes, rows, steps):
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_train_epochs": 3, "use_cpu": True}
    args = arguments.PretrainingArguments(**{**settings, "auto_bf16": False, "report_to": [], **sizes})
    assert pretrain.planned_steps(args, rows) == steps
