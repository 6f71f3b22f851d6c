"""Tiny pretraining runs for the tests, each in this process or in one of its own."""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

from hf_efficient.trainer import EfficientTrainer
from hf_efficient.trainer.arguments import parse_overrides
from hf_efficient.trainer.model_setup import build_config
from training import pretrain


ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
WORDS = [
    "the",
    "a",
    "old",
    "new",
    "red",
    "small",
    "dog",
    "cat",
    "bird",
    "house",
    "tree",
    "river",
    "sees",
    "likes",
    "finds",
    "near",
    "under",
    "and",
    "then",
]
OVERRIDES = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=24,max_position_embeddings=32"
NO_DROPOUT = ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
TIMES = ("runtime", "per_second")


def write_corpus(path: Path, documents: int = 60) -> None:
    """Short documents of simple sentences, one a paragraph."""
    lines = []
    for i in range(documents):
        words = [WORDS[(i * i + 7 * j + i * j * j) % len(WORDS)] for j in range(12 + (5 * i) % 40)]
        lines.append(" ".join(words) + ".")
    path.write_text("\n\n".join(lines), encoding="utf-8")


def arguments(folder: Path, output_dir: Path, **changes) -> list[str]:
    """Command line of a tiny run on the corpus in `folder`."""
    settings = {
        "corpus": folder / "corpus.txt",
        "txt_documents": "blank_line",
        "validation_size": 0.1,
        "vocab_size": 80,
        "block_size": 24,
        "config_overrides": OVERRIDES,
        "output_dir": output_dir,
        "max_steps": 17,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "save_steps": 5,
        "eval_steps": 4,
        "learning_rate": 5e-3,
        "disable_tqdm": "True",
        "auto_bf16": "False",
        "use_cpu": "True",
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def history(output_dir: Path) -> list[dict]:
    """The log of a run, without what is measured in seconds and the summary of the last process."""
    log = json.loads((output_dir / "history.json").read_text())["log_history"]
    kept = [entry for entry in log if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not any(t in key for t in TIMES)} for entry in kept]


def run_here(argv: list[str]):
    """`pretrain.py` in this process; returns its trainer."""
    return pretrain.pretrain(*pretrain.parse_arguments(argv))


def build_here(argv: list[str], tokenizer, **overrides):
    """The settings, the arguments of Trainer and the objective that `pretrain.py` would train, with other sizes."""
    settings, args = pretrain.parse_arguments([*argv, "--auto_bf16", "False", "--use_cpu", "True"])
    overrides = {**parse_overrides(settings.config_overrides), **overrides}
    config = build_config(tokenizer, settings.model_type, settings.config, overrides)
    masking = settings.masking_options(args.seed)
    objective = pretrain.build_objective(
        settings.objective, config, tokenizer, masking, args.max_steps, settings.objective_overrides
    )
    if settings.notes is not None:
        pretrain.add_notes(objective, settings.notes, tokenizer, settings.notes_overrides)
    return settings, args, objective


def run_in_child(argv: list[str], prepare=None) -> int:
    """The same in a fork of this process, after `prepare()`; returns its exit code."""

    def child():
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            if prepare is not None:
                prepare()
            run_here(argv)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step):
    """Die after the given step's update, before what it logs or saves."""

    def prepare():
        def killing_step(self, *args, **kwargs):
            if self.state.global_step == step:
                kill_self()
            return original(self, *args, **kwargs)

        original = EfficientTrainer._maybe_log_save_evaluate
        EfficientTrainer._maybe_log_save_evaluate = killing_step

    return prepare
