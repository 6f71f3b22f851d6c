"""The examples for users, each at tiny size; those whose package is not installed are skipped by name."""

import contextlib
import importlib.util
import json
import socket
import time
import urllib.error
import urllib.request

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_efficient.data.byte_tokenizer import byte_tokenizer
from tests.helpers.processes import run_by_torchrun
from training.examples import (
    deploy,
    score_with_lm_eval,
    sentence_embeddings,
    serve,
    text_tasks,
    tune_language_model,
    two_processes,
)
from training.examples.small_models import FIELDS, LENGTH, TEXTS, load_or_make, small_model, small_tokenizer


def need(*modules):
    """Skip a test whose packages are not there, by their names."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; `make matrix` has all packages of the examples")


@pytest.mark.parametrize("family", FIELDS)
def test_small_models_read_what_their_tokenizers_write(family, tmp_path):
    tokenizer = small_tokenizer(family)
    assert max(len(tokenizer(text)["input_ids"]) for text in TEXTS) <= LENGTH
    model = small_model(family, "AutoModelForSequenceClassification", tokenizer, num_labels=5)
    assert model.num_parameters() < 60_000
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    assert model(**inputs).logits.shape == (8, 5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_or_make(tmp_path, family, "AutoModelForSequenceClassification")
    assert again.config.num_labels == 5


def test_text_tasks_learn_their_rows(tmp_path, capsys):
    found = text_tasks.main(["--output", str(tmp_path)])
    classes = [answer["label"] for answer in found["classes"]]
    assert sum(one == other for one, other in zip(classes, text_tasks.CLASSES, strict=True)) >= 7
    names = {(name["word"], name["entity_group"]) for name in found["names"][0]}
    assert names == {("anna paul", "PER"), ("rome", "LOC")}
    assert [answer for answer, _ in found["answers"]] == [answer for _, _, answer in text_tasks.ASKED]
    assert "answers: ('The old dog'" in capsys.readouterr().out


def test_an_answer_lies_in_the_text_and_ends_after_it_begins():
    model, tokenizer = load_or_make(None, "tupe", "AutoModelForQuestionAnswering")
    for most in (1, 4):
        answer, score = text_tasks.find_answer(model, tokenizer, "Who paints boats?", TEXTS[4], most)
        assert answer
        assert answer in TEXTS[4]
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= most
        assert 0 < score < 1


@pytest.mark.parametrize("family", ["tupe", "scaling_transformer"])
def test_embeddings_find_the_texts_of_questions(family, tmp_path):
    need("sentence_transformers")
    found = sentence_embeddings.main(["--output", str(tmp_path), "--family", family])
    assert sum(index == place for place, index in enumerate(found)) >= 7


@pytest.mark.parametrize("family", tune_language_model.FAMILIES)
def test_language_models_are_tuned(family, tmp_path):
    need("trl", "peft")
    found = tune_language_model.main(["--output", str(tmp_path), "--family", family, "--steps", "8"])
    for way, losses in found.items():
        assert losses[-1] < losses[0], way
    # The adapter holds two matrices for each layer, and what was merged is a whole model.
    assert all(".lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "merged").config.model_type == family


def test_a_classifier_runs_in_onnx_runtime(tmp_path):
    need("onnxruntime", "onnxscript")
    assert deploy.main(["--output", str(tmp_path), "--ways", "onnx"])["onnx"] < 1e-5


def test_a_language_model_is_quantised_by_torchao(tmp_path):
    need("torchao")
    assert 0 < deploy.main(["--output", str(tmp_path), "--ways", "torchao"])["torchao"] < 0.05


@pytest.mark.parametrize("family", ["srupp", "terraformer"])
def test_the_harness_scores_a_folder(family, tmp_path, monkeypatch):
    need("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    accuracy = score_with_lm_eval.main(["--output", str(tmp_path), "--family", family])
    assert accuracy * len(TEXTS) == pytest.approx(round(accuracy * len(TEXTS)))
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == {"beginning": "The old dog sleeps by the warm", "choices": ["fire.", "minute."], "answer": 0}


def answer_of(url, body, tries=60):
    """Ask a server as soon as it is up."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(tries):
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError(f"no server at {url}")


def test_a_language_model_is_served(tmp_path):
    need("fastapi", "uvicorn", "openai")
    from transformers.cli.serve import Serve

    model, tokenizer = load_or_make(None, "scaling_transformer", "AutoModelForCausalLM")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "ScalingTransformerForCausalLM" in serve.name_classes()
    server = Serve(force_model=str(tmp_path), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        place, short = f"http://127.0.0.1:{port}/v1", {"model": str(tmp_path), "max_tokens": 3, "temperature": 0}
        answer = answer_of(f"{place}/completions", {**short, "prompt": TEXTS[0]})
        assert answer["usage"]["completion_tokens"] == 3
        chat = answer_of(f"{place}/chat/completions", {**short, "messages": [{"role": "user", "content": TEXTS[0]}]})
        assert chat["choices"][0]["message"]["content"] == answer["choices"][0]["text"]
    finally:
        server.kill_server()


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path):
    arguments = ["--steps", "3"]
    run_by_torchrun("training.examples.two_processes", "--output", tmp_path / "two", *arguments)
    one = two_processes.main(["--output", str(tmp_path / "one"), "--batch_size", "4", *arguments])
    assert json.loads((tmp_path / "two" / "losses.json").read_text()) == pytest.approx(one, rel=1e-3)


def test_a_folder_takes_the_place_of_a_small_model(tmp_path, capsys):
    model, _ = load_or_make(None, "srupp", "AutoModelForCausalLM", hidden_size=24)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(eos_token="<eos>", pad_token="<pad>").save_pretrained(tmp_path / "model")
    folder, output = str(tmp_path / "model"), str(tmp_path / "run")
    losses = two_processes.main(["--model", folder, "--output", output, "--steps", "2"])
    assert len(losses) == 2
    assert AutoModelForCausalLM.from_pretrained(output).config.hidden_size == 24


@pytest.mark.parametrize(
    ("example", "option"), [(text_tasks, "--tasks"), (tune_language_model, "--ways"), (deploy, "--ways")]
)
def test_an_unknown_name_is_refused(example, option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main(["--output", str(tmp_path), option, "nothing"])
    assert f"Error: argument {option}: there is no 'nothing', but " in capsys.readouterr().err


@pytest.mark.parametrize(
    "example",
    [text_tasks, sentence_embeddings, tune_language_model, deploy, score_with_lm_eval, two_processes, serve],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_help_teaches(example, capsys):
    with contextlib.suppress(SystemExit):
        example.main(["--help"])
    said = capsys.readouterr().out
    assert f"python -m training.examples.{example.__name__.rpartition('.')[2]} " in said or "torchrun" in said
    assert "http" in said or "--output" in said
    assert len(said.splitlines()) > 12
