"""The benchmarks of decoding by encoder-decoders at tiny sizes: what they count, compose and report."""

import json

import pytest
import torch

from training.benchmarks import seq2seq_decode, seq2seq_limits


TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_decoder_layers": 1,
    "vocab_size": 320,
}


def test_bytes_of_a_dense_decoder():
    """Of a dense layer all maps but the two of the source; of the embeddings a row; the output layer."""
    decoder = seq2seq_decode.Decoder(seq2seq_decode.DENSE, **TINY)
    decoder.step()
    width, units = TINY["hidden_size"], TINY["intermediate_size"]
    weights = 6 * width**2 + 2 * units * width + TINY["vocab_size"] * width
    read = decoder.bytes_read() / 4
    assert weights < read < weights + 30 * width + units + TINY["vocab_size"] + 4 * width


def test_goals_stand_beside_what_was_measured():
    entries = [
        {"model": name, "bytes": 100, "seconds": seconds, "share_of_bandwidth": 0.5, "times_faster": 6 / seconds,
         "goal": goal}
        for (name, goal), seconds in zip(seq2seq_decode.MODELS.items(), (6.0, 2.0, 1.5, 1.0), strict=True)
    ]  # fmt: skip
    found = seq2seq_decode.report(entries)
    assert [figure["value"] for figure in found["summary"]] == [3.0, 4.0, 6.0]
    assert [figure["goal"] for figure in found["summary"]] == ["at least 3", "at least 6", "at least 6"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_tiny_limits_run_and_are_reported(tmp_path, one_thread):
    path = tmp_path / "limits.json"
    for race in ("wide-bf16", "wide-int8", "long"):
        seq2seq_limits.main([race, "--tiny", "--repeats", "2", "--result", str(path)])
    found = json.loads(path.read_text())
    assert list(found["races"]) == ["wide-bf16", "wide-int8", "long"]
    for entry in found["races"]["wide-int8"]["entries"]:
        layers, rest = entry["of_layers"], entry["rest"]
        assert entry["composed"] == pytest.approx(6 * layers + rest)
    assert [figure["goal"] for figure in found["summary"]] == [*("at least 37", None, "below 100") * 2, "at most 0.4"]
    full, hashed = found["races"]["long"]["entries"]
    assert 1 < hashed["cache_bytes"] / full["cache_bytes"] < 1.2  # digits of buckets behind the keys
