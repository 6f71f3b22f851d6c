"""The benchmark of winners that stay the same: what is compared, and what is written."""

import json

import numpy as np
import pytest
import torch

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.modules.unit_usage import sparse_feed_forwards
from training.benchmarks import equal_winners as benchmark


def build(kind="all", length=9):
    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        vocab_size=256,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=length,
        dropout=0.0,
        ff_sparsity=4,
        ff_rank=3,
    )
    return ScalingTransformerForCausalLM(config)


def test_decoding_and_one_pass_are_compared_token_by_token():
    model, ids = build().double(), torch.randint(256, (2, 9))
    forward, decoded = benchmark.winners(model, ids), benchmark.winners(model, ids, decode=True)
    assert [tuple(layer.shape) for layer in forward] == [(18, 5), (18, 5)]
    assert benchmark.share_of_equal(decoded, forward) == [1.0, 1.0]
    decoded[1][3, 2] += 1
    assert benchmark.share_of_equal(decoded, forward) == [1.0, 1 - 1 / 90]
    assert all(layer.observer is None for layer in sparse_feed_forwards(model).values())


def test_the_result_holds_both_states_and_what_they_are_of(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "build", build)
    monkeypatch.setattr(benchmark, "split", lambda data: (data[:-30], data[-30:]))
    text, result = tmp_path / "text", tmp_path / "result.json"
    text.write_bytes(np.random.default_rng(0).integers(256, size=200, dtype=np.uint8).tobytes())
    options = {"text": text, "result": result, "steps": 2, "length": 9, "rows": 3, "batch_size": 2}
    benchmark.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    found = json.loads(result.read_text())
    assert {"machine", "versions", "commit", "command", "backend"} <= set(found)
    assert found["tokens"] == 27
    assert list(found["shares_by_layer"]) == ["new", "after 2 steps"]
    rows = {row["name"]: row for row in found["summary"]}
    for state, pairs in found["shares_by_layer"].items():
        for pair, shares in pairs.items():
            row = rows.pop(f"equal winners, {pair}, {state}")
            assert row["value"] == pytest.approx(sum(shares) / 2)
            assert row["goal"] == (None if "16" in pair else "1")
    assert not rows
