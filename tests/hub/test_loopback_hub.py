"""The loopback Hub answers the real client as the Hub does: files, trees, ranges, errors by their class."""

import random
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


CARD = "---\npipeline_tag: fill-mask\nlibrary_name: transformers\ntags: [tiny]\n---\n# A card\n"
CHUNK = 1024


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The client may speak to loopback; of a broken download it keeps whole steps of `CHUNK` bytes."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "config.json").write_text('{"a": 1}')
    (source / "README.md").write_text(CARD)
    (source / "sub" / "deep" / "notes.txt").write_text("deep " * 1001)
    (source / "model.safetensors").write_bytes(random.Random(0).randbytes(300_001))
    return source


def test_info_tree_and_files_of_two_commits(hub, folder, tmp_path):
    api, where = HfApi(endpoint=hub.endpoint), {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    first = hub.commit("org/tiny", folder)
    (folder / "config.json").write_text('{"a": 2}')
    second = hub.commit("org/tiny", folder)

    info = api.model_info("org/tiny")
    assert (info.sha, info.pipeline_tag, info.library_name) == (second, "fill-mask", "transformers")
    assert {"config.json", "sub/deep/notes.txt"} < {file.rfilename for file in info.siblings or ()}
    assert api.model_info("org/tiny", revision=first).sha == first

    top = {entry.path: entry for entry in api.list_repo_tree("org/tiny")}
    assert top.keys() == {"README.md", "config.json", "model.safetensors", "sub"}
    assert isinstance(top["model.safetensors"], RepoFile)
    assert top["model.safetensors"].lfs is not None
    assert top["model.safetensors"].size == 300_001
    deep = [entry.path for entry in api.list_repo_tree("org/tiny", "sub", recursive=True)]
    assert deep == ["sub/deep", "sub/deep/notes.txt"]

    here = Path(snapshot_download("org/tiny", **where))
    assert here.name == second
    for path in folder.rglob("*"):
        assert path.is_dir() or (here / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert Path(hf_hub_download("org/tiny", "config.json", revision=first, **where)).read_text() == '{"a": 1}'


def test_errors_have_the_classes_of_the_hub(hub, folder, tmp_path):
    hub.commit("org/tiny", folder)
    api, where = HfApi(endpoint=hub.endpoint), {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/absent")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/absent", "config.json", **where)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/tiny", "config.json", revision="nope", **where)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/tiny", "absent.json", **where)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/tiny", "additional_chat_templates"))
    with pytest.raises(HfHubHTTPError, match="404"):
        api.dataset_info("org/tiny")
    hub.stop()
    with pytest.raises(URLError):  # the client itself would try again for 20 seconds
        urlopen(hub.endpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/deep/notes.txt"])
def test_a_download_that_breaks_off_is_taken_up_by_range(hub, folder, tmp_path, name):
    hub.commit("org/tiny", folder)
    cut = (folder / name).stat().st_size // 2
    hub.break_off(name, after=cut)
    with hub.recording() as requests:
        path = hf_hub_download("org/tiny", name, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / name).read_bytes()
    first, second = (request for request in requests if request.method == "GET")
    assert (first.status, first.range) == (200, None)
    assert second.status == 206
    assert second.range.startswith("bytes=")
    assert cut - CHUNK < int(second.range.removeprefix("bytes=").removesuffix("-")) <= cut
