"""Fine-tuning on GLUE tasks: scores, tables, resuming, and the models that are left behind."""

import csv
import json
import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    pipeline,
)

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.data.glue import GLUE_TASKS
from hf_efficient.data.python_docs import builtin_topic_pairs
from hf_efficient.trainer import finetuning
from hf_efficient.trainer.task_encoding import encode
from hf_efficient.trainer.task_model import load_model
from tests.helpers.processes import run_program
from tests.training.tiny_glue import BAD, GOOD, make_rows, make_tokenizer, numbers, save_encoder, write_glue
from training import finetune_glue


QUICK = ["--use_cpu", "--disable_tqdm", "True", "--learning_rate", "5e-3", "--num_train_epochs", "2"]


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([" ".join(GOOD + BAD), "the film is a day and it was so very", *map(str, range(10))])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    folder = str(tmp_path_factory.mktemp("model"))
    save_encoder(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def glue_dir(tmp_path_factory):
    return str(write_glue(tmp_path_factory.mktemp("data")))


def task(name):
    return finetune_glue.as_finetuning_task(GLUE_TASKS[name])


def results_in(folder):
    return {path.parent: json.loads(path.read_text()) for path in sorted(Path(folder).rglob("results.json"))}


def test_tasks_and_seeds_end_in_one_table(model_dir, glue_dir, tmp_path):
    arguments = ["--model", model_dir, "--data_dir", glue_dir, "--output_dir", str(tmp_path / "out"), *QUICK]
    arguments += ["--tasks", "sst2,stsb,mnli,qnli,rte", "--seeds", "2", "--seed", "3"]
    arguments += ["--per_device_train_batch_size", "8", "--num_train_epochs", "6", "--save_strategy", "no"]
    finetune_glue.main(arguments)

    results = results_in(tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in results] == [
        f"{task}/seed-{seed}" for task in ("mnli", "sst2", "stsb") for seed in (3, 4)
    ]
    for path, result in results.items():
        assert sorted(file.name for file in path.iterdir()) == ["model", "results.json", "settings.json"]
        assert {"torch", "transformers", "hf_efficient"} <= set(result["versions"])
    with (tmp_path / "out" / "glue.csv").open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["sst2", "stsb", "mnli", "qnli", "rte", "average"]
    assert (rows["qnli"]["seeds"], rows["qnli"]["note"]) == ("0", "no training data")
    assert (rows["rte"]["seeds"], rows["rte"]["note"]) == ("0", "no data")

    by_task = {task: [r["metrics"] for r in results.values() if r["task"] == task] for task in ("sst2", "stsb", "mnli")}
    assert set(by_task["mnli"][0]) == {"accuracy", "accuracy_mm"}
    assert by_task["sst2"][0]["accuracy"] > 0.9
    expected = {task: np.median([100 * np.mean(list(m.values())) for m in runs]) for task, runs in by_task.items()}
    for task, score in expected.items():
        assert float(rows[task]["median"]) == pytest.approx(score)
        assert float(rows[task]["min"]) <= score <= float(rows[task]["max"])
    assert float(rows["average"]["median"]) == pytest.approx(np.mean(list(expected.values())))
    text = (tmp_path / "out" / "glue.md").read_text()
    assert "over 3 of 8 tasks, so not the GLUE average; without cola, mrpc, qqp, qnli, rte" in text
    assert "| rte | - | - | - | 0 |  | no data |" in text


def test_saved_model_serves_and_scores_the_same(model_dir, glue_dir, tmp_path):
    data = {split: make_rows(GLUE_TASKS["sst2"], 30, 7) for split in ("train", "validation")}
    data = DatasetDict({split: Dataset.from_list(rows) for split, rows in data.items()})
    args = finetune_glue.FinetuningArguments(
        output_dir=str(tmp_path),
        num_train_epochs=8,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    result = finetune_glue.finetune(model_dir, "sst2", args, data)
    config = AutoModelForSequenceClassification.from_pretrained(result["model_dir"]).config
    assert config.id2label == {0: "negative", 1: "positive"}
    classify = pipeline("text-classification", model=result["model_dir"], device="cpu")
    answers = [answer["label"] for answer in classify(list(data["validation"]["sentence"]))]
    names = [config.id2label[label] for label in data["validation"]["label"]]
    assert np.mean([a == b for a, b in zip(answers, names, strict=True)]) == result["metrics"]["accuracy"]
    assert result["metrics"]["accuracy"] > 0.9


def test_the_encoder_of_an_encoder_decoder_is_fine_tuned(tokenizer, tmp_path):
    """Terraformer as it was pretrained, of which the classifier takes the encoder."""
    config = TerraformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        max_position_embeddings=30,
        position_init_scale=0.1,
        ff_sparsity=4,
        ff_rank=3,
    )
    pretrained = TerraformerForConditionalGeneration(config)
    pretrained.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    network, _ = load_model(str(tmp_path / "pretrained"), str(tmp_path / "pretrained"), task("sst2"))
    loaded, own = network.model.encoder.state_dict(), pretrained.model.encoder.state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    rows = Dataset.from_list(make_rows(GLUE_TASKS["sst2"], 40, 7))
    args = finetune_glue.FinetuningArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = DatasetDict({"train": rows, "validation": rows})
    result = finetune_glue.finetune(str(tmp_path / "pretrained"), "sst2", args, data)
    assert result["metrics"]["accuracy"] > 0.9
    classify = pipeline("text-classification", model=result["model_dir"], device="cpu")
    answers = [answer["label"] == "positive" for answer in classify(list(rows["sentence"]))]
    assert np.mean(np.equal(answers, rows["label"])) == result["metrics"]["accuracy"]


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_accumulated_batches_equal_one_large_batch(task, model_dir, tokenizer, tmp_path):
    encoder = BertModel.from_pretrained(model_dir, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder.save_pretrained(tmp_path / "encoder")
    rows = Dataset.from_list(make_rows(GLUE_TASKS[task], 16, 5))
    losses, weights = [], []
    for accumulated in (1, 4):
        args = finetune_glue.FinetuningArguments(
            output_dir=str(tmp_path / str(accumulated)),
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            num_train_epochs=2,
            learning_rate=0.1,
            optim="sgd",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
        )
        data = DatasetDict({"train": rows, "validation": rows})
        result = finetune_glue.finetune(str(tmp_path / "encoder"), task, args, data, tokenizer=model_dir)
        losses.append([entry["loss"] for entry in result["log_history"] if "loss" in entry])
        weights.append(AutoModelForSequenceClassification.from_pretrained(result["model_dir"]).classifier.weight)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_stsb_is_learned_in_the_unit_interval(tokenizer):
    rows = {"sentence1": ["a"], "sentence2": ["the film"], "label": [2.5]}
    encoded = encode(rows, task("stsb"), tokenizer, 20)
    assert encoded["labels"] == [0.5]


def test_the_longer_text_of_a_pair_is_cut(tokenizer):
    rows = {"sentence1": ["the film"], "sentence2": ["0 1 2 3 4 5 6 7 8 9"], "label": [1]}
    encoded = encode(rows, task("rte"), tokenizer, 9)
    assert tokenizer.decode(encoded["input_ids"][0]) == "[CLS] the film [SEP] 0 1 2 3 [SEP]"
    assert encoded["length"] == [9]


def test_inputs_that_the_model_does_not_take_are_dropped(model_dir, tokenizer, tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    _, processor = load_model(str(tmp_path), model_dir, task("rte"))
    assert processor.model_input_names == ["input_ids", "attention_mask"]
    processor.save_pretrained(tmp_path)
    assert classify_keys(tmp_path) == {"input_ids", "attention_mask"}


def classify_keys(folder):
    return set(pipeline("text-classification", model=str(folder), device="cpu").preprocess("the film"))


def test_tokenizer_of_another_model_is_refused(model_dir, tokenizer, tmp_path):
    larger = make_tokenizer([" ".join(GOOD + BAD), "and many more words than that one knows"])
    larger.add_tokens([f"new{i}" for i in range(len(tokenizer))])
    larger.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        load_model(model_dir, str(tmp_path), task("rte"))


def test_killed_and_resumed_gives_the_same_numbers(model_dir, tmp_path):
    """Killed in its second run, and in the middle of an epoch that is grouped by length."""
    arguments = ["--model", model_dir, "--tasks", "topic_pairs", "--seeds", "2", *QUICK]
    arguments += ["--max_train_samples", "80", "--max_eval_samples", "40", "--per_device_train_batch_size", "4"]
    arguments += ["--save_strategy", "steps", "--save_steps", "8", "--logging_steps", "3", "--max_length", "24"]
    finetune_glue.main([*arguments, "--output_dir", str(tmp_path / "whole")])

    broken = tmp_path / "broken"
    second = broken / "topic_pairs" / "seed-43"
    kill_when(second / "checkpoints" / "checkpoint-24", [*arguments, "--output_dir", str(broken)])
    assert (broken / "topic_pairs" / "seed-42" / "results.json").exists()
    assert not (second / "results.json").exists()
    finetune_glue.main([*arguments, "--output_dir", str(broken), "--resume"])

    expected, found = (list(results_in(tmp_path / name).values()) for name in ("whole", "broken"))
    assert len(expected) == 2
    for one, other in zip(expected, found, strict=True):
        assert one["metrics"] == other["metrics"]
        assert numbers(one["log_history"]) == numbers(other["log_history"])
        assert len(numbers(one["log_history"])) > 10
    weights = [sorted((tmp_path / name).rglob("model.safetensors")) for name in ("whole", "broken")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    assert (tmp_path / "whole" / "glue.csv").read_text() == (broken / "glue.csv").read_text()


def kill_when(path, arguments):
    process = multiprocessing.get_context("fork").Process(target=finetune_glue.main, args=(arguments,))
    process.start()
    while not path.exists() and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(finetune_glue, "--help")
    assert ended.value.code == 0
    assert "--max_eval_samples" in capsys.readouterr().out


def test_finished_runs_are_read_and_others_are_not_overwritten(model_dir, glue_dir, tmp_path, monkeypatch):
    arguments = ["--model", model_dir, "--data_dir", glue_dir, "--tasks", "sst2", "--output_dir", str(tmp_path)]
    arguments += [*QUICK, "--max_train_samples", "8", "--max_eval_samples", "8"]
    main = finetune_glue.main
    main(arguments)
    table = (tmp_path / "glue.md").read_text()
    with pytest.raises(FileExistsError, match="--resume"):
        main(arguments)
    with pytest.raises(ValueError, match=r"weight_decay was 0.01 and is 0.5 now"):
        main([*arguments, "--resume", "--weight_decay", "0.5"])
    with pytest.raises(ValueError, match=r"adam_beta2 was 0.999 and is 0.5 now"):
        main([*arguments, "--resume", "--adam_beta2", "0.5"])
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps was 1 and is 2 now; rows_per_step was 16 and is"
    ):
        main([*arguments, "--resume", "--gradient_accumulation_steps", "2"])
    monkeypatch.setattr(finetuning, "set_seed", lambda seed: pytest.fail("trained again"))
    main([*arguments, "--resume"])
    assert (tmp_path / "glue.md").read_text() == table


def test_a_result_belongs_to_its_data(model_dir, tmp_path):
    data = {name: Dataset.from_list(make_rows(GLUE_TASKS["sst2"], 8, 1)) for name in ("train", "validation")}
    args = finetune_glue.FinetuningArguments(
        output_dir=str(tmp_path), num_train_epochs=1, use_cpu=True, disable_tqdm=True
    )

    def finetune(rows):
        return finetune_glue.finetune(model_dir, "sst2", args, DatasetDict(rows), resume=True)

    result = finetune(data)
    assert finetune(data) == result
    flipped = data["train"].map(lambda row: {"label": 1 - row["label"]})
    with pytest.raises(ValueError, match=r"started otherwise: data was '\w+' and is '\w+' now"):
        finetune({**data, "train": flipped})


def test_without_any_data_the_program_fails_and_says_so(model_dir, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = ["--model", model_dir, "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    for folder in ("data", "absent"):
        arguments[3] = str(tmp_path / folder)
        with pytest.raises(FileNotFoundError, match=rf"No task had data .*{folder}"):
            finetune_glue.main([*arguments, "--use_cpu"])
    rows = json.loads((tmp_path / "out" / "glue.json").read_text())["rows"]
    assert [row["task"] for row in rows] == [task for task in GLUE_TASKS if task != "topic_pairs"]
    assert {row["note"] for row in rows} == {"no data"}


def test_unknown_tasks_are_refused_before_anything_is_done():
    with pytest.raises(ValueError, match=r"'mrcp'.*mrpc"):
        finetune_glue.choose_tasks("rte, mrcp")


def tupe(tokenizer, **sizes):
    from hf_efficient import TupeConfig, TupeForMaskedLM

    return TupeForMaskedLM(TupeConfig(vocab_size=len(tokenizer), **sizes))


def scaling_transformer(tokenizer, **sizes):
    """A language model, sparse in every layer, as `train_lm.py` leaves it."""
    from hf_efficient import ScalingTransformerForCausalLM
    from hf_efficient.trainer.model_setup import build_config

    overrides = {"ff_sparsity": 4, "ff_rank": 2, "attention_type": "multiplicative_conv", "attention_sparsity": 2}
    overrides |= {"lm_head_type": "multiplicative", "loss_sparsity": 4, **sizes}
    return ScalingTransformerForCausalLM(build_config(tokenizer, "scaling_transformer", overrides=overrides))


@pytest.mark.parametrize("pretrained", [tupe, scaling_transformer])
def test_builtin_task_trains_any_encoder_of_this_package(pretrained, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = pretrained(tokenizer, max_position_embeddings=32, **sizes)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    data = DatasetDict({name: rows.take(24) for name, rows in builtin_topic_pairs().items()})
    args = finetune_glue.FinetuningArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=1, use_cpu=True, disable_tqdm=True
    )
    result = finetune_glue.finetune(str(tmp_path / "encoder"), "topic_pairs", args, data)
    assert 0 <= result["metrics"]["accuracy"] <= 1
    loss = [entry["eval_loss"] for entry in result["log_history"] if "eval_loss" in entry]
    assert len(loss) == 1
    assert 0.5 < loss[0] < 1.0


def test_glue_average_is_that_of_the_eight_tasks():
    scores = dict(zip(GLUE_TASKS, np.linspace(0.2, 0.9, len(GLUE_TASKS)), strict=True))
    results = {
        task: [{"metrics": {"accuracy": score + d}} for d in (-0.1, 0.0, 0.02)] for task, score in scores.items()
    }
    results["stsb"] = [{"metrics": {"pearson": p, "spearmanr": s}} for p, s in ((0.8, 0.6), (None, None), (0.5, 0.3))]
    summary = finetune_glue.summarise(results, {})
    counted = {**scores, "stsb": 0.4}
    expected = 100 * np.mean([counted[task] for task in scores if task not in ("wnli", "topic_pairs")])
    assert summary["average"] == pytest.approx(expected)
    assert summary["missing"] == []
    rows = {row["task"]: row for row in summary["rows"]}
    assert rows["stsb"]["note"] == "1 of 3 seeds predict a constant, counted as 0"
    assert (rows["stsb"]["min"], rows["stsb"]["median"]) == (0.0, pytest.approx(40.0))
    assert "the GLUE average, over all eight tasks" in finetune_glue.to_markdown(summary)


def test_one_task_alone_has_a_score_and_no_average():
    runs = [{"metrics": {"accuracy": score}} for score in (0.5, 0.75, 0.625)]
    text = finetune_glue.to_markdown(finetune_glue.summarise({"rte": runs}, {}))
    assert "\nrte: 62.5.\n" in text
    assert "verage" not in text
    assert "rte: -." in finetune_glue.to_markdown(finetune_glue.summarise({"rte": []}, {"rte": "no data"}))


def dataset(task, count, label, seed=0):
    """Rows of a task that all have one label."""
    return Dataset.from_list([{**row, "label": label} for row in make_rows(GLUE_TASKS[task], count, seed)])


def test_each_validation_set_of_mnli_has_its_own_score(model_dir, tmp_path):
    """A model that has only seen entailment is right on one set and wrong on the other."""
    rows = {"train": dataset("mnli", 40, 0), "validation_matched": dataset("mnli", 9, 0)}
    data = DatasetDict({**rows, "validation_mismatched": dataset("mnli", 7, 2)})
    args = finetune_glue.FinetuningArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        learning_rate=5e-3,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    metrics = finetune_glue.finetune(model_dir, "mnli", args, data)["metrics"]
    assert metrics == {"accuracy": 1.0, "accuracy_mm": 0.0}


def test_stsb_is_scored_in_the_units_of_its_labels(model_dir, tmp_path, monkeypatch):
    """Correlations do not see a scale, so the metric here is one that does."""
    seen = {}

    class Metric:
        def compute(self, predictions, references):
            seen.update(predictions=predictions, references=references)
            return {"pearson": 0.5, "spearmanr": 0.25}

    monkeypatch.setattr(finetune_glue, "load_glue_metric", lambda task: Metric())
    rows = Dataset.from_list(make_rows(GLUE_TASKS["stsb"], 13, 3))
    args = finetune_glue.FinetuningArguments(
        output_dir=str(tmp_path), num_train_epochs=1, save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    data = DatasetDict({"train": rows, "validation": rows})
    result = finetune_glue.finetune(model_dir, "stsb", args, data)
    assert result["metrics"] == {"pearson": 0.5, "spearmanr": 0.25}
    # Rows are scored in the order of their lengths.
    np.testing.assert_allclose(np.sort(seen["references"]), np.sort(rows["label"]), rtol=1e-6)
    rate = pipeline("text-classification", model=result["model_dir"], device="cpu", function_to_apply="none")
    pairs = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows]
    scores = [answer["score"] for answer in rate(pairs)]
    np.testing.assert_allclose(np.sort(seen["predictions"]), 5 * np.sort(scores), rtol=1e-3, atol=1e-5)
