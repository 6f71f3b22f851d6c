"""Padding anywhere leaves no trace, and a new document begins where `document_start` says so."""

import itertools

import pytest
import torch

from hf_efficient.ops.sru import sru_recurrence
from tests.ops.sru_inputs import TENSORS, gradients, leaves_of, make_inputs


pytestmark = pytest.mark.usefixtures("recurrence_backend")
PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
    "inside": [[1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 0, 1]],
    "all": [[0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]],
}


@pytest.mark.parametrize("parts", [3, 4], ids=["k3", "k4"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", PADS)
def test_pads_leave_no_trace(where, rubbish, reverse, parts):
    """The state passes a pad to the bit, and rows equal the rows without their pads."""
    mask = torch.tensor(PADS[where], dtype=torch.bool)
    names = [name for name in TENSORS if name not in ("mask", "document_start", *(("x",) if parts == 4 else ()))]
    inputs = make_inputs(*names, batch=2, length=8, parts=parts, dtype=torch.float32)
    spoilt = dict(inputs)
    for name in {"u", "x"} & set(inputs):
        pads = ~mask.view(2, 8, *[1] * (inputs[name].dim() - 2))
        spoilt[name] = inputs[name].detach().masked_fill(pads, rubbish).requires_grad_()
    h, states = sru_recurrence(**spoilt, mask=mask, reverse=reverse, return_all_states=True)
    assert h.isfinite().all()
    assert (h[~mask] == 0).all()
    previous = torch.cat(
        [states[:, 1:], inputs["c0"][:, None]] if reverse else [inputs["c0"][:, None], states[:, :-1]], 1
    )
    assert torch.equal(states[~mask], previous[~mask])

    # A loss that also looks at the pads, where the gradient of the output is rubbish too
    grad_h = torch.randn_like(h).masked_fill(~mask[..., None], rubbish)
    last = states[:, 0 if reverse else -1]
    for name, gradient in gradients([h, last], [grad_h, torch.ones(2, 5)], leaves_of(spoilt)).items():
        assert gradient.isfinite().all(), name
        if name in ("u", "x"):
            assert (gradient[~mask] == 0).all(), name
    for row in range(2):
        kept = {name: tensor[row : row + 1] for name, tensor in inputs.items() if name not in ("weight_c", "bias")}
        kept |= {name: tensor[:, mask[row]] for name, tensor in kept.items() if name in ("u", "x")}
        last = states[row, 0 if reverse else -1]
        if not mask[row].any():
            assert torch.equal(last, inputs["c0"][row])
            continue
        alone, last_alone = sru_recurrence(**kept, weight_c=inputs["weight_c"], bias=inputs["bias"], reverse=reverse)
        torch.testing.assert_close(h[row][mask[row]], alone[0])
        torch.testing.assert_close(last, last_alone[0])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_document_start_begins_a_new_sequence(reverse):
    inputs = make_inputs("x", "weight_c", "bias", "c0", batch=1, length=11)
    starts = (0, 3, 4, 9, 11)
    document_start = torch.zeros(1, 11, dtype=torch.bool)
    begins = [stop - 1 for stop in starts[1:]] if reverse else list(starts[:-1])
    document_start[0, begins] = True
    h, states = sru_recurrence(**inputs, document_start=document_start, reverse=reverse, return_all_states=True)
    for start, stop in itertools.pairwise(starts):
        alone = {"u": inputs["u"][:, start:stop], "x": inputs["x"][:, start:stop]}
        alone |= {"weight_c": inputs["weight_c"], "bias": inputs["bias"]}
        h_alone, states_alone = sru_recurrence(**alone, reverse=reverse, return_all_states=True)
        torch.testing.assert_close(h[:, start:stop], h_alone)
        torch.testing.assert_close(states[:, start:stop], states_alone)
    (gradient,) = torch.autograd.grad(h.sum() + states.sum(), inputs["c0"])
    assert (gradient == 0).all()
