import numpy as np

from hf_efficient.trainer.length_grouping import ResumableLengthGroupedSampler


def test_length_groups_depend_on_seed_and_epoch():
    lengths = list(np.random.default_rng(0).integers(3, 60, 97))
    sampler = ResumableLengthGroupedSampler(4, lengths, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert sorted(first) == sorted(second) == list(range(97))
    spread = [np.ptp([lengths[i] for i in first[start : start + 4]]) for start in range(0, 96, 4)]
    assert np.mean(spread) < 20
