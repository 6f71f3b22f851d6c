"""Faults in what fine-tuning is given: each is told in words before, or as soon as, it does harm."""

import json

import pytest

from tests.training.finetuning_runs import run, write_csv, write_jsonl
from training import finetune, finetune_glue


pytestmark = pytest.mark.usefixtures("own_caches")


def classes(count=12):
    return [{"text": f"{'soup' if i % 2 else 'ball'} the {i}", "label": i % 2} for i in range(count)]


@pytest.mark.parametrize(
    "option", ["seeds", "max_length", "max_train_samples", "max_eval_samples", "early_stopping_patience"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_begin_at_one(option, value):
    with pytest.raises(ValueError, match=rf"--{option} must be at least 1, not {value}\."):
        finetune.FinetuneSettings(model="m", train="t", **{option: value})
    if option != "early_stopping_patience":
        with pytest.raises(ValueError, match=rf"--{option} must be at least 1, not {value}\."):
            finetune_glue.GlueArguments(model="m", **{option: value})


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ("a,b,a", "auto", "--class_names must be different names"),
        ("a,,b", "classification", "none of them empty, not 'a,,b'"),
        ("", "auto", "none of them empty"),
        ("a,b", "regression", "--class_names are for tasks with classes, not for regression"),
    ],
    ids=["twice", "gap", "none", "regression"],
)
def test_names_of_classes_are_checked(names, kind, message):
    with pytest.raises(ValueError, match=message):
        finetune.FinetuneSettings(model="m", train="t", class_names=names, task_type=kind)


def test_names_of_classes_say_that_there_are_classes(topic_encoder, tmp_path, caplog):
    rows = [{"text": f"the {i}", "label": i % 25} for i in range(60)]
    settings = {"model": topic_encoder, "train": str(write_csv(tmp_path / "own.csv", rows))}
    assert finetune.prepare(finetune.FinetuneSettings(**settings)).task.kind == "regression"
    names = [f"c{i}" for i in range(25)]
    with caplog.at_level("INFO"):
        named = finetune.prepare(finetune.FinetuneSettings(**settings, class_names=",".join(names)))
    assert "The task is classification (--class_names)." in caplog.text
    assert named.task.label_names == tuple(names)


def test_the_score_that_chooses_is_known_before_training(topic_encoder, tmp_path):
    command = ["--model", topic_encoder, "--train", write_csv(tmp_path / "own.csv", classes())]
    command += ["--output_dir", tmp_path / "out", "--metric_for_best_model", "eval_bleu"]
    with pytest.raises(ValueError, match=r"no score 'eval_bleu' is computed; there are accuracy, macro_f1, loss\."):
        run(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limit", "options", "least"),
    [(2, [], 3), (2, ["--tokens_column", "words"], 3), (4, ["--second_text_column", "other"], 5)],
    ids=["text", "tokens", "pair"],
)
def test_a_length_without_room_for_words_is_refused(limit, options, least, topic_encoder, tmp_path):
    rows = [{**row, "other": row["text"]} for row in classes()]
    if "--tokens_column" in options:
        rows = [{"words": row["text"].split(), "label": ["O", "B-X", "O"]} for row in rows]
    command = ["--model", topic_encoder, "--train", write_jsonl(tmp_path / "own.jsonl", rows), *options]
    with pytest.raises(ValueError, match=rf"--max_length {limit} leaves no room for words .* at least {least}"):
        run(*command, "--max_length", limit, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("metrics", ["rmse,mae", None], ids=["regression", "classification"])
def test_a_run_that_diverges_says_so(metrics, topic_encoder, tmp_path):
    rows = classes() if metrics is None else [{**row, "label": row["label"] + 0.5} for row in classes()]
    command = ["--model", topic_encoder, "--train", write_csv(tmp_path / "own.csv", rows), "--max_grad_norm", 0]
    command += [] if metrics is None else ["--metrics", metrics]
    with pytest.raises(ValueError, match=r"outputs are not finite: training at --learning_rate 1e\+30 has diverged"):
        run(*command, "--output_dir", tmp_path / "out", "--learning_rate", 1e30)


def test_one_row_has_no_correlation(topic_encoder, tmp_path):
    rows = [{"text": f"the {i}", "label": i / 7} for i in range(10)]
    command = ["--model", topic_encoder, "--train", write_csv(tmp_path / "own.csv", rows), "--num_train_epochs", 1]
    summary = run(*command, "--output_dir", tmp_path / "out")
    assert summary["examples"]["validation"] == 1
    scores = {row["metric"]: row for row in summary["rows"]}
    assert scores["pearson"] == {
        **{"metric": "pearson", "median": None, "min": None, "max": None, "seeds": 1, "one answer": None},
    }
    assert scores["rmse"]["median"] > 0
    assert "| pearson | - | - | - | 1 | - |" in (tmp_path / "out" / "scores.md").read_text()
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == summary


def test_digits_that_are_no_numbers_are_names(topic_encoder, tmp_path):
    rows = [{"text": f"the {i}", "label": "²" if i % 2 else "3"} for i in range(12)]
    settings = finetune.FinetuneSettings(model=topic_encoder, train=str(write_csv(tmp_path / "own.csv", rows)))
    assert finetune.prepare(settings).task.label_names == ("3", "²")
