"""Bad input gets an error that says what was wrong and what to do; and doing that works."""

import pytest
import torch

from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
    TupeModel,
)


IDS = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
EMBEDS = torch.zeros(2, 4, 15)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param({}, "either input_ids or inputs_embeds", id="neither"),
        pytest.param({"input_ids": IDS, "inputs_embeds": EMBEDS}, "either input_ids or inputs_embeds", id="both"),
        pytest.param({"input_ids": IDS[0]}, r"\(batch, length\).*got \(4,\).*x\[None\]", id="ids-1d"),
        pytest.param({"inputs_embeds": EMBEDS[0]}, r"\(batch, length, hidden_size\); got \(4, 15\)", id="embeds-2d"),
        pytest.param(
            {"input_ids": IDS.masked_fill(IDS == 7, 40)}, r"holds 40, outside.* 40 ids \(0 to 39\)", id="id-40"
        ),
        pytest.param({"input_ids": IDS.masked_fill(IDS == 7, -1)}, "holds -1, outside.*resize_token", id="id-minus-1"),
        pytest.param(
            {"input_ids": IDS, "attention_mask": MASK[:, :3]},
            r"\(2, 3\), but must have shape \(2, 4\)",
            id="mask-short",
        ),
        pytest.param(
            {"input_ids": IDS, "attention_mask": MASK[:1]}, r"\(1, 4\), but must have shape \(2, 4\)", id="mask-1"
        ),
        pytest.param(
            {"input_ids": IDS, "attention_mask": MASK[:, None, :]},
            r"\(2, 1, 4\), but must have shape \(2, 4\)",
            id="mask-3d",
        ),
        pytest.param(
            {"input_ids": IDS, "attention_mask": MASK.flip(1)}, "Row 1 is padded on the left.*padding_side", id="left"
        ),
        pytest.param(
            {"inputs_embeds": EMBEDS, "attention_mask": MASK.flip(1)}, "Row 1 is padded on the left", id="left-embeds"
        ),
        pytest.param(
            {"input_ids": torch.tensor([[0, 5], [6, 5]])},
            r"Row 1 starts with id 6, not with \[CLS\] \(id 0\)",
            id="cls",
        ),
        pytest.param({"input_ids": IDS[:, :0]}, r"length 0; TUPE needs at least the \[CLS\]", id="length-0"),
        pytest.param({"inputs_embeds": EMBEDS[:, :0]}, "length 0", id="length-0-embeds"),
        pytest.param({"input_ids": IDS, "position_ids": torch.arange(4)}, "takes no position_ids", id="position_ids"),
    ],
)
def test_errors_of_the_encoder(make_model, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs)


def test_the_checks_of_layout_can_be_switched_off(make_model):
    model = make_model(cls_token_id=None)
    assert model(torch.tensor([[7, 5]])).last_hidden_state.isfinite().all()
    assert model(IDS, MASK.flip(1)).last_hidden_state.isfinite().all()


def test_a_row_of_padding_need_not_start_with_cls(make_model):
    ids = torch.tensor([[0, 5, 2], [1, 1, 1]])
    assert make_model()(ids, (ids != 1).long()).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_too_long_says_the_limit_and_how_to_raise_it(make_model, make_inputs, training):
    model = make_model(TupeForMaskedLM).train(training)
    inputs = make_inputs(71)
    with pytest.raises(ValueError, match=r"71 tokens.* ends at 70.*max_length=70.*resize_position_embeddings\(71\)"):
        model(**inputs)
    assert model(**make_inputs(70)).logits.isfinite().all()
    model.resize_position_embeddings(71)
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("cls", [TupeModel, TupeForMaskedLM, TupeForSequenceClassification])
def test_an_id_outside_says_how_to_grow_the_vocabulary(make_model, cls):
    model = make_model(cls)
    ids = torch.tensor([[0, 41]])
    with pytest.raises(ValueError, match=r"holds 41.*resize_token_embeddings"):
        model(ids)
    model.resize_token_embeddings(42)
    assert model(ids)[0].isfinite().all()
    if cls is TupeForMaskedLM:
        assert model(ids, labels=ids).logits.shape == (1, 2, 42)
        assert model.lm_head.decoder.weight is model.model.embed_tokens.weight


LABELS = [
    pytest.param(TupeForMaskedLM, {}, {"labels": IDS[:, :3]}, r"labels must have shape \(2, 4\)", id="mlm"),
    pytest.param(TupeForPreTraining, {}, {"labels": IDS[0]}, r"labels must have shape \(2, 4\)", id="pretraining"),
    pytest.param(
        TupeForSequenceClassification,
        {"num_labels": 3},
        {"labels": torch.zeros(2, 1).long()},
        r"labels must have shape \(2,\) .*one class id a row; got \(2, 1\)",
        id="classification",
    ),
    pytest.param(
        TupeForSequenceClassification,
        {"num_labels": 1},
        {"labels": torch.zeros(3)},
        r"labels must have shape \(2,\)",
        id="regression",
    ),
    pytest.param(
        TupeForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        {"labels": torch.zeros(2)},
        r"labels must have shape \(2, 3\) \(batch, num_labels\)",
        id="regression-3-values",
    ),
    pytest.param(
        TupeForSequenceClassification,
        {"num_labels": 3},
        {"labels": torch.zeros(2, 2)},
        r"labels must have shape \(2, 3\)",
        id="multi-label",
    ),
    pytest.param(
        TupeForTokenClassification,
        {"num_labels": 3},
        {"labels": torch.zeros(2).long()},
        r"labels must have shape \(2, 4\)",
        id="tokens",
    ),
    pytest.param(
        TupeForQuestionAnswering,
        {},
        {"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(2, 1).long()},
        r"end_positions must have shape \(2,\)",
        id="answers",
    ),
]


@pytest.mark.parametrize(("cls", "fields", "labels", "message"), LABELS)
def test_errors_of_label_shapes(make_model, cls, fields, labels, message):
    with pytest.raises(ValueError, match=message):
        make_model(cls, **fields)(IDS, MASK, **labels)


def test_errors_of_multiple_choice(make_model):
    model = make_model(TupeForMultipleChoice)
    with pytest.raises(ValueError, match=r"\(batch, choices, length\)"):
        model(IDS)
    with pytest.raises(ValueError, match=r"\(batch, choices, length\)"):
        model()
    with pytest.raises(ValueError, match=r"labels must have shape \(1,\)"):
        model(IDS[None], MASK[None], labels=torch.tensor([0, 1]))


def test_regression_takes_a_column_of_labels_as_well(make_model):
    model = make_model(TupeForSequenceClassification, num_labels=1)
    values = torch.tensor([0.5, -1.0])
    assert torch.equal(model(IDS, MASK, labels=values).loss, model(IDS, MASK, labels=values[:, None]).loss)
