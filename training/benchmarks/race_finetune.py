"""After a race: its encoders, and one that was never trained, fine-tuned on GLUE tasks; by the project's own script."""

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from contestants import CONTESTANTS
from environment import ROOT
from transformers import AutoTokenizer


sys.path.insert(1, str(ROOT / "training"))
from glue_run import FinetuningArguments, finetune

from hf_efficient.data.glue import load_glue
from hf_efficient.utils.process import bf16_support


UNTRAINED = "random"
# Short on purpose: at this size the encoders cannot be told apart anyway.
EPOCHS = {"sst2": 1.0, "cola": 2.0, "mrpc": 2.0, "rte": 2.0, "stsb": 2.0}
MAX_TRAIN_SAMPLES = {"sst2": 8_000}


def _folder_of(encoder: str, race: Path, seed: int, sizes: tuple[int, int, int]) -> Path:
    """Where an encoder of the race stands; the untrained one, a TUPE-R, is made here."""
    folder = race / f"seed-{seed}" / encoder
    if encoder == UNTRAINED and not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(race / "tokenizer")
        torch.manual_seed(seed)
        CONTESTANTS["tupe_r"].make(tokenizer, *sizes).model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def finetune_encoders(args) -> None:
    """Every encoder on every task with every seed; finished runs are kept, an interrupted one begins again."""
    race = Path(args.output_dir)
    fast_bf16 = bf16_support() is not None
    for task in args.tasks:
        data = load_glue(task, args.data_dir)
        for encoder in args.encoders:
            model = _folder_of(encoder, race, args.seed, (args.layers, args.width, args.length))
            for seed in range(args.seeds):
                training = FinetuningArguments(
                    output_dir=str(race / f"seed-{args.seed}" / "glue" / encoder),
                    num_train_epochs=EPOCHS.get(task, 2.0),
                    per_device_train_batch_size=32,
                    learning_rate=args.learning_rate,
                    save_strategy="no",
                    bf16=fast_bf16,
                    use_cpu=not torch.accelerator.is_available(),
                    report_to=[],
                    seed=seed,
                )
                samples = MAX_TRAIN_SAMPLES.get(task)
                result = finetune(
                    str(model), task, training, data, max_length=args.length, max_train_samples=samples, resume=True
                )
                print(f"{task}, {encoder}, seed {seed}: {result['metrics']}", flush=True)


def collect(race: Path) -> list[dict[str, Any]]:
    """Scores of all finished runs: one entry an encoder, task and metric, with the scores of its seeds in percent."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(race.glob("seed-*/glue/*/*/seed-*/results.json")):
        result = json.loads(path.read_text())
        for metric, value in result["metrics"].items():
            if value is not None:
                scores.setdefault((path.parts[-4], result["task"], metric), []).append(100 * value)
    return [
        {"encoder": encoder, "task": task, "metric": metric, "scores": values}
        for (encoder, task, metric), values in sorted(scores.items(), key=lambda item: item[0][1:])
    ]


def summary_rows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{entry['task']} {entry['metric']}, fine-tuned from {entry['encoder']}",
            "value": round(median(entry["scores"]), 2),
            "unit": f"%, median of {len(entry['scores'])} seeds (from {min(entry['scores']):.1f} to "
            f"{max(entry['scores']):.1f}, mean {mean(entry['scores']):.1f})",
            "goal": "no claim",
        }
        for entry in entries
    ]
