"""The speed of SRU++ against GPT-2: where results go."""

import pytest

from training.benchmarks import environment, lm_speed


@pytest.mark.parametrize(
    ("flags", "limit", "name"),
    [
        (["avx2", "avx512f"], None, "lm_speed_kernel_avx512.json"),
        (["avx2", "avx512f"], "avx2", "lm_speed_kernel_avx2.json"),
        (["avx2"], None, "lm_speed_kernel_avx2.json"),
        (["avx2"], "avx2", "lm_speed_kernel_avx2.json"),
    ],
)
def test_each_instruction_set_has_a_result_of_its_own(monkeypatch, flags, limit, name):
    monkeypatch.setattr(environment, "instructions", lambda: flags)
    for variable in environment.LIMITS:
        monkeypatch.delenv(variable, raising=False)
    if limit is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
    assert lm_speed.default_result("cpu") == environment.RESULTS / name
    assert lm_speed.default_result("reference") == environment.RESULTS / "lm_speed.json"
    assert (environment.RESULTS / name).is_file()
