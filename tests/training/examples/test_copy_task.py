"""The example in which a small Terraformer learns to copy, for a few steps."""

import json

import pytest
import torch

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.modules.lsh_layers import LshAttention
from training.examples import copy_task
from training.examples.copy_task import CopySettings, draw_rows, exact_matches, teach


@pytest.mark.parametrize("task", copy_task.ORDERS)
def test_rows(task):
    rows = draw_rows(task, 200, 9, torch.Generator().manual_seed(0), shortest=2)
    lengths = rows["attention_mask"].sum(1)
    assert set(lengths.tolist()) == set(range(2, 10))
    assert set(rows["input_ids"].unique().tolist()) == set(range(12))  # 11 symbols, and padding
    orders = {"copy": list, "reverse": lambda row: row[::-1], "sort": sorted}
    for ids, labels, length in zip(rows["input_ids"], rows["labels"], lengths, strict=True):
        assert labels[:length].tolist() == orders[task](ids[:length].tolist())
        assert set(ids[length:].tolist()) <= {0}
        assert set(labels[length:].tolist()) <= {-100}


def test_a_few_steps_from_the_command_line(capsys):
    copy_task.main(["--steps", "4", "--batch_size", "3", "--length", "5", "--rows", "4"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["exact", "exact_twice_as_long", "keys that a query sees at most"]


def test_results_of_runs_are_gathered(tmp_path):
    path = tmp_path / "found.json"
    common = ["--steps", "2", "--batch_size", "2", "--length", "32", "--rows", "3", "--result", str(path)]
    for options in ([], *[["--lsh", "--full_steps", "1"]] * 2):
        copy_task.main([*common, *options])
    rows = json.loads(path.read_text())["rows"]
    assert [row["lsh"] for row in rows] == [False, True]
    assert [row["keys_seen"] for row in rows] == [{"encoder": 1.0, "decoder": 1.0}, {"encoder": 1.0, "decoder": 0.5}]
    assert all(row["core_s"] > 0 and 0 <= row["exact"] <= 1 for row in rows)


@torch.no_grad()
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_hashed_queries_see_no_more_keys_than_is_said(stack):
    """Values that are the keys' own places show which keys a query sees."""
    config = TerraformerConfig(**copy_task.CONFIG, **{**copy_task.LSH, "lsh_full_length": 0, "lsh_chunk_length": 4})
    length = 32 if stack == "encoder" else 64
    layers = getattr(TerraformerForConditionalGeneration(config).model, stack).layers
    (attention,) = [module for module in layers[0].modules() if isinstance(module, LshAttention)]
    query = torch.randn(2, 4, length, 16)
    places = torch.eye(length).expand(2, 4, -1, -1)
    seen = attention._attend_hashed(query, places, attention._hash(query, None), None) > 0
    most = int(seen.sum(-1).max())
    assert 4 < most <= copy_task.keys_seen(config, 32)[stack] * length


def test_short_rows_are_learned():
    """Of one symbol, which needs no attention to more than one token."""
    settings = CopySettings(length=1, steps=60, batch_size=16, rows=50, config_overrides="max_position_embeddings=1")
    model, found = teach(settings)
    assert found == {"exact": 1.0}
    rows = draw_rows("copy", 8, 1, torch.Generator().manual_seed(1))
    rows["labels"][3] = rows["labels"][3] % copy_task.SYMBOLS + 1  # another one than it writes
    assert exact_matches(model, rows) == pytest.approx(7 / 8)


def test_errors():
    with pytest.raises(ValueError, match="one of copy, reverse, sort"):
        teach(CopySettings(task="add"))
    with pytest.raises(ValueError, match=r"`full_steps` \(500\) leave none of 500 `steps`"):
        teach(CopySettings(lsh=True, steps=500))
