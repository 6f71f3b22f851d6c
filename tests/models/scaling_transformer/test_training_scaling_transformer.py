"""What training needs of a Scaling Transformer: classification, bf16, dropout, LoRA."""

import pytest
import torch
from torch import nn

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import (
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
)
from tests.helpers.comparison import named_gradients
from tests.helpers.families import FF, QKV, SPARSE_LOSS


ALL = {**FF, **QKV, "ff_sru_layers": 1, **SPARSE_LOSS}


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
    model = make_model(ScalingTransformerForCausalLM, dtype=dtype, **ALL, ff_hard_probability=probability).train()
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


def test_lora_on_all_linear_layers(make_model, make_ids, tmp_path):
    """Sparse layers are no linear ones, and take no adapters; the recurrences beside them do."""
    peft = pytest.importorskip("peft")
    model = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **ALL)
    before, ids = {name: parameter.clone() for name, parameter in model.named_parameters()}, make_ids(2, 7)
    base = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(adapted(ids).logits, base)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".sru." in name for name in trained)
    assert len(trained) == 2 * 2 * 3
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    fresh = ScalingTransformerForCausalLM(model.config)
    fresh.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
