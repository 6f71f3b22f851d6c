"""Labels that every objective must take: of any integer dtype, and none at all."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from tests.objectives.encoders import CONFIGS


def make_objective(kind):
    torch.manual_seed(0)
    config = CONFIGS["bert"]()
    if kind is MaskedLMObjective:
        return kind(model=AutoModelForMaskedLM.from_config(config)).eval()
    options = {"nota_token_id": 1} if kind is MetaControllerObjective else {}
    return kind(encoder=AutoModel.from_config(config), **options).eval()


every_objective = pytest.mark.parametrize("kind", [MaskedLMObjective, ReplacedTokenObjective, MetaControllerObjective])
IDS = torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(1))


def batch(labels):
    return {"input_ids": IDS, "labels": labels, "attention_mask": torch.ones_like(IDS)}


@every_objective
def test_integers_of_any_dtype_and_nothing_else(kind):
    objective, labels = make_objective(kind), IDS.masked_fill(IDS % 3 > 0, -100)
    seeds = {} if kind is MaskedLMObjective else {"sample_seeds": torch.tensor([3, 1, 4])}
    expected = objective(**batch(labels), **seeds).loss
    assert torch.equal(objective(**batch(labels.int()), **seeds).loss, expected)
    with pytest.raises(ValueError, match=r"integer dtype, not torch\.float32"):
        objective(**batch(labels.float()), **seeds)


@every_objective
@pytest.mark.parametrize("count", [None, 0], ids=["own-count", "count-0"])
def test_a_batch_without_targets_has_a_finite_loss_and_gradients(kind, count):
    objective = make_objective(kind)
    loss = objective(**batch(torch.full_like(IDS, -100)), num_items_in_batch=count).loss
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == (kind is MaskedLMObjective)  # the others tell replaced tokens from original ones all the same
    for name, parameter in objective.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
