"""Draws from a softmax in two levels: against its plain cumulative sum, and by their frequencies."""

import pytest
import torch

from hf_efficient.ops.categorical import sample_categorical


def make_layer(vocab_size, tokens, width=6, dtype=torch.float64, spread=1.0):
    torch.manual_seed(vocab_size)
    states, weight = torch.randn(tokens, width, dtype=dtype), spread * torch.randn(vocab_size, width, dtype=dtype)
    return states, weight, torch.randn(vocab_size, dtype=dtype)


def plain_draws(states, weight, bias, uniforms, temperature=1.0, replacement=True):
    """The rule as it is written down: one cumulative sum, renormalised without what was drawn."""
    probabilities = ((states @ weight.T + bias) / temperature).softmax(-1)
    ids = []
    for column in uniforms.unbind(1):
        cumulative = probabilities.cumsum(-1)
        ids.append((cumulative <= column.unsqueeze(1) * cumulative[:, -1:]).sum(-1))
        if not replacement:
            probabilities = probabilities.scatter(1, ids[-1].unsqueeze(1), 0.0)
    return torch.stack(ids, dim=1)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("vocab_size", [5, 16, 17, 63, 257, 1030])
def test_the_same_uniforms_give_the_ids_of_the_plain_sum(vocab_size, replacement):
    layer = make_layer(vocab_size, 37)
    uniforms = torch.rand(37, 5, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2.0**-53
    for temperature in (1.0, 0.3):
        ids = sample_categorical(*layer, uniforms, temperature, replacement)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, plain_draws(*layer, uniforms, temperature, replacement))


def test_ids_differ_from_the_plain_sum_by_rounding_only():
    """In float32 an id may differ where its uniform number lies on the border of two ids."""
    layer = make_layer(1030, 500, dtype=torch.float32)
    uniforms = torch.rand(500, 8)
    ids = sample_categorical(*layer, uniforms)
    exact = [part.double() for part in layer]
    cumulative = (exact[0] @ exact[1].T + exact[2]).softmax(-1).cumsum(-1)
    upper = cumulative.gather(1, ids)
    lower = upper - (exact[0] @ exact[1].T + exact[2]).softmax(-1).gather(1, ids)
    assert (uniforms <= upper + 1e-5).all()
    assert (uniforms >= lower - 1e-5).all()
    assert (ids == plain_draws(*exact, uniforms)).float().mean() > 0.99


@pytest.mark.parametrize(("vocab_size", "bias"), [(7, True), (61, True), (61, False)])
def test_frequencies(vocab_size, bias):
    from scipy.stats import chisquare

    states, weight, offsets = make_layer(vocab_size, 1, spread=0.4)
    offsets = offsets if bias else None
    probabilities = (states @ weight.T + (offsets if bias else 0.0)).softmax(-1)[0]
    count = 40_000
    ids = sample_categorical(states.expand(count, -1), weight, offsets, torch.rand(count, 1, dtype=torch.float64))
    assert chisquare(torch.bincount(ids.flatten(), minlength=vocab_size), count * probabilities).pvalue > 1e-3


def test_frequencies_of_different_ids():
    """Pairs without replacement: P(a, b) = p_a p_b / (1 - p_a)."""
    from scipy.stats import chisquare

    states, weight, bias = make_layer(5, 1, spread=0.5)
    p = (states @ weight.T + bias).softmax(-1)[0]
    pairs = p[:, None] * p / (1 - p[:, None])
    apart = ~torch.eye(5, dtype=torch.bool)
    count = 40_000
    uniforms = torch.rand(count, 2, dtype=torch.float64)
    first, second = sample_categorical(states.expand(count, -1), weight, bias, uniforms, replacement=False).T
    assert (first != second).all()
    observed = torch.bincount(5 * first + second, minlength=25).view(5, 5)
    assert chisquare(observed[apart], count * pairs[apart]).pvalue > 1e-3


def test_all_ids_can_be_drawn_without_replacement_however_unlikely():
    """Next to a certain id the others' probabilities are 0 in float32, and still none is drawn twice."""
    weight = torch.diag(torch.tensor([400.0, 300.0, 0.0, 0.0, 0.0, -200.0, 0.0, 0.0, 0.0]))
    ids = sample_categorical(torch.ones(11, 9), weight, None, torch.rand(11, 9), replacement=False)
    assert (ids[:, 0] == 0).all()
    assert torch.equal(ids.sort(-1).values, torch.arange(9).expand(11, -1))
    with pytest.raises(ValueError, match="10 different ids can't be drawn from 9"):
        sample_categorical(torch.ones(11, 9), weight, None, torch.rand(11, 10), replacement=False)


@pytest.mark.parametrize("replacement", [True, False])
def test_chunks_change_nothing(replacement):
    layer = make_layer(101, 23)
    uniforms = torch.rand(23, 4, dtype=torch.float64)
    whole = sample_categorical(*layer, uniforms, replacement=replacement)
    for chunk in (1, 7, 22, 40):
        assert torch.equal(sample_categorical(*layer, uniforms, replacement=replacement, chunk_tokens=chunk), whole)
    assert sample_categorical(*(layer[0][:0], *layer[1:]), uniforms[:0]).shape == (0, 4)


def test_autocast_draws_from_the_scores_of_its_dtype():
    states, weight, bias = make_layer(301, 200, dtype=torch.float32)
    uniforms = torch.rand(200, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = sample_categorical(states, weight, bias, uniforms)
        ones = torch.ones(200, 1)
        scores = torch.mm(torch.cat([states, ones], 1), torch.cat([weight, bias.unsqueeze(1)], 1).T)
    assert scores.dtype == torch.bfloat16
    probabilities = scores.double().softmax(-1)
    upper = probabilities.cumsum(-1).gather(1, ids)
    assert (uniforms <= upper + 1e-5).all()
    assert (uniforms >= upper - probabilities.gather(1, ids) - 1e-5).all()


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
def test_scores_of_any_size_give_the_same_draws(shift):
    """Also where their exponentials are no numbers of float32."""
    states, weight, _ = make_layer(301, 64, dtype=torch.float32)
    weight, uniforms = weight.bfloat16(), torch.rand(64, 3)
    steps = torch.randint(-3, 3, (301,)).bfloat16()  # so that a shift is exact
    plain = sample_categorical((states * 0).bfloat16(), weight, steps, uniforms)
    assert torch.equal(sample_categorical((states * 0).bfloat16(), weight, steps + shift, uniforms), plain)
    assert len(plain.unique()) > 50


@pytest.mark.parametrize("replacement", [True, False])
def test_scores_that_are_no_numbers_still_give_ids(replacement):
    """As after an overflow in half precision, of which the loss, not an index out of range, has to tell."""
    states, weight, bias = make_layer(301, 9, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        lost = states.to(dtype)
        lost[4] = torch.nan
        ids = sample_categorical(lost, weight.to(dtype), bias, torch.rand(9, 3), replacement=replacement)
        assert ((ids >= 0) & (ids < 301)).all()


def test_bad_settings_are_named():
    layer = make_layer(9, 4)
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        sample_categorical(*layer, torch.rand(4, 2), temperature=0.0)
    with pytest.raises(ValueError, match="rows for 5 tokens, `states` for 4"):
        sample_categorical(*layer, torch.rand(5, 2))
