"""Inputs of every family: what is taken, in which forms alike, and what is refused with its name, shape and dtype."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, DynamicCache, StaticCache

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppModel
from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM, TupeForMultipleChoice, TupeModel
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective

from .tiny_models import make


IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 8, 2, 1]])
TRIL = torch.ones(5, 5).tril().bool()[None, None].expand(2, 1, 5, 5)


@pytest.fixture(params=[SruppModel, TupeModel], ids=["srupp", "tupe"])
def cls(request):
    return request.param


def states(model, **inputs):
    with torch.no_grad():
        return model(**{"input_ids": IDS, **inputs}).last_hidden_state


MASKS = [
    pytest.param(torch.ones(5), r"shape \(5,\), but must have shape \(2, 5\)", id="1d"),
    pytest.param(
        torch.ones(2, 5, 5), r"\(2, 5, 5\), but must have shape \(2, 5\).*\(2 or 1, 2 or 1, 5 or 1, 5\)", id="3d"
    ),
    pytest.param(torch.ones(1, 2, 1, 5, 5), r"\(1, 2, 1, 5, 5\), but", id="5d"),
    pytest.param(torch.ones(2, 4), r"\(2, 4\), but must have shape \(2, 5\)", id="short"),
    pytest.param(torch.ones(1, 5), r"\(1, 5\), but must have shape \(2, 5\)", id="batch-1"),
    pytest.param(torch.ones(3, 1, 5, 5), r"\(3, 1, 5, 5\), but", id="4d-batch"),
    pytest.param(torch.ones(2, 3, 5, 5), r"\(2, 3, 5, 5\), but", id="4d-heads"),
    pytest.param(torch.ones(2, 1, 5, 4), r"\(2, 1, 5, 4\), but", id="4d-keys"),
    pytest.param(torch.ones(2, 1, 4, 5), r"\(2, 1, 4, 5\), but", id="4d-queries"),
    pytest.param(
        torch.ones(2, 5, dtype=torch.complex64), "booleans, integers or floats, not of torch.complex64", id="z"
    ),
    pytest.param(torch.ones(2, 1, 5, 5, dtype=torch.complex64), "not of torch.complex64", id="4d-complex"),
    pytest.param(torch.full((2, 5), math.nan), "torch.float32.* holds nan.*0 and 1.*have four dimensions", id="nan"),
    pytest.param(torch.full((2, 5), 2), r"torch.int64 and shape \(2, 5\) holds 2, but", id="2"),
    pytest.param(torch.full((2, 5), -1), "holds -1, but", id="minus-1"),
    pytest.param(torch.full((2, 5), 0.5), "holds 0.5, but", id="half"),
    pytest.param(torch.zeros(2, 5).fill_(-torch.inf), "holds -inf, but", id="2d-additive"),
    pytest.param(torch.full((2, 1, 5, 5), 2), "holds 2, but", id="4d-2"),
    pytest.param(torch.full((2, 1, 5, 5), math.nan), "holds NaN", id="4d-nan"),
    pytest.param(torch.full((2, 1, 5, 5), math.inf), "holds NaN or .inf", id="4d-inf"),
]


@pytest.mark.parametrize(("mask", "message"), MASKS)
def test_what_is_no_mask_is_refused(cls, mask, message):
    with pytest.raises(ValueError, match=message):
        states(make(cls), attention_mask=mask)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.float64], ids=str
)
def test_zeros_and_ones_of_any_dtype(cls, dtype):
    model = make(cls)
    mask = (IDS != 1).long()
    torch.testing.assert_close(states(model, attention_mask=mask.to(dtype)), states(model, attention_mask=mask))
    ones = torch.ones(2, 5, dtype=dtype)
    torch.testing.assert_close(states(model, attention_mask=ones), states(model))


def additive(allowed, lowest=-torch.inf, dtype=torch.float32):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)


FORMS = {
    "int64": lambda allowed: allowed.long(),
    "uint8": lambda allowed: allowed.byte(),
    "inf": additive,
    "float64": lambda allowed: additive(allowed, torch.finfo(torch.float64).min, torch.float64),
    "float16": lambda allowed: additive(allowed, dtype=torch.float16),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_scores_in_every_form(cls, attention, form):
    """The first query of the second row may attend to nothing, which is the same in both forms of attention."""
    allowed = TRIL.clone()
    allowed[1, 0, 0] = False
    expected = states(make(cls, "eager"), attention_mask=allowed)
    assert expected.isfinite().all()
    torch.testing.assert_close(states(make(cls, attention), attention_mask=FORMS[form](allowed)), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (2, 2, 5, 5), (1, 2, 5, 5), (2, 1, 1, 5)], ids=str)
def test_a_mask_of_scores_is_broadcast(cls, attention, shape):
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    expected = states(make(cls, "eager"), attention_mask=allowed.expand(2, 2, 5, 5))
    torch.testing.assert_close(states(make(cls, attention), attention_mask=allowed), expected)


@pytest.mark.slow
def test_flex_attention_takes_a_mask_of_scores_for_each_head():
    allowed = torch.rand((2, 2, 5, 5), generator=torch.Generator().manual_seed(0)) < 0.7
    found = states(make(TupeModel, "flex_attention"), attention_mask=allowed)
    torch.testing.assert_close(found, states(make(TupeModel, "eager"), attention_mask=allowed))


def test_flex_attention_without_a_position_bias_takes_none():
    """torch would corrupt memory."""
    with pytest.raises(ValueError, match=r"give a BlockMask, or call model.set_attn_implementation\('sdpa'\)"):
        states(make(SruppModel, "flex_attention"), attention_mask=TRIL)


def test_a_mask_of_scores_replaces_causality():
    model = make(SruppModel)
    torch.testing.assert_close(states(model, attention_mask=TRIL), states(model))
    sees_all = torch.ones(2, 1, 5, 5).bool()
    assert not torch.allclose(states(model, attention_mask=sees_all)[:, 0], states(model)[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_nothing_in_half_precision(cls, dtype):
    model = make(cls).to(dtype)
    allowed = TRIL.clone()
    allowed[1, 0, 2] = False
    for mask in (allowed, additive(allowed), additive(allowed, dtype=dtype)):
        assert states(model, attention_mask=mask).isfinite().all()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_mask_of_scores_beside_a_cache(static):
    """A mask over all keys, of which a static cache has more than there are tokens."""
    model = make(SruppModel)
    expected = states(model)
    cache = StaticCache(model.config, max_cache_len=7) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :3], cache=cache)
        mask = torch.nn.functional.pad(TRIL[:, :, 3:], (0, 2)) if static else TRIL[:, :, 3:]
        with pytest.raises(ValueError, match=r"\(2, 1, 2, 2\), but must"):
            model(IDS[:, 3:], attention_mask=mask[..., :2], cache=cache)
        torch.testing.assert_close(
            model(IDS[:, 3:], attention_mask=mask, cache=cache).last_hidden_state, expected[:, 3:]
        )


def test_a_mask_of_scores_beside_memory():
    model = make(SruppModel)
    with torch.no_grad():
        memory = model(IDS[:, :3], return_memory=True).memory
        expected = model(IDS[:, 3:], memory=memory).last_hidden_state
        found = model(IDS[:, 3:], attention_mask=TRIL[:, :, 3:], memory=memory).last_hidden_state
        with pytest.raises(ValueError, match=r"\(2, 1, 2, 2\), but must have shape \(2, 2\) or \(2, 5\)"):
            model(IDS[:, 3:], attention_mask=TRIL[:, :, :2, :2], memory=memory)
    torch.testing.assert_close(found, expected)


def test_documents_and_the_window_hold_beside_a_mask_of_scores():
    model = make(SruppModel)
    restarting = torch.tensor([[0, 1, 0, 1, 2]])
    for options in ({"position_ids": restarting}, {"attention_window": 1}):
        torch.testing.assert_close(states(model, attention_mask=TRIL, **options), states(model, **options))


def test_whatever_the_mask_hides_may_have_any_id(cls):
    model = make(cls)
    mask = (IDS != 1).long()
    expected = states(model, attention_mask=mask)
    for hidden in (41, 10**9, -100):
        ids = IDS.masked_fill(mask == 0, hidden)
        assert torch.equal(states(model, input_ids=ids, attention_mask=mask), expected)
        with pytest.raises(ValueError, match=f"holds {hidden}, outside the vocabulary of 41"):
            states(model, input_ids=ids)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        pytest.param({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a torch.Tensor, not list", id="list"),
        pytest.param(
            {"input_ids": IDS.numpy()}, TypeError, "input_ids must be a torch.Tensor, not ndarray", id="numpy"
        ),
        pytest.param({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask must be a torch.Tensor", id="mask"),
        pytest.param({"input_ids": IDS.float()}, ValueError, "int64 or torch.int32, not torch.float32", id="ids-float"),
        pytest.param({"input_ids": IDS.bool()}, ValueError, "not torch.bool", id="ids-bool"),
        pytest.param({"input_ids": IDS.short()}, ValueError, "not torch.int16", id="ids-int16"),
        pytest.param(
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 18).half()},
            ValueError,
            "inputs_embeds is of torch.float16, but the model is of torch.float32",
            id="embeds-half",
        ),
        pytest.param(
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 18).long()},
            ValueError,
            "inputs_embeds must be of a floating dtype, not torch.int64",
            id="embeds-int",
        ),
        pytest.param(
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 17)},
            ValueError,
            r"17 wide, but \w+_size is 18; its shape \(2, 5, 17\) must be \(batch, length, 18\)",
            id="embeds-width",
        ),
        pytest.param(
            {"input_ids": None, "inputs_embeds": np.zeros((2, 5, 18))},
            TypeError,
            "inputs_embeds must be",
            id="embeds-np",
        ),
        pytest.param(
            {"token_type_ids": IDS[:1]}, ValueError, r"token_type_ids must have shape \(2, 5\)", id="token_type_ids"
        ),
        pytest.param(
            {"token_type_ids": IDS.float()}, ValueError, "token_type_ids must be of an integer", id="types-float"
        ),
    ],
)
def test_errors_of_types_and_shapes(cls, inputs, error, message):
    with pytest.raises(error, match=message):
        states(make(cls), **inputs)


def test_embeddings_of_the_dtype_that_autocast_gives(cls):
    model = make(cls)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeds = model.get_input_embeddings()(IDS)
        found = model(inputs_embeds=embeds.bfloat16()).last_hidden_state
        expected = model(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(found.float(), expected.float(), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_both_dtypes_that_an_embedding_takes(cls, dtype):
    model = make(cls)
    assert torch.equal(states(model, input_ids=IDS.to(dtype)), states(model))


@pytest.mark.parametrize("objective", [MaskedLMObjective, ReplacedTokenObjective])
def test_an_objective_refuses_it_as_well(objective):
    """Also over an encoder that would swallow it."""
    config = BertConfig(vocab_size=41, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForMaskedLM(config)
    trained = objective(model=model) if objective is MaskedLMObjective else objective(encoder=model.bert)
    for keyword, meant in {"attention_maks": "attention_mask", "num_item_in_batch": "num_items_in_batch"}.items():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'. Did you mean '{meant}'"):
            trained(IDS, labels=IDS, **{keyword: IDS})
    assert trained(IDS, labels=IDS, token_type_ids=torch.zeros_like(IDS)).loss.isfinite()


def test_keywords_of_transformers_are_taken(cls):
    model = make(cls)
    own = {
        **{"num_items_in_batch": 3, "output_hidden_states": True, "output_attentions": False, "return_dict": True},
        **{"output_router_logits": False, "use_cache": False, "position_ids": None, "seq_idx": None},
        **{"cu_seq_lens_q": None, "cu_seq_lens_k": None, "max_length_q": None, "max_length_k": None},
        "token_type_ids": torch.zeros_like(IDS),
    }
    torch.testing.assert_close(states(model, **own), states(model))


@pytest.mark.parametrize("value", [-1, 0.5, True], ids=str)
def test_counts_are_whole_numbers(value):
    model = make(SruppForCausalLM)
    for name in ("attention_window", "logits_to_keep"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 0, not {value}"):
            model(IDS, **{name: value})
    with pytest.raises(TypeError, match=r"'num_logits_to_keep'. Did you mean 'logits_to_keep'"):
        model(IDS, num_logits_to_keep=1)


def test_multiple_choice_names_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"input_ids must be a torch.Tensor, not list"):
        make(TupeForMultipleChoice)(IDS[None].tolist())


SPARSE = {
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "must not be a nested tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "must not be a nested tensor"),
    "coo": (lambda x: x.to_sparse(), "must be a dense tensor, not of torch.sparse_coo"),
    "csr": (lambda x: x.to_sparse_csr(), "must be a dense tensor, not of torch.sparse_csr"),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse CSR)")
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels"])
@pytest.mark.parametrize("head", [SruppForCausalLM, TupeForMaskedLM])
def test_tensors_that_are_not_dense(head, name, kind):
    make_it, message = SPARSE[kind]
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    with pytest.raises(ValueError, match=f"{name} {message}"):
        make(head)(**{**call, name: make_it(call[name])})


@pytest.mark.parametrize("name", ["use_cache", "return_memory"])
@pytest.mark.parametrize("value", ["no", 1, torch.tensor(True)], ids=str)
def test_flags_are_true_or_false(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False, not"):
        make(SruppForCausalLM)(IDS, **{name: value})
