"""The benchmark of training on long input, at tiny sizes in this process."""

import json

import pytest

from training.benchmarks import long_input
from training.benchmarks.long_input import Case


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(long_input, "in_fresh_processes", lambda run, given, repeats: [run(*given)] * repeats)
    monkeypatch.setattr(long_input, "WIDTH", 64)
    monkeypatch.setattr(long_input, "VOCABULARY", 500)
    monkeypatch.setattr(long_input, "TARGET", 5)


def test_a_short_run(tmp_path, monkeypatch, in_this_process, capsys):
    cases = [Case("reversible", "lsh", 1, 301), Case("checkpointed", "full", 1, 301)]
    monkeypatch.setattr(long_input, "CASES", {"length": cases})
    path = tmp_path / "found.json"
    long_input.main(["--cases", "length", "--repeats", "2", "--result", str(path)])
    found = json.loads(path.read_text())
    assert [(entry["form"], entry["attention"]) for entry in found["entries"]] == [case[:2] for case in cases]
    assert all(len(entry["seconds"]) == 2 and min(entry["seconds"]) > 0 for entry in found["entries"])
    assert "source tokens 301" in capsys.readouterr().out


def test_a_killed_process_is_a_row_without_figures(monkeypatch):
    def killed(*_):
        raise ChildProcessError("killed")

    monkeypatch.setattr(long_input, "in_fresh_processes", killed)
    entry = long_input.measure(Case("reversible", "full", 6, 16384), 1)
    assert entry["peak_bytes"] is None
    assert long_input.report([entry])["table"]["rows"][0][-2:] == ["out of memory", "-"]


def test_goals_compare_growth_with_that_of_checkpointing():
    def entry(form, layers, peak, tokens=8192):
        figures = {"seconds": [1.0], "kept_bytes": [peak], "peak_bytes": [peak]}
        return {**Case(form, "lsh", layers, tokens)._asdict(), **figures}

    entries = [entry("reversible", 6, 100), entry("reversible", 24, 118), entry("checkpointed", 6, 200)]
    assert not long_input.goals(entries), "half of a comparison is none"
    rows = long_input.goals([*entries, entry("checkpointed", 24, 236)])
    assert [(row["name"], row["value"]) for row in rows] == [("growth of the peak a layer, over checkpointing's", 0.5)]


def test_attention_to_all_keys_holds_no_weights(in_this_process):
    """Where weights are dropped, torch holds those of all pairs."""
    assert long_input.build(Case("reversible", "full", 1, 300)).config.attention_dropout == 0
    assert long_input.build(Case("reversible", "lsh", 1, 300)).config.attention_dropout is None
