"""The benchmark of what it costs to make a GPT-2 sparse, on a tiny layer."""

import json
import sys

import pytest

from training.benchmarks import sparsify_cost as cost


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
def test_a_case_is_measured_and_reported(tmp_path, capsys):
    cost.main(["--cases", "8:600:4", "--repeats", "1", "--result", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    (entry,) = found["entries"]
    assert (entry["width"], entry["units"], entry["tokens"], entry["block_size"]) == (8, 32, 600, 4)
    assert 0 < entry["seconds"][0] < 60
    assert 0 <= entry["peak_bytes"][0] < 1e9
    assert found["table"]["rows"][0][:4] == [8, "32", "600", 4]
    assert "seconds a layer" in capsys.readouterr().out


def test_the_page_shows_medians_and_speaks_of_the_last_case():
    entries = [
        {"width": 8, "units": 32, "tokens": 600, "block_size": 4, "seconds": [1.0], "peak_bytes": [1e7]},
        {
            "width": 16,
            "units": 64,
            "tokens": 65_536,
            "block_size": 16,
            "seconds": [3.0, 9.0, 4.0],
            "peak_bytes": [2e9] * 3,
        },
    ]
    found = cost.report(entries)
    assert found["table"]["rows"][1] == [16, "64", "65,536", 16, "4", "2.00"]
    assert "16 wide of 64 units was fitted to 65,536 tokens, with N 16 and rank 64, in 4 s" in found["headline"]
