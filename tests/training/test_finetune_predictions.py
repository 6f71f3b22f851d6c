"""Files of predictions of fine-tuning, and the words that are scored."""

import collections
import csv
import json
import statistics

import pytest

from hf_efficient.trainer import finetuning
from tests.training.finetuning_runs import (
    read_csv,
    run,
    topic_rows,
    write_csv,
    write_jsonl,
)
from tests.training.tiny_glue import numbers


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, topic_encoder):
    """A run on rows with more columns than it needs, its command and its output."""
    folder = tmp_path_factory.mktemp("ids")
    rows = [{"id": f"k{i}", **row, "score": i} for i, row in enumerate(topic_rows({"sport": 12, "food": 12}))]
    command = ["--train", write_csv(folder / "own.csv", rows), "--text_column", "review", "--label_column", "topic"]
    command = ["--model", topic_encoder, *command, "--num_train_epochs", 1, "--output_dir", folder / "out"]
    run(*command)
    return rows, [*command, "--resume"], folder / "out" / "seed-42"


def test_other_columns_stand_in_front(finished):
    rows, _, folder = finished
    found = read_csv(folder / "predictions.csv")
    assert list(found[0]) == ["id", "text", "label", "prediction", "score"]
    by_id = {row["id"]: row for row in rows}
    assert [(row["text"], row["label"]) for row in found] == [
        (by_id[row["id"]]["review"], by_id[row["id"]]["topic"]) for row in found
    ]
    assert all(0 < float(row["score"]) <= 1 for row in found)  # the model's, not the number of the row


def test_columns_that_clash_are_told_once(finished, tmp_path, caplog):
    _, command, folder = finished
    rows = [{"id": 1, "prediction": "old", "review": "the soup", "topic": None, "seen": [1, {"a": None}]}]
    run(*command, "--predict", write_jsonl(tmp_path / "clash.jsonl", rows), "--predictions_format", "jsonl")
    warnings = [record.message for record in caplog.records if "of their own" in record.message]
    assert warnings == [
        "The files of predictions have columns 'score', 'prediction' of their own: those of the data are left out of "
        "them."
    ]
    (found,) = map(json.loads, (folder / "predictions_clash.jsonl").read_text().splitlines())
    assert list(found) == ["id", "topic", "seen", "text", "prediction", "score"]
    assert found["seen"] == [1, {"a": None}]
    assert found["prediction"] in ("food", "sport")


def test_files_of_the_same_name_do_not_replace_each_other(finished, tmp_path):
    _, command, folder = finished
    for parent, name, text in (
        ("a", "new.v1.csv", "the soup"),
        ("a", "new.v2.csv", "the ball"),
        ("b", "new.v1.csv", 'bread, or "soup"\nor ball'),
        ("a", "new.v1.csv", "the soup"),
    ):
        (tmp_path / parent).mkdir(exist_ok=True)
        run(*command, "--predict", write_csv(tmp_path / parent / name, [{"review": text}]))
    run(*command, "--predict", tmp_path / "b" / "new.v1.csv")
    files = sorted(path.name for path in folder.glob("predictions_new*"))
    assert files == ["predictions_new.v1.csv", "predictions_new.v1_2.csv", "predictions_new.v2.csv"]
    texts = [read_csv(folder / name)[0]["text"] for name in files]
    assert texts == ["the soup", 'bread, or "soup"\nor ball', "the ball"]


def test_one_answer_is_scored_on_the_words_of_the_model(topic_encoder, tmp_path, caplog):
    """Words behind the limit have no prediction, and count for neither."""
    rows = [
        {"tokens": ["ball"] * 9 + ["soup"] * 20 + [f"{i}"], "label": ["O"] * 9 + ["X"] * 21, "id": i} for i in range(20)
    ]
    options = ["--max_length", 12, "--tokens_column", "tokens", "--metrics", "accuracy", "--num_train_epochs", 1]
    command = ["--model", topic_encoder, "--train", write_jsonl(tmp_path / "own.jsonl", rows), *options]
    with caplog.at_level("INFO"):
        summary = run(*command, "--output_dir", tmp_path / "out")
    lines = map(json.loads, (tmp_path / "out" / "seed-42" / "predictions.jsonl").read_text().splitlines())
    (score,) = summary["rows"]
    found = list(lines)
    assert [row["prediction"].count(None) for row in found] == [20] * 2
    pairs = [
        (tag, truth)
        for row in found
        for tag, truth in zip(row["prediction"], row["label"], strict=True)
        if tag is not None
    ]
    assert score["median"] == pytest.approx(statistics.fmean(tag == truth for tag, truth in pairs))
    # X is the most frequent tag of all words, O that of those which are read
    assert score["one answer"] == pytest.approx(0.9)
    assert "40 of 60 words of the validation examples lie behind the first 12 tokens" in caplog.text


def test_predictions_in_cells_are_json(finished, tmp_path):
    _, command, folder = finished
    rows = [{"review": "the soup", "tags": ["a", "é"]}]
    run(*command, "--predict", write_jsonl(tmp_path / "cells.jsonl", rows))
    with (folder / "predictions_cells.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["tags"] == '["a", "é"]'


def test_each_text_is_tokenised_once_for_all_seeds(topic_encoder, tmp_path, monkeypatch):
    encode, counts = finetuning.encode, collections.Counter()

    def counted(rows, *arguments):
        counts.update(rows["text"])
        return encode(rows, *arguments)

    monkeypatch.setattr(finetuning, "encode", counted)
    rows = [{"text": f"{'soup' if i % 2 else 'ball'} {i}", "label": i % 2} for i in range(20)]
    command = ["--model", topic_encoder, "--train", write_csv(tmp_path / "own.csv", rows), "--num_train_epochs", 1]
    together = run(*command, "--seeds", 2, "--output_dir", tmp_path / "two")
    assert sorted(counts.values()) == [1] * 18 + [2] * 2  # those for validation once more without their labels
    alone = run(*command, "--seed", 43, "--output_dir", tmp_path / "one")
    results = [json.loads((tmp_path / name / "seed-43" / "results.json").read_text()) for name in ("two", "one")]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert numbers(results[0]["log_history"]) == numbers(results[1]["log_history"])
    assert together["examples"] == alone["examples"]
