"""
The main job, from nothing to a served model, on this machine alone and without a download: train a tokenizer,
pretrain a small TUPE-BERT on English text, fine-tune it on a sentence-pair task in GLUE format, score it with
`evaluate`, load it back through the Auto classes, and use it in pipelines.

    python training/quickstart.py
    python training/quickstart.py --output_dir my-first-model

The text is the documentation that every Python brings along, so the model is a toy; the steps are those of a real run.
Interrupted, the same command takes up what is there.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glue_run import FinetuningArguments, finetune
from pretrain import pretrain
from pretrain_args import PretrainingArguments, PretrainingSettings
from run_folder import StartedOtherwiseError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, pipeline

from hf_efficient.checkpoints import write_files
from hf_efficient.data.builtin import builtin_topic_pairs


TASK = "topic_pairs"
CONFIG = "hidden_size=256,num_hidden_layers=4,num_attention_heads=4,intermediate_size=1024,max_position_embeddings=128"


@dataclass
class QuickstartArguments:
    """How long, and where to."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder for all that the demo writes."})
    pretraining_steps: int = field(default=300, metadata={"help": "Steps of pretraining, 32 rows of 128 tokens each."})
    finetuning_epochs: float = field(default=2.0, metadata={"help": "Passes over the sentence pairs."})
    short: bool = field(default=False, metadata={"help": "A minute instead of some: shows that every step works."})


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)


def pretrain_small(args: QuickstartArguments, folder: Path) -> float:
    """Pretrains into `folder`; returns the held-out loss in nats."""
    settings = PretrainingSettings(config_overrides=CONFIG, vocab_size=4096, max_eval_rows=256)
    training = PretrainingArguments(
        output_dir=str(folder),
        max_steps=60 if args.short else args.pretraining_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        logging_steps=20,
        eval_steps=30 if args.short else 100,
        save_steps=30 if args.short else 100,
        save_total_limit=1,
        report_to=[],
        resume=True,
    )
    history = pretrain(settings, training).state.log_history
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]


def finetune_small(args: QuickstartArguments, model: Path, folder: Path) -> dict:
    """Fine-tunes on the built-in task; returns what `finetune` does."""
    precision = PretrainingArguments(output_dir=str(folder), report_to=[])  # chooses bf16 where it is fast
    training = FinetuningArguments(
        output_dir=str(folder),
        num_train_epochs=args.finetuning_epochs,
        per_device_train_batch_size=32,
        learning_rate=3e-4,
        bf16=precision.bf16,
        use_cpu=precision.use_cpu,
        report_to=[],
        seed=0,
    )
    samples = 640 if args.short else None
    return finetune(str(model), TASK, training, max_length=96, max_train_samples=samples, resume=True)


def use(pretrained: Path, finetuned: str) -> dict:
    """Loads both models back and asks them; returns the answers."""
    model = AutoModelForSequenceClassification.from_pretrained(finetuned)
    tokenizer = AutoTokenizer.from_pretrained(finetuned)
    labels = ", ".join(model.config.id2label.values())
    print(f"   {type(model).__name__}, {model.num_parameters():,} parameters, labels {labels}")
    fill: Any = pipeline("fill-mask", model=str(pretrained))
    sentence = f"Return the {fill.tokenizer.mask_token} of the string."
    guesses = [guess["token_str"] for guess in fill(sentence)]
    print(f"   {sentence}  ->  {', '.join(guesses)}")
    classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer)
    pair = builtin_topic_pairs()["validation"][0]
    answer = classify({"text": pair["sentence1"], "text_pair": pair["sentence2"]})
    answer = answer[0] if isinstance(answer, list) else answer
    truth = model.config.id2label[pair["label"]]
    print(f"   A: {pair['sentence1']}\n   B: {pair['sentence2']}")
    print(f"   ->  {answer['label']} ({answer['score']:.2f}); in truth {truth}")
    return {
        "fill_mask": {sentence: guesses},
        "text_classification": {**pair, "answer": answer["label"], "truth": truth},
    }


def run(args: QuickstartArguments) -> dict:
    """All steps; returns what `quickstart.json` then holds."""
    folder = Path(args.output_dir + ("-short" if args.short else ""))
    started = time.perf_counter()
    with step("Pretrain a TUPE-BERT of 4 layers on the text that Python brings along"):
        loss = pretrain_small(args, folder / "pretrained")
        print(f"   held-out masked-LM loss {loss:.3f} nats; picture: {folder / 'pretrained' / 'loss_curve.png'}")
    with step("Fine-tune it: do two passages come from the same topic?"):
        result = finetune_small(args, folder / "pretrained", folder / "finetuned")
        accuracy = result["metrics"]["accuracy"]
        labels = builtin_topic_pairs()["validation"]["label"]
        floor = max(labels.count(0), labels.count(1)) / len(labels)
        print(f"   accuracy {accuracy:.3f} on {len(labels)} pairs, by evaluate (always one answer: {floor:.3f})")
    with step("Load it back and use it"):
        answers = use(folder / "pretrained", result["model_dir"])
    report = {
        "held_out_loss": loss,
        "accuracy": accuracy,
        "accuracy_of_always_one_answer": floor,
        "answers": answers,
        "seconds": time.perf_counter() - started,
        "versions": result["versions"],
    }
    text = json.dumps(report, indent=1) + "\n"
    write_files(folder, lambda place: Path(place, "quickstart.json").write_text(text, encoding="utf-8"))
    print(f"\nDone in {report['seconds']:.0f} s. Everything is in {folder}.")
    return report


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="   %(message)s", level=logging.WARNING)
    logging.getLogger("hf_efficient").setLevel(logging.INFO)
    parser = HfArgumentParser([QuickstartArguments], description=__doc__)  # type: ignore[list-item]
    (args,) = parser.parse_args_into_dataclasses(argv)
    try:
        return run(args)
    except StartedOtherwiseError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
