"""The GLUE tasks and the built-in sentence-pair task: one table and one loader, from the Hub or from local files."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from .document_readers import json_rows
from .text_files import CorpusError, TextFile


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

logger = logging.get_logger(__name__)

HUB_DATASET = "nyu-mll/glue"
# In order of preference, for a folder that holds several.
FORMATS = ("parquet", "jsonl", "json", "tsv")


@dataclass(frozen=True)
class GlueTask:
    """
    Columns, labels and files of one task. Its name is also its config on the Hub and that of the metric.

    Args:
        name (`str`):
            Name of the task.
        text_columns (`tuple[str, ...]`):
            The one or two texts of an example.
        label_names (`tuple[str, ...]`):
            Names of the classes in the order of their indices; empty for regression.
        raw_folder (`str`):
            The task's folder in GLUE's own download.
        raw_columns (`dict[str, str]`):
            For each of our columns its name in the header of GLUE's tsv files.
        raw_header (`tuple[str, ...]`, *optional*):
            The header, for tsv files that come without one.
        label_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Smallest and largest label of a regression.
        validation_splits (`tuple[str, ...]`, *optional*, defaults to `("validation",)`):
            The splits on which the task is scored.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    raw_folder: str
    raw_columns: dict[str, str]
    raw_header: tuple[str, ...] = ()
    label_range: tuple[float, float] = (0.0, 1.0)
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def features(self) -> "Features":
        """The columns and their types, as the Hub has them: texts, `label`, `idx`."""
        from datasets import ClassLabel, Features, Value

        label = Value("float32") if self.is_regression else ClassLabel(names=list(self.label_names))
        texts = {column: Value("string") for column in self.text_columns}
        return Features({**texts, "label": label, "idx": Value("int32")})


PAIR = ("sentence1", "sentence2")
RAW_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}
ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            ("sentence",),
            ("unacceptable", "acceptable"),
            "CoLA",
            {"sentence": "sentence", "label": "label"},
            raw_header=("source", "label", "mark", "sentence"),
        ),
        GlueTask("sst2", ("sentence",), ("negative", "positive"), "SST-2", {"sentence": "sentence", "label": "label"}),
        GlueTask(
            "mrpc",
            PAIR,
            ("not_equivalent", "equivalent"),
            "MRPC",
            {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        ),
        GlueTask("stsb", PAIR, (), "STS-B", {**RAW_PAIR, "label": "score"}, label_range=(0.0, 5.0)),
        GlueTask(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            "QQP",
            {"question1": "question1", "question2": "question2", "label": "is_duplicate"},
        ),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            "MNLI",
            {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        GlueTask(
            "qnli",
            ("question", "sentence"),
            ENTAILMENT,
            "QNLI",
            {"question": "question", "sentence": "sentence", "label": "label"},
        ),
        GlueTask("rte", PAIR, ENTAILMENT, "RTE", RAW_PAIR),
        GlueTask("wnli", PAIR, ("not_entailment", "entailment"), "WNLI", RAW_PAIR),
        GlueTask("topic_pairs", PAIR, ("different_topic", "same_topic"), "topic_pairs", RAW_PAIR),
    )
}


def load_glue(task: str, data_dir: str | Path | None = None) -> "DatasetDict":
    """
    Load the labelled splits of a task, with the columns, class names and `idx` of the dataset on the Hub.

    Local files lie in `data_dir/<task>`, in `data_dir/<GLUE's own folder name>` (such as `CoLA` or `SST-2`),
    or in `data_dir` itself if that has one of these names. They are parquet (the Hub's
    `train-00000-of-00001.parquet` too), jsonl, or GLUE's raw tsv, and are called after the split (`dev` will
    do for `validation`). Splits that are not there are left out.

    Args:
        task (`str`):
            A GLUE task, or `topic_pairs`, which is made on the spot and needs no data.
        data_dir (`str` or `Path`, *optional*):
            Folder of local files. Without it the data come from the Hub.

    Returns:
        `datasets.DatasetDict`: `train` and `validation`; for MNLI `validation_matched` and
        `validation_mismatched`.

    Raises:
        ValueError: if there is no task of that name, or a file has not the columns or labels of the task.
        FileNotFoundError: if there are no data; the message lists the files that were tried.
    """
    if task not in GLUE_TASKS:
        raise ValueError(f"No task {task!r}. The tasks are: {', '.join(GLUE_TASKS)}.")
    spec = GLUE_TASKS[task]
    if task == "topic_pairs":
        from .python_docs import builtin_topic_pairs

        return builtin_topic_pairs()
    return _load_from_hub(spec) if data_dir is None else _load_local(spec, Path(data_dir))


def content_digest(task: str, data: "DatasetDict") -> str:
    """Digest of the splits of a task; see [`dataset_digest`]."""
    return dataset_digest(data, [*GLUE_TASKS[task].text_columns, "label"])


def dataset_digest(data: "DatasetDict", columns: list[str]) -> str:
    """Digest of the splits' names, and of some columns in order: equal for equal rows, whatever their source."""
    digest = hashlib.blake2b(digest_size=16)
    for name, rows in sorted(data.items()):
        digest.update(json.dumps([name, len(rows), columns]).encode())
        for batch in rows.select_columns(columns).iter(batch_size=1000):
            digest.update(json.dumps([batch[column] for column in columns]).encode())
    return digest.hexdigest()


