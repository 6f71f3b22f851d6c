"""Fine-tuning on own data: each kind of task from a table to a pipeline, seeds, resuming, and faults in one line."""

import dataclasses
import json
import multiprocessing
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_efficient import SruppConfig, SruppForMaskedLM, TupeConfig, TupeModel
from tests.helpers.processes import run_program
from tests.training.finetuning_runs import (
    FILLING,
    QUICK,
    TAGS,
    TOPICS,
    read_csv,
    run,
    tagged_rows,
    topic_rows,
    write_csv,
    write_jsonl,
)
from tests.training.test_finetune_glue import results_in
from tests.training.tiny_glue import numbers
from training import finetune, finetune_glue


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def topics(tmp_path_factory, topic_encoder):
    """A run of two seeds on a csv file of three classes, with a file to predict."""
    folder = tmp_path_factory.mktemp("topics")
    rows = topic_rows({"sport": 60, "food": 25, "law": 15})
    train = write_csv(folder / "own.csv", rows)
    new = write_csv(folder / "new.csv", [{"review": "the judge was very"}, {"review": "soup"}])
    columns = ["--text_column", "review", "--label_column", "topic", "--predict", new, "--class_weights", "balanced"]
    command = ["--model", topic_encoder, "--train", train, *columns, "--seeds", 2, "--output_dir", folder / "out"]
    return folder, command, run(*command)


def test_three_classes_of_a_csv_file(topics):
    folder, _, summary = topics
    assert summary["task_type"] == "classification"
    assert summary["labels"] == ["food", "law", "sport"]
    assert summary["examples"] == {"train": 90, "validation": 10}  # 6, 2 and 2 of the classes
    rows = {row["metric"]: row for row in summary["rows"]}
    assert list(rows) == ["accuracy", "macro_f1"]
    assert rows["accuracy"]["one answer"] == pytest.approx(6 / 10)
    assert rows["accuracy"]["median"] > 0.7
    assert rows["accuracy"]["seeds"] == 2
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        *("scores.csv", "scores.json", "scores.md", "seed-42", "seed-43"),
    ]
    assert [row["metric"] for row in read_csv(folder / "out" / "scores.csv")] == list(rows)
    assert json.loads((folder / "out" / "scores.json").read_text()) == summary
    assert "| accuracy |" in (folder / "out" / "scores.md").read_text()


def test_predictions_are_written_beside_texts_and_labels(topics):
    folder, _, summary = topics
    seed = folder / "out" / "seed-42"
    names = {"model", "results.json", "settings.json", "predictions.csv", "predictions_new.csv"}
    assert {path.name for path in seed.iterdir()} == names
    rows = read_csv(seed / "predictions.csv")
    accuracy = json.loads((seed / "results.json").read_text())["metrics"]["accuracy"]
    assert list(rows[0]) == ["text", "label", "prediction", "score"]
    assert np.mean([row["label"] == row["prediction"] for row in rows]) == pytest.approx(accuracy)
    new = read_csv(seed / "predictions_new.csv")
    assert list(new[0]) == ["text", "prediction", "score"]
    assert [row["text"] for row in new] == ["the judge was very", "soup"]
    assert all(row["prediction"] in TOPICS and 1 / 3 < float(row["score"]) <= 1 for row in new)
    assert summary["models"][0] == str(seed / "model")


def test_a_finished_run_predicts_for_another_file(topics, monkeypatch):
    folder, command, summary = topics
    monkeypatch.setattr("hf_efficient.trainer.finetuning.set_seed", lambda seed: pytest.fail("trained again"))
    command = [*command]
    command[command.index("--predict") + 1] = write_jsonl(folder / "more.jsonl", [{"review": "the ball"}])
    assert run(*command, "--resume", "--predictions_format", "jsonl") == summary
    row = json.loads((folder / "out" / "seed-43" / "predictions_more.jsonl").read_text())
    assert (row["text"], row["prediction"] in TOPICS) == ("the ball", True)
    with pytest.raises(FileExistsError, match="--resume"):
        run(*command)
    with pytest.raises(ValueError, match="class_weights was 'balanced' and is None now"):
        run(*[part for part in command if part not in ("--class_weights", "balanced")], "--resume")


@pytest.fixture(scope="module")
def names_in_texts(tmp_path_factory, topic_encoder):
    """A run on words with numbers of tags."""
    folder = tmp_path_factory.mktemp("names")
    rows = [{**row, "tags": [TAGS.index(tag) for tag in row["tags"]]} for row in tagged_rows(70)]
    command = ["--tokens_column", "words", "--label_column", "tags", "--class_names", ",".join(TAGS)]
    command += ["--train", write_jsonl(folder / "ner.jsonl", rows[:60])]
    command += ["--validation", write_jsonl(folder / "dev.jsonl", rows[60:])]
    return folder, run("--model", topic_encoder, *command, "--output_dir", folder / "out")


