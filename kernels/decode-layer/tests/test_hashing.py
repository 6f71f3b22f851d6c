"""Attention by hashing in the op `layers`, against keys chosen one by one in float64, with nothing but torch."""

import math
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the `kernels` library is imported

import pytest
import torch
from kernel_testing.loading import load_for_tests


kernel = load_for_tests(Path(__file__).resolve().parents[1], "cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, HEADS, ROUNDS = 2, 3, 2
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def buckets_of(vectors, rotations, factors):
    """Of one vector, a round each: the place of the maximum of [x R, -x R], the first factor's counting least."""
    found = []
    for rotated in (vectors.double() @ rotations.double().flatten(1)).view(rotations.shape[1], -1):
        bucket, stride = 0, 1
        for factor, part in zip(factors, rotated.split([factor // 2 for factor in factors]), strict=True):
            bucket += stride * int(torch.cat([part, -part]).argmax())
            stride *= factor
        found.append(bucket)
    return torch.tensor(found)


def with_digits(keys, buckets, tokens, hashes):
    """Keys `(rows, heads, slots, size)` with what stands behind them; rows that hash as a list."""
    digits = torch.cat([buckets // 256, buckets % 256], dim=2).transpose(2, 3)
    flags = torch.stack([tokens.float(), torch.tensor(hashes).float()[:, None].expand(tokens.shape)], -1)
    return torch.cat([keys, digits, flags[:, None].expand(-1, HEADS, -1, -1)], -1)


def room(held, places):
    """Room that holds nothing to be read behind what is filled."""
    empty = float("nan") if held.is_floating_point() else 0
    tensor = torch.full((*held.shape[:2], places, held.shape[3]), empty, dtype=held.dtype)
    tensor[:, :, : held.shape[2]] = held
    return tensor


class HashedAttention:
    """A dense attention that hashes, over a source with padding in front, if there is one, and `filled` tokens."""

    def __init__(
        self, filled, source=None, size=5, places=9, factors=(4, 6), dtype=torch.float32, shares=False,
        hashes=(True, True), source_rows=ROWS,
    ):  # fmt: skip
        self.width, self.size, self.places, self.factors = HEADS * size, size, places, factors
        self.shares, self.filled, self.hashes, self.dtype = shares, filled, hashes, dtype
        self.rotations = torch.randn(size, ROUNDS, sum(factors) // 2)
        self.norm = [*torch.randn(2, self.width)]
        self.matrices = [torch.randn(self.width, self.width) / math.sqrt(self.width) for _ in range(3 if shares else 4)]
        self.weights = [self.rotations, *self.norm, *self.matrices]
        self.source, self.source_buckets = (None, None) if source is None else self.make_part(source, source_rows, 0.2)
        self.held, self.held_buckets = self.make_part(filled, ROWS, 0.0 if source else 0.2)
        self.rooms = [room(held, filled + 2) for held in self.held]
        self.buckets = room(self.held_buckets.transpose(2, 3), filled + 2).transpose(2, 3).contiguous()
        kinds = [1, 0, 1, 1] if shares else [1, 1, 1, 1]
        hashing = [ROUNDS, places, len(factors), *factors]
        settings = [*hashing, HEADS, 1, 0, 0, 0, *kinds]
        self.settings = [4 if source is None else 5, len(self.weights), len(settings), *settings]

    def make_part(self, slots, rows, padding):
        keys, values = torch.randn(2, rows, HEADS, slots, self.size)
        keys = keys.to(self.dtype).float()
        tokens = torch.rand(rows, slots) >= padding
        tokens[:, 1:2] = True
        buckets = torch.zeros(rows, HEADS, ROUNDS, slots, dtype=torch.int64)
        for row, head, slot in torch.cartesian_prod(*map(torch.arange, (rows, HEADS, slots))).tolist():
            buckets[row, head, :, slot] = buckets_of(keys[row, head, slot], self.rotations, self.factors)
        stored = with_digits(keys, buckets, tokens, self.hashes[:rows])
        buckets = buckets.masked_fill(~tokens[:, None, None], -1)
        return [stored.to(self.dtype), values.to(self.dtype)], buckets.short()

    def call(self, hidden, mask=None):
        source = [] if self.source is None else [self.source]
        kernel.layers(
            hidden, [self.rooms[0]], [self.rooms[1]], [], mask, self.weights, self.settings, [1e-5], [self.filled],
            None, [keys for keys, _ in source], [values for _, values in source], None, [self.buckets],
            [] if self.source is None else [self.source_buckets],
        )  # fmt: skip

    def chosen(self, buckets, own):
        """Slots of one head by the rule: those that share a bucket first, then the latest; padding never."""
        slots = [slot for slot in range(buckets.shape[1]) if buckets[0, slot] >= 0]
        slots.sort(key=lambda slot: (bool((buckets[:, slot] == own).any()), slot), reverse=True)
        return slots[: self.places]

    def expected(self, hidden, mask=None):
        x = torch.nn.functional.layer_norm(hidden.double(), (self.width,), *(one.double() for one in self.norm), 1e-5)
        query, *key, value = (x @ one.double().mT for one in self.matrices[:-1])
        query_key = (query if self.shares else (query + key[0]) / 2).view(ROWS, HEADS, self.size)
        value, out = value.view(ROWS, HEADS, self.size), torch.zeros(ROWS, HEADS, self.size).double()
        parts = [] if self.source is None else [(*self.source, self.source_buckets)]
        parts.append((*self.held, self.held_buckets))
        for row in range(ROWS):
            for head in range(HEADS):
                keys, values, buckets = (
                    torch.cat([part[place].expand(ROWS, *part[place].shape[1:])[row, head] for part in parts], axis)
                    for place, axis in enumerate((0, 0, 1))
                )
                own = query_key[row, head].to(self.dtype).double()
                keys = torch.cat([keys[:, : self.size].double(), own[None]])
                values = torch.cat([values.double(), value[row, head].to(self.dtype).double()[None]])
                scores = keys @ query_key[row, head] / math.sqrt(self.size)
                if self.hashes[row]:
                    hashed = buckets_of(query_key[row, head], self.rotations, self.factors)
                    seen = [*self.chosen(buckets.long(), hashed), len(keys) - 1]
                    scores = scores / (keys.square().mean(-1) + 1e-6).sqrt()
                    scores[-1] -= 1e5
                    scores, values = scores[seen], values[seen]
                elif mask is not None:
                    scores = scores + mask[row].double()
                out[row, head] = scores.softmax(-1) @ values
        return hidden.double() + out.flatten(1) @ self.matrices[-1].double().mT


def assert_near(found, expected, tolerance=5e-5):
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("shares", [False, True], ids=["two-maps", "one-map"])
@pytest.mark.parametrize("source", [None, 1, 64, 130])
@every_dtype
def test_keys_that_share_a_bucket_and_the_latest(dtype, source, shares):
    for filled in (2, 63, 70):
        part = HashedAttention(filled, source, dtype=dtype, shares=shares)
        hidden = torch.randn(ROWS, part.width)
        expected = part.expected(hidden)
        kept = [tensor.clone() for tensor in part.source or ()]
        part.call(hidden)
        assert_near(hidden, expected, 5e-5 if dtype == torch.float32 else 2e-2)
        assert all(map(torch.equal, part.source or (), kept))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("size", [4, 16, 33, 70])
@pytest.mark.parametrize("places", [1, 30, 500])
def test_sizes_of_heads_and_numbers_of_places(size, places):
    """Fewer places than keys that share a bucket, more than there are keys, and heads of more than a register."""
    part = HashedAttention(20, 100, size=size, places=places, factors=(2,))
    hidden = torch.randn(ROWS, part.width)
    expected = part.expected(hidden)
    part.call(hidden)
    assert_near(hidden, expected)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("masked", [False, True], ids=["all-seen", "masked"])
@pytest.mark.parametrize("hashes", [(True, False), (False, False)], ids=["one-row", "no-row"])
def test_rows_that_do_not_hash_see_all_keys(hashes, masked):
    part = HashedAttention(20, 70, hashes=hashes)
    hidden, mask = torch.randn(ROWS, part.width), None
    if masked:
        mask = torch.randn(ROWS, 91).masked_fill(torch.rand(ROWS, 91) < 0.3, -torch.inf)
        mask[:, -1] = 0.0
    expected = part.expected(hidden, mask)
    part.call(hidden, mask)
    assert_near(hidden, expected)


@pytest.mark.kernels_ci
def test_this_token_is_written_with_its_buckets():
    part = HashedAttention(7, 20, factors=(32, 16))
    hidden = torch.randn(ROWS, part.width)
    part.call(hidden)
    key, buckets = part.rooms[0][:, :, 7], part.buckets[..., 7].long()
    for row in range(ROWS):
        for head in range(HEADS):
            expected = buckets_of(key[row, head, : part.size], part.rotations, part.factors)
            assert torch.equal(buckets[row, head], expected)
    digits = key[..., part.size : -2].long()
    assert torch.equal(digits[..., :ROUNDS] * 256 + digits[..., ROUNDS:], buckets)
    assert buckets.max() > 256
    assert torch.equal(key[..., -2:], torch.ones(ROWS, HEADS, 2))
    assert part.rooms[0][:, :, 8].isnan().all()


@pytest.mark.kernels_ci
def test_a_source_may_serve_all_rows():
    part = HashedAttention(3, 50, source_rows=1)
    hidden = torch.randn(ROWS, part.width)
    expected = part.expected(hidden)
    part.call(hidden)
    assert_near(hidden, expected)


@pytest.mark.kernels_ci
def test_padding_may_hold_anything():
    part = HashedAttention(9, 40)
    for row, slot in (part.source_buckets[:, 0, 0] < 0).nonzero().tolist():
        part.source[0][row, :, slot, : part.size] = torch.nan
        part.source[1][row, :, slot] = torch.nan
    hidden = torch.randn(ROWS, part.width)
    part.call(hidden)
    assert hidden.isfinite().all()


def change(name, value):
    return lambda part: setattr(part, name, value)


def change_setting(place, value):
    return lambda part: part.settings.__setitem__(3 + place, value)


REFUSED = {
    "rounds": (change_setting(0, 3), "rotations must be float32 of shape .head size, 3, 5."),
    "places": (change_setting(1, 0), "Rounds, places and factors must be there"),
    "no-factors": (change_setting(2, 0), "Rounds, places and factors must be there"),
    "odd-factor": (change_setting(3, 5), "Factors must be even"),
    "many-buckets": (change_setting(3, 8192), "their product at most 32768"),
    "buckets-dtype": (lambda part: setattr(part, "buckets", part.buckets.int()), "buckets must be int16"),
    "buckets-room": (lambda part: setattr(part, "buckets", part.buckets[..., :4]), "buckets must be int16 of shape"),
    "source-buckets": (change("source_buckets", torch.zeros(2, 3, 2, 5).short()), "buckets of a source must be int16"),
    "rotations-size": (
        lambda part: part.weights.__setitem__(0, torch.zeros(6, 2, 5)),
        "rotations must be of vectors of 5 numbers, not 6",
    ),
    "key-size": (lambda part: part.rooms.__setitem__(0, part.rooms[0][..., :-1].contiguous()), "keys must have shape"),
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_changes_nothing(spoil, message):
    part = HashedAttention(4, 6)
    spoil(part)
    hidden = torch.randn(ROWS, part.width)
    before = hidden.clone()
    with pytest.raises(RuntimeError, match=message):
        part.call(hidden)
    assert torch.equal(hidden, before)


@pytest.mark.kernels_ci
def test_a_first_token_is_refused():
    part = HashedAttention(0)
    with pytest.raises(RuntimeError, match="begins behind a token"):
        part.call(torch.randn(ROWS, part.width))
