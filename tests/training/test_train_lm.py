"""Language models from the command line: each level, resuming, generation from what is left behind."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline

from hf_efficient.data.token_stream import Stream, build_tokenizer
from hf_efficient.metrics.language_model_metric import load_language_model_metric
from hf_efficient.trainer.model_setup import build_config
from tests.helpers.processes import ROOT
from tests.trainer import segment_runs
from tests.training import pretraining_runs
from training import train_lm
from training.train_lm import parse_arguments


CONFIGS = pretraining_runs.TRAINING / "configs"
SRUPP = "hidden_size=16,projection_size=6,num_hidden_layers=2,dropout=0.1"
SCALING = (
    "hidden_size=16,intermediate_size=24,num_hidden_layers=2,num_attention_heads=2,max_position_embeddings=40,"
    "ff_sparsity=4,ff_rank=3,attention_type=multiplicative_conv,attention_sparsity=4,lm_head_type=multiplicative,"
    "loss_sparsity=4"
)
GPT2 = "n_embd=16,n_layer=1,n_head=2,n_positions=32"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    pretraining_runs.write_corpus(path, documents=40)
    return path


def arguments(corpus, output_dir, **changes):
    settings = {
        "corpus": corpus,
        "config_overrides": SRUPP,
        "output_dir": output_dir,
        "validation_size": 0.1,
        "unroll_size": 16,
        "eval_unroll_size": 24,
        "max_steps": 12,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "logging_steps": 3,
        "save_steps": 4,
        "eval_steps": 6,
        "sample_tokens": 12,
        "disable_tqdm": "True",
        "auto_bf16": "False",
        "use_cpu": "True",
        "report_to": "none",
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def encoded_text(argv):
    """The text of a run, by the tokenizer that the run makes of it."""
    settings, _ = parse_arguments(argv)
    parts = settings.load_split()
    tokenizer = build_tokenizer(settings.level, *parts, alphabet=settings.alphabet, vocab_size=settings.vocab_size)
    return train_lm.encode_text(settings.level, tokenizer, *parts)


def run(argv):
    return train_lm.train_lm(*parse_arguments(argv))


def test_bytes_are_counted_on_the_tokens_that_are_measured(corpus, tmp_path):
    """A part of the validation text may have other words, and so other bytes a token, than all of it."""
    text = encoded_text(arguments(corpus, tmp_path, level="subword", vocab_size=300))
    tokens = text.validation.tokens
    shares = {count: text.units_per_token(count) for count in (5, 11, len(tokens) + 1, None)}
    for count in (5, 11):
        assert shares[count] * count == len(text.tokenizer.decode(tokens[:count].tolist()).encode())
    assert shares[5] != shares[11]
    assert shares[None] == shares[len(tokens) + 1] == text.validation.size / len(tokens)


@pytest.mark.parametrize(
    ("level", "changes", "unit"),
    [
        ("byte", {"alphabet": "corpus"}, "byte"),
        ("subword", {"vocab_size": 300}, "byte"),
        ("word", {"model_type": "gpt2", "config_overrides": GPT2}, "token"),
        ("char", {"paper_recipe": "True", "warmup_steps": 4}, "character"),
    ],
    ids=["byte", "subword", "word-gpt2", "char-paper-recipe"],
)
def test_from_text_to_generation(corpus, tmp_path, level, changes, unit):
    trainer = run(arguments(corpus, tmp_path, level=level, **changes))
    log = json.loads((tmp_path / "history.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [6, 12]
    final = next(entry for entry in log if "final_loss" in entry)
    validation = encoded_text(arguments(corpus, tmp_path, level=level, **changes)).validation
    size = len(validation.tokens) if unit == "token" else validation.size
    bits_per_nat = len(validation.tokens) / size / math.log(2)
    for prefix, entry in [*(("eval", entry) for entry in evaluations), ("final", final)]:
        assert entry[f"{prefix}_perplexity"] == pytest.approx(math.exp(entry[f"{prefix}_loss"]), rel=1e-4)
        assert entry[f"{prefix}_bits_per_{unit}"] == pytest.approx(entry[f"{prefix}_loss"] * bits_per_nat, rel=1e-4)
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.use_cache
    assert model.config.vocab_size == len(tokenizer)
    prompt = tokenizer.decode(validation.tokens[:32])
    assert all(entry["sample"].startswith(prompt[:10]) for entry in evaluations)
    assert len(tokenizer(evaluations[-1]["sample"])["input_ids"]) >= 12
    has_alpha = "alpha" in next(entry for entry in log if "loss" in entry)
    assert has_alpha == ("eval_alpha_1" in evaluations[0]) == (changes.get("model_type") != "gpt2")
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    # The pipeline of transformers 5.17 drops a space before a full stop, whatever the tokenizer says.
    options = {"max_new_tokens": 7, "do_sample": False, "clean_up_tokenization_spaces": False}
    text = generate("the old dog", **options)[0]["generated_text"]
    ids = tokenizer("the old dog", return_tensors="pt")["input_ids"]
    expected = trainer.model.eval().generate(ids, max_new_tokens=7, do_sample=False, use_cache=False)[0, ids.shape[1] :]
    assert text == "the old dog" + tokenizer.decode(expected, skip_special_tokens=True)


def run_in_child(argv, die_at=None):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def child():
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            build = train_lm.LanguageModelTrainer

            def with_death(*args, callbacks, **kwargs):
                return build(*args, callbacks=[*callbacks, Die()], **kwargs)

            train_lm.LanguageModelTrainer = with_death
            run(argv)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def test_a_sparse_model_from_text_to_generation(corpus, tmp_path, caplog):
    """With a vocabulary that its output layer can share, and what its controllers choose in log and checkpoints."""
    changes = {"model_type": "scaling_transformer", "config_overrides": SCALING, "logging_steps": 4}
    with caplog.at_level("INFO", "hf_efficient"):
        trainer = run(arguments(corpus, tmp_path, **changes))
    assert "rounded up from 258 to 260 ids" in caplog.text
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert [entry["step"] for entry in losses if "lowest_unit_entropy" in entry] == [4, 8, 12]
    for step in (8, 12):
        usage = json.loads((tmp_path / f"checkpoint-{step}" / "unit_usage.json").read_text())
        assert usage["step"] == step
        assert list(usage["layers"]) == [f"model.layers.{index}.feed_forward.sparse" for index in range(2)]

    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (model.config.vocab_size, len(tokenizer)) == (260, 258)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 7, "do_sample": False, "clean_up_tokenization_spaces": False}
    text = generate("the old dog", **options)[0]["generated_text"]
    ids = tokenizer("the old dog", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False)[0, ids.shape[1] :]
    assert text == "the old dog" + tokenizer.decode(expected, skip_special_tokens=True)


RESUMED = {
    "byte": {"level": "byte", "paper_recipe": "True"},
    "subword": {"level": "subword", "carry_state": "False", "vocab_size": 300},
    "sparse": {"level": "byte", "model_type": "scaling_transformer", "config_overrides": SCALING},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_killed_and_resumed_is_the_same_run(corpus, tmp_path, kind):
    """Bytes with memory in the paper's recipe; subwords without, in random segments, over several epochs; a model that
    draws units, and whose units are counted."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {**RESUMED[kind], "max_steps": 17}
    assert run_in_child(arguments(corpus, whole, **changes)) == 0
    argv = [*arguments(corpus, parts, **changes), "--resume"]
    for step in (7, 14):
        assert run_in_child(argv, die_at=step) == -signal.SIGKILL
        assert not (parts / "history.json").exists()
    assert run_in_child(argv) == 0
    assert pretraining_runs.history(parts) == pretraining_runs.history(whole)
    assert any("sample" in entry for entry in pretraining_runs.history(parts))
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="unroll_size was 16 and is 20 now"):
        run([*argv, "--unroll_size", "20"])


