"""The benchmark of whole meetings, on short ones."""

import json

from training.benchmarks import long_summary


def test_a_short_run(tmp_path, monkeypatch, capsys):
    from datasets import Dataset

    monkeypatch.setattr(long_summary, "in_fresh_processes", lambda run, given, repeats: [run(*given)])
    for split in ("train", "validation", "test"):
        documents = [f"A: Number {i}. " + "B: So it is. " * 30 for i in range(4)] + ["Too short."]
        columns = {"document": documents, "summary": [f"They count {i}." for i in range(5)]}
        Dataset.from_dict(columns).to_parquet(tmp_path / f"qmsum-{split}.parquet")
    options = ["--minutes", "0.01", "--source", "70", "--target", "5", "--least_words", "9"]
    options += ["--vocab_size", "260", "--rows", "2"]
    paths = ["--data", str(tmp_path), "--output_dir", str(tmp_path), "--result", str(tmp_path / "found.json")]
    long_summary.main([*options, *paths])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["meetings"]["train"] == 4
    assert found["tokens"] == {"source": 70, "target": 5, "written": 5}
    assert found["loss_after"]["own"] < found["loss_before"]["own"]
    for what in ("step", "summary"):
        assert 0 <= found[what]["growth_bytes"] < found[what]["peak_bytes"] < 8e9
    assert "of 70 tokens" in capsys.readouterr().out
