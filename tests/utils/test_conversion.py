"""Files of the original programs: every kind is read, and nothing in them is run."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from hf_efficient.utils.conversion import load_original


WEIGHTS = {"layers.0.weight": torch.arange(15.0).view(3, 5), "bias": torch.ones(1)}
ARGUMENTS = argparse.Namespace(arch="tupe_base", encoder_layers=2, rel_pos=True)


class Payload:
    """Unpickling one makes the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "beside-the-weights"])
def test_a_file_that_would_run_code_is_refused(tmp_path, inside):
    payload = Payload(tmp_path / "was_run")
    torch.save({"model": WEIGHTS, "args": payload} if inside else payload, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="could not be read without running code from it"):
        load_original(tmp_path / "checkpoint.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="could not be read without running code from it"):
        load_original(tmp_path / "plain.pt")
    assert not (tmp_path / "was_run").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "was_run").exists()  # the file is as bad as it should be


def test_files_without_weights_are_refused(tmp_path):
    for name, content in {"list": [1, 2], "numbers": {"model": {"a": 1}}, "inner": {"model": [1]}, "empty": {}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=rf"{name}\.pt holds no state dict"):
            load_original(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        load_original(tmp_path / "nothing.pt")


def test_files_of_every_kind_are_read(tmp_path):
    torch.save({"model": WEIGHTS, "args": ARGUMENTS, "optimizer_history": [{"lr": 0.1}]}, tmp_path / "fairseq.pt")
    torch.save({"model": WEIGHTS, "step": 3}, tmp_path / "entry.pt")
    torch.save(WEIGHTS, tmp_path / "bare.bin")
    torch.save({f"module.{name}": tensor for name, tensor in WEIGHTS.items()}, tmp_path / "parallel.pt")
    save_file(WEIGHTS, tmp_path / "safe.safetensors")
    for path in tmp_path.iterdir():
        state_dict, told = load_original(path)
        assert state_dict.keys() == WEIGHTS.keys(), path.name
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in WEIGHTS.items())
        assert told == (vars(ARGUMENTS) if path.name == "fairseq.pt" else {})
