"""The benchmark of what hashing sees: the keys it compares with, decoding beside a forward pass, and a short run."""

import json

import pytest
import torch

from training.benchmarks import lsh_quality as quality


LENGTH = 70


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 4)
    torch.manual_seed(0)
    return quality.build(LENGTH).double().eval()


def make_batch():
    ids = torch.randint(256, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def test_near_keys_are_those_of_the_own_chunk_and_of_those_before(monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 2)
    assert quality.neighbours(5, 2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_decoding_with_all_keys_equals_the_forward_pass(model):
    found = quality.distance_of_decoding(model, make_batch()["input_ids"], 13)
    assert found["divergence"] == pytest.approx(0, abs=1e-9)
    assert found["differs"] == 0
    assert found["bits_decode"] == pytest.approx(found["bits_forward"], abs=1e-9)


def test_decoding_by_hashes_differs_from_the_forward_pass(model):
    with quality.hashing(model):
        found = quality.distance_of_decoding(model, make_batch()["input_ids"], 13)
    assert found["divergence"] > 1e-9
    assert found["bits_decode"] != pytest.approx(found["bits_forward"], abs=1e-9)


def test_rounds_that_reach_all_keys_lose_nothing(model):
    """Where the chunk is as long as the text, hashing and near keys are attention to all keys."""
    full = quality.score(model, [make_batch()])
    with quality.near_only(model, LENGTH):
        assert quality.score(model, [make_batch()]) == pytest.approx(full, abs=1e-12)
    with quality.near_only(model, 1):
        assert quality.score(model, [make_batch()]) != pytest.approx(full, abs=1e-9)


def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "split", lambda data: (data[:9000], data[9000:]))
    monkeypatch.setattr(quality, "DECODED", 13)
    monkeypatch.setattr(quality, "CHUNK", 8)
    small = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_decoder_layers": 2}
    monkeypatch.setattr(quality, "SIZES", small)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and so it was. " * 800)
    options = ["--text", str(text), "--output_dir", str(tmp_path / "run"), "--result", str(tmp_path / "found.json")]
    options += ["--steps", "20", "--evaluations", "1", "--length", "150", "--eval_bytes", "2500"]
    quality.main(["train", *options])
    quality.main(["measure", *options])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["rounds"] for row in found["rows"]] == list(quality.ROUNDS)
    shares = [row["seen"] for row in found["rows"]]
    assert 0 < shares[0] < shares[-1] <= 1
    assert found["decoding_with_all_keys"]["divergence"] < 1e-6
    assert set(found["tuned"]) == {"lsh", "near"}
    assert len(found["table"]["rows"]) == len(quality.ROUNDS)
    assert "neighbouring chunks" in found["headline"]
    assert "8 rounds" in capsys.readouterr().out


def test_measuring_needs_a_trained_model(tmp_path):
    with pytest.raises(SystemExit, match="use `train` first"):
        quality.main(["measure", "--text", "missing.txt", "--output_dir", str(tmp_path)])
