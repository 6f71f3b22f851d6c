"""Documents that share a row are told apart by whatever transformers' collator gives, or refused."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM
from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM

from .tiny_models import make


DOCUMENTS = [[0, 5, 6, 7, 2], [0, 9], [0], [0, 8, 4, 2]]
ENDS = torch.tensor([0, 5, 7, 8, 12])
NUMBERS = torch.tensor([[0] * 5 + [1] * 2 + [2] + [3] * 4])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 0, 1, 2, 3]])
ROW = torch.tensor([[token for document in DOCUMENTS for token in document]])

GIVEN = {
    "position_ids": {"position_ids": POSITIONS},
    "position_ids-from-2": {"position_ids": POSITIONS + 2},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "seq_idx-in-any-order": {"seq_idx": 7 - NUMBERS},
    "cu_seq_lens": {"cu_seq_lens_q": ENDS.int(), "cu_seq_lens_k": ENDS.int(), "max_length_q": 5, "max_length_k": 5},
    "cu_seq_lens_k": {"cu_seq_lens_k": ENDS},
    "all": {"position_ids": POSITIONS, "seq_idx": NUMBERS, "cu_seq_lens_q": ENDS},
}


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return make(SruppForCausalLM, request.param)


def one_by_one(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([document])).logits for document in DOCUMENTS], dim=1)


@pytest.mark.parametrize("given", GIVEN)
def test_each_document_is_read_by_itself(model, given):
    with torch.no_grad():
        packed = model(ROW, **GIVEN[given]).logits
        assert not torch.allclose(packed, model(ROW).logits, atol=1e-3)
    torch.testing.assert_close(packed, one_by_one(model))


@pytest.mark.parametrize("given", ["position_ids", "seq_idx"])
def test_padding_means_nothing_between_documents(model, given):
    """Padding before, inside and after, whose numbers are those of no document."""
    places = [1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14]
    ids, mask = torch.full((1, 16), 40), torch.zeros(1, 16)
    ids[:, places], mask[:, places] = ROW, 1.0
    for filler in (0, 1, 99, -1):
        numbers = torch.full((1, 16), filler)
        numbers[:, places] = GIVEN[given][given].long()
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, **{given: numbers}).logits[:, places]
        torch.testing.assert_close(logits, one_by_one(model))


@pytest.mark.parametrize("options", [{"return_seq_idx": True}, {"return_flash_attn_kwargs": True}, {}], ids=str)
def test_batches_of_the_collator(model, options):
    batch = DataCollatorWithFlattening(**options)([{"input_ids": document} for document in DOCUMENTS])
    if options:
        del batch["position_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, one_by_one(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seq_idx": NUMBERS[:, :3]}, r"seq_idx must have shape \(1, 12\) \(batch, length\); got \(1, 3\)"),
        ({"seq_idx": NUMBERS.float()}, "seq_idx must be of an integer dtype, not torch.float32"),
        ({"position_ids": torch.arange(12)}, r"position_ids must have shape \(1, 12\)"),
        ({"cu_seq_lens_q": ENDS[:-1]}, r"rise from 0 to the input's length, 12; got \[0, 5, 7, 8\]"),
        ({"cu_seq_lens_q": ENDS.flip(0)}, "must rise from 0"),
        ({"cu_seq_lens_q": ENDS[None]}, r"\(documents \+ 1,\), for a batch of one row; got \(1, 5\)"),
        ({"cu_seq_lens_q": ENDS.float()}, "must hold integers"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        make(SruppForCausalLM)(ROW, **given)


def test_no_document_begins_in_a_row_that_goes_on():
    model = make(SruppForCausalLM)
    cache = model(ROW[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match="begins within a row that goes on from a cache"):
        model(ROW[:, 5:], seq_idx=NUMBERS[:, 5:], cache=cache)
    for name in ("seq_idx", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match="Memory continues"):
            model(ROW, return_memory=True, **{name: {"seq_idx": NUMBERS, "cu_seq_lens_q": ENDS}[name]})


@pytest.mark.parametrize("given", GIVEN)
def test_an_encoder_whose_positions_are_columns_refuses(given):
    model = make(TupeForMaskedLM)
    with pytest.raises(ValueError, match=r"TUPE takes no .*: a position is a column. .*DataCollatorWithPadding"):
        model(ROW, **GIVEN[given])
