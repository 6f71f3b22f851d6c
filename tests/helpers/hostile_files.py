"""Files that would run code if they were unpickled, and other damage."""

import os
import pickle
from pathlib import Path

import torch


class Payload:
    """Unpickling one makes the folder `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(path: Path, mark: Path) -> None:
    """Write a plain pickle that makes the folder `mark`."""
    path.write_bytes(pickle.dumps(Payload(mark)))


def write_archive(path: Path, mark: Path) -> None:
    """Write a file of `torch.save` that makes the folder `mark`."""
    torch.save({"weight": torch.ones(3), "payload": Payload(mark)}, path)
