"""A tiny Terraformer of odd sizes, and batches of unequal sources and targets for it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hf_efficient.models.terraformer.modeling_terraformer import TerraformerForConditionalGeneration
from tests.helpers.families import TERRAFORMER


@dataclass
class Batch:
    """
    Sources of unequal lengths, and a target for each.

    Args:
        sources (`list[Tensor]`): ids without padding.
        input_ids, attention_mask (`Tensor` of shape `(batch, source length)`): the sources, padded.
        targets (`Tensor` of shape `(batch, target length)`): ids.
    """

    sources: list[Tensor]
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    @property
    def source(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def _batch(lengths: list[int], target_length: int = 6, side: str = "right") -> Batch:
    ids = TERRAFORMER.make_ids(len(lengths), max(lengths))
    places = torch.arange(max(lengths)).expand_as(ids)
    if side == "left":
        places = places.flip(1)
    mask = places < torch.tensor(lengths)[:, None]
    sources = [row[real] for row, real in zip(ids, mask, strict=True)]
    return Batch(sources, ids.masked_fill(~mask, 0), mask.long(), TERRAFORMER.make_ids(len(lengths), target_length))


@pytest.fixture
def make_batch():
    """`make_batch(lengths, target_length=6, side="right")`: a [`Batch`] padded on one side."""
    return _batch


@pytest.fixture
def make_config():
    """`make_config(**fields)`: two and two layers of width 24, four heads, no dropout."""
    return TERRAFORMER.make_config


@pytest.fixture
def make_model():
    """`make_model(cls=TerraformerForConditionalGeneration, attention=None, dtype=torch.float64, **config fields)`."""

    def make(cls=TerraformerForConditionalGeneration, attention=None, dtype=None, **fields):
        return TERRAFORMER.make_model(cls, attention, dtype, **fields)

    return make


@pytest.fixture(params=TERRAFORMER.variants)
def variant(request):
    """Config fields of each kind of encoder-decoder in turn."""
    return TERRAFORMER.variants[request.param]
