"""Encoder-decoders from the command line: pairs and plain text, scores and predictions, recipes, resuming."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from hf_efficient import TerraformerConfig
from hf_efficient.data.pairs import lead, load_pairs
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from hf_efficient.metrics.rouge_metric import load_rouge_metric
from hf_efficient.models.terraformer.convert_terraformer import restore_state_dict
from hf_efficient.trainer.adafactor import TraxAdafactor
from hf_efficient.trainer.model_setup import build_config
from hf_efficient.utils.text_pieces import split_sentences
from tests.helpers.processes import run_distributed
from tests.training import pretraining_runs, seq2seq_worker
from training import train_seq2seq
from training.train_seq2seq import parse_arguments


TINY = (
    "hidden_size=16,intermediate_size=24,num_encoder_layers=1,num_decoder_layers=1,num_attention_heads=2,"
    "max_position_embeddings=40,position_init_scale=0.1"
)
SIZES = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2}
SPARSE = (
    f"{TINY},ff_sparsity=4,ff_rank=3,attention_type=multiplicative_conv,attention_sparsity=4,"
    "lm_head_type=multiplicative,loss_sparsity=4"
)


def write_pairs(path, count, seed):
    """A document names birds and dogs; its summary is its first and its last word. Some are long."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        words = [rng.choice(pretraining_runs.WORDS) for _ in range(3 + i % 9)]
        summary = f"{words[0]} {words[-1]}"
        text = f"{' '.join(words).capitalize()}. It is so. {'And on it goes. ' * (i % 3)}"
        rows.append({"document": text, "summary": summary, "others": [summary, words[0]]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run that has learned to write something."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"max_steps": 80, "eval_steps": 40, "save_steps": 40, "logging_steps": 20, "learning_rate": 0.03}
    return run(arguments(data, folder, **changes, train_sampling_strategy="group_by_length"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 50, 0)
    write_pairs(folder / "validation.jsonl", 9, 1)
    pretraining_runs.write_corpus(folder / "corpus.txt", documents=40)
    return folder


def arguments(data, output_dir, **changes):
    settings = {
        "pairs": data / "train.jsonl",
        "validation": data / "validation.jsonl",
        "references_column": "others",
        "config_overrides": SPARSE,
        "output_dir": output_dir,
        "vocab_size": 300,
        "max_source_length": 20,
        "max_target_length": 9,
        "max_eval_samples": 5,
        "max_steps": 12,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "logging_steps": 4,
        "save_steps": 4,
        "eval_steps": 6,
        "disable_tqdm": "True",
        "auto_bf16": "False",
        "use_cpu": "True",
        "report_to": "none",
        **changes,
    }
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


TEXT = {"pairs": None, "validation": None, "objective": "span_corruption", "txt_documents": "blank_line"}


def text_arguments(data, output_dir, **changes):
    return arguments(data, output_dir, corpus=data / "corpus.txt", validation_size=0.2, **{**TEXT, **changes})


def run(argv):
    return train_seq2seq.train_seq2seq(*parse_arguments(argv))


def run_in_child(argv, die_at=None):
    def child():
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            if die_at is not None:
                pretraining_runs.at_step(die_at)()
            run(argv)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def rouge(predictions, references):
    """ROUGE with a line for each sentence."""

    def lines(text):
        return "\n".join(split_sentences(text))

    references = [[lines(text) for text in texts] for texts in references]
    metric = load_rouge_metric(keep_in_memory=True)
    return metric.compute(predictions=[lines(text) for text in predictions], references=references)


def test_from_pairs_to_summaries(data, trained):
    """Long documents in pieces; scores, predictions and the lead; what the units do; the folder in a pipeline."""
    folder = Path(trained.args.output_dir)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 20
    log = json.loads((folder / "history.json").read_text())["log_history"]
    losses = [entry for entry in log if "loss" in entry]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert [entry["step"] for entry in losses if "lowest_unit_entropy" in entry] == [20, 40, 60, 80]
    assert set(json.loads((folder / "checkpoint-80" / "unit_usage.json").read_text())["layers"]) == {
        f"model.{part}.layers.0.feed_forward.sparse" for part in ("encoder", "decoder")
    }
    assert not any("runtime" in name for entry in log if "final_loss" in entry for name in entry)
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [(entry["step"], len(entry["summaries"])) for entry in evaluations] == [(40, 3), (80, 3)]

    pairs = load_pairs(str(data / "validation.jsonl"), references_column="others")
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == list(pairs["references"])
    assert len({row["prediction"] for row in rows}) > 2
    assert [row["lead"] for row in rows] == [lead(text, 3) for text in pairs["document"]]
    final = next(entry for entry in log if "final_loss" in entry)
    for prefix, name in (("", "prediction"), ("lead_", "lead")):
        for kind, score in rouge([row[name] for row in rows], pairs["references"]).items():
            assert final[f"final_{prefix}{kind}"] == pytest.approx(score)
    summarize = pipeline("summarization", model=str(folder), device="cpu")
    found = summarize(list(pairs["document"]), max_source_length=20)
    assert [answer["summary_text"] for answer in found] == [row["prediction"] for row in rows]

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = model.config.pad_token_id, model.config.eos_token_id, model.config.decoder_start_token_id
    assert ids == (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 0)
    assert (model.config.use_cache, model.generation_config.max_new_tokens) == (True, 9)
    assert (folder / "loss_curve.png").stat().st_size > 1000
    assert evaluations[-1]["eval_loss"] == pytest.approx(mean_loss(trained.model, tokenizer, pairs.take(5)), rel=1e-5)


def mean_loss(model, tokenizer, pairs):
    """The mean over all tokens of summaries, of which each is predicted from the first piece of its document."""
    encoder = train_seq2seq.PairEncoder(tokenizer, 20, 9)
    rows = encoder.encode_in_pieces(pairs.to_dict(), range(len(pairs)))
    total = count = 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        if labels != [-100]:
            with torch.no_grad():
                loss = model.eval()(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            total, count = total + loss * len(labels), count + len(labels)
    return total / count


def test_from_text_to_pairs(data, tmp_path):
    """Span corruption, and then summaries by what it has left, whose tokenizer is taken over."""
    first = run(text_arguments(data, tmp_path / "first"))
    log = first.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not any("rouge" in name for entry in log for name in entry)
    assert len([entry for entry in log if "eval_loss" in entry]) == 2
    second = run(
        arguments(data, tmp_path / "second", model=tmp_path / "first", config_overrides="dropout=0.0", max_steps=1)
    )
    assert second.model.config.dropout == 0.0
    vocabularies = [AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("first", "second")]
    assert vocabularies[0] == vocabularies[1]
    names = dict(first.model.named_parameters())
    moved = [(value - names[name]).abs().max().item() for name, value in second.model.named_parameters()]
    assert max(moved) <= 0.021  # one step of AdamW from there


RESUMED = {
    "pairs-sparse-recipe": (arguments, {"recipe": "arxiv", "recipe_warmup": 3}),
    "text-dense": (text_arguments, {"config_overrides": TINY}),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_killed_and_resumed_is_the_same_run(data, tmp_path, kind):
    build, changes = RESUMED[kind]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {**changes, "max_steps": 14}
    assert run_in_child(build(data, whole, **changes)) == 0
    argv = [*build(data, parts, **changes), "--resume"]
    for step in (6, 11):
        assert run_in_child(argv, die_at=step) == -signal.SIGKILL
        assert not (parts / "history.json").exists()
    assert run_in_child(argv) == 0
    assert pretraining_runs.history(parts) == pretraining_runs.history(whole)
    for name in ("model.safetensors", *(["predictions.jsonl"] if kind.startswith("pairs") else [])):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(ValueError, match="max_source_length was 20 and is 21 now"):
        run([*argv, "--max_source_length", "21"])


def test_two_processes_are_one(data, trained, tmp_path):
    """With half of the batch each: the losses, and each prediction once, though the last batches are filled up."""
    overrides = "dropout=0.0,activation_dropout=0.0,ff_hard_probability=1.0,ff_temperature=1e-6"
    changes = {"model": trained.args.output_dir, "config_overrides": overrides, "logging_steps": 1, "max_steps": 6}
    changes |= {"recipe": "c4", "recipe_warmup": 1000}
    run(arguments(data, tmp_path / "one", **changes, per_device_train_batch_size=4))
    argv = arguments(data, tmp_path / "two", **changes, per_device_train_batch_size=2, per_device_eval_batch_size=3)
    run_distributed(seq2seq_worker, tmp_path / "said", *argv)
    one, two = (pretraining_runs.history(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in [key for key in a if "loss" in key or "rouge" in key]:
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)
    predictions = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1]
    assert len(set(predictions[0].splitlines())) > 2


def test_a_recipe_is_that_of_the_authors(data, tmp_path):
    """Their optimizer for all weights, its rates, no clipping; matrices of sparse layers along the authors' axes."""
    changes = {"recipe": "arxiv", "recipe_warmup": 3, "max_steps": 5, "logging_steps": 1, "eval_strategy": "no"}
    trainer = run([*arguments(data, tmp_path, **changes), "--no_final_evaluation"])
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is TraxAdafactor
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The log shows the rate of the update to come.
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(
        [1 / 3 / 3**0.5 * n for n in (1, 2, 3)] + [0.5, 5**-0.5]
    )
    assert trainer.args.max_grad_norm == 0.0
    assert {group["decay_exponent"] for group in optimizer.param_groups} == {0.9}
    original = restore_state_dict(trainer.model.state_dict(), trainer.model.config)
    shapes = {tuple(tensor.shape) for tensor in original.values()}
    named = dict(trainer.model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.dim() == 3:
                name = next(name for name, value in named.items() if value is parameter)
                wanted = {"up": (0, 1), "controller_up": (0, 1), "down": (0, 2)}[name.rpartition(".")[2]]
                assert group["factored_axes"] == wanted
    assert (16, 6, 4) in shapes  # the first matrix of a sparse layer, as `up` along these axes


def test_t5_of_transformers(data, tmp_path):
    overrides = "d_model=16,d_kv=8,d_ff=24,num_layers=1,num_heads=2"
    trainer = run(arguments(data, tmp_path, model_type="t5", config_overrides=overrides, max_steps=2, eval_steps=2))
    assert any("eval_rouge1" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "translation"}, "one of pairs, span_corruption"),
        ({"pairs": None}, "documents and summaries by --pairs"),
        ({"objective": "span_corruption"}, "plain text by --corpus"),
        ({"recipe": "adam"}, "one of c4, c4-dense, arxiv"),
        ({"recipe_warmup": 5}, "of a --recipe"),
        ({"model": "x", "preset": "terraformer-medium"}, "has its config"),
        ({"preset": "terraformer-large"}, "no preset 'terraformer-large'"),
        ({"validation_size": 1.5}, r"must lie in \[0, 1\)"),
        ({"mean_span_length": 0.5}, "mean_span_length from 1"),
        ({"lead_sentences": -1}, "must not be negative"),
        ({"memory_check": "stop"}, "one of warn, refuse, off"),
        ({"max_source_length": 41}, r"can't take rows of 41 tokens with targets of 9 .*--max_source_length"),
        ({"max_target_length": 41}, "can't take rows of 20 tokens with targets of 41"),
        ({"max_target_length": 1}, "leave no room"),
        ({"model_type": "bert", "config_overrides": None}, "is no encoder-decoder"),
        ({"summary_column": "title"}, "has no column 'title'"),
        ({"validation": "validation"}, "--validation validation: no such file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(arguments(data, tmp_path, **changes))
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize("check", ["warn", "refuse", "off"])
def test_too_little_memory_is_said_before_training(data, tmp_path, monkeypatch, caplog, check):
    settings, args = parse_arguments(arguments(data, tmp_path, memory_check=check))
    model = AutoModelForSeq2SeqLM.from_config(TerraformerConfig(**SIZES))
    monkeypatch.setattr(train_seq2seq, "free_memory", lambda device: 10_000)
    with (
        caplog.at_level("INFO"),
        pytest.raises(ValueError, match="Lower --per_device") if check == "refuse" else (contextlib.nullcontext()),
    ):
        train_seq2seq.check_memory(settings, args, model)
    assert ("A training step takes about" in caplog.text) == (check != "off")
    assert ("are free. Lower --per_device_train_batch_size" in caplog.text) == (check == "warn")


def test_label_smoothing_is_refused_where_the_decoder_hashes(data, tmp_path):
    model = AutoModelForSeq2SeqLM.from_config(TerraformerConfig(**SIZES))
    _, args = parse_arguments(arguments(data, tmp_path, label_smoothing_factor=0.1))
    train_seq2seq.check_smoothing(args, model)
    model.config.decoder_long_attention = "lsh"
    with pytest.raises(ValueError, match="use --label_smoothing_factor 0"):
        train_seq2seq.check_smoothing(args, model)


def test_fsdp_and_a_recipe_are_refused(data, tmp_path):
    settings, args = parse_arguments(arguments(data, tmp_path, recipe="c4"))
    args.fsdp = True
    with pytest.raises(ValueError, match="which FSDP cuts apart"):
        train_seq2seq.train_seq2seq(settings, args)


def test_the_preset_trains_what_it_says(tmp_path):
    argv = [str(pretraining_runs.TRAINING / "configs" / "terraformer_small.json"), "--pairs", "x", "--use_cpu", "True"]
    settings, args = parse_arguments([*argv, "--output_dir", str(tmp_path)])
    settings.check()
    tokenizer = seq2seq_tokenizer(["the old dog sees a red bird"], 290)
    config = build_config(tokenizer, settings.model_type, settings.config, settings.config_overrides, settings.preset)
    assert (config.model_type, config.ff_sparsity, config.attention_sparsity) == ("terraformer", 16, 8)
    assert settings.max_source_length == config.max_position_embeddings  # so that no row of the table stays as it was
    assert config.vocab_size % config.loss_sparsity == 0
    assert (args.max_grad_norm, args.train_sampling_strategy) == (1.0, "group_by_length")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], train_seq2seq.__doc__)
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "python training/train_seq2seq.py",
        "span_corruption",
        "--references_column",
        "c4-dense",
        "(default: 512)",
    ):
        assert part in shown
