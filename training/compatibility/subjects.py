"""The small models that consumers are given, one of each family, and inputs for them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.auto import FAMILIES
from hf_efficient.utils.labels import IGNORE_INDEX

from ..examples.small_models import TEXTS, small_model, small_tokenizer


# The head in which each family is at home.
LANGUAGE_MODELS = {
    "tupe": "AutoModelForMaskedLM",
    "srupp": "AutoModelForCausalLM",
    "scaling_transformer": "AutoModelForCausalLM",
    "terraformer": "AutoModelForSeq2SeqLM",
}


class Refused(Exception):
    """A consumer does not take a family, and an error has said so; the message is the reason."""


@dataclass
class Subject:
    """
    A family as a consumer meets it.

    Args:
        family (`str`): its `model_type`.
    """

    family: str

    @cached_property
    def tokenizer(self) -> Any:
        return small_tokenizer(self.family)

    @property
    def auto_classes(self) -> dict[str, str]:
        """Auto class of transformers -> class of the family."""
        return FAMILIES[self.family].classes

    @property
    def home(self) -> str:
        """The Auto class of its language model."""
        return LANGUAGE_MODELS[self.family]

    @property
    def generates(self) -> bool:
        return self.family != "tupe"

    def model(self, auto_class: str | None = None, **fields: Any) -> Any:
        """A new small model in evaluation mode, of its language model by default; the same one at every call."""
        if self.auto_classes.get(auto_class or "") == "SruppForMaskedLM":
            fields = {"bidirectional": True, **fields}
        model = small_model(self.family, auto_class or self.home, self.tokenizer, **fields).eval()
        with torch.no_grad():  # large enough that each weight shows in what comes out
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.mul_(3.0)
        return model

    def save(self, folder: Path, auto_class: str | None = None, **fields: Any) -> Any:
        """Save a model with its tokenizer, and return the model."""
        model = self.model(auto_class, **fields)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return model

    def inputs(self, model: Any, rows: int = 3) -> dict[str, Tensor]:
        """Inputs of a model: a few texts, of which the shorter ones are padded."""
        found = dict(self.tokenizer(list(TEXTS[:rows]), padding=True, return_tensors="pt"))
        name = type(model).__name__
        if name.endswith("MultipleChoice"):
            found = {key: value[None] for key, value in found.items()}
        if model.config.is_encoder_decoder and not name.endswith("Classification"):
            found["decoder_input_ids"] = found["input_ids"].flip(1)
        return found

    def training_batch(self, rows: int = 4) -> dict[str, Tensor]:
        """Inputs and labels of its language model: the tokens themselves."""
        found = dict(self.tokenizer(list(TEXTS[:rows]), padding=True, return_tensors="pt"))
        found["labels"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORE_INDEX)
        return found

    def training_rows(self, copies: int = 1) -> list[dict[str, Tensor]]:
        """The rows of a training batch, one by one, as a dataset."""
        batch = self.training_batch(len(TEXTS))
        return [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(TEXTS))] * copies


def outputs_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a model in evaluation: logits, or the states of a model without a head."""
    with torch.no_grad():
        found = model.eval()(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "prediction_logits")
    return {name: found[name].float() for name in names if found.get(name) is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], most: float, mask: Tensor | None = None) -> str:
    """
    Compare outputs, at real tokens where a mask is given and tells them.

    Args:
        found, expected (`dict[str, Tensor]`): tensors by name.
        most (`float`): the largest difference that there may be, as a share of the largest number, or of 1.
        mask (`Tensor` of shape `(batch, length)`, *optional*): 1 at real tokens.

    Returns:
        `str`: how near they are, for the page.

    Raises:
        AssertionError: if they differ by more, hold NaN, or have other names or shapes.
    """
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    for name, value in expected.items():
        assert found[name].shape == value.shape, (name, found[name].shape, value.shape)
        difference = (found[name] - value).abs()
        if mask is not None and difference.shape[: mask.dim()] == mask.shape:
            difference = difference[mask.bool()]
        share = difference.max().item() / max(1.0, value.abs().max().item())
        assert share <= most, f"{name} differ by {share:.2g} of the largest"  # false for NaN too
    return f"equal to {most:g}"
