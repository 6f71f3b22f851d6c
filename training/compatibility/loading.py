"""Cells of loading and use as transformers has them: Auto classes, remote code, pipelines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, pipeline

from hf_efficient.hub import export

from ..examples.small_models import TEXTS
from .subjects import Subject, assert_close, outputs_of


ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("load_folder.py")


def _load_elsewhere(subject: Subject, folder: Path, save: Callable[[Any, Path], Any], *options: str) -> str:
    """Save every class of a family, load all of them in one new process, and compare what they give there."""
    jobs, expected = [], {}
    for auto_class in subject.auto_classes:
        model, place = subject.model(auto_class), folder / f"{subject.family}-{auto_class}"
        save(model, place)
        inputs = subject.inputs(model)
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, place / "inputs.safetensors")
        expected[auto_class] = outputs_of(model, inputs), inputs["attention_mask"]
        jobs.append({"auto_class": auto_class, "folder": str(place)})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    isolated = ["-I"] if "remote" in options else []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, *isolated, str(CLIENT), str(folder / "jobs.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    for auto_class, (outputs, mask) in expected.items():
        found = load_file(folder / f"{subject.family}-{auto_class}" / "outputs.safetensors")
        assert_close({name: found[name] for name in outputs}, outputs, 1e-4, mask if mask.dim() == 2 else None)
    names = ", ".join(name.removeprefix("AutoModel") or "Model" for name in subject.auto_classes)
    return f"{names}: outputs equal to 1e-4"


def auto_classes(subject: Subject, folder: Path) -> str:
    """Load all classes of a family in a fresh process that has imported the package."""
    return _load_elsewhere(subject, folder, lambda model, place: model.save_pretrained(place))


def remote_code(subject: Subject, folder: Path) -> str:
    """Load exported folders of all classes of a family where the package cannot be imported."""
    return _load_elsewhere(subject, folder, lambda model, place: export(model, subject.tokenizer, place), "remote")


LABELS: dict[str, Any] = {
    "num_labels": 3,
    "id2label": {0: "law", 1: "food", 2: "sport"},
    "label2id": {"law": 0, "food": 1, "sport": 2},
}
# Task of `pipeline` -> the Auto class whose models it takes, in the order of the page.
TASKS = {
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "zero-shot-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "feature-extraction": "AutoModel",
}


def pipelines(subject: Subject, folder: Path) -> str:
    """Answer by each pipeline that a family has the head for, from a folder."""
    done = []
    for task, auto_class in TASKS.items():
        takes = auto_class in subject.auto_classes
        if auto_class == "AutoModelForMaskedLM":
            takes = takes and subject.tokenizer.mask_token is not None
        if task == "feature-extraction" and subject.family == "terraformer":
            takes = False  # whose base model wants a target besides
        if takes:
            _answer(subject, task, auto_class, folder / task)
            done.append(task)
    return ", ".join(done)


def _answer(subject: Subject, task: str, auto_class: str, folder: Path) -> None:
    labels: dict[str, Any] = LABELS if task in ("text-classification", "token-classification") else {}
    if task == "zero-shot-classification":
        labels = {"num_labels": 2, "label2id": {"contradiction": 0, "entailment": 1}}
        labels["id2label"] = {0: "contradiction", 1: "entailment"}
    subject.save(folder, auto_class, **labels)
    ask: Any = pipeline(task, model=str(folder), device="cpu")  # type: ignore[call-overload]
    if task == "fill-mask":
        answers = ask(f"The old {ask.tokenizer.mask_token} sleeps.", top_k=3)
        assert len(answers) == 3
        assert answers[0]["score"] >= answers[2]["score"] > 0
    elif task == "zero-shot-classification":
        answer = ask(TEXTS[0], candidate_labels=["dogs", "trains"])
        assert abs(sum(answer["scores"]) - 1) < 1e-4
    elif task in ("text-classification", "token-classification"):
        (answer, *_) = ask(TEXTS[0])
        assert answer.get("label", answer.get("entity")) in LABELS["label2id"]
    elif task == "feature-extraction":
        assert len(ask(TEXTS[0])[0][0]) == 32
    else:
        short = GenerationConfig(max_new_tokens=5, do_sample=False)
        writes = task == "text-generation"
        (answer,) = ask("The old dog", generation_config=short) if writes else ask(TEXTS[0], max_new_tokens=5)
        assert isinstance(answer["generated_text" if writes else "summary_text"], str)
