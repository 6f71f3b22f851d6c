"""
Fine-tunes an encoder on GLUE tasks, over several seeds, and writes one table.

    python training/finetune_glue.py --model bert-base-uncased --tasks rte,mrpc --seeds 5
    python training/finetune_glue.py --model ./my-encoder --tasks all --data_dir ./glue --output_dir ./scores
    python training/finetune_glue.py --model ./my-encoder --tasks topic_pairs --learning_rate 2e-4

One setting serves all tasks, as in Cramming (Geiping and Goldstein 2022): 5 epochs, batches of 16, length
128, the model of the last epoch. Its learning rate, 4e-5, suits models of BERT's size; small ones want more.
STS-B is trained on label / 5, as in RoBERTa's recipe, so that a small learning rate need not first find the
mean label. After an interruption the same command with --resume goes on and comes to the same numbers.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from glue_run import FinetuningArguments, finetune, missing_data
from glue_table import summarise, to_markdown, write_table
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_efficient.data.glue import GLUE_TASKS, load_glue
from hf_efficient.trainer.arguments import HelpFormatter
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import keep_freed_memory


logger = logging.get_logger(__name__)


@dataclass
class GlueArguments:
    """Which model, which tasks, and how often."""

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


def choose_tasks(names: str) -> list[str]:
    """
    The tasks of a `--tasks` argument.

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


def run_tasks(glue: GlueArguments, args: FinetuningArguments) -> dict[str, Any]:
    """
    Runs every task with every seed, and writes the table to `args.output_dir`.

    All data are looked at before anything is trained. A task without data is named in the table.

    Returns:
        `dict`: see `glue_table.summarise`.
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


def main(arguments: Sequence[str] | None = None) -> int:
    keep_freed_memory()
    parser = HfArgumentParser(
        [GlueArguments, FinetuningArguments],  # type: ignore[list-item]
        usage="%(prog)s --model MODEL [options]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    glue, args = parser.parse_args_into_dataclasses(arguments)
    summary = run_tasks(glue, args)
    if not any(row["seeds"] for row in summary["rows"]):
        logger.error("No task had data to train on. Give --data_dir, or try --tasks topic_pairs.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
