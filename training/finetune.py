r"""Fine-tune an encoder on data of your own: classes, several labels at once, numbers, or tags of words.

python training/finetune.py --model bert-base-uncased --train reviews.csv --text_column review --label_column stars
python training/finetune.py --model ./my-encoder --train train.jsonl --validation dev.jsonl --tokens_column tokens \
    --label_column ner_tags --learning_rate 3e-4
python training/finetune.py --model ./my-encoder --train pairs.tsv --text_column question \
    --second_text_column answer --seeds 5 --metrics accuracy,macro_f1 --early_stopping_patience 2
python training/finetune.py --model ./my-encoder --train dair-ai/emotion --validation validation --predict new.csv

The kind of task follows from the labels, and is said; --task_type says another. Without --validation a tenth of the
examples is held out, of each class alike. Each seed's folder gets the model, which pipelines load, and predictions for
the validation examples; scores.md, scores.csv and scores.json compare the scores of all seeds with always giving one
answer. After an interruption the same command with --resume goes on and comes to the same numbers.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import copy
import csv
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState

import hf_efficient.objectives  # noqa: F401  (so that a checkpoint of pretraining loads as its encoder)
from hf_efficient.data.glue import dataset_digest
from hf_efficient.data.labelled import Columns, LabelledTable, hub_splits, load_labelled, local_splits
from hf_efficient.data.task_labels import (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    TASK_TYPES,
    TOKEN_CLASSIFICATION,
    balanced_weights,
    find_label_names,
    fold_booleans,
    hold_out,
    infer_task_type,
    label_ids,
    label_table,
    name_numbers,
    read_labels,
)
from hf_efficient.data.text_files import plain_stem
from hf_efficient.metrics import classification_metric, span_metric
from hf_efficient.trainer import finetuning
from hf_efficient.trainer.arguments import parse_with_preset
from hf_efficient.trainer.finetuning import FinetuningTask, finetune, predict
from hf_efficient.trainer.run_directory import finite, resume_critical_args
from hf_efficient.trainer.score_table import markdown_table, spread, write_table
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import errors_in_one_line, settle_process_group, start_script


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

COLUMNS = ("metric", "median", "min", "max", "seeds", "one answer")
FORMATS = ("csv", "jsonl")
PREDICTED = ("prediction", "score")
MOST_LABELS_SHOWN = 40


@dataclass
class FinetuneSettings:
    """The model, the examples, their columns, and what is made of them."""

    model: str = field(metadata={"help": "Folder or Hub name of any encoder that has a head for the task."})
    train: str = field(
        metadata={
            "help": "Examples: a path, folder or pattern of csv, tsv, jsonl or parquet files, compressed or not, or "
            "the name of a data set on the Hub. Of a folder with a_train.csv and a_dev.csv each is what it is called."
        }
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "Examples to score on: files, or a split of --train, such as 'validation'. Without it those of the "
            "folder or data set that are called so, or else a part of --train."
        },
    )
    validation_size: float = field(default=0.1, metadata={"help": "Share that is held out, where a part is."})
    train_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    train_split: str = field(
        default="train", metadata={"help": "Split of a data set on the Hub, such as 'train[:10%%]'."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    second_text_column: str | None = field(default=None, metadata={"help": "Column of a second text."})
    label_column: str = field(
        default="label", metadata={"help": "Column of the label: a name or a number, or a list of them."}
    )
    tokens_column: str | None = field(
        default=None, metadata={"help": "Column of lists of words, each with a label of its own."}
    )
    task_type: str = field(
        default="auto", metadata={"help": f"{', '.join(TASK_TYPES)}, or auto: what the labels look like."}
    )
    class_names: str | None = field(
        default=None, metadata={"help": "Names of the labels 0, 1, ..., separated by commas, where they are numbers."}
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between the labels of a row that has several, such as '|'."}
    )
    metrics: str | None = field(
        default=None,
        metadata={
            "help": "Scores, separated by commas: accuracy, macro_f1, f1, matthews_correlation, pearson, rmse, ...; a "
            "wrong one lists all. The first one chooses the best model."
        },
    )
    class_weights: str | None = field(
        default=None, metadata={"help": "'balanced' lets rare labels weigh as much in the loss as frequent ones."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better score, and keep the best model."},
    )
    predict: str | None = field(
        default=None, metadata={"help": "Files, or a split of --train, without labels, to write predictions for."}
    )
    predictions_format: str | None = field(
        default=None, metadata={"help": "csv or jsonl; by default jsonl for labels of tokens, else csv."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer; that of the model by default."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text or a pair is cut off."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many examples only, for a quick try."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Score on the first so many examples only, for a quick try."}
    )
    seeds: int = field(default=1, metadata={"help": "Number of runs, with the seeds --seed, --seed + 1, and so on."})
    resume: bool = field(
        default=False,
        metadata={
            "help": "Take the results that --output_dir already holds, and go on from the last complete checkpoint of "
            "an interrupted run."
        },
    )

    def __post_init__(self):
        if self.task_type not in ("auto", *TASK_TYPES):
            raise ValueError(f"--task_type must be auto or one of {', '.join(TASK_TYPES)}, not {self.task_type!r}.")
        if self.class_weights not in (None, "balanced"):
            raise ValueError(f"--class_weights must be 'balanced', not {self.class_weights!r}.")
        if self.predictions_format not in (None, *FORMATS):
            raise ValueError(
                f"--predictions_format must be one of {', '.join(FORMATS)}, not {self.predictions_format!r}."
            )
        if not 0 < self.validation_size < 1:
            raise ValueError(f"--validation_size must lie between 0 and 1, not {self.validation_size}.")
        finetuning.check_counts(
            self, "seeds", "early_stopping_patience", "max_length", "max_train_samples", "max_eval_samples"
        )
        if self.chosen_names is not None:
            self._check_names(self.chosen_names)
        if self.tokens_column is not None and self.second_text_column is not None:
            raise ValueError("Labels of tokens are for one text: give --tokens_column or --second_text_column.")
        if self.tokens_column is not None and self.task_type not in ("auto", TOKEN_CLASSIFICATION):
            raise ValueError(f"--tokens_column is for {TOKEN_CLASSIFICATION}; for {self.task_type} give --text_column.")
        if self.task_type == TOKEN_CLASSIFICATION and self.tokens_column is None:
            self.tokens_column = "tokens"

    def _check_names(self, names: tuple[str, ...]) -> None:
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"--class_names must be different names, none of them empty, not {self.class_names!r}.")
        if self.task_type == REGRESSION:
            raise ValueError(f"--class_names are for tasks with classes, not for {REGRESSION}.")

    @property
    def chosen_names(self) -> tuple[str, ...] | None:
        """Names of the classes 0, 1, ..., or `None` for those of the data."""
        return None if self.class_names is None else tuple(name.strip() for name in self.class_names.split(","))

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        return Columns(self.text_column, self.second_text_column, self.tokens_column, self.label_column)

    @property
    def chosen_metrics(self) -> list[str] | None:
        """Names of the scores, or `None` for those of the kind of task."""
        return None if self.metrics is None else [name.strip() for name in self.metrics.split(",") if name.strip()]


@dataclass
class FinetuneArguments(finetuning.FinetuningArguments):
    """Arguments of fine-tuning that evaluate after each epoch."""

    output_dir: str | None = field(
        default="finetuned",
        metadata={"help": "Gets scores.md, scores.csv, scores.json, and seed-<n>/ with the model and predictions."},
    )
    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to score: 'epoch', 'steps' (see --eval_steps), or 'no'."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Score that chooses the best model, the first of --metrics by default."}
    )

    def __post_init__(self):
        by = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        # Which Trainer sets to the loss where there is none; the scores are known when the task is.
        self.metric_for_best_model, self.greater_is_better = by

    def choose_best_by(self, score: str) -> None:
        """Let a score choose the best model, unless the user named one."""
        self.metric_for_best_model = self.metric_for_best_model or score
        name = self.metric_for_best_model.removeprefix("eval_")
        if self.greater_is_better is None:
            self.greater_is_better = name != "loss" and name not in classification_metric.LOWER_IS_BETTER

    def keep_the_best(self) -> None:
        """
        Let Trainer end with the best model.

        Raises:
            ValueError: if it is not saved when it is scored.
        """
        self.load_best_model_at_end = True
        if self.eval_strategy != self.save_strategy or (
            self.eval_strategy == "steps" and self.save_steps % (self.eval_steps or self.logging_steps)
        ):
            raise ValueError(
                "--early_stopping_patience keeps the best model, which must be saved when it is scored: give the same "
                "--eval_strategy and --save_strategy, epoch or steps, and --save_steps that are a multiple of "
                "--eval_steps."
            )


def load_tables(settings: FinetuneSettings) -> dict[str, LabelledTable]:
    """Load `train`, `validation` where it is not to be held out, and `predict` where there is one."""
    splits = local_splits(settings.train, verbose=PartialState().is_main_process)
    named = set(hub_splits(settings.train, settings.train_config) if splits is None else splits) - {""}

    def load(source: str, split: str, labelled: bool) -> LabelledTable:
        if source.partition("[")[0] in named:  # a split of --train, whatever files are called so
            source, split = settings.train, source
        elif local_splits(source) is None:
            split = settings.train_split
        return load_labelled(
            *(source, settings.columns),
            config_name=settings.train_config,
            split=split,
            labelled=labelled,
            with_others=True,
        )

    validation = settings.validation or ("validation" if "validation" in named else None)
    tables = {
        "train": load_labelled(
            *(settings.train, settings.columns),
            config_name=settings.train_config,
            split=settings.train_split,
            with_others=validation is None,  # of which some rows are held out
        )
    }
    if validation is not None:
        tables["validation"] = load(validation, "validation", True)
    if settings.predict is not None:
        tables["predict"] = load(settings.predict, "test", False)
    drop_clashing(tables)
    return tables


def drop_clashing(tables: Mapping[str, LabelledTable]) -> None:
    """Leave out other columns that are called as those which a file of predictions gets, with one warning."""
    dropped: dict[str, None] = {}
    for table in tables.values():
        ours = {*table.values, *PREDICTED}
        dropped |= dict.fromkeys(name for row in table.others for name in row if name in ours)
        table.others = [{name: value for name, value in row.items() if name not in ours} for row in table.others]
    if dropped and PartialState().is_main_process:
        logger.warning(
            "The files of predictions have columns %s of their own: those of the data are left out of them.",
            ", ".join(map(repr, dropped)),
        )


@dataclass
class Examples:
    """A task with its examples: tables, labels in words and in numbers, and what is tokenised of them."""

    task: FinetuningTask
    tables: dict[str, LabelledTable]
    labels: dict[str, list[Any]]
    ids: dict[str, list[Any]]
    metric: Callable[[Any, Any], Mapping[str, float]]
    encodings: dict[str, Any] = field(default_factory=dict)

    def dataset(self, split: str) -> "Dataset":
        """Inputs of a split, and its labels in numbers where it has them."""
        from datasets import Dataset

        labels = {"label": self.ids[split]} if split in self.ids else {}
        return Dataset.from_dict({**self.tables[split].inputs, **labels})

    def datasets(self) -> "DatasetDict":
        """The splits to train and to score on."""
        from datasets import DatasetDict

        return DatasetDict({split: self.dataset(split) for split in ("train", "validation")})


def prepare(settings: FinetuneSettings) -> Examples:
    """
    Load the examples, tell the task, and say what was found.

    Raises:
        ValueError: for data, or settings, that can't be used; the message names file and row.
    """
    tables = load_tables(settings)
    task_type, reason = settings.task_type, "--task_type"
    if task_type == "auto":
        task_type, reason = infer_task_type(tables["train"], settings.label_separator)
    if task_type == REGRESSION and settings.chosen_names is not None:
        task_type, reason = CLASSIFICATION, "--class_names"
    logger.info("The task is %s (%s).", task_type, reason)

    def read(table: LabelledTable) -> list[Any]:
        return read_labels(table, task_type, settings.label_column, settings.label_separator)

    labels = {split: read(table) for split, table in tables.items() if split != "predict"}
    if "validation" not in tables:
        kept = hold_out(tables["train"], labels["train"], settings.validation_size)
        whole = tables["train"], labels["train"]
        for split, rows in zip(("train", "validation"), kept, strict=True):
            tables[split], labels[split] = whole[0].take(rows), [whole[1][row] for row in rows]
        logger.info("%d of %d examples are held out for validation.", len(kept[1]), len(whole[0]))
    names, labels = choose_names(settings, tables["train"], labels, task_type)
    ids = {
        split: some if task_type == REGRESSION else label_ids(tables[split], some, names, task_type)
        for split, some in labels.items()
    }
    for split, limit in (("train", settings.max_train_samples), ("validation", settings.max_eval_samples)):
        count = min(len(tables[split]), limit or len(tables[split]))
        tables[split] = tables[split].take(range(count))
        labels[split], ids[split] = labels[split][:count], ids[split][:count]
    shown = label_table(labels, names, task_type).splitlines()
    more = len(shown) - 1 - MOST_LABELS_SHOWN
    PartialState().print("\n".join(shown[: MOST_LABELS_SHOWN + 1] + ([f"... and {more} more"] if more > 0 else [])))
    metric, metrics = choose_metric(task_type, names, settings.chosen_metrics)
    weights = balanced_weights(ids["train"], len(names), task_type) if settings.class_weights else None
    task = FinetuningTask(
        name=settings.label_column,
        kind=task_type,
        input_columns=tuple(tables["train"].inputs),
        label_names=names or (settings.label_column,),
        metrics=tuple(metrics),
        scale=None,
        class_weights=None if weights is None else tuple(weights),
    )
    return Examples(task, tables, labels, ids, metric)


def choose_names(
    settings: FinetuneSettings, table: LabelledTable, labels: dict[str, list[Any]], task_type: str
) -> tuple[tuple[str, ...], dict[str, list[Any]]]:
    """
    Find the names of the classes, those that the user or the data set gives, or else those of the training data; with
    the labels of all splits, in which names stand for numbers.

    Raises:
        ValueError: if there is only one class.
    """
    if task_type == REGRESSION:
        return (), labels
    names = settings.chosen_names or table.label_names
    if names:
        labels = {split: name_numbers(some, names) for split, some in labels.items()}
    elif task_type == CLASSIFICATION:
        labels = fold_booleans(labels)
    names = names or find_label_names(labels["train"])
    if len(names) < (1 if task_type == MULTI_LABEL else 2):
        raise ValueError(
            f"{table.source}: all labels in the column {settings.label_column!r} are {', '.join(names) or 'empty'}, so "
            "there is nothing to tell apart. Name another column (--label_column), or add examples."
        )
    return names, labels


def choose_metric(
    task_type: str, names: Sequence[str], chosen: list[str] | None
) -> tuple[Callable[[Any, Any], Mapping[str, float]], list[str]]:
    """
    The metric of a kind of task, and the names of its scores.

    Raises:
        ValueError: if there is no score of a name; the message lists those that there are.
    """
    known: tuple[str, ...]
    if task_type == TOKEN_CLASSIFICATION:
        known, count = span_metric.METRIC_NAMES, span_metric.NUM_DEFAULTS
        of_spans = all(map(span_metric.is_span_tag, names))
        defaults = (
            ["f1", *(name for name in known[:count] if name != "f1")] if of_spans else ["accuracy", "token_macro_f1"]
        )
        metric: Any = span_metric.load_span_metric()
    else:
        known, count = classification_metric.METRIC_NAMES[task_type], classification_metric.NUM_DEFAULTS[task_type]
        known = tuple(name for name in known if name != "f1" or len(names) == 2 or task_type != CLASSIFICATION)
        defaults, metric = list(known[:count]), classification_metric.load_classification_metric(task_type)
    metrics = chosen or defaults
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise ValueError(f"--metrics: no score {unknown[0]!r} of {task_type} here; there are {', '.join(known)}.")

    def compute(predictions: Any, references: Any) -> Mapping[str, float]:
        return metric.compute(predictions=predictions, references=references, metrics=metrics)

    return compute, metrics


def scores_of_one_answer(
    examples: Examples, read_tags: Mapping[str, int], found: Sequence[Mapping[str, Any]]
) -> Mapping[str, float | None]:
    """
    Scores of always giving the most frequent class or tag, no label at all, or the mean.

    Args:
        examples ([`Examples`]): the task and its examples.
        read_tags (`Mapping[str, int]`): how often each tag is among the training words that a model reads.
        found (`Sequence[Mapping]`): what a model predicts for the validation examples: words for which it has no tag
            are scored neither for it nor here.
    """
    kind, ids, names = examples.task.kind, examples.ids, examples.task.label_names
    truth = ids["validation"]
    if kind == REGRESSION:
        answers: Any = np.full(len(truth), np.mean(ids["train"]))
    elif kind == MULTI_LABEL:
        answers = np.zeros((len(truth), len(names)), dtype=np.int64)
    elif kind == CLASSIFICATION:
        answers = np.full(len(truth), statistics.mode(ids["train"]))
    else:
        answer = max(read_tags, key=read_tags.__getitem__)
        truth = [
            [names[number] for number, tag in zip(row, tags["prediction"], strict=True) if tag is not None]
            for row, tags in zip(truth, found, strict=True)
        ]
        answers = [[answer] * len(row) for row in truth]
    references = truth if kind == TOKEN_CLASSIFICATION else np.asarray(truth)
    with np.errstate(all="ignore"):
        return finite(dict(examples.metric(answers, references)))


def write_predictions(
    examples: Examples, split: str, found: Sequence[Mapping[str, Any]], folder: Path, stem: str, form: str | None
) -> Path:
    """
    Write the rows of a split: other columns of its table, inputs, labels where there are some, and predictions.

    Args:
        examples ([`Examples`]): the task and its examples.
        split (`str`): the split.
        found (`Sequence[Mapping]`): predictions, one for each row.
        folder (`Path`), stem (`str`): place of the file. One that is there is replaced if it speaks of the same inputs,
            or of the split `validation`; else the new one gets a number.
        form (`str`, *optional*): `"csv"` or `"jsonl"`.

    Returns:
        `Path`: the file.
    """
    form = form or ("jsonl" if examples.task.kind == TOKEN_CLASSIFICATION else "csv")
    table = examples.tables[split]
    columns: dict[str, Sequence[Any]] = dict(table.inputs)
    if split in examples.labels:
        columns["label"] = examples.labels[split]
    columns |= {name: [row[name] for row in found] for name in found[0]}
    own = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [{**others, **row} for others, row in zip(table.others or [{}] * len(own), own, strict=True)]
    names = [*dict.fromkeys(name for others in table.others for name in others), *columns]
    path, number = folder / f"{stem}.{form}", 1
    while split != "validation" and path.exists() and not holds_inputs(path, table.inputs):
        number += 1
        path = folder / f"{stem}_{number}.{form}"

    def write(staging: str) -> None:
        with Path(staging, path.name).open("w", encoding="utf-8", newline="") as file:
            if form == "jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                return
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow({name: as_cell(value) for name, value in row.items()})

    write_files(folder, write)
    return path


def as_cell(value: Any) -> Any:
    """A value as a cell of a csv file: lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value


