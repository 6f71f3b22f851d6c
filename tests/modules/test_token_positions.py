"""Position vectors by their formulas, the draws of training, and how tokens are numbered."""

import pytest
import torch
from scipy.stats import binomtest

from hf_efficient.modules import token_positions as module
from hf_efficient.modules.token_positions import (
    FixedBasePositions,
    LearnedPositions,
    share_starts,
    sinusoids,
    token_positions,
)
from tests.helpers.comparison import assert_close


def filled(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double().eval()


@pytest.mark.parametrize("width", [1, 2, 5])
def test_sinusoids(width):
    table = sinusoids(7, width).double()
    for place in range(7):
        for column in range(width):
            angle = torch.tensor(place * 10_000 ** (-(column - column % 2) / width), dtype=torch.float64)
            expected = angle.cos() if column % 2 else angle.sin()
            torch.testing.assert_close(table[place, column], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [None, 3])
def test_learned(rank):
    layer = filled(LearnedPositions(9, 4, rank))
    positions = torch.tensor([[0, 8, 3], [1, 1, 0]])
    rows = layer.table[positions]
    assert_close("vectors", layer(positions), rows if rank is None else rows @ layer.projection, 1e-12)


@pytest.mark.parametrize("bases", [[11, 13, 14, 15], [2], [3, 2]])
def test_fixed_bases(bases):
    """Digit by digit, the lowest first."""
    layer = filled(FixedBasePositions(16, bases))
    largest = min(bases) ** 8 - 1
    positions = torch.tensor([[0, 1, 2, 10, 255, largest]]).clamp(max=largest)
    found = layer(positions)
    for place, position in enumerate(positions[0].tolist()):
        expected = layer.start.clone() if position == 0 else torch.zeros(16).double()
        for base, vectors in zip(bases, layer.vectors, strict=True):
            rest, parts = position, []
            for vector in vectors:
                parts.append(rest % base * vector)
                rest //= base
            expected = expected + torch.cat(parts)
        assert_close(f"position {position}", found[0, place], expected, 1e-12)


def test_training_begins_somewhere_once_for_the_batch():
    layer = filled(LearnedPositions(50, 4, max_offset=20, zero_probability=0.25)).train()
    positions, starts = torch.arange(5)[None], []
    for _ in range(800):
        vectors = layer(positions)
        start = int((layer.table - vectors[0, 0]).abs().sum(1).argmin())
        assert_close("one start", vectors[0], layer.table[start : start + 5], 1e-12)
        starts.append(start)
    assert set(starts) == set(range(20))
    assert binomtest(starts.count(0), 800, 0.25 + 0.75 / 20).pvalue > 1e-3
    assert_close("evaluation", layer.eval()(positions)[0], layer.table[:5], 1e-12)


def test_a_random_start_stays_in_the_table():
    layer = filled(LearnedPositions(9, 4, max_offset=8, zero_probability=0.0)).train()
    starts = set()
    for _ in range(100):
        vectors = layer(torch.arange(6)[None])
        starts.add(int((layer.table - vectors[0, 0]).abs().sum(1).argmin()))
    assert starts == {0, 1, 2, 3}


def starts_of(layer, vectors):
    """The place in the table at which each row begins."""
    return [int((layer.table - row[0]).abs().sum(1).argmin()) for row in vectors]


def test_a_target_begins_where_its_source_does():
    """At a random place of each row; at 0 in evaluation, and behind a source that is read in evaluation."""
    source, target = (filled(LearnedPositions(50, 4, None, 0.0, 20, 0.25)).train() for _ in range(2))
    share_starts(source, target)
    found = []
    for _ in range(100):
        starts = starts_of(source, source(torch.arange(5)[None], 8))
        assert starts_of(target, target(torch.arange(7)[None], 8)) == starts
        found += starts
    assert set(found) == set(range(20))
    assert binomtest(found.count(0), 800, 0.25 + 0.75 / 20).pvalue > 1e-3
    with pytest.raises(ValueError, match="8 sources were read for 4 targets"):
        target(torch.arange(7)[None], 4)
    assert starts_of(target.eval(), target(torch.arange(7)[None], 4)) == [0]
    source.eval()(torch.arange(5)[None], 3)
    assert starts_of(target.train(), target(torch.arange(7)[None], 3)) == [0]


def test_shared_starts_stay_in_the_table_row_by_row():
    source, target = (filled(LearnedPositions(9, 4, None, 0.0, 8, 0.0)).train() for _ in range(2))
    share_starts(source, target)
    positions, found = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]), set()
    for _ in range(100):
        starts = starts_of(source, source(positions))
        assert starts_of(target, target(torch.arange(7)[None], 2)) == [min(start, 2) for start in starts]
        found.update(enumerate(starts))
    assert found == {(0, start) for start in range(6)} | {(1, start) for start in range(8)}