def test_tags_of_words(names_in_texts):
    folder, summary = names_in_texts
    assert summary["task_type"] == "token_classification"
    assert summary["labels"] == TAGS
    scores = {row["metric"]: row for row in summary["rows"]}
    assert list(scores) == ["f1", "precision", "recall", "accuracy"]
    assert scores["f1"]["median"] > 0.9
    assert scores["f1"]["one answer"] == 0
    lines = (folder / "out" / "seed-42" / "predictions.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert len(row["tokens"]) == len(row["label"]) == len(row["prediction"])
        assert {*row["label"], *row["prediction"]} <= set(TAGS)


def test_tags_may_be_names(topic_encoder, tmp_path):
    settings = {"tokens_column": "words", "label_column": "tags"}
    train = write_jsonl(tmp_path / "ner.jsonl", tagged_rows(30))
    examples = finetune.prepare(finetune.FinetuneSettings(model=topic_encoder, train=str(train), **settings))
    assert examples.task.label_names == tuple(TAGS)
    first = examples.labels["train"][0]
    assert [TAGS[number] for number in examples.ids["train"][0]] == first
    assert len(first) == len(examples.tables["train"].values["tokens"][0])


def save_tupe(folder, tokenizer, **sizes):
    TupeModel(TupeConfig(vocab_size=len(tokenizer), intermediate_size=24, **sizes)).save_pretrained(folder)


def save_srupp(folder, tokenizer, **sizes):
    config = SruppConfig(vocab_size=len(tokenizer), projection_size=8, bidirectional=True, **sizes)
    SruppForMaskedLM(config).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_tupe, save_srupp])
