"""Keywords that nothing reads: the head that was called says so, and offers what it takes itself and nothing else."""

import pytest
import torch

from hf_efficient.auto import FAMILIES
from tests.helpers.fuzzing.subjects import OBJECTIVES, heads
from tests.models.test_refusals import call_of, model_of


HEADS = [(family, head) for family in FAMILIES for head in heads(family) if head not in OBJECTIVES]


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_mistyped_keyword(family, head):
    model, call = model_of(family, head), call_of(head)
    close = {"attention_maks": "attention_mask", "output_hidden_state": "output_hidden_states"}
    if "labels" in call:
        close["lables"] = "labels"
    if head.endswith("QuestionAnswering"):
        close["start_position"] = "start_positions"
    for keyword, meant in close.items():
        message = rf"^{head}\.forward\(\) got an unexpected keyword argument '{keyword}'\. Did you mean '{meant}'\?$"
        with pytest.raises(TypeError, match=message):
            model(**call, **{keyword: torch.ones(2)})


@pytest.mark.parametrize("keyword", ["cache_position", "labels", "shift_labels", "start_positions", "qqq"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_nothing_is_offered_where_nothing_is_alike(family, head, keyword):
    call = call_of(head)
    if keyword in call or (keyword == "shift_labels" and head.endswith("CausalLM")):
        pytest.skip("this head takes it")
    if keyword == "shift_labels" and "labels" in call:
        call.pop("labels")
    with pytest.raises(TypeError, match=rf"^{head}\.forward\(\) got an unexpected keyword argument '{keyword}'\.$"):
        model_of(family, head)(**call, **{keyword: torch.ones(2)})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_that_is_called_by_itself_names_itself(family):
    head = next(head for head in heads(family) if head.endswith("SequenceClassification"))
    encoder = model_of(family, head).base_model
    with pytest.raises(TypeError, match=rf"^{type(encoder).__name__}\.forward\(\) got .* 'labels'\.$"):
        encoder(**call_of(head))
