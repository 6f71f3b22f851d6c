"""Faults in the files of models and tokenizers: each is named with its file, and nothing is unpickled."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from hf_efficient.utils.model_files import ModelFileError, file_faults_named, find_fault
from tests.helpers.hostile_files import write_archive, write_pickle
from tests.training.tiny_glue import make_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(folder, max_shard_size=900)
    make_tokenizer(["a film"]).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


def replace(path, content):
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DAMAGE = {
    "config cut off": (lambda f: os.truncate(f / "config.json", 20), r"config\.json is not valid JSON"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\x80\x04\xff"), r"config\.json is not valid JSON"),
    "config a list": (lambda f: replace(f / "config.json", "[1]"), r"config\.json holds a list and no JSON object"),
    "config a folder": (lambda f: replace(f / "config.json", None), r"config\.json is a folder, and should be a file"),
    "config gone": (lambda f: (f / "config.json").unlink(), None),
    "model type foreign": (lambda f: edit_config(f, model_type="resnext9"), r"names the model type 'resnext9'"),
    "model type a list": (lambda f: edit_config(f, model_type=["bert"]), r"names the model type \['bert'\]"),
    "code of its own": (
        lambda f: edit_config(f, model_type="mine", auto_map={"AutoConfig": "x.X"}),
        r"Code that comes with a model is not run here",
    ),
    "field of another type": (lambda f: edit_config(f, hidden_size="x"), r"config\.json cannot be used .*hidden_size"),
    "index cut off": (
        lambda f: os.truncate(f / "model.safetensors.index.json", 30),
        r"model\.safetensors\.index\.json is not valid JSON",
    ),
    "index without a map": (lambda f: replace(f / "model.safetensors.index.json", "{}"), "has no weight_map"),
    "shard gone": (lambda f: first_shard(f).unlink(), r"index\.json names model-00001-of-\d+\.safetensors, which"),
    "shard cut off": (lambda f: os.truncate(first_shard(f), 60), r"model-00001.* is damaged, or no safetensors file"),
    "shard empty": (lambda f: os.truncate(first_shard(f), 0), r"model-00001.* is damaged, or no safetensors file"),
    "shard a pickle": (lambda f: write_pickle(first_shard(f), f / "ran"), r"model-00001.* is a pickle under"),
    "shard an archive": (lambda f: write_archive(first_shard(f), f / "ran"), r"model-00001.* is a pickle under"),
    "tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 50), r"tokenizer\.json is not valid JSON"),
    "tokenizer of nonsense": (lambda f: replace(f / "tokenizer.json", '{"a": 1}'), r"tokenizer\.json cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_fault_is_named_with_its_file(folder, damage):
    assert find_fault(folder) is None
    spoil, message = DAMAGE[damage]
    spoil(folder)
    if message is None:  # a tokenizer alone is a sound folder, and transformers says by itself what it lacks
        assert find_fault(folder) is None
        return
    with pytest.raises(ModelFileError, match=message) as error, file_faults_named(folder):
        raise KeyError("whatever the reader met")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("write", [write_pickle, write_archive])
def test_pickled_weights_that_would_run_code(tmp_path, folder, write):
    for path in folder.glob("model*"):
        path.unlink()
    write(folder / "pytorch_model.bin", tmp_path / "ran")
    message = r"pytorch_model\.bin .*not unpickled.*save its tensors as \.safetensors"
    with pytest.raises(ModelFileError, match=message), file_faults_named(folder):
        AutoModel.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_tensors_alone_are_read(folder):
    model = AutoModel.from_pretrained(folder)
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert find_fault(folder) is None
    loaded = AutoModel.from_pretrained(folder)
    assert torch.equal(loaded.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


def test_a_folder_of_runs_names_the_newest_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "sst2" / "model")
    message = find_fault(tmp_path / "run")
    assert f"{tmp_path / 'run'} has no config.json. The model in it is {tmp_path / 'run' / 'sst2' / 'model'}" in message
    shutil.copytree(folder, tmp_path / "run" / "checkpoint-7")
    assert "Of the 2 models in it the newest is" in find_fault(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "Give the folder that save_pretrained or Trainer wrote." in find_fault(tmp_path / "empty")
    assert "is a file: give the folder" in find_fault(first_shard(folder))
    assert find_fault(folder / "config.json") is None
    os.truncate(folder / "config.json", 9)
    assert "config.json is not valid JSON" in find_fault(folder / "config.json")
    assert find_fault("google/bert-on-the-hub") is None


def test_errors_that_no_file_explains_pass(folder):
    with pytest.raises(KeyError, match="another matter"), file_faults_named(folder):
        raise KeyError("another matter")


@pytest.mark.parametrize("name", ["nofolder", "no/such/folder", "./nofolder"])
def test_a_folder_that_does_not_exist_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match=f"There is no folder '{name}', and the Hub"), file_faults_named(name):
        AutoModel.from_pretrained(name, local_files_only=True)
    with pytest.raises(KeyError, match="another matter"), file_faults_named(name):
        raise KeyError("another matter")


@pytest.mark.parametrize(("size", "message"), [(0, "is empty"), (30, "is damaged or cut off")])
def test_pickled_weights_that_are_cut_off(folder, size, message):
    model = AutoModel.from_pretrained(folder)
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", size)
    assert f"pytorch_model.bin {message}" in find_fault(folder)
