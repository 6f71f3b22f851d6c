"""Backward passes that run layers again, reversible or checkpointed, have the gradients of ordinary ones, by name, and
keep no activations of a layer."""

import pytest
import torch

from tests.helpers.comparison import assert_close, named_gradients
from tests.helpers.families import FF, QKV, TERRAFORMER


DROPOUT = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.2}
HARD, SOFT = {**FF, "ff_hard_probability": 1.0}, {**FF, "ff_hard_probability": 0.0}
KINDS = {
    "dense-dropout": DROPOUT,
    "hard-sru-dropout": {**HARD, **QKV, "ff_sru_layers": 1, **DROPOUT},
    "soft-sru-dropout": {**SOFT, **QKV, "ff_sru_layers": 1, **DROPOUT},
    "forgetting-pieces": {**TERRAFORMER.variants["forgetting"], "ff_chunk_size": 5, **DROPOUT},
    "double-width-lsh": {
        "double_width_after": 0,
        "encoder_long_attention": "lsh",
        "decoder_long_attention": "lsh",
        "attention_share_qk": False,
        "lsh_chunk_length": 4,
        "lsh_buckets": [4],
        **DROPOUT,
    },
}
CROSS = {"cross-dropout": {**TERRAFORMER.variants["cross-sparse"], **DROPOUT, "ff_hard_probability": 1.0}}


def gradients(model, batch, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    model(**batch.source, labels=batch.targets).loss.backward()
    found = named_gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reversible_gradients_are_those_of_ordinary_autograd(make_model, make_batch, kind, dtype, tolerance):
    model, batch = make_model(dtype=dtype, **KINDS[kind]).train(), make_batch([5, 9, 1])
    results = []
    for reversible in (False, True):
        model.config.reversible = reversible
        results.append(gradients(model, batch))
    assert_close("gradient", results[1], results[0], tolerance)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("kind", {**KINDS, **CROSS})
def test_checkpointing_changes_no_gradient(make_model, make_batch, kind, reentrant):
    model, batch = make_model(**{**KINDS, **CROSS}[kind]).train(), make_batch([5, 9, 1])
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close("gradient", gradients(model, batch), expected, 1e-9)


def saved_numbers(model, batch):
    """Numbers in the tensors that a forward pass keeps for the backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = max(kept.get(place, 0), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch.source, labels=batch.targets)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["dense-dropout", "hard-sru-dropout"])
def test_activations_that_are_kept_do_not_grow_with_depth(make_model, make_batch, kind):
    batch = make_batch([60, 63], 33)
    numbers = {}
    for reversible in (True, False):
        for depth in (2, 8):
            layers = {"num_encoder_layers": depth, "num_decoder_layers": depth}
            model = make_model(dtype=torch.float32, reversible=reversible, **layers, **KINDS[kind]).train()
            numbers[reversible, depth] = saved_numbers(model, batch)
    # Masks of the scores, which all layers share, are made once.
    assert numbers[True, 8] <= 1.1 * numbers[True, 2]
    assert numbers[False, 8] >= 3 * numbers[False, 2]


@pytest.mark.parametrize("kind", ["soft", "cross"])
def test_accumulated_steps_equal_one(make_model, make_batch, kind):
    fields = {"soft": {**SOFT, **QKV, "ff_sru_layers": 1}, "cross": TERRAFORMER.variants["cross-none-sru"]}[kind]
    model, batch = make_model(**fields).train(), make_batch([5, 9, 1, 4])
    labels = batch.targets.masked_fill(torch.rand(4, 6) < 0.3, -100)
    count = (labels != -100).sum()
    model(**batch.source, labels=labels, num_items_in_batch=count).loss.backward()
    expected = named_gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        source = {name: tensor[rows] for name, tensor in batch.source.items()}
        model(**source, labels=labels[rows], num_items_in_batch=count).loss.backward()
    assert_close("gradient", named_gradients(model), expected, 1e-9)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["hard-sru-dropout", "soft-sru-dropout", "cross-dropout"])
def test_training_in_bfloat16(make_model, make_batch, kind, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model, batch = make_model(dtype=dtype, **{**KINDS, **CROSS}[kind]).train(), make_batch([5, 9])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch.source, labels=batch.targets).loss
    loss.backward()
    assert loss.dtype == torch.float32
    found = named_gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
