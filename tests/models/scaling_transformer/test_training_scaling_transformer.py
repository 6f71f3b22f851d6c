"""What training needs of a Scaling Transformer: classification, bf16, dropout."""

import pytest
import torch
from torch import nn

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import (
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
)
from tests.helpers.comparison import named_gradients
from tests.helpers.families import ALL_SPARSE, FF, QKV


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_classification_reads_the_last_token(make_model, make_ids, side):
    model, ids = make_model(ScalingTransformerForSequenceClassification, num_labels=3, **FF, **QKV), make_ids(2, 7)
    row = {"left": [0, 0, 0, 1, 1, 1, 1], "right": [1, 1, 1, 1, 0, 0, 0], "inside": [1, 0, 1, 1, 0, 1, 0]}[side]
    mask, labels = torch.tensor([row, [1] * 7]), torch.tensor([2, 0])
    output = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    for index in range(2):
        alone = model(ids[index : index + 1, mask[index].bool()]).logits[0]
        torch.testing.assert_close(output.logits[index], alone)


@pytest.mark.parametrize("probability", [0.0, 1.0], ids=["soft", "hard"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_training_in_bfloat16(make_model, make_ids, autocast, probability):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = make_model(
        ScalingTransformerForCausalLM, dtype=dtype, **ALL_SPARSE, ff_hard_probability=probability
    ).train()
    ids = make_ids(2, 33)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = named_gradients(model)
    assert loss.dtype == torch.float32
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_dropouts(make_model, make_ids):
    """Each acts in training alone."""
    ids = make_ids(2, 50)
    for field in ("dropout", "attention_dropout", "activation_dropout"):
        model = make_model(ScalingTransformerForCausalLM, **{field: 0.4})
        assert torch.equal(model(ids).logits, make_model(ScalingTransformerForCausalLM)(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), field
        with torch.no_grad():
            assert model(ids).logits.isfinite().all()