def test_sampling_leaves_training_as_it_is(corpus, tmp_path):
    runs = [run(arguments(corpus, tmp_path / str(tokens), sample_tokens=tokens)) for tokens in (0, 12)]
    first, second = ([entry["loss"] for entry in r.state.log_history if "loss" in entry] for r in runs)
    assert first == second


def test_paper_rate_is_the_formula_of_the_original():
    """Linear over w steps, then torch's own cosine, whose rate was overwritten meanwhile."""
    warmup, total, base = 7, 40, 0.3
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=base)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for step in range(total):
        if step < warmup:
            optimizer.param_groups[0]["lr"] = base * (step + 1) / warmup
        assert base * train_lm.paper_rate(step, warmup, total) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert train_lm.paper_rate(0, 0, total) == 1
    assert train_lm.paper_rate(total, warmup, total) == 0


def test_paper_recipe_decays_every_weight(corpus, tmp_path):
    trainer = run(arguments(corpus, tmp_path, paper_recipe="True", max_steps=1, sample_tokens=0))
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.RAdam
    decayed = sum(
        p.numel() for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]
    )
    assert decayed == sum(p.numel() for p in trainer.model.parameters())
    assert all(group["decoupled_weight_decay"] for group in optimizer.param_groups)


PRESETS = {
    "srupp_enwik8": {"hidden_size": 3072, "projection_size": 768, "num_hidden_layers": 10, "vocab_size": 103},
    "srupp_small": {"hidden_size": 512, "projection_size": 128, "num_hidden_layers": 8, "vocab_size": 258},
    "scaling_transformer_small": {"hidden_size": 256, "ff_sparsity": 16, "num_hidden_layers": 6, "vocab_size": 260},
    "scaling_transformer_24x1024": {"hidden_size": 1024, "ff_rank": 96, "attention_sparsity": 16, "loss_sparsity": 4},
}