def _load_from_hub(task: GlueTask) -> "DatasetDict":
    from datasets import DatasetDict, load_dataset

    try:
        splits = load_dataset(HUB_DATASET, task.name)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"The data of {task.name} could not be had from {HUB_DATASET} on the Hub ({error}). "
            "Without a network, give a folder of local files as `data_dir`."
        ) from error
    return DatasetDict({name: splits[name] for name in ("train", *task.validation_splits)})


def _load_local(task: GlueTask, data_dir: Path) -> "DatasetDict":
    from datasets import DatasetDict

    names = (task.name, task.raw_folder)
    folders = [data_dir / name for name in dict.fromkeys(names)]
    if data_dir.name in names:
        folders.insert(0, data_dir)
    found = {}
    for split in ("train", *task.validation_splits):
        stems = dict.fromkeys((split, split.replace("validation", "dev")))
        files = next(filter(None, (_files(folder, stem) for folder in folders for stem in stems)), None)
        if files:
            found[split] = _read(task, files)
    if not found:
        raise FileNotFoundError(
            f"No data of {task.name} in {' or '.join(map(str, folders))}: there is no file called train, validation "
            f"or dev{' (for MNLI with _matched or _mismatched)' if task.name == 'mnli' else ''} that ends in "
            f"{', '.join(FORMATS)}."
        )
    return DatasetDict(found)


def _files(folder: Path, stem: str) -> list[Path]:
    for ending in FORMATS:
        if files := [*folder.glob(f"{stem}.{ending}")] or sorted(folder.glob(f"{stem}-*-of-*.{ending}")):
            return files
    return []


def _read(task: GlueTask, files: list[Path]) -> "Dataset":
    from datasets import concatenate_datasets

    parts = [_read_file(task, file) for file in files]
    if all("idx" in part.column_names for part in parts):
        return concatenate_datasets(parts)
    columns = [name for name in task.features if name != "idx"]
    rows = concatenate_datasets([part.select_columns(columns) for part in parts])
    return rows.add_column("idx", list(range(len(rows)))).cast(task.features)


def _read_file(task: GlueTask, file: Path) -> "Dataset":
    """Read the columns of a task, of which `idx` may be missing."""
    from datasets import Features
    from datasets.exceptions import DatasetsError

    read = {".tsv": _read_tsv, ".parquet": _read_parquet}.get(file.suffix, _read_json)
    try:
        rows = read(task, file)
        kept = [name for name in task.features if name in rows.column_names]
        rows = rows.select_columns(kept).cast(Features({name: task.features[name] for name in kept}))
    except CorpusError:
        raise
    except (DatasetsError, OSError, TypeError, ValueError) as error:  # the base classes of pyarrow's errors
        raise CorpusError(f"{file} is damaged, or does not hold the types of {task.name}: {error}") from error
    _check_rows(task, rows, str(file))
    return rows


def _check_columns(task: GlueTask, file: Path, columns: Iterable[str]) -> None:
    missing = [name for name in task.features if name not in columns and name != "idx"]
    if missing:
        raise CorpusError(
            f"{file} lacks the column {missing[0]!r} of {task.name}; it has {', '.join(map(repr, columns))}."
        )


def _read_parquet(task: GlueTask, file: Path) -> "Dataset":
    from datasets import Dataset
    from pyarrow.parquet import read_schema

    columns = read_schema(file).names
    _check_columns(task, file, columns)
    return Dataset.from_parquet(str(file), columns=[name for name in columns if name in task.features])


def _read_json(task: GlueTask, file: Path) -> "Dataset":
    """Read by hand, since `datasets` refuses a file in which a column that nobody asked for changes its type."""
    from datasets import Dataset

    rows = [row for _, row in json_rows(TextFile(str(file))) if isinstance(row, dict)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    _check_columns(task, file, columns)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns if name in task.features})


def _read_tsv(task: GlueTask, file: Path) -> "Dataset":
    """
    Read a raw GLUE table. It is split by hand, since `load_dataset("csv", sep="\\t", quoting=3)` takes a carriage
    return in a text for the end of the row, and fills broken rows up instead of counting them.
    """
    from datasets import Dataset

    lines = TextFile(str(file)).read_text().removesuffix("\n").split("\n")
    table = [line.removesuffix("\r").split("\t") for line in lines]
    header = list(task.raw_header) or table.pop(0)
    missing = [name for name in task.raw_columns.values() if name not in header]
    if missing:
        raise CorpusError(f"{file} lacks the column {missing[0]!r} of {task.name}; its header is {header}.")
    whole = [row for row in table if len(row) == len(header)]
    if len(whole) < len(table):
        logger.warning(f"{file}: {len(table) - len(whole)} of {len(table)} rows are broken and left out.")
    columns = {ours: [row[header.index(raw)] for row in whole] for ours, raw in task.raw_columns.items()}
    return Dataset.from_dict(columns)


def _check_rows(task: GlueTask, rows: "Dataset", name: str) -> None:
    for column in (*task.text_columns, "label"):
        if rows.data.column(column).null_count:
            raise CorpusError(f"{name} has rows without {column!r}; every row needs one.")
    low, high = task.label_range if task.is_regression else (0, len(task.label_names) - 1)
    wrong = [label for label in rows.unique("label") if not low <= label <= high]
    if wrong:
        raise CorpusError(
            f"{name} has labels outside {low} to {high}, such as {wrong[0]}. "
            "(Test splits, whose labels are -1, cannot be used for training or validation.)"
        )
