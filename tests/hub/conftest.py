"""Fixtures of the Hub tests: a Hub on loopback, and processes that use it as a stranger's machine would."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers of this folder are no package

from loopback_hub import LoopbackHub


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub
