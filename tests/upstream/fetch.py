"""Fetches transformers' own common tests from its source distribution on PyPI; nothing of it is part of this repo.

The distribution ships the modules at the top of its `tests` folder, not the folders below it; `stand_ins.py` says what
takes their place.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "transformers_tests"  # the folder is called `tests` in the distribution, which is this repository's name too
NEEDED = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")


def fetch(release: str | None = None, cache: Path = ROOT / ".upstream") -> Path:
    """
    The folder that holds the common tests of a release, downloaded if it is not there yet.

    Args:
        release (`str`, *optional*): version of transformers; the installed one by default.
        cache (`Path`): where to keep it.

    Returns:
        `Path`: a folder to put on `sys.path`; the tests are the package `transformers_tests` in it.

    Raises:
        RuntimeError: the download failed, or the distribution lacks the tests.
    """
    release = release or version("transformers")
    target = cache / f"transformers-{release}"
    if target.is_dir():  # renamed into place when complete, so it is whole
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        staging = Path(scratch) / "staging"
        _unpack(_download(release, Path(scratch)), staging / PACKAGE, f"transformers-{release}/tests/")
        missing = [name for name in NEEDED if not (staging / PACKAGE / name).is_file()]
        if missing:
            raise RuntimeError(f"The source distribution of transformers {release} has no tests/{missing[0]}.")
        (staging / PACKAGE / "__init__.py").touch()
        os.replace(staging, target)
    return target


def _download(release: str, folder: Path) -> Path:
    """pip compares the file with the hash in PyPI's index, so what it leaves here is complete."""
    print(f"Downloading the source distribution of transformers {release} (about 10 MB)...", flush=True)
    command = [sys.executable, "-m", "pip", "download", f"transformers=={release}", "--dest", str(folder)]
    command += ["--no-deps", "--no-binary", "transformers", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"pip could not download the source distribution of transformers {release}. These tests need the network "
            f"the first time; run again where PyPI can be reached. pip said:\n{done.stderr.strip()}"
        )
    return folder / f"transformers-{release}.tar.gz"


def _unpack(archive: Path, folder: Path, prefix: str) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(prefix):
                member.name = member.name.removeprefix(prefix)
                tar.extract(member, folder, filter="data")
