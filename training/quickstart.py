"""
The main job, from nothing to a served model, on this machine alone and without a download: train a tokenizer, count
rare words, pretrain a small TUPE-BERT on English text by the meta-controller with notes on those words, fine-tune it on
a sentence-pair task in GLUE format, score it with `evaluate`, load it back through the Auto classes, and use it in a
pipeline.

    python -m training.quickstart
    python -m training.quickstart --output_dir my-first-model

The text is the documentation that every Python brings along, so the model is a toy; the steps are those of a real run.
Interrupted, the same command takes up what is there.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_efficient.data.corpus import split_documents
from hf_efficient.data.python_docs import builtin_topic_pairs
from hf_efficient.data.tokenizers import Texts, train_tokenizer
from hf_efficient.objectives.diagnostics import chance_level_loss
from hf_efficient.trainer.arguments import PretrainingArguments, parse_with_preset
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import disable_malloc_trim, errors_in_one_line

from .count_rare_words import FILE_NAME, RareWordArguments, find_rare_words
from .finetune_glue import FinetuningArguments, finetune
from .pretrain import PretrainingSettings, pretrain


TASK = "topic_pairs"
CONFIG = (
    "hidden_size=256,num_hidden_layers=4,num_attention_heads=4,intermediate_size=1024,max_position_embeddings=128,"
    "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
)
# So small that words which this little text holds seventy times and more are still spelled by several tokens: on those
# notes are kept, and a run meets each more than a hundred times.
VOCABULARY = 1024
RARE = (70, 400)
ROWS = 16  # per step
CANDIDATES = 10


@dataclass
class QuickstartArguments:
    """Length of the demo, and its folder."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder for all that the demo writes."})
    pretraining_steps: int = field(
        default=540, metadata={"help": f"Steps of pretraining, {ROWS} rows of 128 tokens each."}
    )
    finetuning_epochs: float = field(default=2.0, metadata={"help": "Passes over the sentence pairs."})
    short: bool = field(default=False, metadata={"help": "A minute instead of some: shows that every step works."})

    @property
    def steps(self) -> int:
        """Steps of pretraining, the short form considered."""
        return 60 if self.short else self.pretraining_steps


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)


def prepare(args: QuickstartArguments, folder: Path) -> tuple[Path, Path]:
    """Train the tokenizer and count the rare words, unless both are there; return the tokenizer's folder and the words'
    file."""
    tokenizer, words = folder / "tokenizer", folder / "rare-words" / FILE_NAME
    rare = RareWordArguments(
        tokenizer=str(tokenizer),
        output_dir=str(words.parent),
        min_count=RARE[0],
        max_count=RARE[1],
        training_rows=args.steps * ROWS,
    )
    if not (tokenizer / "tokenizer_config.json").is_file():  # the last one to be written
        documents, _ = split_documents(rare.load(), rare.validation_size)
        trained = train_tokenizer(Texts(documents), vocab_size=VOCABULARY, model_max_length=rare.block_size)
        write_files(tokenizer, trained.save_pretrained)
    if words.is_file():
        print(f"   the words of {words} stay")
    else:
        find_rare_words(rare)
    return tokenizer, words


def pretrain_small(args: QuickstartArguments, tokenizer: Path, words: Path, folder: Path) -> list[dict]:
    """Pretrain into `folder`; return the log."""
    settings = PretrainingSettings(
        objective="meta_controller",
        objective_overrides=f"num_candidates={CANDIDATES},loss_weight=20,generator_divider=3",
        notes=str(words),
        config_overrides=CONFIG,
        tokenizer=str(tokenizer),
        max_eval_rows=256,
    )
    part = 30 if args.short else 100
    training = PretrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=ROWS,
        learning_rate=3e-4,  # at 1e-3 every token ends in one and the same vector
        max_grad_norm=1.0,
        logging_steps=20,
        eval_steps=part,
        save_steps=part,
        save_total_limit=1,
        report_to=[],
        resume=True,
    )
    return pretrain(settings, training).state.log_history


def describe_pretraining(history: list[dict]) -> dict[str, float]:
    """Print and return how far pretraining came."""
    names = ("generator_loss", "discriminator_loss", "replaced_fraction", "recall_replaced", "token_variance_fraction")
    last = [entry for entry in history if "eval_loss" in entry][-1]
    found = {name: last[f"eval_{name}"] for name in names}
    found["chance_level_loss"] = chance_level_loss(found["replaced_fraction"], CANDIDATES)
    found["note_updates"] = [entry for entry in history if "note_updates" in entry][-1]["note_updates"]
    print(
        f"   validation: controller {found['generator_loss']:.3f} nats a masked token; encoder "
        f"{found['discriminator_loss']:.3f} a token, where a blind choice gets {found['chance_level_loss']:.3f}\n"
        f"   it suspects {found['recall_replaced']:.1%} of the replaced tokens; "
        f"{found['token_variance_fraction']:.2f} of its final states differs between tokens (0: collapsed)\n"
        f"   each note was moved {found['note_updates']:.0f} times"
    )
    return found


