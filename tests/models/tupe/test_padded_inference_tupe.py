"""Inference over padded rows on a CPU, where each row may attend to its real keys alone."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_efficient.models.tupe import modeling_tupe
from hf_efficient.models.tupe.modeling_tupe import real_key_lengths
from tests.helpers.comparison import assert_close


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the keys of every call of the fused kernel; rows attend one by one at any length."""
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, *args, **kwargs):
        shapes.append(tuple(key.shape))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(modeling_tupe, "ROWWISE_MIN_LENGTH", 1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return shapes


def forward(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize(
    "fields", [{}, {"relative_attention": False, "untie_cls": False}], ids=["tupe-r", "tupe-a-tied"]
)
def test_rows_one_by_one_equal_the_definition(make_model, make_inputs, calls, fields, dtype):
    inputs = make_inputs(63, 5, 5, 1)
    output = forward(make_model(**fields).to(dtype), inputs)
    # Three runs of one length in each of two layers.
    assert calls == [(1, 3, 63, 5), (2, 3, 5, 5), (1, 3, 1, 5)] * 2
    expected = forward(make_model(attention="eager", **fields).to(dtype), inputs)
    # Padded columns too: they attend to the same keys.
    assert_close("hidden states", output, expected, 1e-12 if dtype == torch.float64 else 2e-2)


def test_bf16_autocast(make_model, make_inputs, calls):
    model, inputs = make_model(), make_inputs(17, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = forward(model, inputs)
    assert [shape[0] for shape in calls] == [1, 1] * 2
    assert_close("hidden states", output, forward(model, inputs), 3e-2)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param([[1, 1, 0, 1]], id="padding-inside"),
        pytest.param([[1, 1, 1, 1], [0, 0, 0, 0]], id="only-padding"),
        pytest.param([[0, 1, 1, 1]], id="left-padding"),
    ],
)
def test_other_masks_are_used_as_they_are(calls, mask):
    assert real_key_lengths(torch.tensor(mask)) is None
    assert real_key_lengths(torch.ones(2, 3, dtype=torch.long)) == [3, 3]


def test_short_inputs_keep_the_mask():
    short, long = modeling_tupe.ROWWISE_MIN_LENGTH - 1, modeling_tupe.ROWWISE_MIN_LENGTH
    assert real_key_lengths(torch.ones(1, short)) is None
    assert real_key_lengths(torch.ones(1, long, dtype=torch.bool)) == [long]


def test_attention_weights_and_gradients_take_the_other_path(make_model, make_inputs, calls):
    model, inputs = make_model(), make_inputs(9, 4)
    rows = forward(model, inputs)
    calls.clear()
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    assert outputs.attentions[0][1, :, :, 4:].max() == 0
    assert_close("with weights", outputs.last_hidden_state, rows, 1e-5)
    assert_close("with gradients", model(**inputs).last_hidden_state, rows, 1e-5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()(**inputs)  # frozen, but in training: dropout needs the explicit form
    assert all(shape[0] == 2 for shape in calls)


def test_config_that_asks_for_weights_gets_them(make_model, make_inputs, calls):
    inputs = make_inputs(9, 4)
    rows = forward(make_model(), inputs)
    calls.clear()
    model = make_model(output_attentions=True)
    with torch.no_grad():
        for given in (inputs, {"input_ids": inputs["input_ids"]}):
            attentions = model(**given).attentions
            assert [tuple(weights.shape) for weights in attentions] == [(2, 3, 9, 9)] * 2
        assert not calls
        outputs = model(**inputs, output_attentions=False)
    assert outputs.attentions is None
    assert len(calls) == 4
    assert_close("without weights", outputs.last_hidden_state, rows, 1e-6)


def test_another_revision_that_takes_the_name_changes_nothing(make_model, make_inputs, calls):
    """Remote code registers its functions under the same name, and an old one knows nothing of lengths of rows."""
    model, inputs = make_model(), make_inputs(9, 4)
    expected = forward(model, inputs)
    registered = ALL_ATTENTION_FUNCTIONS[modeling_tupe.AUTO_ATTENTION]
    AttentionInterface.register(modeling_tupe.AUTO_ATTENTION, lambda *args, **kwargs: pytest.fail("was called"))
    try:
        assert torch.equal(forward(model, inputs), expected)
    finally:
        AttentionInterface.register(modeling_tupe.AUTO_ATTENTION, registered)


def test_a_default_device_does_not_matter(make_model, make_inputs, calls):
    model, inputs = make_model(), make_inputs(9, 4)
    with torch.device("meta"):
        assert forward(model, inputs).device.type == "cpu"
    assert [shape[2] for shape in calls] == [9, 4] * 2
