"""Files of the original programs: every kind is read, and nothing in them is run."""

import argparse
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from hf_efficient import TupeConfig, TupeModel
from hf_efficient.utils.conversion import Converter, load_original, parse_fields
from hf_efficient.utils.model_files import ModelFileError
from tests.helpers.hostile_files import Payload, write_archive, write_pickle


WEIGHTS = {"layers.0.weight": torch.arange(15.0).view(3, 5), "bias": torch.ones(1)}
ARGUMENTS = argparse.Namespace(arch="tupe_base", encoder_layers=2, rel_pos=True)


@pytest.mark.parametrize("write", [write_pickle, write_archive])
def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path, write):
    write(tmp_path / "checkpoint.safetensors", tmp_path / "was_run")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is a pickle under the name of a safetensors file"):
        load_original(tmp_path / "checkpoint.safetensors")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["folder.pt", "folder.safetensors"])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"is a folder: give the checkpoint file in it"):
        load_original(tmp_path / name)


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


def test_fields_are_json_or_text():
    found = parse_fields(["a=0.5", "b=true", "c=[1, 2]", "d=gelu", "e=null"], "abcde")
    assert found == {"a": 0.5, "b": True, "c": [1, 2], "d": "gelu", "e": None}


@pytest.mark.parametrize("assignment", ["a", "f=1"], ids=["no-value", "no-such-field"])
def test_other_assignments_are_refused(assignment):
    with pytest.raises(ValueError, match=f"--set {assignment}: write NAME=VALUE"):
        parse_fields([assignment], "abcde")


class BrokenModel(TupeModel):
    """A model that is written halfway."""

    def save_pretrained(self, folder, *args, **kwargs):
        super().save_pretrained(folder, *args, **kwargs)
        raise OSError("No space left on device")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = TupeConfig(vocab_size=11, **sizes)
    save_file(WEIGHTS, tmp_path / "original.safetensors")
    for kind in (BrokenModel, TupeModel):
        converter = Converter("A converter.", ["a"], lambda *arguments, kind=kind: kind(config), lambda *arguments: [])
        arguments = ["--checkpoint", str(tmp_path / "original.safetensors"), "--output_dir", str(tmp_path / "out")]
        if kind is BrokenModel:
            with pytest.raises(OSError, match="No space left"):
                converter.run(arguments)
            assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]
        else:
            converter.run(arguments)
            assert TupeModel.from_pretrained(tmp_path / "out").config.hidden_size == 8


def test_an_empty_or_cut_off_file_is_said_to_be_so(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "archive.pt")
    torch.save({"model": WEIGHTS}, tmp_path / "plain.pt", _use_new_zipfile_serialization=False)
    for name in ("archive", "plain"):
        whole = (tmp_path / f"{name}.pt").read_bytes()
        for size in (0, 20, len(whole) // 2, len(whole) - 9):
            (tmp_path / "cut.pt").write_bytes(whole[:size])
            said = "is empty" if size == 0 else r"is damaged or cut off \("
            with pytest.raises(ModelFileError, match=rf"cut\.pt {said}.*Copy or save it again\.$"):
                load_original(tmp_path / "cut.pt")


def fails(*arguments):
    raise ValueError("No such checkpoint.")


def breaks(*arguments):
    raise KeyError("a")


@pytest.mark.parametrize("build", [fails, breaks])
def test_faults_are_told_in_one_line_that_names_the_file(tmp_path, build):
    save_file(WEIGHTS, tmp_path / "original.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "original.safetensors"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'original.safetensors'))}: .*$"):
        Converter("A converter.", ["a"], build, lambda *arguments: []).run(arguments)
    assert not (tmp_path / "out").exists()
