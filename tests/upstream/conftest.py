"""Collects these tests only where transformers' own tests lie, see `run.py`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
UPSTREAM = os.environ.get("HF_EFFICIENT_UPSTREAM")
collect_ignore = [] if UPSTREAM else [path.name for path in HERE.glob("test_*_common.py")]


def _load(name: str):
    """A module of this folder; `tests` is no package."""
    spec = importlib.util.spec_from_file_location(f"hf_efficient_upstream_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fetch_module():
    return _load("fetch")


if UPSTREAM:
    sys.path.insert(0, UPSTREAM)
    _load("stand_ins").install(Path(UPSTREAM), "transformers_tests")


def pytest_configure(config):
    for marker in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "is_training_test",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")
