"""The benchmark of sparse models' quality: equal sizes, what is summed up, and the cost of counting units."""

import json

import pytest

from training.benchmarks import sparse_quality as quality


def test_kinds_are_of_equal_size_and_read_less_and_less():
    models = {kind: quality.build(kind, 128) for kind in quality.KINDS}
    sizes = {kind: model.num_parameters() for kind, model in models.items()}
    assert max(sizes.values()) < 1.02 * min(sizes.values())
    read = [models[kind].weights_read_per_token() / sizes[kind] for kind in ("dense", "qkv", "ff", "all")]
    assert read == sorted(read, reverse=True)
    assert read[0] > 0.98
    assert read[-1] < 0.35


def test_the_summary_takes_the_worst_seed():
    runs = [
        {"kind": kind, "seed": seed, "bits_per_byte": bits, "parameters": 8, "weights_read_per_token": 2, "step_s": 1.0}
        for kind, seed, bits in [
            ("dense", 0, 2.0),
            ("dense", 1, 2.2),
            ("all", 0, 2.06),
            ("all", 1, 2.2),
            ("ff", 5, 1.0),
        ]
    ]
    rows = quality.summary_of(quality.summarise(runs), {"of_a_step": 1.005})
    values = {row["name"]: (row["value"], row["goal"]) for row in rows}
    assert values["bits per byte of all validation, dense"] == (pytest.approx(2.1), "below 2.6")
    ratio = "bits per byte, sparse FF, QKV and loss / dense (worst seed)"
    assert values[ratio] == (pytest.approx(1.03), "at most 1.02")
    assert values["bits per byte, sparse FF / dense (worst seed)"] == (None, "at most 1.02")  # no dense run of its seed
    assert rows[-1]["value"] == 1.005
    assert quality.summary_of({}, None)[-1]["value"] is None


def test_the_cost_of_counting_is_that_of_its_share_of_steps(tmp_path, capsys):
    sizes = ["--batch_size", "1", "--length", "5", "--no-bf16", "--repeats", "2"]
    quality.main(["cost", "--output_dir", str(tmp_path), *sizes])
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["of_a_step"] == pytest.approx(1 + (found["counted_step"] - 1) / found["every"])
    assert {name: len(values) for name, values in found["seconds"].items()} == {"plain": 2, "counted": 2}
    assert f"of one in {found['every']}" in capsys.readouterr().out
