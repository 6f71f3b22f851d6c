"""What training needs of every causal language model: its loss, accumulated steps, and that it learns."""

import pytest
import torch
from torch import nn

from tests.helpers.comparison import assert_gradients_close, named_gradients
from tests.helpers.families import ALL_SPARSE, TERRAFORMER_LM, subjects


# One kind of mask for all calls, so that two models, or one model twice, are the same function.
SOFT = {**ALL_SPARSE, "ff_hard_probability": 0.0}
KINDS = {
    "srupp": {"": {}},
    "scaling_transformer": {"dense": {}, "soft": SOFT},
    "terraformer_lm": {"reformer": TERRAFORMER_LM.variants["reformer"], "soft": SOFT},
}
every_kind = pytest.mark.parametrize(("family", "fields"), subjects(KINDS))


@every_kind
def test_loss_of_a_causal_lm(family, fields):
    model, ids = family.make_model(family.causal_lm, **fields), family.make_ids(2, 7)
    labels = ids.clone()
    labels[0, 4:] = -100
    output = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=5).loss, expected * 9 / 5)


@every_kind
def test_accumulated_steps_equal_one(family, fields):
    model, ids = family.make_model(family.causal_lm, **fields).train(), family.make_ids(4, 7)
    labels = ids.masked_fill(torch.rand(4, 7) < 0.3, -100)
    count = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels, num_items_in_batch=count).loss.backward()
    expected = named_gradients(model)
    assert expected.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    assert_gradients_close(model, expected, 1e-9)


# Fields, the learning rate, the number of steps, and below which the loss falls.
LEARNERS = {
    "srupp": {
        "all-attend": ({"num_hidden_layers": 2}, 0.02, 60, 0.1),
        "sru": ({"num_hidden_layers": 2, "attention_layers": [], "projection_size": 0}, 0.02, 60, 0.1),
    },
    "scaling_transformer": {"sparse": ({**ALL_SPARSE, "intermediate_size": 60}, 0.01, 80, 0.3)},
    "terraformer_lm": {"sparse": ({**ALL_SPARSE, "intermediate_size": 60}, 0.01, 80, 0.3)},
}


@pytest.mark.parametrize(("family", "learner"), subjects(LEARNERS))
def test_it_learns_to_count(family, learner):
    """A text that only a memory of three tokens back predicts; then the model writes that text."""
    fields, learning_rate, steps, limit = learner
    ids = torch.tensor([[3, 4, 5, 3, 4, 6, 3, 7, 5, 3] * 4])
    torch.manual_seed(0)
    model = family.causal_lm(family.make_config(**fields)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).loss.item() < limit
    assert model.generate(ids[:, :10], max_new_tokens=10, do_sample=False)[0].tolist() == ids[0, :20].tolist()
