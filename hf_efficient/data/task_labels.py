"""Labels of a fine-tuning task: the kind of task that they speak of, their names, numbers and frequencies."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .labelled import NO_LIST, LabelledTable, and_others, looks_like_list, shortened, split_list
from .text_files import CorpusError


CLASSIFICATION, MULTI_LABEL = "classification", "multi_label"
REGRESSION, TOKEN_CLASSIFICATION = "regression", "token_classification"
TASK_TYPES = (CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION)

# Whole numbers are classes if there are few of them, or if they count classes that have examples enough.
_FEW_NUMBERS, _EXAMPLES_OF_A_CLASS = 20, 5
_FEW_ROWS = 20
_WHOLE = re.compile(r"[+-]?[0-9]+")  # in which, unlike for `str.isdigit`, a ² is none
_BOOLEANS = {"true", "false"}


def infer_task_type(table: LabelledTable, separator: str | None = None) -> tuple[str, str]:
    """
    Tell the kind of task from the labels.

    Args:
        table (`LabelledTable`): the training examples.
        separator (`str`, *optional*): what stands between the labels of a row.

    Returns:
        `tuple[str, str]`: one of `TASK_TYPES`, and the reason in words.

    Raises:
        CorpusError: if the labels speak of no task.
    """
    labels = [label for label in table.values["label"] if not _is_missing(label)]
    if "tokens" in table.values:
        return TOKEN_CLASSIFICATION, "there is a column of tokens"
    if any(isinstance(label, list) for label in labels) or _has_lists_in_cells(table):
        return MULTI_LABEL, "the labels are lists"
    if separator is not None:
        return MULTI_LABEL, f"the labels of a row are separated by {separator!r}"
    if table.label_names:
        return CLASSIFICATION, f"the data set names {len(table.label_names)} classes"
    different = {label_name(label) for label in labels}
    given = [] if any(isinstance(label, bool) for label in labels) else [_number(label) for label in labels]
    numbers = [number for number in given if number is not None]
    if not labels or len(numbers) < len(labels):
        if len(labels) > _FEW_ROWS and len(different) > len(labels) / 2:
            raise CorpusError(
                f"{table.source}: {len(different)} different labels in {len(labels)} rows, such as "
                f"{shortened(labels[0])}, are no classes. Name another column (--label_column), or say the kind of "
                "task (--task_type)."
            )
        return CLASSIFICATION, f"the labels are {len(different)} names"
    if not all(number == int(number) for number in numbers):
        return REGRESSION, "the labels are numbers with decimals"
    counts = len(different) * _EXAMPLES_OF_A_CLASS <= len(labels)
    if len(different) <= _FEW_NUMBERS or (counts and set(numbers) == set(range(len(different)))):
        return CLASSIFICATION, f"the labels are {len(different)} whole numbers"
    return REGRESSION, f"the labels are {len(different)} different numbers"


def _has_lists_in_cells(table: LabelledTable) -> bool:
    """
    Tell whether labels are lists written as text. One in brackets without quotes, as `[other]`, may be a name.

    Raises:
        CorpusError: for a list that can't be read, or names in brackets among lists.
    """
    cells = [(row, label) for row, label in enumerate(table.values["label"]) if looks_like_list(label)]
    wrong = []
    for row, label in cells:
        try:
            split_list(label)
        except ValueError:
            wrong.append((row, label))
    if wrong and (len(wrong) < len(cells) or any(quote in label for _, label in wrong for quote in "'\"")):
        row, label = wrong[0]
        raise CorpusError(f"{table.places[row]}: the label is {shortened(label)}, {NO_LIST}.")
    return len(wrong) < len(cells)


def _is_missing(label: Any) -> bool:
    return label is None or (isinstance(label, float) and math.isnan(label)) or str(label).strip() in ("", "nan", "NaN")


def _number(label: Any) -> float | None:
    try:
        number = float(label)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def label_name(label: Any) -> str:
    """Name of a class: a text without white space around it, a whole number without decimals, `true` or `false`."""
    if isinstance(label, bool):
        return str(label).lower()
    text = str(label).strip()
    whole, point, decimals = text.partition(".")
    return whole if point and _WHOLE.fullmatch(whole) and not decimals.strip("0") else text


def read_labels(table: LabelledTable, task_type: str, column: str, separator: str | None = None) -> list[Any]:
    """
    Bring labels into one form.

    Args:
        table (`LabelledTable`): the examples.
        task_type (`str`): one of `TASK_TYPES`.
        column (`str`): the column's name, for messages.
        separator (`str`, *optional*, defaults to `","`): what stands between the labels of a row, if they are one text.

    Returns:
        `list`: of each row a name, for classification; a list of names, for several labels or tokens; or a number.

    Raises:
        CorpusError: if a row has no label, or one that the task can't use; the message names it.
    """
    read: Callable[[Any], Any] = {
        CLASSIFICATION: _one_name,
        MULTI_LABEL: lambda label: _some_names(label, separator or ","),
        REGRESSION: _finite_number,
        TOKEN_CLASSIFICATION: lambda label: _some_names(label, None),
    }[task_type]
    labels = table.values["label"]
    may_be_empty = task_type == MULTI_LABEL
    missing = [row for row, label in enumerate(labels) if _is_missing(label) and not (may_be_empty and label == "")]
    if missing:
        raise CorpusError(
            f"{table.places[missing[0]]}: no label in the column {column!r}{and_others(missing)}. Give the row one, or "
            "remove it."
        )
    found = []
    for place, label in zip(table.places, labels, strict=True):
        try:
            found.append(read(label))
        except ValueError as error:
            raise CorpusError(
                f"{place}: the column {column!r} holds {shortened(label)}, {error} ({task_type}). Correct the row, or "
                "say another --task_type."
            ) from error
    if task_type == TOKEN_CLASSIFICATION:
        for place, words, tags in zip(table.places, table.values["tokens"], found, strict=True):
            if len(words) != len(tags):
                raise CorpusError(f"{place}: {len(words)} tokens and {len(tags)} labels; each token needs one.")
    return found


def _one_name(label: Any) -> str:
    if isinstance(label, (list, dict)):
        raise ValueError("where one label is wanted")
    return label_name(label)


def _some_names(label: Any, separator: str | None) -> list[str]:
    if isinstance(label, str) and not looks_like_list(label) and separator is not None:
        return [label_name(name) for name in label.split(separator) if name.strip()]
    names = split_list(label)
    if isinstance(names, int | float) and separator is not None:
        names = [names]
    if not isinstance(names, list) or any(_is_missing(name) or isinstance(name, (list, dict)) for name in names):
        raise ValueError("where a list of labels is wanted")
    return [label_name(name) for name in names]


def _finite_number(label: Any) -> float:
    number = None if isinstance(label, bool) else _number(label)
    if number is None:
        raise ValueError("where a number is wanted")
    return number


def names_in(labels: Sequence[Any]) -> Iterator[str]:
    """Iterate over the names of classes in labels as [`read_labels`] gives them, one by one."""
    for label in labels:
        yield from (label,) if isinstance(label, str) else label


def find_label_names(labels: Sequence[Any]) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers: by value where all are whole numbers, `O` before other tags,
    else by the alphabet."""
    names = set(names_in(labels))
    if all(_WHOLE.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def name_numbers(labels: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Put its name in place of the number of a class, in labels as [`read_labels`] gives them, if no class is called by
    the number."""
    named = {str(number): name for number, name in enumerate(names) if str(number) not in names}
    return [
        named.get(label, label) if isinstance(label, str) else [named.get(name, name) for name in label]
        for label in labels
    ]


def fold_booleans(labels: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Write `True`, as csv files have it, like the `true` of JSON, in the labels of all splits, if those of `train` are
    nothing but true and false."""
    if not {label.lower() for label in labels["train"]} <= _BOOLEANS:
        return dict(labels)
    return {
        split: [label.lower() if label.lower() in _BOOLEANS else label for label in some]
        for split, some in labels.items()
    }


def label_ids(table: LabelledTable, labels: Sequence[Any], names: Sequence[str], task_type: str) -> list[Any]:
    """
    Turn names into numbers.

    Args:
        table (`LabelledTable`): the examples, for messages.
        labels (`Sequence`): what [`read_labels`] gave.
        names (`Sequence[str]`): names of the classes.
        task_type (`str`): a kind of task that has classes.

    Returns:
        `list`: of each row the number of its class; for several labels a list with 1.0 for those that it has, else
        0.0; for tokens a list of numbers.

    Raises:
        CorpusError: for a label that is none of the names, with its row.
    """
    ids = {name: number for number, name in enumerate(names)}
    found: list[Any] = []
    for place, label in zip(table.places, labels, strict=True):
        try:
            numbers = [ids[name] for name in names_in([label])]
        except KeyError as error:
            known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise CorpusError(
                f"{place}: the label {error.args[0]!r} is none of those of the training data ({known}). Correct the "
                "row, or add examples of that label to the training data."
            ) from error
        if task_type == MULTI_LABEL:
            found.append([float(number in numbers) for number in range(len(names))])
        else:
            found.append(numbers[0] if task_type == CLASSIFICATION else numbers)
    return found


def hold_out(table: LabelledTable, labels: Sequence[Any], share: float) -> tuple[list[int], list[int]]:
    """
    Keep examples for validation: of all their share, and of each class as nearly as that allows.

    Equal inputs are never on both sides. The choice depends on the rows alone, not on their order.

    Args:
        table (`LabelledTable`): all examples.
        labels (`Sequence`): what [`read_labels`] gave.
        share (`float`): fraction for validation, between 0 and 1.

    Returns:
        `tuple[list[int], list[int]]`: numbers of the rows to train on, with at least one of each class, and of those
        for validation, at least one.

    Raises:
        CorpusError: if nothing is left for one of them.
    """
    inputs = list(zip(*table.inputs.values(), strict=True))
    digests = [_digest(json.dumps(row)) for row in inputs]
    counts = Counter(digests)
    of_class = all(isinstance(label, str) for label in labels)
    classes: dict[str, set[str]] = {}  # of each input; all are of one more, so that some are left where there are none
    for digest, label in sorted(zip(digests, labels, strict=True), key=lambda pair: pair[0]):
        classes.setdefault(digest, {""}).update(() if isinstance(label, float) else names_in([label]))
    strata: dict[str, list[str]] = {}
    for digest, names in classes.items():
        strata.setdefault(min(names - {""}) if of_class else "", []).append(digest)
    left = Counter(name for names in classes.values() for name in names)

    def is_free(digest: str) -> bool:
        return all(left[name] > 1 for name in classes[digest])

    chosen: set[str] = set()
    sizes = {name: sum(counts[digest] for digest in group) for name, group in strata.items() if len(group) > 1}
    for name, wanted in _shares(sizes, max(round(share * len(table)), 1)).items():
        for digest in strata[name]:
            if counts[digest] <= wanted and is_free(digest):
                chosen.add(digest)
                wanted -= counts[digest]
                left.subtract(classes[digest])
    if not chosen:
        chosen.update(sorted(filter(is_free, classes), key=counts.__getitem__)[:1])
    if not chosen:
        reason = f"all {len(table)} rows have the same input, which can't be both trained and scored on"
        if len(counts) > 1 or len(table) == 1:
            reason = f"{len(table)} rows are too few to keep some for validation and one of each class for training"
        raise CorpusError(f"{table.source}: {reason}. Give more, or a file of their own (--validation).")
    validation = [row for row, digest in enumerate(digests) if digest in chosen]
    return [row for row, digest in enumerate(digests) if digest not in chosen], validation


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Spread a total over classes in proportion to their sizes: the remainders go to the greatest ones, and among equal
    ones to any, which the names alone decide."""
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    found = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: (found[name] - exact[name], _digest(name)))
    for name in order[: total - sum(found.values())]:
        found[name] += 1
    return found


def label_table(labels: Mapping[str, Sequence[Any]], names: Sequence[str], task_type: str) -> str:
    """
    Make a table of how often each label occurs, so that imbalance is seen.

    Args:
        labels (`Mapping[str, Sequence]`): for each split what [`read_labels`] gave.
        names (`Sequence[str]`): names of the classes; empty for regression.
        task_type (`str`): one of `TASK_TYPES`.

    Returns:
        `str`: lines of text, a row for each label, with its number and its share of the rows, or of the tokens. Of
        numbers their count, least, mean and greatest.
    """
    if task_type == REGRESSION:
        heads = ["labels", "count", "least", "mean", "greatest"]
        rows = [
            [split, f"{len(some)}", *(f"{value:.4g}" for value in (min(some), math.fsum(some) / len(some), max(some)))]
            for split, some in labels.items()
        ]
        return _in_columns(heads, rows)
    of_tokens = task_type == TOKEN_CLASSIFICATION
    totals = [sum(map(len, some)) if of_tokens else len(some) for some in labels.values()]
    counts = {split: Counter(names_in(some)) for split, some in labels.items()}
    heads = ["label", *(cell for split in labels for cell in (split, "share"))]
    rows = []
    for name in names:
        found = [counts[split][name] for split in labels]
        shares = [f"{count / max(total, 1):.1%}" for count, total in zip(found, totals, strict=True)]
        rows.append([name, *(cell for pair in zip(map(str, found), shares, strict=True) for cell in pair)])
    return _in_columns(heads, rows)


def _in_columns(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for first, *others in [heads, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def balanced_weights(ids: Sequence[Any], num_labels: int, task_type: str) -> list[float]:
    """
    Weights that let every class count alike in the loss.

    Args:
        ids (`Sequence`): what [`label_ids`] gave for the training examples.
        num_labels (`int`): number of classes.
        task_type (`str`): kind of task.

    Returns:
        `list[float]`: for each class the number of examples, or of tokens, over the number of classes times that of
        its own, as scikit-learn's `balanced`; for several labels the rows without a label over those with it.

    Raises:
        ValueError: for a task without classes.
    """
    if task_type == REGRESSION:
        raise ValueError("Weights of classes (--class_weights) are for tasks with classes, not for regression.")
    if task_type == MULTI_LABEL:
        having = [max(sum(row[label] for row in ids), 1.0) for label in range(num_labels)]
        return [max(len(ids) - count, 1.0) / count for count in having]
    counts = Counter(ids if task_type == CLASSIFICATION else (number for row in ids for number in row))
    return [counts.total() / (num_labels * max(counts[number], 1)) for number in range(num_labels)]
