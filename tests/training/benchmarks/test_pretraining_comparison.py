"""The comparison of pretraining methods at a tiny size: killed, taken up again, reported."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from hf_efficient.objectives.masking import original_ids
from tests.training.tiny_glue import make_tokenizer
from training.benchmarks import equal_time, pretraining_comparison, pretraining_report


WORDS = " ".join(f"w{number}" for number in range(60))


@pytest.fixture(autouse=True)
def _threads():
    """The number of threads is a benchmark's own business."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path):
    """Sentences of a small grammar, in which rare words of several tokens recur."""
    nouns = ["cat", "dog", "rhinoceros", "bird", "horse", "zookeeper"]
    verbs = ["sees", "likes", "follows", "reconsiders", "hears"]
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for document in range(300):
            lines = []
            for n in range(12):
                k = document * 31 + n * n
                subject, verb, thing = nouns[k % 6], verbs[k * 7 % 5], nouns[(k * 5 + n) % 6]
                lines.append(f"the {subject} {verb} a {thing} number {k % 97}")
            file.write(json.dumps({"text": " . ".join(lines)}) + "\n")
    return path


def call(*words):
    pretraining_comparison.main([*map(str, words)])


def tiny_run(corpus, folder, *words):
    sizes = ("--layers", 1, "--width", 64, "--length", 24, "--batch_size", 5, "--vocab_size", 120)
    times = ("--minutes", 0.01, "--slice", 0.05, "--eval_rows", 7, "--probe", 20, 10, "--band", 5, 500)
    return "run", "--corpus", corpus, "--output_dir", folder, *sizes, *times, *words


class Killed(BaseException):
    pass


