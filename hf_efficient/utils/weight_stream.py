"""Weights of trax: a stream of consecutive .npy records, read without running code from them, and written."""

import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from .atomic_write import write_files
from .model_files import ModelFileError


SUFFIXES = (".npy", ".npy.gz")
_FLOATS = (np.float16, np.float32, np.float64)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# Bytes that are read at a time, so that a header which claims too much takes no memory.
_PIECE = 1 << 24


def _read_values(stream: BinaryIO, size: int) -> bytearray:
    values = bytearray()
    while len(values) < size:
        piece = stream.read(min(_PIECE, size - len(values)))
        if not piece:
            raise ValueError(f"an array of {size} bytes ends after {len(values)}")
        values += piece
    return values


def _record(stream: BinaryIO) -> Tensor:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"a record of version {version}, which no array of numbers has")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    native = dtype.newbyteorder("=")
    if native != np.uint16 and native not in _FLOATS:
        raise ValueError(f"an array of {dtype}; weights are float16, float32, float64, or bfloat16 stored as uint16")
    if min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape}")
    values = np.frombuffer(_read_values(stream, math.prod(shape) * dtype.itemsize), dtype)
    array = values.astype(native, copy=False).reshape(shape, order="F" if fortran_order else "C")
    array = array if array.flags.c_contiguous else array.copy(order="C")
    if native == np.uint16:  # the bits of bfloat16, which numpy does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


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
    except (ValueError, EOFError, OSError, zlib.error, TypeError, MemoryError, OverflowError) as error:
        raise ModelFileError(
            f"{path} is damaged or cut off behind {len(tensors)} arrays, or is no weight file of trax "
            f"({type(error).__name__}: {error}). Copy it again."
        ) from error
    if not tensors:
        raise ModelFileError(f"{path} is empty.")
    return tensors


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array = tensor.numpy()
    if array.dtype not in _FLOATS:
        raise ValueError(f"A weight file of trax holds no {tensor.dtype}: convert it to a floating point type.")
    return array


def write_weight_stream(path: str | Path, tensors: Iterable[Tensor]) -> None:
    """
    Write a weight file of trax, which appears whole or not at all.

    Args:
        path (`str` or `Path`): the file; packed if its name ends with `.gz`. Equal tensors give equal files.
        tensors (`Iterable[Tensor]`): arrays in trax's order, as `restore_state_dict` of a converter gives them.
            bfloat16 is stored as the 16-bit integers of its bits.

    Raises:
        ValueError: for a tensor that is not of floating point.
    """
    path = Path(path)

    def write(staging: str) -> None:
        with (Path(staging) / path.name).open("wb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", compresslevel=2, fileobj=file, mtime=0) as packed:
                    _write_records(packed, tensors)
            else:
                _write_records(file, tensors)

    write_files(path.parent, write)


def _write_records(stream: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        np.lib.format.write_array(stream, _array(tensor), allow_pickle=False)


class _Prefixed:
    """A stream of which the first byte was read already."""

    def __init__(self, start: bytes, stream: BinaryIO):
        self.start, self.stream = start, stream

    def read(self, size: int = -1) -> bytes:
        start, self.start = self.start, b""
        return start + self.stream.read(size - len(start) if size >= 0 else size)