def holds_inputs(path: Path, inputs: Mapping[str, Sequence[Any]]) -> bool:
    """Tell whether a file of predictions is for these inputs."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows: list[dict[str, Any]] = (
                list(map(json.loads, file)) if path.suffix == ".jsonl" else list(csv.DictReader(file))
            )
        except (ValueError, csv.Error):
            return False
    return all(
        [as_cell(row.get(name)) for row in rows] == [as_cell(value) for value in values]
        for name, values in inputs.items()
    )


def run_seed(
    settings: FinetuneSettings, args: FinetuneArguments, examples: Examples, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fine-tune with one seed, write its predictions, and return its result and those for the validation examples."""
    task, data = examples.task, examples.datasets()
    run_args = copy.copy(args)
    run_args.seed = seed
    folder = Path(str(args.output_dir), f"seed-{seed}")
    patience = settings.early_stopping_patience
    kept = ("eval_strategy", "eval_steps", "load_best_model_at_end")
    best = ("metric_for_best_model", "greater_is_better") if args.load_best_model_at_end else ()
    result = finetune(
        task,
        settings.model,
        run_args,
        data,
        examples.metric,
        folder,
        {
            "model": settings.model,
            "tokenizer": settings.tokenizer or settings.model,
            "max_length": settings.max_length,
            "task_type": task.kind,
            "labels": list(task.label_names),
            "metrics": list(task.metrics),
            "class_weights": settings.class_weights,
            "early_stopping_patience": patience,
            "data": dataset_digest(data, [*task.input_columns, "label"]),
            **resume_critical_args(args, "per_device_train_batch_size", "gradient_accumulation_steps", *kept, *best),
        },
        tokenizer=settings.tokenizer,
        max_length=settings.max_length,
        early_stopping_patience=patience,
        resume=settings.resume,
        encodings=examples.encodings,
    )
    stems = {"validation": "predictions"}
    if settings.predict is not None:
        stems["predict"] = f"predictions_{plain_stem(settings.predict).strip('*') or 'new'}"
    found = {
        split: predict(
            *(task, result["model_dir"], examples.dataset(split), run_args, settings.max_length),
            encodings=examples.encodings,
            split=split,
        )
        for split in stems
    }
    for split, stem in stems.items() if PartialState().is_main_process else ():
        path = write_predictions(examples, split, found[split], folder, stem, settings.predictions_format)
        logger.info("Predictions for %d examples: %s", len(found[split]), path)
    return result, found["validation"]