def test_a_target_begins_where_a_source_near_the_end_of_the_table_does():
    source, target = (filled(LearnedPositions(64, 4, None, 0.0, 33, 0.0)).train() for _ in range(2))
    share_starts(source, target)
    starts = starts_of(source, source(torch.arange(50)[None], 40))
    assert starts_of(target, target(torch.arange(8)[None], 40)) == starts
    assert max(starts) == 14


@pytest.mark.parametrize("rows", [1, 40])
def test_fixed_bases_draw_a_start_for_each_row_of_the_batch(rows):
    layer = filled(FixedBasePositions(16, [11, 13])).train()
    torch.manual_seed(0)
    vectors = layer(torch.arange(3)[None], rows)
    assert vectors.shape == (rows, 3, 16)
    assert len({tuple(row) for row in vectors[:, 0].tolist()}) >= rows / 4


def test_dropout_has_one_mask_over_features():
    layer = filled(LearnedPositions(9, 40, dropout=0.5)).train()
    vectors, table = layer(torch.arange(6).expand(3, -1)), layer.table[:6]
    ratio = (vectors / table).detach()
    assert_close("one mask", ratio, ratio[:1, :1].expand_as(ratio), 1e-12)
    assert set(ratio[0, 0].round(decimals=6).tolist()) == {0.0, 2.0}


def test_rows_of_fixed_bases_begin_for_themselves():
    """Half of them at 0; one in a hundred has no position but the start vector, which stays at the first token."""
    layer = filled(FixedBasePositions(8, [3, 4])).train()
    vectors = layer(torch.arange(3).expand(4000, -1)).detach()
    plain = layer.eval()(torch.arange(3)[None]).detach()
    at_zero = (vectors - plain).abs().amax((1, 2)) < 1e-9
    dropped = (vectors[:, 1:].abs().amax((1, 2)) < 1e-9) & ((vectors[:, 0] - layer.start).abs().amax(1) < 1e-9)
    assert binomtest(int(at_zero.sum()), 4000, 0.495).pvalue > 1e-3
    assert binomtest(int(dropped.sum()), 4000, 0.01).pvalue > 1e-3
    assert len((vectors - layer.start)[:, 0].round(decimals=6).unique(dim=0)) > 500


@pytest.mark.parametrize("length", [255, 256])
def test_a_text_of_all_positions_of_fixed_bases_is_trained(length):
    layer, positions = filled(FixedBasePositions(8, [2])), torch.arange(length).expand(3, -1)
    expected = layer.eval()(positions)
    vectors = layer.train()(positions)
    whole = [(row - one).abs().max() < 1e-9 for row, one in zip(vectors, expected, strict=True)]
    assert vectors.isfinite().all()
    assert any(whole)


def test_positions_out_of_range():
    for layer, count in ((LearnedPositions(9, 4), 9), (FixedBasePositions(8, [2, 3]), 256)):
        layer.init_own_weights()
        assert layer(torch.tensor([[0, count - 1]])).isfinite().all()
        with pytest.raises(ValueError, match=f"reaches position {count}, but .* at {count - 1}: shorten the text"):
            layer(torch.tensor([[0, count]]))
        with pytest.raises(ValueError, match="position_ids hold -2, but positions begin at 0"):
            layer(torch.tensor([[0, -2]]))


def numbered(mask=None, starts=None, real=None, held=0, length=5, batch=2):
    return token_positions(mask, starts, real, held, (batch, length), torch.device("cpu")).tolist()


def test_numbers_of_tokens():
    real = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    starts = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 1]]).bool()
    assert numbered() == [[0, 1, 2, 3, 4]]
    assert numbered(held=7) == [[7, 8, 9, 10, 11]]
    assert numbered(held=torch.tensor(7)) == [[7, 8, 9, 10, 11]]
    assert numbered(mask=real.long(), real=real) == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    whole = torch.cat([torch.tensor([[0, 1], [1, 1]]), real.long()], 1)  # over a past of two
    assert numbered(mask=whole, real=real, held=2) == [[0, 1, 1, 2, 3], [2, 3, 4, 5, 6]]
    assert numbered(real=real, held=3) == [[2, 3, 3, 4, 5], [3, 4, 5, 6, 7]]
    assert numbered(starts=starts) == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]]


def test_the_draws_can_be_injected(monkeypatch):
    """As recorded cases do it."""
    layer = filled(LearnedPositions(50, 4, max_offset=20, zero_probability=0.25)).train()
    monkeypatch.setattr(module, "_integers", lambda bound, shape, like: torch.tensor(7))
    for drawn, start in ((0.2, 0), (0.3, 7)):
        monkeypatch.setattr(module, "_uniform", lambda shape, like, drawn=drawn: torch.tensor(drawn))
        assert_close("start", layer(torch.arange(3)[None])[0], layer.table[start : start + 3], 1e-12)
