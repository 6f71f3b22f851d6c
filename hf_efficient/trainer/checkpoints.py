"""Checkpoint folders that are whole or absent: staging, manifest with checksums, renaming, and the check."""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.atomic_write import fsync
from ..utils.model_files import ModelFileError, file_fault


logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
TRAINER_STATE_NAME = "trainer_state.json"
# What reading a forged file raises where the file itself is sound. Subclasses of RuntimeError are other matters,
# such as memory.
_MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_REMEDY = "Resume from another checkpoint, or start anew in another output_dir."
_CHECKPOINT_NAME = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _write_manifest(folder: Path) -> None:
    """List every file of `folder` with size and checksum, and force all of it to the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "crc32": _crc32(path)}
            fsync(path)
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n", encoding="utf-8")
    fsync(manifest)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(path)


def find_damage(checkpoint: str | os.PathLike) -> str | None:
    """
    Compare a checkpoint of [`EfficientTrainer`] with its manifest.

    Returns:
        `str` or `None`: the damage, with the name of the file, or `None` if the checkpoint is complete.
    """
    folder = Path(checkpoint)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return f"it has no {MANIFEST_NAME}, so it was not written to the end, or not by EfficientTrainer"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["crc32"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST_NAME} is damaged"
    except OSError as error:
        return f"its {MANIFEST_NAME} cannot be read ({error.strerror})"
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if _crc32(path) != checksum:
                return f"the content of its file {name} was altered"
        except OSError as error:
            return f"its file {name} cannot be read ({error.strerror})"
    return None


def find_last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    Find the newest complete checkpoint in `output_dir`; `None` if there is none.

    Checkpoints that are half-written or damaged are skipped, each with a warning that gives the reason.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (match := _CHECKPOINT_NAME.match(path.name))
    }
    for step in sorted(steps, reverse=True):
        damage = find_damage(steps[step])
        if damage is None:
            return str(steps[step])
        logger.warning("Passing over the checkpoint %s: %s.", steps[step], damage)
    return None


@contextmanager
def restoring(checkpoint: str | os.PathLike | None, *patterns: str) -> Iterator[None]:
    """
    Let an error from reading a part of a checkpoint name the file, and say what to do.

    Args:
        checkpoint (`str` or `os.PathLike`, *optional*): the folder; without one there is nothing to explain.
        patterns (`str`): names of the files that are read, which may hold `*`.

    Raises:
        ModelFileError: if one of the files is damaged, holds more than tensors and plain values, or something that the
            run has no use for.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None:
            raise
        paths = [path for pattern in patterns for path in sorted(Path(checkpoint).glob(pattern))]
        for path in paths:
            if (fault := file_fault(path, _REMEDY)) is not None:
                raise ModelFileError(fault) from error
        if paths and type(error) in _MISFITS:
            names = " or ".join(path.name for path in paths)
            found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelFileError(f"{checkpoint}: {names} does not fit this run ({found}). {_REMEDY}") from error
        raise


def check_trainer_state(checkpoint: str | os.PathLike) -> None:
    """
    Make sure that Trainer can read its state in a checkpoint.

    Raises:
        ModelFileError: if it cannot.
    """
    path = Path(checkpoint, TRAINER_STATE_NAME)
    if not path.exists():
        return
    with restoring(checkpoint, path.name):
        state = TrainerState.load_from_json(str(path))
        numbers = (state.global_step, state.max_steps, state.epoch)
        if not all(isinstance(number, (int, float)) for number in numbers) or not isinstance(state.log_history, list):
            raise TypeError("global_step, max_steps and epoch are numbers, and log_history is a list")


def put_in_place(staged: Path, final: Path) -> None:
    """Give a staged checkpoint its name; the old one of that name, if any, goes only then."""
    _write_manifest(staged)
    replaced = staged.with_name(f"replaced-{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(staged, final)
    fsync(final.parent)
    shutil.rmtree(staged.parent)