def summarise(
    examples: Examples, results: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Rows of the table, one for each score, and what they speak of, given the results of all seeds and what a model
    predicts for the validation examples."""
    one_answer = scores_of_one_answer(examples, results[0].get("read_tags", {}), found)
    tables = examples.tables
    rows = []
    for name in examples.task.metrics:
        scores = [result["metrics"][name] for result in results]
        if len(found) < 2 and None in scores:  # one row has no correlation, whatever is predicted
            over_seeds: dict[str, Any] = {**dict.fromkeys(("median", "min", "max")), "seeds": len(scores)}
        else:
            # It is undefined if all predictions are equal, too, which is no better than none at all.
            over_seeds = spread([score or 0.0 for score in scores])
        rows.append({"metric": name, **over_seeds, "one answer": one_answer[name]})
    return {
        "task_type": examples.task.kind,
        "labels": list(examples.task.label_names),
        "examples": {split: len(tables[split]) for split in ("train", "validation")},
        "rows": rows,
        "models": [result["model_dir"] for result in results],
    }


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Format the table, and under it what it speaks of."""
    sizes = summary["examples"]
    about = (
        f"{summary['task_type']}, {sizes['train']} examples to train on and {sizes['validation']} to score on. Each "
        "row is a score over the seeds; 'one answer' is that of always giving the most frequent one, or the mean."
    )
    return "\n".join([*markdown_table(COLUMNS, summary["rows"], digits=4), "", about, ""])


def run(settings: FinetuneSettings, args: FinetuneArguments) -> dict[str, Any]:
    """
    Fine-tune with every seed, and write the table to `args.output_dir`.

    Returns:
        `dict`: see [`summarise`].
    """
    examples = prepare(settings)
    args.choose_best_by(examples.task.metrics[0])
    if settings.early_stopping_patience is not None:
        args.keep_the_best()
    results: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for seed in range(args.seed, args.seed + settings.seeds):
        PartialState().print(f"seed {seed} ({len(results) + 1} of {settings.seeds})", flush=True)
        result, found = run_seed(settings, args, examples, seed)
        results.append(result)
    summary = summarise(examples, results, found)
    if PartialState().is_main_process:
        text = to_markdown(summary)
        write_files(
            str(args.output_dir),
            lambda folder: write_table(folder, "scores", summary, text, COLUMNS, summary["rows"]),
        )
        print(text)
        print(f"The model is in {results[0]['model_dir']}.")
    return summary


def main(argv: list[str] | None = None) -> dict[str, Any]:
    start_script(__name__)
    settings, args = parse_with_preset([FinetuneSettings, FinetuneArguments], argv, __doc__)
    summary = run(settings, args)
    settle_process_group()
    return summary


if __name__ == "__main__":
    with errors_in_one_line():
        main()
