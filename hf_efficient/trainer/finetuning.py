"""Fine-tuning an encoder on one task: classes, several labels, numbers or tagged tokens, with exact resuming."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ..data.task_labels import MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION
from ..data.unknown_tokens import report_unknown
from ..utils.labels import IGNORE_INDEX
from .length_grouping import LengthGroupingTrainer
from .run_directory import RunDirectory
from .task_encoding import encode, input_limit, sample_inputs
from .task_model import label_scale, load_model, restore_scale
from .task_outputs import answers, check_outputs, decode
from .trainer import EfficientTrainer


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

UNKNOWN_ADVICE = "Give the tokenizer that the model was trained with (--tokenizer), or a model that knows such text."


@dataclass(frozen=True)
class FinetuningTask:
    """
    One task: its inputs, its labels, and its scores.

    Args:
        name (`str`):
            Name of the task, for messages and results.
        kind (`str`):
            A kind of task of `hf_efficient.data.task_labels.TASK_TYPES`.
        input_columns (`tuple[str, ...]`):
            Columns of one or two texts, or of a list of words.
        label_names (`tuple[str, ...]`):
            Names of the model's outputs in their order; for regression one. Labels are in the column `label`: the
            number of a class, a float for every label, a number, or a list of a class for each word.
        metrics (`tuple[str, ...]`):
            Names of the scores to keep.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Of regression an offset and a unit: the model learns `(label - offset) / unit`. `None` takes them from the
            labels, and gives the model that is saved back the scale of the labels.
        class_weights (`tuple[float, ...]`, *optional*):
            Weight of each class in the loss; for several labels that of the rows with the label.
        validation_suffixes (`Mapping[str, str]`, *optional*, defaults to `{"validation": ""}`):
            Splits that are scored, and what is put behind the names of their scores.
    """

    name: str
    kind: str
    input_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    scale: tuple[float, float] | None = (0.0, 1.0)
    class_weights: tuple[float, ...] | None = None
    validation_suffixes: Mapping[str, str] = field(default_factory=lambda: {"validation": ""})


@dataclass
class FinetuningArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of fine-tuning."""

    output_dir: str | None = field(default="finetuned", metadata={"help": "Folder for models, results and the table."})
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


class ResumableEarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that also ends a resumed run whose checkpoint is the one at which it stopped."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if state.global_step < state.max_steps:
            logger.info("Stopped after %d of %d steps.", state.global_step, state.max_steps)
        if state.best_global_step is not None:
            logger.info(
                "The model kept is that of step %s, with %s %.4g.",
                *(state.best_global_step, args.metric_for_best_model, state.best_metric),
            )


