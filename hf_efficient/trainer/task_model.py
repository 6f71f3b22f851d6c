"""The model of a fine-tuning task: an encoder with a head for its labels, and the scale of a head for numbers."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)

from ..data.task_labels import CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION
from ..utils.model_files import file_faults_named
from .model_setup import load_tokenizer


if TYPE_CHECKING:
    from .finetuning import FinetuningTask

logger = logging.getLogger(__name__)

_PROBLEM_TYPES = {
    CLASSIFICATION: "single_label_classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}


def load_model(model: str, tokenizer: str, task: "FinetuningTask") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load an encoder with a head for `task`, the names of its labels in the config, and a tokenizer that gives only
    what the model takes.

    Raises:
        ValueError: if there is no such head for the model, or the tokenizer knows more tokens than the model.
    """
    of_tokens = task.kind == TOKEN_CLASSIFICATION
    auto_class: Any = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    with file_faults_named(model), _missing_head_named(model, task.kind), _without_loading_report():
        network, loading = auto_class.from_pretrained(
            model,
            output_loading_info=True,
            id2label=dict(enumerate(task.label_names)),
            label2id={name: i for i, name in enumerate(task.label_names)},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head of another task is replaced
            **({} if of_tokens else {"problem_type": _PROBLEM_TYPES[task.kind]}),
        )
    _say_what_is_new(network, loading)
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


def _say_what_is_new(network: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Name the weights that begin at random, and warn of those of the encoder among them."""
    new = sorted({*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])})
    of_encoder = [name for name in new if name.startswith(f"{network.base_model_prefix}.")]
    of_head = [name for name in new if name not in of_encoder]
    if of_head:
        logger.info("New for this task, and random until they are trained: %s.", _some(of_head))
    if of_encoder:
        logger.warning(
            "The model's files lack %d weights of the encoder, or have them in other sizes; they begin at random: %s.",
            len(of_encoder), _some(of_encoder),
        )  # fmt: skip


def _some(names: list[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Keep transformers' table of weights that are new or not used, as a new head always has some, unless loading
    fails and its error points to the table."""
    held: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        held.extend([record] * is_report)
        return not is_report

    reporter = logging.getLogger(modeling_utils.__name__)
    reporter.addFilter(passes)
    try:
        yield
    except RuntimeError:
        reporter.removeFilter(passes)
        for record in held:
            reporter.handle(record)
        raise
    finally:
        reporter.removeFilter(passes)


@contextmanager
def _missing_head_named(model: str, kind: str) -> Iterator[None]:
    """Let transformers' list of all models that have a head be one sentence about the one that has not."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise ValueError(
            f"Models of the kind of {model} have no head for {kind}. Choose a model of another kind, such as TUPE, "
            "BERT or a bidirectional SRU++."
        ) from error


def output_layer(network: PreTrainedModel) -> nn.Linear | None:
    """The last layer of a model's head; `None` if it is not found."""
    layers = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == network.config.num_labels
        and not name.startswith(f"{network.base_model_prefix}.")
    ]
    return layers[-1] if layers else None


def label_scale(network: PreTrainedModel, labels: Any) -> tuple[float, float]:
    """Offset and unit that bring numbers to about mean 0 and deviation 1, as far as the output layer can be given them
    back: one without a bias takes no offset."""
    layer = output_layer(network)
    if layer is None:
        return 0.0, 1.0
    values = np.asarray(labels, dtype=np.float64)
    offset = float(values.mean()) if layer.bias is not None else 0.0
    return offset, float(np.sqrt(np.mean((values - offset) ** 2))) or 1.0


def restore_scale(network: PreTrainedModel, scale: tuple[float, float]) -> None:
    """Let a model's output have the scale of the labels, by its output layer."""
    layer = output_layer(network)
    if layer is not None:
        with torch.no_grad():
            layer.weight.mul_(scale[1])
            if layer.bias is not None:
                layer.bias.mul_(scale[1]).add_(scale[0])
