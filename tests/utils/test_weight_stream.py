"""Weight files of trax: what is read, and what is refused."""

import gzip
import io
import pickle

import numpy as np
import pytest
import torch

from hf_efficient.utils.conversion import load_original
from hf_efficient.utils.model_files import ModelFileError
from hf_efficient.utils.weight_stream import read_weight_stream


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
    }


@pytest.mark.parametrize("kind", damaged())
def test_whatever_else_the_file_holds_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "model.weights.npy.gz"
    path.write_bytes(damaged()[kind])
    with pytest.raises(ModelFileError, match=rf"{path.name} is damaged or cut off behind \d arrays"):
        read_weight_stream(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "model.weights.npy"
    path.touch()
    with pytest.raises(ModelFileError, match="is empty"):
        read_weight_stream(path)
