"""The benchmark of a GPT-2 made sparse, on a tiny one: best units, its table and its picture."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efficient import from_gpt2, sparsify
from training.benchmarks import sparsify_quality as quality


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return from_gpt2(
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, initializer_range=0.3)).eval()
    )


@pytest.fixture(scope="module")
def text():
    return torch.randint(256, (900,), generator=torch.Generator().manual_seed(1)).to(torch.uint8).numpy()


def test_the_model_is_of_five_million_parameters():
    assert quality.build_gpt2(128).num_parameters() == pytest.approx(4.84e6, rel=0.01)


def test_best_units_are_those_of_the_dense_rows(dense, text):
    """Written out: the winner leaves the least of its block by the dense rows, and is put out by the fitted ones."""
    sparse = sparsify(dense, torch.from_numpy(text).long(), 4, 5, epochs=1, length=8, progress=False)
    rows = quality.rows_as_trained(sparse, dense)
    for layer, own in zip(dense.model.layers, rows, strict=True):
        weight = layer.feed_forward.down_proj.weight.T
        assert sorted(own[:, 0].tolist()) == sorted(weight[:, 0].tolist())
    x = torch.randn(3, 5, 16)
    layer = sparse.model.layers[0].feed_forward.sparse
    plain = layer(x)
    with quality.best_of_each_block(sparse, rows):
        chosen = layer(x)
    assert chosen.shape == x.shape
    assert not torch.allclose(chosen, plain)
    assert torch.equal(layer(x), plain)
    hidden = torch.nn.functional.gelu(x @ layer.up.flatten(0, 1).T + layer.inner_bias.flatten(), approximate="tanh")
    parts = (hidden.unsqueeze(-1) * rows[0]).unflatten(2, (-1, 4))
    winners = (parts.sum(3, keepdim=True) - parts).square().sum(-1).argmin(-1)
    own = (hidden.unsqueeze(-1) * layer.down.flatten(0, 1)).unflatten(2, (-1, 4))
    expected = own.gather(3, winners[..., None, None].expand(*winners.shape, 1, 16)).sum((2, 3)) + layer.bias
    torch.testing.assert_close(chosen, expected)


def test_from_training_to_the_picture(dense, text, tmp_path, monkeypatch, capsys):
    path, folder = tmp_path / "text.bin", tmp_path / "runs"
    path.write_bytes(text.tobytes() * 2)
    monkeypatch.setattr(quality, "split", lambda data: (data[:1400], data[1400:]))
    sizes = {"vocab_size": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    ids = {"bos_token_id": None, "eos_token_id": None}
    monkeypatch.setattr(quality, "build_gpt2", lambda length: GPT2LMHeadModel(GPT2Config(**sizes, **ids)))
    common = ["--text", str(path), "--length", "8", "--batch_size", "2", "--no-bf16", "--eval_bytes", "150"]
    where = ["--output_dir", str(folder)]
    with pytest.raises(SystemExit, match="use `train` first"):
        quality.main(["run", *common, *where])
    quality.main(["train", *common, *where, "--steps", "20", "--evaluations", "2", "--slice", "1"])
    run = ["run", *common, *where, "--block_sizes", "4", "--rank", "3", "--fit_tokens", "300"]
    quality.main(run)
    capsys.readouterr()
    quality.main(run)  # finished
    assert not capsys.readouterr().out
    quality.main(["speed", *where, "--tokens", "1", "--repeats", "1"])
    quality.main(["report", *where, "--result", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert [(row["kind"], row["block_size"]) for row in found["models"]] == [("coactivation", 4), ("random", 4)]
    assert "N 4" in found["headline"]
    assert [row["goal"] for row in found["summary"]] == ["below 2.6", None, "at most 1.03", None, None]
    for row in found["models"]:
        for when in ("at_once", "distilled"):
            ratio = row["bits_per_byte"][when]["controller"] / found["dense"]["score"]["bits_per_byte"]
            assert row["of_dense"][when]["controller"] == pytest.approx(ratio)
        assert row["tokens_per_s"] > 0
    assert [row[0] for row in found["table"]["rows"]] == ["dense", 4, 4]
    assert {len(row) for row in found["table"]["rows"]} == {len(found["table"]["columns"])}
    assert (tmp_path / "result.png").stat().st_size > 5000
