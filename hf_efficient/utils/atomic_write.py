"""Files and folders that appear whole or not at all."""

import errno
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

# Of the system: the disk, the user's share of it, or what one file may have is used up. Of safetensors and torch: text.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIGNS_OF_A_FULL_DISK = ("No space left on device", "File too large", "PytorchStreamWriter failed writing")


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    if os.name != "posix" and path.is_dir():  # Windows can't open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """
    Let a disk that is full end in an error that names the folder.

    The operating system names no file when a write fails, and torch and safetensors raise errors of their own.

    Raises:
        OSError: `ENOSPC`, with the folder as its file name.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in _FULL or any(sign in str(error) for sign in _SIGNS_OF_A_FULL_DISK):
            reason = (
                "No space left to write (free some, or choose a folder on another disk; nothing half-written stays)"
            )
            raise OSError(errno.ENOSPC, reason, str(folder)) from error
        raise


def write_files(folder: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """
    Let `write(staging_folder)` make files, and move each one into `folder` only when all are complete.

    Files of other names in `folder` stay as they are.
    """
    target = Path(folder)
    staged = target / STAGING_NAME / "files"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with full_disk_named(target):
            staged.mkdir(parents=True)
            write(str(staged))
            for path in sorted(path for path in staged.rglob("*") if path.is_file()):
                fsync(path)
                final = target / path.relative_to(staged)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, final)
    finally:
        shutil.rmtree(staged.parent, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name when the block ends well, and is removed when it fails."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: remove it, or name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        with full_disk_named(folder):
            yield staging
            staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