def test_a_killed_comparison_goes_on_and_is_reported(tmp_path, corpus, monkeypatch):
    folder = tmp_path / "comparison"
    trainer_class = pretraining_comparison.TimedObjectiveTrainer
    monkeypatch.setattr(equal_time.train_interleaved, "__defaults__", (1,))  # save in every round
    run_slice = trainer_class.run_slice

    def killed(self, seconds):
        if self.name == "tupe_mc_notes" and self.progress.seconds > 0.25:
            raise Killed
        run_slice(self, seconds)

    methods = ("--methods", "bert_relative", "tupe_notes", "tupe_rtd", "tupe_mc_notes")
    monkeypatch.setattr(trainer_class, "run_slice", killed)
    with pytest.raises(Killed):
        call(*tiny_run(corpus, folder, *methods))
    first_turns: dict[str, tuple] = {}

    def noted(self, seconds):
        first_turns.setdefault(self.name, (self.progress.seconds > 0.1, int(self.model.discriminator_on)))
        run_slice(self, seconds)

    def noted_if_discriminator(self, seconds):
        if hasattr(self.model, "discriminator_on"):
            noted(self, seconds)
        else:
            run_slice(self, seconds)

    monkeypatch.setattr(trainer_class, "run_slice", noted_if_discriminator)
    call(*tiny_run(corpus, folder, *methods))
    assert {name: begun for name, (begun, _) in first_turns.items()} == {"tupe_rtd": True, "tupe_mc_notes": True}

    # Another run of the same seed adds to it.
    call(*tiny_run(corpus, folder, "--methods", "bert", "--long", "tupe_rtd", "--long_minutes", 0.015))
    result = json.loads((folder / "seed-0" / "result.json").read_text())
    assert list(result["runs"]) == [*methods[1:], "bert", "tupe_rtd_long"]
    for name, run in result["runs"].items():
        assert run["steps"] > 0
        assert len(run["probes"]) >= 2, name
        assert run["probes"][0][0] == 0.0
        assert len(run["curve"]) == len(run["parts"])
    assert result["runs"]["tupe_notes"]["parts"][-1]["note_updates"] > 1
    assert {name: run["choices"] for name, run in result["runs"].items() if run["choices"]} == {"tupe_mc_notes": 10}

    output = tmp_path / "report.json"
    call("report", "--output_dir", folder, "--result", output)
    rows = {row["name"]: row["value"] for row in json.loads(output.read_text())["summary"]}
    assert "held-out MLM loss, tupe_notes" in rows
    assert "held-out MLM loss, tupe_rtd" not in rows, "a generator's loss is no masked LM of the encoder"
    assert rows["held-out loss of the generator, tupe_rtd"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000
    columns, lines = json.loads(output.read_text())["table"].values()
    assert [line[0] for line in lines][:2] == ["BERT", "BERT with T5's relative bias"]
    assert lines[-1][0] == "TUPE-R, masked LM, then replaced tokens, longer"
    assert {len(line) for line in lines} == {len(columns)}

    with pytest.raises(ValueError, match=r"settings\.json was made otherwise: width was 64 and is 128 now"):
        call(*tiny_run(corpus, folder, *methods), "--width", 128)
    with pytest.raises(ValueError, match=r"bert_relative\.pt was made otherwise: budget_s was 0\.6 and is 3\.0 now"):
        call(*tiny_run(corpus, folder, *methods), "--minutes", 0.05)


def test_a_table_of_all_scores():
    runs = {
        "bert": {"final_loss": 6.0, "budget_s": 600, "probe_passed_s": None},
        "tupe_rtd": {
            "final_loss": 5.0,
            "budget_s": 2400,
            "probe_passed_s": 150.0,
            "parts": {"fraction_of_chance_level_loss": 0.9, "recall_replaced": 0.2},
        },
    }
    probe = {name: {"accuracy": 55.0 + 5 * i, "standard_error": 0.7 + i / 10} for i, name in enumerate(runs)}
    scores = [
        {"encoder": "bert", "task": "rte", "metric": "accuracy", "scores": [50.0, 53.0, 51.0]},
        {"encoder": "random", "task": "rte", "metric": "accuracy", "scores": [52.0]},
        {"encoder": "random", "task": "mrpc", "metric": "f1", "scores": [80.0]},
    ]
    titles = {"bert": "BERT", "tupe_rtd": "TUPE"}
    found = pretraining_report.comparison_table([{"runs": runs, "probe": probe}], scores, titles, "bert", {"tupe_rtd"})
    assert found["columns"][-1] == "rte, accuracy, %"
    assert found["rows"] == [
        ["BERT", "6.00", "55.0 ± 0.7", "-", "-", "51.0 (50.0 to 53.0)"],
        ["TUPE", "-", "60.0 ± 0.8", "2.5", "0.90, 20 %", "-"],
        ["never pretrained", "-", "-", "-", "-", "52.0 (52.0 to 52.0)"],
    ]


def test_saved_encoders_are_what_was_trained(tmp_path, corpus):
    """BERT's relative bias has a class of its own, which the Auto classes find."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "comparison"
    call(*tiny_run(corpus, folder, "--methods", "bert_relative"))
    state = torch.load(folder / "seed-0" / "bert_relative.pt", weights_only=True)["objective"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "seed-0" / "bert_relative")
    bias = model.base_model.relative_attention_bias.weight
    torch.testing.assert_close(bias, state["model.bert.relative_attention_bias.weight"], rtol=0, atol=0)


def test_a_probe_passes_when_it_is_clearly_above():
    baseline = {"probes": [(0.0, 50.0, 0.8), (60.0, 50.2, 0.8)]}
    noise = {"probes": [(0.0, 50.0, 0.8), (60.0, 52.0, 0.8)]}
    better = {"probes": [(0.0, 50.2, 0.8), (60.0, 60.2, 0.8)]}
    assert pretraining_report.probe_passed(noise, baseline) is None
    margin = 2 * math.hypot(0.8, 0.8)
    assert pretraining_report.probe_passed(better, baseline) == pytest.approx(60.0 * margin / 10.0)


def tiny_trainer(tokenizer, seed):
    """The trainer of masked LM on 40 rows that differ in their first word."""
    words = WORDS.split()
    rows = [{"input_ids": tokenizer(" ".join(words[k : k + 9]))["input_ids"]} for k in range(40)]
    length = len(rows[0]["input_ids"])
    rows = Dataset.from_list([row for row in rows if len(row["input_ids"]) == length])
    args = SimpleNamespace(seed=seed, layers=1, width=64, length=length, batch_size=5, eval_rows=7, learning_rate=1e-3)
    shared = {"tokenizer": tokenizer, "rows": (rows, rows), "probe": None}
    return pretraining_comparison.make_trainer(args, "bert", 1.0, shared, torch.device("cpu"))


def originals(batches):
    """The rows of batches before masking, in their order."""
    return [tuple(row) for b in batches for row in original_ids(b["input_ids"], b["labels"]).tolist()]


def targets(batches):
    return [tuple(labels) for b in batches for labels in b["labels"].tolist()]


def test_a_seed_decides_the_order_and_the_masks_of_training_and_no_evaluation():
    tokenizer = make_tokenizer([WORDS])
    first, again, other = (tiny_trainer(tokenizer, seed) for seed in (0, 0, 1))
    per_epoch = len(first.rows) // 5
    epochs = [list(itertools.islice(trainer.batches(), per_epoch)) for trainer in (first, again, other)]
    orders = [originals(batches) for batches in epochs]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 5 * per_epoch
    masks = [dict(zip(originals(batches), targets(batches), strict=True)) for batches in epochs]
    shared = set(orders[0]) & set(orders[2])
    assert any(masks[0][row] != masks[2][row] for row in shared)
    assert masks[0] == masks[1]
    for one, two in zip(first.eval_batches, other.eval_batches, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert torch.equal(one["labels"], two["labels"])
    first.progress.steps = per_epoch
    second = list(itertools.islice(first.batches(), per_epoch))
    assert originals(second) != orders[0]
