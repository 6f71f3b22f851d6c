"""Uniform numbers that belong to a row: against plain integers of Python, and their distribution."""

import pytest
import torch

from hf_efficient.ops.counter_rng import counter_based_uniforms


WORD = (1 << 64) - 1


def splitmix(bits):
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & WORD
    return bits ^ (bits >> 31)


def expected(seed, position, draw, stream, bits):
    golden = 0x9E3779B97F4A7C15
    start = splitmix((splitmix((seed + golden) & WORD) + (stream + 1) * 0xD1342543DE82EF95) & WORD)
    return (splitmix((start + ((position << 32) + draw + 1) * golden) & WORD) >> (64 - bits)) / 2**bits


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 53), (torch.float32, 24)])
def test_numbers_are_those_of_unsigned_arithmetic(dtype, bits):
    seeds = [0, 1, 2**63 - 1, -5, 123456789123456789]
    found = counter_based_uniforms(torch.tensor(seeds), 3, 2, stream=7, dtype=dtype)
    assert found.dtype == dtype
    assert found.tolist() == [
        [[expected(seed & WORD, place, draw, 7, bits) for draw in range(2)] for place in range(3)] for seed in seeds
    ]


def test_numbers_do_not_depend_on_batch_padding_or_count():
    seeds = torch.randint(2**62, (5,))
    whole = counter_based_uniforms(seeds, 9, 4, stream=0)
    assert torch.equal(counter_based_uniforms(seeds[3:], 6, 4, stream=0), whole[3:, :6])
    assert torch.equal(counter_based_uniforms(seeds, 9, 2, stream=0), whole[..., :2])
    assert counter_based_uniforms(seeds[:0], 9, 4, stream=0).shape == (0, 9, 4)


def test_numbers_are_uniform_and_independent():
    seeds = torch.arange(400)  # neighbouring seeds are the hardest
    numbers = torch.stack([counter_based_uniforms(seeds, 31, 3, stream=stream) for stream in range(4)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    share = numbers.numel() / 20
    assert ((counts - share) ** 2 / share).sum() < 43.8  # chi-square with 19 degrees of freedom, 0.1 %
    assert numbers.unique().numel() == numbers.numel()
    centred = numbers - 0.5
    for axis in range(4):  # stream, row, position, draw
        near, far = centred.narrow(axis, 0, centred.shape[axis] - 1), centred.narrow(axis, 1, centred.shape[axis] - 1)
        assert (12 * near * far).mean().abs() < 4 / near.numel() ** 0.5


def test_unfit_seeds_are_refused():
    with pytest.raises(ValueError, match="int64 of shape"):
        counter_based_uniforms(torch.zeros(3), 2, 1, stream=0)
    with pytest.raises(ValueError, match=r"float32 or torch\.float64"):
        counter_based_uniforms(torch.arange(3), 2, 1, stream=0, dtype=torch.float16)
