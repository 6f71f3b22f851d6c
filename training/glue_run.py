"""One fine-tuning run: an encoder, a GLUE task, a seed; from data to scores, resumable at any point."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

import hf_efficient.objectives  # noqa: F401  (so that a checkpoint of pretraining loads as its encoder)
from hf_efficient.data.glue import GLUE_TASKS, GlueTask, content_digest, load_glue
from hf_efficient.metrics.glue_metric import METRIC_KEYS, load_glue_metric
from hf_efficient.trainer.length_grouping import LengthGroupingTrainer
from hf_efficient.trainer.run_directory import RunFolder, decisive


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass
class FinetuningArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of fine-tuning. `output_dir` is the folder of all tasks and seeds."""

    output_dir: str | None = field(
        default="glue_output",
        metadata={"help": "Gets glue.md, glue.csv, glue.json, and <task>/seed-<n>/ with the model and results.json."},
    )
    learning_rate: float = field(
        default=4e-5, metadata={"help": "Peak learning rate. Models much smaller than BERT base want 1e-4 to 5e-4."}
    )
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples in a training batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples in an evaluation batch."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of warm-up; below 1 it is their share of all steps."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "'group_by_length' puts examples of similar length in a batch, 'random' does not."},
    )
    save_strategy: str = field(
        default="epoch",
        metadata={"help": "When to save a checkpoint to resume from: 'epoch', 'steps' (see --save_steps) or 'no'."},
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep while a run goes on."})
    logging_steps: float = field(default=50, metadata={"help": "Log the loss every so many steps."})

    def __post_init__(self):
        super().__post_init__()
        # Pinning does nothing but warn where there is no accelerator to copy to.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


def finetune(
    model: str,
    task: str,
    args: FinetuningArguments,
    data: "DatasetDict | None" = None,
    tokenizer: str | None = None,
    max_length: int = 128,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """
    Fine-tunes an encoder on one task with the seed `args.seed`, and scores it.

    A run is resumed with the settings and the rows that it was started with only. A model is known by its name alone:
    that a folder's weights are others by now is not noticed.

    Args:
        model, tokenizer (`str`): folder or Hub name; the tokenizer is that of the model by default.
        task (`str`): a key of `GLUE_TASKS`.
        args (`FinetuningArguments`): the run goes to `<args.output_dir>/<task>/seed-<args.seed>`: `model` with weights
            and tokenizer and, when all is done, `results.json`.
        data (`DatasetDict`, *optional*): the splits of the task; by default what `load_glue(task)` gives.
        max_length (`int`): longest input in tokens; of a pair the longer text is cut first.
        max_train_samples, max_eval_samples (`int`, *optional*): use the first so many examples only.
        resume (`bool`): give the result if the run is finished, or else go on from its last complete checkpoint.

    Returns:
        `dict`: `metrics` (by name, with the suffix `_mm` on MNLI's mismatched set; None where undefined), `model_dir`,
        `task`, `seed`, `settings`, `samples`, `log_history`, `versions`, `device`.

    Raises:
        FileExistsError: if the run exists and `resume` is off.
        ValueError: if the run was started with other settings, or a split that it needs is missing.
    """
    spec = GLUE_TASKS[task]
    run = RunFolder(Path(args.output_dir or ".", task, f"seed-{args.seed}"))
    data = data or load_glue(task)
    if missing := missing_data(spec, data):
        raise ValueError(f"{task} cannot be run: {missing}.")
    data = _shorten(data, max_train_samples, max_eval_samples)
    settings = {
        "model": model,
        "tokenizer": tokenizer or model,
        "max_length": max_length,
        "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples,
        "data": content_digest(task, data),
        **decisive(args, "per_device_train_batch_size", "gradient_accumulation_steps"),
    }
    result = run.open(settings, resume)
    if result is None:
        set_seed(args.seed)
        network, processor = load_model(model, tokenizer or model, spec)
        result = {"task": task, "seed": args.seed, "settings": settings}
        run_args = copy.copy(args)
        run_args.output_dir = str(run.checkpoints)
        result |= _train_and_score(network, processor, spec, data, max_length, run_args)

        def save_model(folder: str) -> None:
            network.save_pretrained(folder)
            processor.save_pretrained(folder)

        result = run.close(result, save_model)
    return {**result, "model_dir": str(run.model)}


def missing_data(task: GlueTask, data: "DatasetDict") -> str:
    """What keeps `task` from being run on `data`, in words; empty if nothing does."""
    if "train" not in data:
        return "no training data"
    return "" if set(task.validation_splits) & set(data) else "no validation data"


def _shorten(data: "DatasetDict", max_train: int | None, max_eval: int | None) -> "DatasetDict":
    from datasets import DatasetDict

    limits = {name: max_train if name == "train" else max_eval for name in data}
    return DatasetDict({name: rows.take(min(len(rows), limits[name] or len(rows))) for name, rows in data.items()})


def _train_and_score(
    network: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    task: GlueTask,
    data: "DatasetDict",
    max_length: int,
    args: FinetuningArguments,
) -> dict[str, Any]:
    interrupted = Path(str(args.output_dir)).is_dir()  # before Trainer makes it
    positions = getattr(network.config, "max_position_embeddings", None) or max_length
    limit = min(max_length, processor.model_max_length, positions)
    encoded = data.map(
        lambda rows: _encode(rows, task, processor, limit),
        batched=True,
        remove_columns=data["train"].column_names,
        desc=f"Tokenizing {task.name}",
    )
    validation = {name: encoded[name] for name in task.validation_splits if name in encoded}
    trainer = LengthGroupingTrainer(
        model=network,
        args=args,
        train_dataset=encoded["train"],
        lengths=list(encoded["train"]["length"]),
        eval_dataset=next(iter(validation.values())),
        processing_class=processor,
        data_collator=DataCollatorWithPadding(processor),
        compute_metrics=_metrics_function(task),
    )
    trainer.train(resume_from_checkpoint=interrupted)
    return {
        "metrics": _score(trainer, validation, METRIC_KEYS[task.name]),
        "samples": {name: len(rows) for name, rows in encoded.items()},
        "log_history": trainer.state.log_history,
        "device": str(args.device),
    }


def load_model(model: str, tokenizer: str, task: GlueTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads an encoder with a head for `task`, the names of its labels in the config, and a tokenizer that gives only
    what the model takes.

    Raises:
        ValueError: if the tokenizer knows more tokens than the model.
    """
    names = task.label_names or ("similarity",)
    network = AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="regression" if task.is_regression else "single_label_classification",
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # a head of another task is replaced, and named in a warning
    )
    # Classification losses are means over the batch, whatever Trainer passes to them. Unless the model says so, Trainer
    # takes the loss for one that is divided by all items of the step already, and averages neither over accumulated
    # batches nor over processes.
    network.accepts_loss_kwargs = False
    processor = AutoTokenizer.from_pretrained(tokenizer)
    if len(processor) > network.config.vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer} has {len(processor)} tokens and the model {model} only "
            f"{network.config.vocab_size}: they do not belong together."
        )
    taken = set(inspect.signature(network.forward).parameters)
    if getattr(network.config, "type_vocab_size", 2) < 2:
        taken.discard("token_type_ids")
    inputs = [name for name in processor.model_input_names if name in taken]
    if inputs != processor.model_input_names:
        # Written to the tokenizer's config, so that pipelines leave out the same inputs later.
        processor = AutoTokenizer.from_pretrained(tokenizer, model_input_names=inputs)
    return network, processor


def _encode(rows: dict[str, list], task: GlueTask, processor: PreTrainedTokenizerBase, limit: int) -> dict[str, list]:
    texts = [rows[column] for column in task.text_columns]
    encoded = processor(*texts, truncation="longest_first", max_length=limit)
    labels = [label / task.label_range[1] for label in rows["label"]] if task.is_regression else rows["label"]
    return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}


def _metrics_function(task: GlueTask) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = load_glue_metric(task.name)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        outputs, labels = prediction.predictions, np.asarray(prediction.label_ids)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        if not task.is_regression:
            return metric.compute(predictions=logits.argmax(axis=-1), references=labels)
        scale = task.label_range[1]
        return metric.compute(predictions=logits[:, 0] * scale, references=labels * scale)

    return compute


def _score(trainer: LengthGroupingTrainer, validation: "dict[str, Dataset]", keys: tuple[str, ...]) -> dict[str, float]:
    metrics = {}
    for name, rows in validation.items():
        suffix = "_mm" if name.endswith("mismatched") else ""
        logged = trainer.evaluate(rows)
        metrics.update({f"{key}{suffix}": logged[f"eval_{key}"] for key in keys})
    return metrics
