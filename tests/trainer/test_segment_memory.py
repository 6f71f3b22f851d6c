"""Memory as files of a checkpoint."""

import logging

import pytest
import torch

from hf_efficient.trainer.segment_memory import load_memory, save_memory
from tests.trainer.segment_runs import srupp, text


def rows_of(memory, first, last):
    inputs = tuple(None if tensor is None else tensor[first:last] for tensor in memory.layer_inputs)
    return type(memory)(tuple(state[first:last] for state in memory.cell_states), inputs, memory.mask[first:last])


def test_memory_files(tmp_path, caplog):
    model, tokens = srupp(), text()
    padding = torch.ones(6, 9, dtype=torch.long)
    padding[2, 5:] = 0
    memory = model(tokens[: 6 * 9].view(6, 9), attention_mask=padding, return_memory=True).memory
    template = model(tokens[:2].view(2, 1), return_memory=True).memory
    for process in range(3):
        save_memory(rows_of(memory, 2 * process, 2 * process + 2), tmp_path, process, 3)
    halves = [load_memory(template, tmp_path, 3, process, 2) for process in range(2)]
    for loaded, first in zip(halves, (0, 3), strict=True):
        assert type(loaded) is type(memory)
        expected = rows_of(memory, first, first + 3)
        assert torch.equal(loaded.mask, expected.mask)
        for ours, theirs in zip(loaded.cell_states + loaded.layer_inputs, expected[0] + expected[1], strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="memory of 6 columns of text, but here are 8"):
        load_memory(template, tmp_path, 4, 0, 2)
    with pytest.raises(ValueError, match="memory of 2 columns of text, but here are 4"):
        load_memory(template, tmp_path, 4, 0, 3)
    (tmp_path / "segment_memory-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="memory of 2 of 3 processes"):
        load_memory(template, tmp_path, 3, 0, 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    with caplog.at_level(logging.WARNING):
        assert load_memory(template, empty, 3, 0, 2) is None
    assert "holds no memory" in caplog.text
