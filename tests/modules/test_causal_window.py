"""The last tokens before each one, against a loop over the tokens of each row."""

import pytest
import torch

from hf_efficient.modules.causal_window import CausalWindow, TokenOrder, false_first


def by_loop(values, real, starts, past, window):
    """For each real token the last `window` tokens of its document, zeros before it; and the row's last ones."""
    batch, length, width = values.shape
    windows, states = torch.zeros(batch, length, window, width), torch.zeros(batch, window - 1, width)
    for row in range(batch):
        seen = list(past[row])
        for place in range(length):
            if real[row, place]:
                if starts[row, place]:
                    seen = [torch.zeros(width)] * (window - 1)
                seen.append(values[row, place])
                windows[row, place] = torch.stack(seen[-window:])
        states[row] = torch.stack(seen[len(seen) - window + 1 :]) if window > 1 else states[row]
    return windows, states.flatten(1)


def draw(seed, window, length, with_past, with_starts):
    torch.manual_seed(seed)
    values = torch.randn(3, length, 2)
    real = torch.rand(3, length) < 0.6
    starts = (torch.rand(3, length) < 0.3) & real if with_starts else torch.zeros(3, length).bool()
    past = torch.randn(3, window - 1, 2) if with_past else torch.zeros(3, window - 1, 2)
    return values, real, starts, past


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("with_past", "with_starts"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_padding_and_documents(seed, window, length, with_past, with_starts):
    values, real, starts, past = draw(seed, window, length, with_past, with_starts)
    order = TokenOrder.of(real, starts if with_starts else None, window, (3, length), values.device)
    state = past.flatten(1) if with_past else None
    layer = CausalWindow(window, 2)
    windows, last = layer(values, state, order, all_states=False)
    expected, states = by_loop(values, real, starts, past, window)
    assert torch.equal(windows[real], expected[real])
    assert last.shape == (3, 1, layer.state_size)
    assert torch.equal(last[:, 0], states)
    _, every = layer(values, state, order, all_states=True)
    for place in range(length):
        _, states = by_loop(values[:, : place + 1], real, starts, past, window)
        assert torch.equal(every[:, place], states)


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_plain_text(window, length):
    """As with an order that says nothing."""
    values, _, _, past = draw(0, window, length, True, False)
    real = torch.ones(3, length).bool()
    expected, states = by_loop(values, real, ~real, past, window)
    windows, last = CausalWindow(window, 2)(values, past.flatten(1), None, all_states=False)
    assert torch.equal(windows.unfold(1, window, 1).transpose(2, 3), expected)
    assert torch.equal(last[:, 0], states)
    _, every = CausalWindow(window, 2)(values, past.flatten(1), None, all_states=True)
    order = TokenOrder.of(None, None, window, (3, length), values.device)
    assert torch.equal(every, CausalWindow(window, 2)(values, past.flatten(1), order, all_states=True)[1])


def test_a_window_of_one_token_has_no_state():
    values = torch.randn(2, 5, 3)
    assert CausalWindow(1, 3).state_size == 0
    windows, states = CausalWindow(1, 3)(values, None, None, all_states=True)
    assert windows is values
    assert states is None


@pytest.mark.parametrize("length", [1, 9, 63])
def test_places_are_ordered_by_a_mask_and_stay_in_their_order(length):
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.5
    assert torch.equal(false_first(mask), mask.to(torch.uint8).argsort(dim=1, stable=True))
    for same in (torch.zeros(2, length).bool(), torch.ones(2, length).bool()):
        assert torch.equal(false_first(same), torch.arange(length).expand(2, -1))
