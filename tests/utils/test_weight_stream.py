"""Weight files of trax: what is read, and what is refused."""

import gzip
import io
import pickle

import numpy as np
import pytest
import torch

from hf_efficient.utils.conversion import load_original
from hf_efficient.utils.model_files import ModelFileError
from hf_efficient.utils.weight_stream import read_weight_stream, write_weight_stream


ARRAYS = [
    np.arange(15, dtype=np.float32).reshape(5, 3),
    np.zeros((0,), np.float32),
    np.float32(2.5).reshape(()),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
]


def stream(*arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    for array in arrays:
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", ["model.weights.npy", "model.weights.npy.gz"])
def test_arrays_come_in_order(tmp_path, packed, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(stream(*ARRAYS)) if packed else stream(*ARRAYS))
    tensors = read_weight_stream(path)
    assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in ARRAYS]
    numbered, arguments = load_original(path)
    assert list(numbered) == ["0", "1", "2", "3"]
    assert arguments == {}


def test_words_of_16_bits_are_bfloat16(tmp_path):
    expected = torch.tensor([1.0, -2.5, 3e38, float("inf")]).bfloat16()
    path = tmp_path / "model.weights.npy"
    path.write_bytes(stream(expected.view(torch.int16).numpy().view(np.uint16)))
    (found,) = read_weight_stream(path)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">u2"])
def test_big_endian_arrays_are_read(tmp_path, dtype):
    values = np.array([[1, 2, 3], [4, 16256, 6]])
    path = tmp_path / "model.weights.npy"
    path.write_bytes(stream(values.astype(dtype)))
    (found,) = read_weight_stream(path)
    path.write_bytes(stream(values.astype(dtype.replace(">", "<"))))
    (expected,) = read_weight_stream(path)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


WRITTEN = [
    torch.arange(15.0).reshape(5, 3).T,
    torch.tensor([1.0, -2.5, 3e38]).bfloat16(),
    torch.tensor(2.5, dtype=torch.bfloat16),
    torch.zeros(0, 4),
    torch.tensor([0.1], dtype=torch.float64),
    torch.ones(2, 1, dtype=torch.float16, requires_grad=True),
]


@pytest.mark.parametrize("name", ["model.weights.npy", "model.weights.npy.gz"])
def test_what_is_written_is_read(tmp_path, name):
    path = tmp_path / name
    write_weight_stream(path, WRITTEN)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    found = read_weight_stream(path)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in WRITTEN]
    assert all(torch.equal(a, b) for a, b in zip(found, WRITTEN, strict=True))
    first = path.read_bytes()
    write_weight_stream(path, WRITTEN)
    assert path.read_bytes() == first


def test_a_tensor_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.weights.npy.gz"
    write_weight_stream(path, WRITTEN)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds no torch\.int64"):
        write_weight_stream(path, [WRITTEN[0], torch.arange(3)])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def claim(shape: tuple[int, ...]) -> bytes:
    """A record that claims a shape, with 8 bytes of values."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue() + bytes(8)


def damaged() -> dict[str, bytes]:
    whole, packed = stream(*ARRAYS), gzip.compress(stream(*ARRAYS))
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    return {
        "cut off in an array": whole[: len(stream(ARRAYS[0])) - 5],
        "cut off in a header": whole[: len(stream(ARRAYS[0])) + 20],
        "cut off in the archive": packed[:-12],
        "garbage behind": whole + b"garbage",
        "a pickle": pickle.dumps({"weights": [1]}),
        "an array of objects": objects.getvalue(),
        "text": b"no weights at all",
        "a claim of 3.6 TiB": claim((10**6, 10**6)),
        "a packed claim of 3.6 TiB": gzip.compress(claim((10**6, 10**6))),
        "a claim beyond all addresses": claim((10**12, 10**12)),
        "a claim of nothing beyond all addresses": claim((0, 10**30)),
        "a negative claim": claim((-1, 2)),
    }


@pytest.mark.parametrize("kind", damaged())
def test_whatever_else_the_file_holds_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "model.weights.npy.gz"
    path.write_bytes(damaged()[kind])
    with pytest.raises(ModelFileError, match=rf"{path.name} is damaged or cut off behind \d arrays"):
        read_weight_stream(path)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8", "bool", "complex64", ">i4"])
def test_arrays_that_are_no_weights_are_refused_by_their_type(tmp_path, dtype):
    path = tmp_path / "model.weights.npy"
    path.write_bytes(stream(ARRAYS[0], np.zeros(3, dtype)))
    with pytest.raises(ModelFileError, match=rf"behind 1 arrays.*an array of {dtype}; weights are float16"):
        read_weight_stream(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "model.weights.npy"
    path.touch()
    with pytest.raises(ModelFileError, match="is empty"):
        read_weight_stream(path)
