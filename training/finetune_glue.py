"""
Fine-tune an encoder on GLUE tasks, over several seeds, and write one table.

    python training/finetune_glue.py --model bert-base-uncased --tasks rte,mrpc --seeds 5
    python training/finetune_glue.py --model ./my-encoder --tasks all --data_dir ./glue --output_dir ./scores
    python training/finetune_glue.py --model ./my-encoder --tasks topic_pairs --learning_rate 2e-4

One setting serves all tasks, as in Cramming (Geiping and Goldstein 2022): 5 epochs, batches of 16, length
128, the model of the last epoch. Its learning rate, 4e-5, suits models of BERT's size; small ones want more.
STS-B is trained on label / 5, as in RoBERTa's recipe, so that a small learning rate need not first find the
mean label. After an interruption the same command with --resume goes on and comes to the same numbers.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers.utils import logging

import hf_efficient.objectives  # noqa: F401  (so that a checkpoint of pretraining loads as its encoder)
from hf_efficient.data.glue import GLUE_TASKS, GlueTask, content_digest, load_glue
from hf_efficient.data.task_labels import CLASSIFICATION, REGRESSION
from hf_efficient.metrics.glue_metric import METRIC_KEYS, load_glue_metric
from hf_efficient.trainer import finetuning
from hf_efficient.trainer.arguments import parse_with_preset
from hf_efficient.trainer.run_directory import resume_critical_args
from hf_efficient.trainer.score_table import cell, markdown_table, spread, write_table
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import errors_in_one_line, settle_process_group, start_script


if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.get_logger(__name__)

AVERAGE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
SCORE_FORMULA = (
    "A task's score is the plain mean of its metrics (MNLI: of matched and mismatched) times 100, and its row shows "
    "the median over seeds."
)
FORMULA = f"{SCORE_FORMULA} The GLUE average is the plain mean of the medians of the eight tasks without WNLI."
COLUMNS = ("task", "median", "min", "max", "seeds", "metrics", "note")


@dataclass
class GlueArguments:
    """The model, the tasks, and the number of seeds."""

    model: str = field(
        metadata={"help": "Folder or Hub name of any encoder that AutoModelForSequenceClassification can load."}
    )
    tasks: str = field(
        default="all",
        metadata={
            "help": f"Names separated by commas, from {', '.join(GLUE_TASKS)}. 'all' means the nine tasks of "
            "GLUE; topic_pairs is made from the documentation of Python and needs no download."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with one folder for each task (rte, or GLUE's own RTE) of parquet, jsonl or raw tsv files. "
            "Without it the data come from the Hub (nyu-mll/glue)."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer; that of the model by default."}
    )
    seeds: int = field(
        default=1,
        metadata={"help": "Number of runs for each task, with the seeds --seed, --seed + 1, and so on."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text or a pair is cut off."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many examples only, for a quick try."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Score on the first so many examples only, for a quick try."}
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Take the results that --output_dir already holds, and go on from the last complete checkpoint of "
            "an interrupted run."
        },
    )

    def __post_init__(self):
        finetuning.check_counts(self, "seeds", "max_length", "max_train_samples", "max_eval_samples")


@dataclass
class FinetuningArguments(finetuning.FinetuningArguments):
    """Arguments of fine-tuning. `output_dir` is the folder of all tasks and seeds."""

    output_dir: str | None = field(
        default="glue_output",
        metadata={"help": "Gets glue.md, glue.csv, glue.json, and <task>/seed-<n>/ with the model and results.json."},
    )


def choose_tasks(names: str) -> list[str]:
    """
    Read a `--tasks` argument.

    Raises:
        ValueError: if one of them does not exist.
    """
    if names == "all":
        return [task for task in GLUE_TASKS if task != "topic_pairs"]
    tasks = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [task for task in tasks if task not in GLUE_TASKS]
    if unknown:
        raise ValueError(f"No task {unknown[0]!r}. The tasks are: {', '.join(GLUE_TASKS)}; 'all' means those of GLUE.")
    return tasks


def missing_data(task: GlueTask, data: "DatasetDict") -> str:
    """Name the split that `task` lacks in `data`; empty if it can be run."""
    if "train" not in data:
        return "no training data"
    return "" if set(task.validation_splits) & set(data) else "no validation data"


def _shorten(data: "DatasetDict", max_train: int | None, max_eval: int | None) -> "DatasetDict":
    from datasets import DatasetDict

    limits = {name: max_train if name == "train" else max_eval for name in data}
    return DatasetDict({name: rows.take(min(len(rows), limits[name] or len(rows))) for name, rows in data.items()})


def as_finetuning_task(spec: GlueTask) -> finetuning.FinetuningTask:
    """Describe a task of GLUE for [`~hf_efficient.trainer.finetuning.finetune`]. Regression labels are scaled to at
    most 1."""
    return finetuning.FinetuningTask(
        name=spec.name,
        kind=REGRESSION if spec.is_regression else CLASSIFICATION,
        input_columns=spec.text_columns,
        label_names=spec.label_names or ("similarity",),
        metrics=METRIC_KEYS[spec.name],
        scale=(0.0, spec.label_range[1]),
        validation_suffixes={split: "_mm" if split.endswith("mismatched") else "" for split in spec.validation_splits},
    )


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
    Fine-tune an encoder on one task with the seed `args.seed`, and score it.

    A run is resumed on the settings, rows and name of the model that it was started with; weights are not compared.

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
    data = data or load_glue(task)
    if missing := missing_data(spec, data):
        raise ValueError(f"{task} cannot be run: {missing}.")
    data = _shorten(data, max_train_samples, max_eval_samples)
    samples = {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}
    settings = {
        **{"model": model, "tokenizer": tokenizer or model, "max_length": max_length, **samples},
        "data": content_digest(task, data),
        **resume_critical_args(args, "per_device_train_batch_size", "gradient_accumulation_steps"),
    }
    metric = load_glue_metric(task)
    return finetuning.finetune(
        as_finetuning_task(spec),
        model,
        args,
        data,
        lambda predictions, references: metric.compute(predictions=predictions, references=references),
        Path(args.output_dir or ".", task, f"seed-{args.seed}"),
        settings,
        tokenizer=tokenizer,
        max_length=max_length,
        resume=resume,
    )


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]], notes: Mapping[str, str]) -> dict[str, Any]:
    """
    Make the rows of the table, one a task with median and spread over seeds, and the average.

    Args:
        results (`Mapping[str, Sequence[Mapping]]`):
            For each task that was asked for the results of its seeds, possibly none. A result has `metrics`:
            a number for each, or None where it is undefined.
        notes (`Mapping[str, str]`):
            A remark on a task, such as why it has no result.

    Returns:
        `dict`: `rows` (dictionaries of `COLUMNS`, scores times 100, None without a result), `average` (None
        if no task entered), `entered` and `missing` (names of the average's tasks) and `formula`.
    """
    rows = [_row(task, runs, notes.get(task, "")) for task, runs in results.items()]
    medians = {row["task"]: row["median"] for row in rows if row["median"] is not None}
    entered = [task for task in AVERAGE_TASKS if task in medians]
    return {
        "rows": rows,
        "average": statistics.fmean(medians[task] for task in entered) if entered else None,
        "entered": entered,
        "missing": [task for task in AVERAGE_TASKS if task not in medians],
        "formula": FORMULA,
    }


def _row(task: str, runs: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    if not runs:
        return {**dict.fromkeys(COLUMNS), "task": task, "seeds": 0, "metrics": "", "note": note}
    # A correlation is undefined if all predictions are equal, which is no better than none at all.
    known = [{name: value or 0.0 for name, value in run["metrics"].items()} for run in runs]
    undefined = sum(None in run["metrics"].values() for run in runs)
    if undefined:
        note = "; ".join(filter(None, [note, f"{undefined} of {len(runs)} seeds predict a constant, counted as 0"]))
    scores = [100 * statistics.fmean(metrics.values()) for metrics in known]
    medians = {name: 100 * statistics.median(metrics[name] for metrics in known) for name in known[0]}
    return {
        "task": task,
        **spread(scores),
        "metrics": ", ".join(f"{name} {median:.1f}" for name, median in medians.items()),
        "note": note,
    }


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Format the table, and under it the average, the tasks that entered it and the formula; of one task its score."""
    lines = markdown_table(COLUMNS, summary["rows"])
    if len(summary["rows"]) == 1:
        (row,) = summary["rows"]
        ends = [f"{row['task']}: {cell(row['median'])}.", "", SCORE_FORMULA]
    else:
        ends = [f"Average: {cell(summary['average'])} ({_average_note(summary)}).", "", summary["formula"]]
    return "\n".join([*lines, "", *ends, ""])


def _average_note(summary: Mapping[str, Any]) -> str:
    if not summary["missing"]:
        return "the GLUE average, over all eight tasks"
    return (
        f"over {len(summary['entered'])} of 8 tasks, so not the GLUE average; without {', '.join(summary['missing'])}"
    )


def run_tasks(glue: GlueArguments, args: FinetuningArguments) -> dict[str, Any]:
    """
    Run every task with every seed, and write the table to `args.output_dir`.

    All data are looked at before anything is trained. A task without data is named in the table.

    Returns:
        `dict`: see [`summarise`].
    """
    tasks = choose_tasks(glue.tasks)
    data, notes = {}, {}
    for task in tasks:
        try:
            splits = load_glue(task, glue.data_dir)
        except FileNotFoundError as error:
            notes[task] = "no data"
            logger.warning(f"{task} is left out. {error}")
            continue
        absent = [name for name in GLUE_TASKS[task].validation_splits if name not in splits]
        if missing := missing_data(GLUE_TASKS[task], splits):
            notes[task] = missing
            logger.warning(f"{task} is left out: {missing}.")
            continue
        if absent:
            notes[task] = f"without {', '.join(absent)}"
        data[task] = splits

    results: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    for task, splits in data.items():
        for seed in range(args.seed, args.seed + glue.seeds):
            PartialState().print(f"{task}, seed {seed} ({len(results[task]) + 1} of {glue.seeds})", flush=True)
            run_args = copy.copy(args)
            run_args.seed = seed
            results[task].append(
                finetune(
                    glue.model,
                    task,
                    run_args,
                    splits,
                    tokenizer=glue.tokenizer,
                    max_length=glue.max_length,
                    max_train_samples=glue.max_train_samples,
                    max_eval_samples=glue.max_eval_samples,
                    resume=glue.resume,
                )
            )
    summary = summarise(results, notes)
    if PartialState().is_main_process:
        text = to_markdown(summary)
        average = {"task": "average", "median": summary["average"], "note": _average_note(summary)}
        rows = summary["rows"] if len(tasks) == 1 else [*summary["rows"], average]
        write_files(str(args.output_dir), lambda folder: write_table(folder, "glue", summary, text, COLUMNS, rows))
        print(text)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    start_script(__name__)
    glue, args = parse_with_preset([GlueArguments, FinetuningArguments], arguments, __doc__)
    summary = run_tasks(glue, args)
    settle_process_group()
    if not any(row["seeds"] for row in summary["rows"]):
        raise FileNotFoundError(
            f"No task had data to train on (--data_dir {glue.data_dir}). Give another --data_dir, or try --tasks "
            "topic_pairs."
        )


if __name__ == "__main__":
    with errors_in_one_line():
        main()
