"""The benchmark of training on a stream, on a little text."""

import json
import sys

import pytest

from training.benchmarks import streaming


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm")
def test_a_stream_is_read_and_gone_on_with(tmp_path, monkeypatch):
    texts = [f"document {i} " + "of some words " * (i % 9) for i in range(40)]
    monkeypatch.setattr(streaming, "builtin_corpus", lambda: {"text": texts})
    monkeypatch.setattr(streaming, "SAMPLED", 100)
    streaming.write_text(tmp_path, 1000)
    assert len(list(tmp_path.glob("part-*.txt"))) == streaming.FILES
    found = streaming.drain("bytes", str(tmp_path), None)
    size = sum(path.stat().st_size for path in tmp_path.glob("part-*.txt"))
    assert found["rows"] == len(found["resident_bytes"]) * 100 + found["rows"] % 100
    assert 0 <= size - found["tokens"] <= streaming.SEGMENT + 8
    assert 0 < found["state_bytes"] < 1e5


def test_the_sentence_says_what_was_measured(tmp_path):
    drained = [
        {
            "stream": name,
            "rows": 9,
            "tokens": 4_000_000,
            "seconds": 2.0,
            "resume_seconds": 0.25,
            "state_bytes": 1_000_000,
            "resident_bytes": [400_000_000] * 10 + [410_000_000],
        }
        for name in ("bytes", "blocks")
    ]
    runs = [{"script": name, "equal": name == "pretrain"} for name in ("pretrain", "train_lm")]
    found = streaming.report(10**9, drained, runs, {"stream": [0.004, 0.006], "memory": [0.002, 0.002]})
    assert "1 GB of text were read with 410 MB in memory at most, 400 after a tenth" in found["headline"]
    assert "pretrain gave the same losses to the bit and train_lm NOT" in found["headline"]
    assert "takes 5.0 ms" in found["headline"]
    assert found["stream_to_memory"] == pytest.approx(2.5)
    assert found["table"]["rows"][1] == ["blocks", "4", "2.00", "2", "400", "410", "0.25", "1.00"]


def test_losses_of_all_kinds_are_compared(tmp_path):
    log = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "eval_loss": 3.0}, {"step": 2, "runtime": 1.0}]
    (tmp_path / "history.json").write_text(json.dumps({"log_history": log}))
    assert streaming.losses(tmp_path) == [(1, "loss", 2.0), (1, "grad_norm", 1.0), (2, "eval_loss", 3.0)]
