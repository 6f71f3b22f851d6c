"""Weights of trax: a stream of consecutive .npy records, read without running code from them."""

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from .model_files import ModelFileError


SUFFIXES = (".npy", ".npy.gz")


def _record(stream: BinaryIO) -> Tensor:
    array = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype == np.uint16:  # the bits of bfloat16, which numpy does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.c_contiguous else array.copy(order="C"))


def read_weight_stream(path: str | Path) -> list[Tensor]:
    """
    Read a weight file of trax, `NAME.weights.npy.gz`, or the same unpacked.

    It holds arrays without names, in the order of the model's parts; arrays of 16-bit integers are bfloat16.

    Args:
        path (`str` or `Path`): the file. It is unpacked by its first bytes, whatever it is called.

    Raises:
        ModelFileError: if it holds anything but such records, or is cut off: trax itself would load a part.
    """
    path = Path(path)
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    tensors: list[Tensor] = []
    try:
        with cast(BinaryIO, gzip.open(path)) if packed else path.open("rb") as stream:
            while start := stream.read(1):
                rest = _Prefixed(start, stream)
                tensors.append(_record(cast(BinaryIO, rest)))
    except (ValueError, EOFError, OSError, zlib.error, TypeError) as error:
        raise ModelFileError(
            f"{path} is damaged or cut off behind {len(tensors)} arrays, or is no weight file of trax "
            f"({type(error).__name__}: {error}). Copy it again."
        ) from error
    if not tensors:
        raise ModelFileError(f"{path} is empty.")
    return tensors


class _Prefixed:
    """A stream of which the first byte was read already."""

    def __init__(self, start: bytes, stream: BinaryIO):
        self.start, self.stream = start, stream

    def read(self, size: int = -1) -> bytes:
        start, self.start = self.start, b""
        return start + self.stream.read(size - len(start) if size >= 0 else size)
