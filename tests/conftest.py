"""Settings for the whole suite: no network, one thread, real data where it is."""

import gc
import os
import re
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from hf_efficient.ops import backend, kernel_loader, sru


torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    return Path(os.environ.get("HF_EFFICIENT_DATA", ROOT.parent / "shared" / "data"))


def _describe(value: object) -> str | None:
    """A short text for a value of a parametrised test, where pytest itself would only number it."""
    if isinstance(value, dict):
        return ",".join(f"{key}={_describe(entry)}" for key, entry in value.items()) or "defaults"
    if isinstance(value, (list, tuple)):
        return "+".join(_describe(entry) or "?" for entry in value) or "none"
    if isinstance(value, torch.Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, range):
        return f"{value.start}..{value.stop - 1}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def pytest_addoption(parser):
    group = parser.getgroup("fuzzing")
    group.addoption("--fuzz-seconds", type=float, default=30.0, help="seconds that tests/models/test_fuzz.py takes")
    group.addoption("--fuzz-cases", type=int, help="number of calls that it makes, in place of a time")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of its first call")


def pytest_make_parametrize_id(config, val, argname):
    """Ids that say what a test is given: `num_heads=2,length=63`, not `fields0`."""
    plain = isinstance(val, (str, int, float, bool, bytes)) or val is None
    return None if plain else _describe(val)[:100]


def pytest_collection_modifyitems(items):
    has_data, has_gpu = data_folder().is_dir(), torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("data") and not has_data:
            item.add_marker(pytest.mark.skip(reason=f"no real data in {data_folder()}; set HF_EFFICIENT_DATA"))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_stay():
    """Garbage collection leaves out what has been imported, so far for all tests: Trainer calls it in every run, and
    each time it would walk through all of torch and transformers, which takes a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data; ask for it only in tests marked `data`."""
    return data_folder()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def recurrence_backend(request, monkeypatch):
    """A test that asks for this runs once for each form of SRU's recurrence, and no other form may have run."""
    if request.param == "cpu" and kernel_loader.find_variant(sru.KERNEL, "cpu") is None:
        pytest.skip(f"{sru.KERNEL} is not built for the CPU: run `python kernels/build.py`")
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, request.param)
    ops = (sru.OP_NAME, sru.BACKWARD_NAME)
    for name in ops:
        monkeypatch.setattr(backend._ops[name], "last_backend", None)
    yield request.param
    assert {backend.last_backend(name) for name in ops} <= {None, request.param}
