"""Checkpoint folders that are whole or absent: staging, manifest with checksums, renaming, and the check."""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.atomic_write import fsync


logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
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
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        if _crc32(path) != checksum:
            return f"the content of its file {name} was altered"
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
