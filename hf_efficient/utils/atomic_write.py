"""Files and folders that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Trainer's pushes to the Hub leave out what starts with an underscore, and its search for checkpoints
# never looks here.
STAGING_NAME = "_incomplete"


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    if os.name != "posix" and path.is_dir():  # Windows can't open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(folder: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """
    Let `write(staging_folder)` make files, and move each one into `folder` only when all are complete.

    Files of other names in `folder` stay as they are.
    """
    target = Path(folder)
    staged = target / STAGING_NAME / "files"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    write(str(staged))
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        fsync(path)
        final = target / path.relative_to(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, final)
    shutil.rmtree(staged.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name when the block ends well, and is removed when it fails."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: remove it, or name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