def test_every_preset_of_language_models_is_checked_here():
    """Those of other scripts name their objective, their blocks, or none of a language model's settings."""
    found = {path.stem for path in CONFIGS.glob("*.json") if "unroll_size" in json.loads(path.read_text())}
    assert found == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, tmp_path):
    argv = [str(CONFIGS / f"{name}.json"), "--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none"]
    settings, args = parse_arguments(argv)
    settings.check()
    options = {"alphabet": settings.alphabet, "vocab_size": 290}
    texts = [bytes(range(100, 200))] if settings.level == "byte" else ["the old dog sees a red bird"]
    tokenizer = build_tokenizer(settings.level, texts, **options)
    config = build_config(tokenizer, settings.model_type, settings.config, settings.config_overrides, settings.preset)
    assert {field: getattr(config, field) for field in PRESETS[name]} == PRESETS[name]
    assert max(settings.unroll_size, settings.eval_unroll_size or 0) <= getattr(config, "max_position_embeddings", 4096)
    if name.startswith("scaling_transformer"):  # every row of the table is trained, by starts from 0 to the offset - 1
        assert config.position_max_offset == config.max_position_embeddings - settings.unroll_size + 1
        assert config.position_zero_probability == 0.5
    assert args.max_grad_norm == 1.0
    assert settings.paper_recipe == (name == "srupp_enwik8")
    (tmp_path / "bad.json").write_text('{"nonsense": 1}')
    with pytest.raises(ValueError, match="settings that do not exist: nonsense"):
        parse_arguments([str(tmp_path / "bad.json")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "syllable"}, "one of byte, char, word, subword"),
        ({"preset": "enwik9"}, "no preset 'enwik9'"),
        ({"preset": "enwik8-base", "model_type": "gpt2"}, "gpt2 models have no presets"),
        ({"unroll_size": 100000}, "too short for 3 columns of segments of 100000"),
        ({"model_type": "gpt2", "config_overrides": GPT2, "eval_unroll_size": 64}, "can't take rows of 64 tokens"),
        ({"alphabet": "some"}, "must be all or corpus"),
        ({"validation_size": -1}, "must not be negative"),
    ],
    ids=["level", "preset", "preset-of-gpt2", "text-too-short", "rows-too-long", "alphabet", "validation-size"],
)
def test_errors(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(arguments(corpus, tmp_path, **changes))
    assert not (tmp_path / "settings.json").exists()


def test_model_that_moves_labels_itself_is_refused(monkeypatch):
    config = train_lm.AutoModelForCausalLM.from_config
    model = config(pretraining_gpt2())
    train_lm.check_labels(model)
    monkeypatch.setattr(
        model, "loss_function", lambda logits, labels, vocab_size, **_: logits[:, :-1].mean() + labels.float().mean()
    )
    with pytest.raises(ValueError, match="does not take labels that are already moved"):
        train_lm.check_labels(model)


def pretraining_gpt2():
    from transformers import GPT2Config

    return GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], train_lm.__doc__)
    shown = " ".join(capsys.readouterr().out.split())
    parts = ("--[no_]carry_state", "half-overlapping windows", "python training/train_lm.py", "(default: 128)")
    for part in (*parts, "scaling_transformer_small.json", "unit_usage.json", "24x1024-all", "loss_sparsity"):
        assert part in shown


def test_no_objective_of_pretraining_is_loaded():
    """Nor is ELECTRA of transformers, nor another script."""
    program = "import sys, training.train_lm; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split())
    assert {"training.train_lm", "hf_efficient.trainer.run_directory"} <= loaded
    assert not [name for name in loaded if name.startswith("hf_efficient.objectives") or ".electra" in name]
    assert {name for name in loaded if name.startswith("training.")} == {"training.train_lm"}


def test_the_final_number_is_that_of_all_tokens(caplog):
    """The last segment of the column is short, and counts."""
    model, tokens = segment_runs.srupp().eval(), segment_runs.text(67).numpy()
    logs: list[dict] = []
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(eval_batch_size=3, disable_tqdm=True),
        accelerator=SimpleNamespace(unwrap_model=lambda model, keep_torch_compile: model),
        log=logs.append,
    )
    validation = Stream(tokens, len(tokens))
    measured = train_lm.Text(None, validation, validation, load_language_model_metric("byte", keep_in_memory=True))
    with caplog.at_level("INFO"):
        train_lm.evaluate_finally(trainer, measured, 8, carry_state=True)
    assert "All 66 validation tokens" in caplog.text
    with torch.no_grad():
        ids = torch.from_numpy(tokens)[None]
        whole = model(ids[:, :-1], attention_window=8).logits
        expected = torch.nn.functional.cross_entropy(whole[0], ids[0, 1:]).item()
    assert logs[0]["final_loss"] == pytest.approx(expected, abs=1e-5)
    assert logs[0]["final_bits_per_byte"] == pytest.approx(expected / math.log(2), abs=1e-5)
