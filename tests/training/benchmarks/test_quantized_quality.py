"""The benchmark of quality in 8 and 4 bits: what it measures of a trained run, and what it sums up."""

import json

import pytest
import torch

from training.benchmarks import quantized_quality as quality
from training.benchmarks.sparse_quality import build


def test_the_summary_takes_the_worst_seed_and_layer():
    runs = [
        {
            "kind": "all",
            "float32": 2.0,
            "int8": 2.0 + place / 100,
            "int4": 2.1,
            "changed_winners_int8": [0.01, 0.03 - place / 100],
            "changed_winners_int4": [0.2],
        }
        for place in range(2)
    ]
    runs.append(
        {"kind": "dense", "float32": 2.0, "int8": 2.0, "int4": 2.2}
        | {f"changed_winners_{k}": [] for k in ("int8", "int4")}
    )
    values = {row["name"]: (row["value"], row["goal"]) for row in quality.summary_of(runs)}
    sparse = "sparse FF, QKV and loss"
    assert values[f"bits per byte, {sparse}, int8 / float32 (worst seed)"] == (pytest.approx(1.005), "at most 1.005")
    assert values[f"winners that int8 changes, {sparse} (worst layer)"] == (0.03, None)
    assert values["bits per byte, dense, int4 / float32 (worst seed)"] == (pytest.approx(1.1), None)
    assert "winners that int8 changes, dense (worst layer)" not in values


def test_pages_show_each_seed_and_the_worst_of_them():
    def run(kind, seed, int8, changed):
        sizes = {"parameters": 4_900_000, "tokens": 4_096_000, "eval_bytes": 60_000}
        winners = {"changed_winners_int8": changed, "changed_winners_int4": [2 * share for share in changed]}
        return {"kind": kind, "seed": seed, **sizes, "float32": 2.0, "int8": int8, "int4": 2.02, **winners}

    runs = [run("all", 1, 2.004, [0.001, 0.05]), run("all", 0, 2.002, [0.002, 0.04]), run("dense", 0, 2.0, [])]
    assert quality.table_of(runs) == {
        "columns": ["bits per byte", "float32", "int8", "int4"],
        "rows": [
            ["dense", "2.000", "2.000", "2.020"],
            ["sparse FF, QKV and loss", "2.000, 2.000", "2.002, 2.004", "2.020, 2.020"],
        ],
    }
    assert quality.headline_of(runs) == (
        "Models of 4.9 M parameters, trained on 4.1 M bytes of text and scored on 60,000 bytes of validation text, 2 "
        "seeds, have at most 0.20% more bits per byte in int8 and 1.00% more bits per byte in int4. At most 0.2% of "
        "the winners change in the first layer, 5.0% in the last (int8). At most 0.4% of the winners change in the "
        "first layer, 10.0% in the last (int4)."
    )


def test_a_run_is_measured_once_and_reported(tmp_path, capsys):
    torch.manual_seed(0)
    runs, output = tmp_path / "runs" / "seed-3", tmp_path / "measured"
    runs.mkdir(parents=True)
    torch.save({"objective": build("all", 5).state_dict()}, runs / "all.pt")
    run = {"kind": "all", "seed": 3, "steps": 1, "tokens": 5, "settings": {"length": 5}}
    for kind in ("all", "dense"):  # the second without a state
        (runs / f"{kind}.json").write_text(json.dumps({**run, "kind": kind}))
    (tmp_path / "text").write_bytes(bytes(range(97, 117)) * 31000)
    arguments = ["--runs", str(tmp_path / "runs"), "--text", str(tmp_path / "text"), "--output_dir", str(output)]
    quality.main(["measure", *arguments, "--eval_bytes", "101"])
    (path,) = output.glob("seed-*/*.json")
    found = json.loads(path.read_text())
    assert found["seed"] == 3
    assert found["parameters"] == build("all", 5).num_parameters()
    assert len(found["changed_winners_int8"]) == len(found["changed_winners_int4"]) == 6
    assert all(found[kind] == pytest.approx(found["float32"], rel=0.05) for kind in ("int8", "int4"))
    written = path.stat().st_mtime_ns
    quality.main(["measure", *arguments])
    assert path.stat().st_mtime_ns == written
    quality.main(["report", "--output_dir", str(output), "--result", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["runs"] == [found]
    assert "winners that int4 changes" in capsys.readouterr().out
