"""Merging what several runs of the GPU agenda have found, and what cards are told of it."""

import json

import pytest

from training.benchmarks.gpu import report
from training.benchmarks.gpu.context import MissingPrerequisiteError


def run_of(gpu="Card", rehearsal=False, **parts):
    machine = {"gpu": gpu, "processor": "Some processor"}
    return {
        "rehearsal": rehearsal,
        "machine": machine,
        "versions": {},
        "command": "python",
        "commit": "a",
        "parts": parts,
    }


def sparse_case(width, tokens, dense):
    times = {"kernel": 10.0, "torch": 20.0, "dense": dense}
    ratios = {name: dense / times[name] for name in ("kernel", "torch")}
    size = {"width": width, "hidden": 4 * width, "units": 5, "tokens": tokens}
    return {**size, "microseconds": times, "faster_than_dense": ratios}


SPEED = {"cases": [sparse_case(500, 1, 55.0), sparse_case(500, 63, 20.0)]}


def test_a_finished_part_stands_against_one_that_did_not_finish_whichever_came_first():
    done = {"state": "done", "result": {"line": "all"}, "commit": "a"}
    broken = {"state": "timed out", "partial": {"line": "some"}, "commit": "b"}
    for order in ([run_of(x=done), run_of(x=broken)], [run_of(x=broken), run_of(x=done)]):
        assert report.merge(order)["parts"] == {"x": done}
    assert report.merge([run_of(x={**broken, "commit": "a"}), run_of(x=broken)])["parts"] == {"x": broken}
    assert report.merge([run_of(x={"state": "failed", "line": "no"})])["parts"] == {}


@pytest.mark.parametrize(
    "runs", [[], [run_of(), run_of(gpu="Other")], [run_of(rehearsal=True)]], ids=["none", "two", "rehearsal"]
)
def test_what_cannot_be_merged_is_refused(runs):
    with pytest.raises(MissingPrerequisiteError, match="runs of one card"):
        report.merge(runs)


def test_summary_and_headline_of_a_file(tmp_path, capsys):
    parts = {
        "sparse-ff": {"state": "done", "result": {"compared": 174}, "line": "174 cases", "commit": "a"},
        "sparse-speed": {"state": "done", "result": SPEED, "line": "fast", "commit": "b"},
    }
    (tmp_path / "agenda.json").write_text(json.dumps(run_of(**parts)))
    report.main([str(tmp_path / "agenda.json"), "--result", str(tmp_path / "gpu_card.json")])
    assert "sparse-speed" in capsys.readouterr().out
    found = json.loads((tmp_path / "gpu_card.json").read_text())
    assert [(row["value"], row["unit"]) for row in found["summary"]] == [
        (5.5, "times (plain torch 2.75; 10 us)"),
        (2.0, "times (plain torch 1.00; 10 us)"),
    ]
    assert "1 token," in found["summary"][0]["name"]
    assert "63 tokens," in found["summary"][1]["name"]
    assert found["headline"].startswith("On one Card, the sparse feed-forward is right in 174 cases")
    assert "5.5 at width 500" in found["headline"]
    assert found["commit"] == "a, b"


def test_rows_of_a_part_that_did_not_finish_say_so_and_nothing_is_said_in_front():
    broken = {"state": "timed out", "partial": SPEED, "line": "late", "commit": "a"}
    found = report.summarise({"sparse-speed": broken})
    assert all(row["name"].endswith("(a part that did not finish)") for row in found)
    assert report.headline("Card", {"sparse-speed": broken}) is None