class WeightedLoss:
    """
    Loss in which some classes weigh more: a mean over examples, or over tagged tokens, of weighted terms.

    Args:
        kind (`str`): kind of task.
        weights (`Sequence[float]`): weight of each class, or of the rows that have a label.
    """

    def __init__(self, kind: str, weights: tuple[float, ...]):
        self.kind, self.weights = kind, torch.tensor(weights)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        weights = self.weights.to(logits.device)
        if self.kind == MULTI_LABEL:
            loss = nn.functional.binary_cross_entropy_with_logits(
                logits, labels.float(), pos_weight=weights, reduction="sum"
            )
        else:
            loss = nn.functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), weight=weights, reduction="sum", ignore_index=IGNORE_INDEX
            )
        items = labels.ne(IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / items


def check_counts(settings: Any, *names: str) -> None:
    """
    Make sure that settings are whole numbers from 1, or `None`.

    Raises:
        ValueError: for the first that is none.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}.")


def check_best_metric(args: TrainingArguments, task: FinetuningTask) -> None:
    """
    Make sure that there is the score that chooses the best model.

    Raises:
        ValueError: if there is none of that name; the message lists those that there are.
    """
    known = (*task.metrics, "loss")
    name = args.metric_for_best_model
    if name is not None and name.removeprefix("eval_") not in known:
        raise ValueError(f"--metric_for_best_model: no score {name!r} is computed; there are {', '.join(known)}.")


def _collator(task: FinetuningTask, processor: PreTrainedTokenizerBase) -> Any:
    of_tokens = task.kind == TOKEN_CLASSIFICATION
    return (DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding)(processor)


def _encode_splits(
    data: "DatasetDict",
    task: FinetuningTask,
    processor: PreTrainedTokenizerBase,
    limit: int,
    scale: tuple[float, float],
) -> "DatasetDict":
    """Tokenise all splits, and say what is cut off."""
    encoded = data.map(
        lambda rows: encode(rows, task, processor, limit, scale),
        batched=True,
        remove_columns=data["train"].column_names,
        desc=f"Tokenizing {task.name}",
    )
    cut = sum(length >= limit for length in encoded["train"]["length"])
    if cut:
        logger.info("%d of %d training examples fill %d tokens, and are cut there.", cut, len(data["train"]), limit)
    if task.kind != TOKEN_CLASSIFICATION:
        return encoded
    for name in ("train", *task.validation_suffixes):
        given = sum(map(len, data[name]["label"]))
        labelled = sum(word >= 0 for row in encoded[name]["words"] for word in row)
        if not labelled:
            raise ValueError(f"No word of the {name} examples has a token within --max_length {limit}. Raise it.")
        if labelled < given and name != "train":
            logger.info(
                "%d of %d words of the %s examples lie behind the first %d tokens, or have none, and are not scored. A "
                "larger --max_length reads more.",
                *(given - labelled, given, name, limit),
            )
    return encoded


def _count_tags(task: FinetuningTask, encoded: "Dataset") -> dict[str, int]:
    counts = Counter(label for row in encoded["labels"] for label in row if label != IGNORE_INDEX)
    return {task.label_names[label]: count for label, count in counts.most_common()}


def _train_and_score(
    network: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    task: FinetuningTask,
    data: "DatasetDict",
    metric: Callable[[Any, Any], Mapping[str, float]],
    max_length: int,
    args: FinetuningArguments,
    patience: int | None,
    encodings: dict[str, Any],
) -> dict[str, Any]:
    interrupted = Path(str(args.output_dir)).is_dir()  # before Trainer makes it
    measured = task.kind == REGRESSION and task.scale is None
    scale = label_scale(network, data["train"]["label"][:]) if measured else task.scale or (0.0, 1.0)
    limit = input_limit(network, processor, max_length, task)
    if "splits" not in encodings:
        encodings["splits"] = _encode_splits(data, task, processor, limit, scale)
    encoded = encodings["splits"]
    validation = {name: encoded[name] for name in task.validation_suffixes if name in encoded}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        check_outputs(prediction, args.learning_rate)
        return dict(metric(*decode(task, prediction, scale)))

    trainer = LengthGroupingTrainer(
        model=network,
        args=args,
        train_dataset=encoded["train"],
        lengths=list(encoded["train"]["length"]),
        eval_dataset=next(iter(validation.values())),
        processing_class=processor,
        data_collator=_collator(task, processor),
        compute_metrics=compute_metrics,
        compute_loss_func=WeightedLoss(task.kind, task.class_weights) if task.class_weights else None,
        callbacks=[ResumableEarlyStopping(patience)] if patience else None,
    )
    trainer.train(resume_from_checkpoint=interrupted)
    metrics = {}
    for name, rows in validation.items():
        logged = trainer.evaluate(rows)
        metrics.update({f"{key}{task.validation_suffixes[name]}": logged[f"eval_{key}"] for key in task.metrics})
    if measured:
        restore_scale(network, scale)
    return {
        "metrics": metrics,
        "samples": {name: len(rows) for name, rows in encoded.items()},
        **({"read_tags": _count_tags(task, encoded["train"])} if task.kind == TOKEN_CLASSIFICATION else {}),
        "log_history": trainer.state.log_history,
        "device": str(args.device),
    }


def finetune(
    task: FinetuningTask,
    model: str,
    args: FinetuningArguments,
    data: "DatasetDict",
    metric: Callable[[Any, Any], Mapping[str, float]],
    folder: str | Path,
    settings: dict[str, Any],
    *,
    tokenizer: str | None = None,
    max_length: int = 128,
    early_stopping_patience: int | None = None,
    resume: bool = False,
    encodings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Fine-tune an encoder on a task with the seed `args.seed`, and score it.

    A run is resumed on the settings that it was started with; weights are not compared.

    Args:
        task ([`FinetuningTask`]): the task.
        model, tokenizer (`str`): folder or Hub name; the tokenizer is that of the model by default.
        args ([`FinetuningArguments`]): arguments of Trainer.
        data (`DatasetDict`): the splits, `train` and those of `task.validation_suffixes`.
        metric (`Callable`): returns scores by name, `task.metrics` at least, given predictions and references as
            [`decode`] makes them.
        folder (`str` or `Path`): the run's; it gets `model` with weights and tokenizer and, when all is done,
            `results.json`.
        settings (`dict`): what the result depends on, and what a resumed run must have the same.
        max_length (`int`): longest input in tokens; of a pair the longer text is cut first.
        early_stopping_patience (`int`, *optional*): stop after so many evaluations without a better score, and take the
            best model; `args` say by which score.
        resume (`bool`): give the result if the run is finished, or else go on from its last complete checkpoint.
        encodings (`dict`, *optional*): gets what is tokenised, for runs with other seeds on the same data and model.

    Returns:
        `dict`: `metrics` (by name; None where undefined), `model_dir`, `task`, `seed`, `settings`, `samples`,
        `log_history`, `versions`, `device`; for tokens `read_tags`, how often each tag is among the training words
        that were not cut off.

    Raises:
        FileExistsError: if the run exists and `resume` is off.
        ValueError: if the run was started with other settings, model, tokenizer and task do not go together, `args`
            choose the best model by a score that there is not, or the model's outputs become infinite or NaN.
    """
    check_best_metric(args, task)
    run = RunDirectory(folder)
    result = run.open(settings, resume)
    if result is None:
        set_seed(args.seed)
        network, processor = load_model(model, tokenizer or model, task)
        report_unknown(processor, sample_inputs(data["train"], task), UNKNOWN_ADVICE)
        run_args = copy.copy(args)
        run_args.output_dir = str(run.checkpoints)
        # Else a resumed run would have all its patience anew.
        run_args.restore_callback_states_from_checkpoint = bool(early_stopping_patience)
        encodings = {} if encodings is None else encodings
        found = _train_and_score(
            network, processor, task, data, metric, max_length, run_args, early_stopping_patience, encodings
        )

        def save_model(folder: str) -> None:
            network.save_pretrained(folder)
            processor.save_pretrained(folder)

        result = run.close({"task": task.name, "seed": args.seed, "settings": settings, **found}, save_model)
    return {**result, "model_dir": str(run.model)}


def predict(
    task: FinetuningTask,
    model_dir: str,
    rows: "Dataset",
    args: FinetuningArguments,
    max_length: int = 128,
    *,
    encodings: dict[str, Any] | None = None,
    split: str = "",
) -> list[dict[str, Any]]:
    """
    Predict with a model that [`finetune`] saved.

    Args:
        task ([`FinetuningTask`]): the task.
        model_dir (`str`): the folder.
        rows (`Dataset`): inputs; a label is not looked at.
        args ([`FinetuningArguments`]): batch size and device.
        max_length (`int`): longest input in tokens.
        encodings (`dict`, *optional*): as for [`finetune`]; of the rows called `split`.

    Returns:
        `list[dict]`: for each row `prediction`: the name of a class, a list of names, a number, or a list with a tag
        for each word, `None` for one that was cut off; and `score`, the probability of the class or of each label that
        was chosen.
    """
    network, processor = load_model(model_dir, model_dir, task)
    inputs = rows.select_columns(list(task.input_columns))
    limit = input_limit(network, processor, max_length, task)
    encodings, key = {} if encodings is None else encodings, f"inputs of {split}"
    if key not in encodings:
        encodings[key] = inputs.map(
            lambda batch: encode(batch, task, processor, limit),
            batched=True,
            remove_columns=inputs.column_names,
            desc=f"Tokenizing {task.name}",
        )
    run_args = copy.copy(args)
    run_args.output_dir = str(Path(model_dir).parent)
    run_args.train_sampling_strategy = "random"  # which for evaluation means: in order
    run_args.eval_strategy = "no"  # which without data to evaluate on must be said
    trainer = EfficientTrainer(
        model=network, args=run_args, processing_class=processor, data_collator=_collator(task, processor)
    )
    return answers(task, trainer.predict(encodings[key]).predictions, rows, encodings[key])
