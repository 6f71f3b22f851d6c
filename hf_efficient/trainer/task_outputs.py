"""Meaning of the outputs of a fine-tuned model: what metrics compare, and answers for users."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..data.task_labels import CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION
from ..utils.labels import IGNORE_INDEX


if TYPE_CHECKING:
    from datasets import Dataset

    from .finetuning import FinetuningTask


def _logits(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check_outputs(prediction: EvalPrediction, learning_rate: float) -> None:
    """
    Make sure that a model's outputs are finite.

    Raises:
        ValueError: if they are not, with the learning rate, which is the usual reason.
    """
    if not np.isfinite(_logits(prediction.predictions)).all():
        raise ValueError(
            f"The model's outputs are not finite: training at --learning_rate {learning_rate:g} has diverged. Give a "
            "lower one, and leave --max_grad_norm and --warmup_steps as they are by default."
        )


def decode(task: "FinetuningTask", prediction: EvalPrediction, scale: tuple[float, float]) -> tuple[Any, Any]:
    """
    Turn outputs and labels into what metrics compare.

    Args:
        task ([`FinetuningTask`]): the task.
        prediction (`EvalPrediction`): logits, `(rows, labels)` or `(rows, tokens, labels)`, and labels.
        scale (`tuple[float, float]`): offset and unit of a regression.

    Returns:
        `tuple`: predictions and references: numbers of classes, zeros and ones for every label, numbers in the scale of
        the labels, or for each row a list of the names of tags.
    """
    logits, labels = _logits(prediction.predictions), np.asarray(prediction.label_ids)
    if task.kind == CLASSIFICATION:
        return logits.argmax(axis=-1), labels
    if task.kind == MULTI_LABEL:
        return (logits > 0).astype(np.int64), labels.astype(np.int64)
    if task.kind == REGRESSION:
        offset, unit = scale
        return logits[:, 0] * unit + offset, labels * unit + offset
    names = np.asarray(task.label_names, dtype=object)
    counted = labels != IGNORE_INDEX
    found, true = names[logits.argmax(axis=-1)], names[np.where(counted, labels, 0)]
    rows = [(list(tags[where]), list(truth[where])) for tags, truth, where in zip(found, true, counted, strict=True)]
    return [tags for tags, _ in rows], [truth for _, truth in rows]


def answers(task: "FinetuningTask", outputs: Any, rows: "Dataset", encoded: "Dataset") -> list[dict[str, Any]]:
    """
    Turn outputs into answers in words.

    Args:
        task ([`~hf_efficient.trainer.finetuning.FinetuningTask`]): the task.
        outputs (`np.ndarray` or `tuple`): logits, `(rows, labels)` or `(rows, tokens, labels)`, or a tuple that begins
            with them.
        rows (`Dataset`): the inputs.
        encoded (`Dataset`): what [`~hf_efficient.trainer.task_encoding.encode`] made of them.

    Returns:
        `list[dict]`: for each row `prediction`, and `score` where there are probabilities, as
        [`~hf_efficient.trainer.finetuning.predict`] says.
    """
    logits, names = _logits(outputs), task.label_names
    if task.kind == REGRESSION:
        return [{"prediction": float(row[0])} for row in logits]
    if task.kind == TOKEN_CLASSIFICATION:
        lengths = map(len, rows[task.input_columns[0]])
        return [
            {"prediction": _tags_of_words(row, words, length, names)}
            for row, words, length in zip(logits.argmax(axis=-1), encoded["words"], lengths, strict=True)
        ]
    scores = torch.tensor(logits).float()
    scores = scores.sigmoid() if task.kind == MULTI_LABEL else scores.softmax(-1)
    found: list[dict[str, Any]] = []
    for row in scores.tolist():
        if task.kind == MULTI_LABEL:
            chosen = [i for i, score in enumerate(row) if score > 0.5]
            found.append({"prediction": [names[i] for i in chosen], "score": [row[i] for i in chosen]})
        else:
            found.append({"prediction": names[int(np.argmax(row))], "score": max(row)})
    return found


def _tags_of_words(classes: Any, words: list[int], length: int, names: tuple[str, ...]) -> list[str | None]:
    tags: list[str | None] = [None] * length
    for number, word in zip(classes, words, strict=False):  # behind the row's own tokens there is padding
        if word >= 0:
            tags[word] = names[int(number)]
    return tags
