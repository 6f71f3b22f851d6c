"""The race of summaries at tiny sizes: batches that go on where they were left, figures, and what is claimed."""

import json
from argparse import Namespace

import pytest
import torch

from training.benchmarks import summarization_race as race
from training.benchmarks import summarization_report
from training.benchmarks.equal_time import TrainConfig


DOCS = summarization_report.RESULT.parents[2] / "docs" / "summarization.md"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(name, *options)` runs a command on a set of 21 pairs, with models 16 wide."""
    from datasets import Dataset

    monkeypatch.setattr(race, "COMMON", {**race.COMMON, "hidden_size": 16, "num_encoder_layers": 1})
    monkeypatch.setattr(race, "DATASETS", {"tiny": race.PairSet("few", 12, 6, "references")})
    for split in ("train", "validation", "test"):
        documents = [f"Number {i} stands {'far ' * (i % 7)}away. So be it." for i in range(21)]
        summaries = [f"number {i}" for i in range(21)]
        columns = {"document": documents, "summary": summaries, "references": [[text] for text in summaries]}
        Dataset.from_dict(columns).to_parquet(tmp_path / f"few-{split}.parquet")
    common = ["--data", str(tmp_path), "--vocab_size", "300", "--batch_size", "4", "--datasets", "tiny"]

    def run(name, *options):
        given = [] if name == "report" else common
        race.main([name, *given, "--output_dir", str(tmp_path / "runs"), *options])

    return run


def test_from_the_first_command_to_the_report(command, tmp_path, capsys):
    command("precision", "--repeats", "1")
    command("screen", "--minutes", "0.001")
    command("train", "--minutes", "0.002", "--evaluations", "2", "--summaries", "5")
    command("train", "--minutes", "0.002", "--evaluations", "2", "--summaries", "5")  # nothing is left to do
    with pytest.raises(ValueError, match=r"minutes was 0\.002 and is 1\.0 now"):
        command("train", "--minutes", "1", "--summaries", "5")
    command("report", "--result", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["screen"]) == set(race.KINDS) == set(summarization_report.TITLES)
    assert [run["kind"] for run in found["runs"]] == ["dense", "terraformer"]
    for run in found["runs"]:
        assert run["core_s"] >= 0.12
        assert run["summaries"] == 5 >= run["distinct_summaries"] >= 1
        assert set(run["leads"]) == {"1", "2", "3"}
        assert run["curve"][-1][1] == run["steps"]
        assert len(run["curve"]) == len(run["unit_usage_curve"])
    assert not found["runs"][0]["unit_usage"]
    assert all(0 <= layer["dead_units"] < 1 for layer in found["runs"][1]["unit_usage"].values())
    assert "no claim" in found["verdicts"][0]  # nothing is learned in a few steps
    assert "| tiny | Terraformer |" in capsys.readouterr().out


def test_a_run_goes_on_with_the_batches_that_follow(command, tmp_path):
    command("precision", "--repeats", "1")
    args = Namespace(data=tmp_path, output_dir=tmp_path / "runs", vocab_size=300)
    pairs = race.Pairs("tiny", race.DATASETS["tiny"], args)

    def drawn(first, count):
        trainer = race.SummaryTrainer("x", race.build("dense", pairs), pairs, TrainConfig(batch_size=4), 3, 8)
        trainer.progress.steps, batches = first, trainer.batches()
        for _ in range(count):
            yield next(batches)
            trainer.progress.steps += 1

    whole = list(drawn(0, 12))
    assert sum(len(batch["labels"]) for batch in whole[:5]) == 20  # an epoch, but for the pair that fills no batch
    for before, after in zip(whole[7:], drawn(7, 5), strict=True):
        assert torch.equal(before["input_ids"], after["input_ids"])
        assert torch.equal(before["labels"], after["labels"])


def test_documents_that_are_exchanged_are_those_of_the_batch(command, tmp_path):
    command("precision", "--repeats", "1")
    args = Namespace(data=tmp_path, output_dir=tmp_path / "runs", vocab_size=300)
    pairs = race.Pairs("tiny", race.DATASETS["tiny"], args)
    model = race.build("terraformer", pairs).eval()
    rows = pairs.rows("test", 2)
    swapped = [{**rows[0], "input_ids": rows[1]["input_ids"]}, {**rows[1], "input_ids": rows[0]["input_ids"]}]
    with torch.no_grad():
        exchanged = race.held_out_loss(model, pairs.batches(rows, 2), exchanged=True)
        assert exchanged == pytest.approx(race.held_out_loss(model, pairs.batches(swapped, 2)), rel=1e-6)
        one_by_one = [race.held_out_loss(model, pairs.batches([row], 1)) for row in rows]
        lengths = [len(row["labels"]) for row in rows]
        mean = sum(loss * length for loss, length in zip(one_by_one, lengths, strict=True)) / sum(lengths)
        assert race.held_out_loss(model, pairs.batches(rows, 2)) == pytest.approx(mean, rel=1e-5)


def test_both_kinds_are_of_equal_size():
    sizes = [
        race.TerraformerForConditionalGeneration(
            race.TerraformerConfig(**race.COMMON, **fields, vocab_size=4096, max_position_embeddings=192)
        ).num_parameters()
        for fields in race.KINDS.values()
    ]
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "ROUGE-1 30.0"),
        ({"distinct_summaries": 49}, "no claim (Terraformer: 49 distinct summaries of 100 documents)"),
        ({"loss_of_exchanged_documents": 3.04}, "no claim (Terraformer: exchanging documents costs 0.040 nats)"),
    ],
    ids=["learned", "writes-the-same", "reads-nothing"],
)
def test_a_model_on_a_plateau_gives_no_claim(changes, said):
    good = {"summaries": 100, "distinct_summaries": 90, "loss": 3.0, "loss_of_exchanged_documents": 3.5, "rouge1": 0.3}
    assert said in summarization_report.verdict("x", {"dense": good, "terraformer": {**good, **changes}})
    assert "Terraformer not trained" in summarization_report.verdict("x", {"dense": good})


def test_processors_are_named_where_they_differ():
    runs = [{"dataset": name, "machine": {"processor": processor}} for name, processor in (("a", "x"), ("b", "y"))]
    assert summarization_report.processors_of(runs) == ["Trained on: a, x; b, y."]
    assert summarization_report.processors_of(runs[:1]) == []


def test_the_table_of_the_docs_is_that_of_the_result():
    if not summarization_report.RESULT.exists():
        pytest.skip("no result of the race")
    runs = json.loads(summarization_report.RESULT.read_text())["runs"]
    assert "\n".join(summarization_report.table_of(runs)) in DOCS.read_text(encoding="utf-8")
