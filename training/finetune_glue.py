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

import copy
import csv
import inspect
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import hf_efficient.objectives  # noqa: F401  (so that a checkpoint of pretraining loads as its encoder)
from hf_efficient.data.glue import GLUE_TASKS, GlueTask, content_digest, load_glue
from hf_efficient.data.unknown_tokens import report_unknown
from hf_efficient.metrics.glue_metric import METRIC_KEYS, load_glue_metric
from hf_efficient.trainer.arguments import HelpFormatter
from hf_efficient.trainer.length_grouping import LengthGroupingTrainer
from hf_efficient.trainer.model_setup import load_tokenizer
from hf_efficient.trainer.run_directory import RunDirectory, resume_critical_args
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.model_files import file_faults_named
from hf_efficient.utils.process import errors_in_one_line, settle_process_group, start_script


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.get_logger(__name__)

AVERAGE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
FORMULA = (
    "A task's score is the plain mean of its metrics (MNLI: of matched and mismatched) times 100, and its row shows "
    "the median over seeds. The GLUE average is the plain mean of the medians of the eight tasks without WNLI."
)
UNKNOWN_ADVICE = "Give the tokenizer that the model was trained with (--tokenizer), or a model that knows such text."
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


def encode(rows: dict[str, list], task: GlueTask, processor: PreTrainedTokenizerBase, limit: int) -> dict[str, list]:
    """Tokenise rows of a task; the longer text of a pair is cut first. Regression labels are scaled to at most 1."""
    texts = [rows[column] for column in task.text_columns]
    encoded = processor(*texts, truncation="longest_first", max_length=limit)
    labels = [label / task.label_range[1] for label in rows["label"]] if task.is_regression else rows["label"]
    return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}


def load_model(model: str, tokenizer: str, task: GlueTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load an encoder with a head for `task`, the names of its labels in the config, and a tokenizer that gives only
    what the model takes.

    Raises:
        ValueError: if the tokenizer knows more tokens than the model.
    """
    names = task.label_names or ("similarity",)
    with file_faults_named(model):
        network = AutoModelForSequenceClassification.from_pretrained(
            model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="regression" if task.is_regression else "single_label_classification",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head of another task is replaced, and named in a warning
        )
    # The losses of transformers' own heads are means over the batch, whatever Trainer passes to them. Unless the model
    # says so, Trainer takes the loss for one that is divided by all items of the step already, and averages neither
    # over accumulated batches nor over processes. Heads that could divide by them give the mean too, to compare alike.
    network.accepts_loss_kwargs = False
    processor = load_tokenizer(tokenizer)
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
    if processor.pad_token is None:
        # Language models often have none. Any will do: the mask hides it.
        processor.pad_token = processor.eos_token or processor.unk_token or processor.convert_ids_to_tokens(0)
    if network.config.pad_token_id is None:
        network.config.pad_token_id = processor.pad_token_id  # by which some heads find the last token
    return network, processor


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
        lambda rows: encode(rows, task, processor, limit),
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
    run = RunDirectory(Path(args.output_dir or ".", task, f"seed-{args.seed}"))
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
    result = run.open(settings, resume)
    if result is None:
        set_seed(args.seed)
        network, processor = load_model(model, tokenizer or model, spec)
        some = data["train"].select(range(0, len(data["train"]), 1 + len(data["train"]) // 500))
        report_unknown(processor, [text for name in spec.text_columns for text in some[name]], UNKNOWN_ADVICE)
        run_args = copy.copy(args)
        run_args.output_dir = str(run.checkpoints)
        found = _train_and_score(network, processor, spec, data, max_length, run_args)

        def save_model(folder: str) -> None:
            network.save_pretrained(folder)
            processor.save_pretrained(folder)

        result = run.close({"task": task, "seed": args.seed, "settings": settings, **found}, save_model)
    return {**result, "model_dir": str(run.model)}


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
        "median": statistics.median(scores),
        "min": min(scores),
        "max": max(scores),
        "seeds": len(runs),
        "metrics": ", ".join(f"{name} {median:.1f}" for name, median in medians.items()),
        "note": note,
    }


def write_table(summary: Mapping[str, Any], folder: str) -> None:
    """Write `summary` to `folder` as `glue.json`, `glue.csv` and `glue.md`."""
    path = Path(folder)
    (path / "glue.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (path / "glue.md").write_text(to_markdown(summary), encoding="utf-8")
    with (path / "glue.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(summary["rows"])
        writer.writerow({"task": "average", "median": summary["average"], "note": _average_note(summary)})


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Format the table, the average with the tasks that entered it, and the formula."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in COLUMNS)} |" for row in summary["rows"]]
    average = _cell(summary["average"])
    return "\n".join([*lines, "", f"Average: {average} ({_average_note(summary)}).", "", summary["formula"], ""])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


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
        write_files(str(args.output_dir), lambda folder: write_table(summary, folder))
        print(to_markdown(summary))
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    start_script(__name__)
    parser = HfArgumentParser(
        [GlueArguments, FinetuningArguments],  # type: ignore[list-item]
        usage="%(prog)s --model MODEL [options]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    glue, args = parser.parse_args_into_dataclasses(arguments)
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
