"""Fetching transformers' own tests: complete or not at all, once, and told clearly when it fails."""

import io
import tarfile

import pytest


RELEASE = "1.2.3"


def make_archive(folder, names):
    path = folder / f"transformers-{RELEASE}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"transformers-{RELEASE}/{name}")
            content = f"NAME = {name!r}".encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def distribution(fetch_module, monkeypatch, tmp_path):
    """Stands for PyPI: hands out an archive with the files that a test names, and counts the downloads."""

    def offer(names):
        archive, calls = make_archive(tmp_path, names), []
        monkeypatch.setattr(fetch_module, "_download", lambda release, folder: calls.append(release) or archive)
        return calls

    return offer


def test_takes_the_tests_alone_and_downloads_once(fetch_module, distribution, tmp_path):
    names = [f"tests/{name}" for name in fetch_module.NEEDED]
    downloads = distribution([*names, "tests/generation/test_utils.py", "src/transformers/__init__.py", "setup.py"])
    folder = fetch_module.fetch(RELEASE, tmp_path / "cache")
    package = folder / fetch_module.PACKAGE
    expected = {"__init__.py", *fetch_module.NEEDED, "generation/test_utils.py"}
    assert {str(path.relative_to(package)) for path in package.rglob("*.py")} == expected
    assert fetch_module.fetch(RELEASE, tmp_path / "cache") == folder
    assert downloads == [RELEASE]


def test_a_distribution_without_the_tests_leaves_nothing_behind(fetch_module, distribution, tmp_path):
    distribution(["src/transformers/__init__.py", "tests/test_modeling_common.py"])
    with pytest.raises(RuntimeError, match=rf"transformers {RELEASE} has no tests/test_configuration_common.py"):
        fetch_module.fetch(RELEASE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(fetch_module, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(RuntimeError, match="need the network the first time"):
        fetch_module.fetch(RELEASE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