def draw_pretraining(history: list[dict], path: Path) -> None:
    """Draw the two losses over steps, and the loss of a blind choice. Without matplotlib there is no picture, as
    `pretrain` said."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for prefix, label, style in (("", "training", "-"), ("eval_", "validation", "o-")):
        entries = [entry for entry in history if f"{prefix}discriminator_loss" in entry]
        steps = [entry["step"] for entry in entries]
        left.plot(steps, [entry[f"{prefix}generator_loss"] for entry in entries], style, label=label, markersize=3)
        right.plot(steps, [entry[f"{prefix}discriminator_loss"] for entry in entries], style, label=label, markersize=3)
        if not prefix:
            blind = [chance_level_loss(entry["replaced_fraction"], CANDIDATES) for entry in entries]
            right.plot(steps, blind, "--", color="gray", label="blind choice: H(s) + s ln(K - 1)")
    left.set(title="controller: masked words", xlabel="step", ylabel="loss (nats per masked token)")
    right.set(title=f"encoder: one of K = {CANDIDATES}", xlabel="step", ylabel="loss (nats per token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    write_files(path.parent, lambda place: figure.savefig(Path(place, path.name), dpi=120))


def finetune_small(args: QuickstartArguments, model: Path, folder: Path) -> dict:
    """Fine-tune on the built-in task; see [`finetune`]."""
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


def use(finetuned: str) -> dict:
    """Load the model back and ask it; return the answer."""
    model = AutoModelForSequenceClassification.from_pretrained(finetuned)
    tokenizer = AutoTokenizer.from_pretrained(finetuned)
    labels = ", ".join(model.config.id2label.values())
    print(f"   {type(model).__name__}, {model.num_parameters():,} parameters, labels {labels}")
    classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer)
    pair = builtin_topic_pairs()["validation"][0]
    answer = classify({"text": pair["sentence1"], "text_pair": pair["sentence2"]})
    answer = answer[0] if isinstance(answer, list) else answer
    truth = model.config.id2label[pair["label"]]
    print(f"   A: {pair['sentence1']}\n   B: {pair['sentence2']}")
    print(f"   ->  {answer['label']} ({answer['score']:.2f}); in truth {truth}")
    return {**pair, "answer": answer["label"], "truth": truth}


def run(args: QuickstartArguments) -> dict:
    """Take all steps; return the content of `quickstart.json`."""
    folder = Path(args.output_dir + ("-short" if args.short else ""))
    started = time.perf_counter()
    with step("Train a tokenizer, and count rare words in the text that Python brings along"):
        tokenizer, words = prepare(args, folder)
    with step("Pretrain a TUPE-BERT of 4 layers on it: the meta-controller, and notes on the rare words"):
        history = pretrain_small(args, tokenizer, words, folder / "pretrained")
        found = describe_pretraining(history)
        picture = folder / "pretraining.png"
        draw_pretraining(history, picture)
        print(f"   picture: {picture}")
    with step("Fine-tune it: do two passages come from the same topic?"):
        result = finetune_small(args, folder / "pretrained", folder / "finetuned")
        accuracy = result["metrics"]["accuracy"]
        labels = builtin_topic_pairs()["validation"]["label"]
        floor = max(labels.count(0), labels.count(1)) / len(labels)
        print(f"   accuracy {accuracy:.3f} on {len(labels)} pairs, by evaluate (always one answer: {floor:.3f})")
    with step("Load it back and use it"):
        answer = use(result["model_dir"])
    report = {
        "pretraining": found,
        "accuracy": accuracy,
        "accuracy_of_always_one_answer": floor,
        "text_classification": answer,
        "seconds": time.perf_counter() - started,
        "versions": result["versions"],
    }
    text = json.dumps(report, indent=1) + "\n"
    write_files(folder, lambda place: Path(place, "quickstart.json").write_text(text, encoding="utf-8"))
    print(f"\nDone in {report['seconds']:.0f} s. Everything is in {folder}.")
    return report


def main(argv: list[str] | None = None) -> dict:
    disable_malloc_trim()
    logging.basicConfig(format="   %(message)s", level=logging.WARNING)
    logging.getLogger("hf_efficient").setLevel(logging.INFO)
    (args,) = parse_with_preset([QuickstartArguments], argv, __doc__)
    return run(args)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