def test_encoders_of_this_package_learn_tags(save, topic_encoder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(topic_encoder)
    save(tmp_path / "model", tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokenizer.save_pretrained(tmp_path / "model")
    train = write_jsonl(tmp_path / "ner.jsonl", tagged_rows(30))
    columns = ["--tokens_column", "words", "--label_column", "tags", "--metrics", "accuracy"]
    command = ["--model", tmp_path / "model", "--train", train, *columns, "--output_dir", tmp_path / "out"]
    (row,) = run(*command, "--num_train_epochs", 20)["rows"]
    assert row["median"] > row["one answer"]


ASK = """
import json, sys
from transformers import pipeline
topics, names = sys.argv[1:]
classify = pipeline("text-classification", model=topics, device="cpu")
find = pipeline("token-classification", model=names, device="cpu", aggregation_strategy="simple")
answers = classify(["the judge was very", "soup"]), find("the paul anna saw rome")
print(json.dumps(answers, default=float))
"""


def test_models_serve_in_a_fresh_process(topics, names_in_texts):
    """In one that knows transformers alone."""
    models = topics[2]["models"][0], names_in_texts[1]["models"][0]
    done = subprocess.run([sys.executable, "-c", ASK, *models], capture_output=True, text=True, timeout=300, check=True)
    classes, groups = json.loads(done.stdout.splitlines()[-1])
    expected = read_csv(topics[0] / "out" / "seed-42" / "predictions_new.csv")
    assert [answer["label"] for answer in classes] == [row["prediction"] for row in expected]
    assert [answer["score"] for answer in classes] == pytest.approx([float(row["score"]) for row in expected], abs=1e-5)
    assert [(group["entity_group"], group["word"]) for group in groups] == [("PER", "paul anna"), ("LOC", "rome")]
    config = AutoModelForSequenceClassification.from_pretrained(models[0]).config
    assert config.label2id == {"food": 0, "law": 1, "sport": 2}


def test_several_labels_separated_in_a_cell(topic_encoder, tmp_path):
    rng = random.Random(2)
    rows = []
    for _ in range(70):
        topics = [topic for topic in TOPICS if rng.random() < 0.5]
        words = [rng.choice(FILLING), *(rng.choice(TOPICS[topic]) for topic in topics)]
        rows.append({"text": " ".join(words), "label": "|".join(topics)})
    options = ["--label_separator", "|", "--metrics", "micro_f1,accuracy", "--class_weights", "balanced"]
    train = write_csv(tmp_path / "several.csv", rows)
    summary = run(
        "--model", topic_encoder, "--train", train, *options, "--output_dir", tmp_path / "out", "--num_train_epochs", 10
    )
    assert summary["task_type"] == "multi_label"
    assert summary["rows"][0]["metric"] == "micro_f1"
    assert summary["rows"][0]["median"] > 0.6
    row = read_csv(tmp_path / "out" / "seed-42" / "predictions.csv")[0]
    assert set(json.loads(row["prediction"])) <= set(TOPICS)
    assert len(json.loads(row["prediction"])) == len(json.loads(row["score"]))
    config = AutoModelForSequenceClassification.from_pretrained(summary["models"][0]).config
    assert config.problem_type == "multi_label_classification"


def test_numbers_come_back_in_their_own_scale(topic_encoder, tmp_path):
    rng = random.Random(3)
    counts = [rng.randint(0, 6) for _ in range(60)]
    rows = [{"one": "ball " * n + "the", "two": "the " * (6 - n) + "a", "price": 200 + 13.5 * n} for n in counts]
    Dataset.from_list(rows[:50]).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list(rows[50:]).to_parquet(tmp_path / "validation.parquet")
    options = ["--text_column", "one", "--second_text_column", "two", "--label_column", "price"]
    options += ["--output_dir", tmp_path / "out", "--metrics", "rmse,pearson", "--num_train_epochs", 12]
    summary = run("--model", topic_encoder, "--train", tmp_path, *options)
    assert summary["task_type"] == "regression"
    assert summary["examples"] == {"train": 50, "validation": 10}
    scores = {row["metric"]: row for row in summary["rows"]}
    assert scores["rmse"]["median"] < 0.6 * scores["rmse"]["one answer"]
    assert scores["pearson"]["one answer"] is None
    assert "| - |" in (tmp_path / "out" / "scores.md").read_text()
    found = read_csv(tmp_path / "out" / "seed-42" / "predictions.csv")
    error = np.mean([(float(row["label"]) - float(row["prediction"])) ** 2 for row in found]) ** 0.5
    assert error == pytest.approx(scores["rmse"]["median"], rel=1e-4)


def test_killed_and_resumed_stops_early_at_the_same_numbers(topic_encoder, tmp_path):
    """Killed after a checkpoint in the middle of its patience."""
    train = write_csv(tmp_path / "own.csv", topic_rows({"sport": 40, "food": 20}))
    options = ["--model", topic_encoder, "--train", train, "--text_column", "review", "--label_column", "topic"]
    options += ["--early_stopping_patience", "3", "--num_train_epochs", "30", "--class_weights", "balanced"]
    arguments = [*map(str, options), *QUICK]
    finetune.main([*arguments, "--output_dir", str(tmp_path / "whole")])

    broken = tmp_path / "broken" / "seed-42"
    again = [*arguments, "--output_dir", str(tmp_path / "broken")]
    process = multiprocessing.get_context("fork").Process(target=finetune.main, args=(again,))
    process.start()
    while not list((broken / "checkpoints").glob("checkpoint-2*")) and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (broken / "results.json").exists()
    finetune.main([*again, "--resume"])

    (one,), (other,) = (list(results_in(tmp_path / name).values()) for name in ("whole", "broken"))
    assert one["metrics"] == other["metrics"]
    assert numbers(one["log_history"]) == numbers(other["log_history"])
    epochs = [entry["epoch"] for entry in one["log_history"] if "eval_accuracy" in entry]
    assert 4 <= epochs[-2] < 30  # the last evaluation is that of the best model
    best = max(entry["eval_accuracy"] for entry in one["log_history"] if "eval_accuracy" in entry)
    assert one["metrics"]["accuracy"] == best
    weights = [path.read_bytes() for path in sorted(tmp_path.rglob("model.safetensors"))]
    assert len(weights) == 2
    assert weights[0] == weights[1]


FAULTS = {
    "missing column": ("review,topic\nfine,a\n", [], "own.csv has no column 'text'; it has 'review', 'topic'."),
    "no label": ("text,label\nfine,a\nbad,\n", [], "own.csv, line 3: no label in the column 'label'"),
    "empty text": ("text,label\nfine,a\n,b\n", [], "own.csv, line 3: the column 'text' is empty"),
    "one class": ("text,label\nfine,a\nbad,a\n", [], "all labels in the column 'label' are a"),
    "no metric": (
        "text,label\n" + "fine,a\nbad,b\nx,a\ny,b\n",
        ["--metrics", "bleu"],
        "no score 'bleu' of classification",
    ),
    "no number": (
        "text,label\nfine,a\nbad,b\n",
        ["--task_type", "regression"],
        "own.csv, line 2: the column 'label' holds 'a', where a number is wanted",
    ),
    "no task": ("text,label\nfine,a\n", ["--task_type", "ranking"], "--task_type must be auto or one of"),
    "unlike strategies": (
        "text,label\n" + "fine,a\nbad,b\n" * 9 + "x,a\ny,b\n",
        ["--early_stopping_patience", "1", "--save_strategy", "no"],
        "give the same --eval_strategy and --save_strategy",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_one_line(fault, topic_encoder, tmp_path, capsys):
    content, options, message = FAULTS[fault]
    (tmp_path / "own.csv").write_text(content)
    argv = [
        "--model",
        topic_encoder,
        "--train",
        str(tmp_path / "own.csv"),
        "--output_dir",
        str(tmp_path / "out"),
        *options,
    ]
    with pytest.raises(SystemExit) as end:
        run_program(finetune, *argv)
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_label_that_training_does_not_know_is_told(topic_encoder, tmp_path):
    train = write_csv(tmp_path / "own.csv", [{"text": "fine", "label": "a"}, {"text": "bad", "label": "b"}])
    dev = write_csv(tmp_path / "dev.csv", [{"text": "fine", "label": "a"}, {"text": "so", "label": "c"}])
    with pytest.raises(ValueError, match=r"dev.csv, line 3: the label 'c' is none of .*\(a, b\)"):
        run("--model", topic_encoder, "--train", train, "--validation", dev, "--output_dir", tmp_path / "out")


def test_booleans_of_json_and_csv_are_the_same(topic_encoder, tmp_path):
    train = write_jsonl(tmp_path / "own.jsonl", [{"text": f"fine {i}", "label": i % 2 == 0} for i in range(6)])
    dev = write_csv(tmp_path / "dev.csv", [{"text": "a", "label": True}, {"text": "b", "label": "False"}])
    settings = finetune.FinetuneSettings(model=topic_encoder, train=str(train), validation=str(dev))
    examples = finetune.prepare(settings)
    assert examples.task.label_names == ("false", "true")
    assert examples.ids["validation"] == [1, 0]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(finetune, "--help")
    assert ended.value.code == 0
    assert "--second_text_column" in capsys.readouterr().out


def test_the_task_and_the_imbalance_are_said(topics, topic_encoder, tmp_path, capsys, caplog):
    folder, _, _ = topics
    settings = finetune.FinetuneSettings(
        model=topic_encoder, train=str(folder / "own.csv"), text_column="review", label_column="topic"
    )
    with caplog.at_level("INFO"):
        finetune.prepare(settings)
    assert "The task is classification (the labels are 3 names)." in caplog.text
    assert "10 of 100 examples are held out for validation." in caplog.text
    assert capsys.readouterr().out.splitlines()[0].split() == ["label", "train", "share", "validation", "share"]
    assert Path(folder / "own.csv").exists()


def test_a_split_of_the_data_is_taken_before_a_folder_of_its_name(topic_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("data/a_train.csv", "data/a_dev.csv", "data/a_test.csv", "validation/x.csv")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_csv(tmp_path / name, [{"text": f"{number} {label}", "label": label} for label in "ab"])
    (tmp_path / "test").mkdir()

    def texts(**options):
        settings = finetune.FinetuneSettings(model=topic_encoder, train="data", **options)
        return {split: table.values["text"][0][0] for split, table in finetune.load_tables(settings).items()}

    assert texts() == {"train": "0", "validation": "1"}
    assert texts(validation="validation", predict="test") == {"train": "0", "validation": "1", "predict": "2"}
    assert texts(validation="./validation") == {"train": "0", "validation": "3"}
    assert texts(validation="validation/x.csv") == {"train": "0", "validation": "3"}
    # A folder of splits given by its path is no mixture either
    assert texts(validation="./data", predict="./data") == {"train": "0", "validation": "1", "predict": "2"}


def test_splits_of_a_data_set_on_the_hub(topic_encoder, monkeypatch):
    """What is asked of `datasets`, which has no network here; `validation` is taken by itself."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        labels = [-1] if split == "test" else [0, 1, 1]
        return Dataset.from_list([{"text": f"{split} {i}", "label": i} for i in labels], features=features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name, config: ["train", "validation", "test"])
    settings = finetune.FinetuneSettings(
        model=topic_encoder, train="some/topics", train_config="en", train_split="train[:50%]", predict="test"
    )
    examples = finetune.prepare(settings)
    assert asked == [("some/topics", "en", split) for split in ("train[:50%]", "validation", "test")]
    assert examples.task.label_names == ("bad", "good")
    assert examples.labels["validation"] == ["bad", "good", "good"]
    assert examples.dataset("train")["label"][:] == [0, 1, 1]
    assert examples.dataset("predict").to_list() == [{"text": "test -1"}]


def test_the_page_names_options_that_exist():
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    kinds = (finetune.FinetuneSettings, finetune.FinetuneArguments, finetune_glue.GlueArguments)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    named = set(re.findall(r"--([a-z_]+)", page))
    assert {"label_column", "class_weights"} <= named
    assert named <= known
