"""Memory after many calls of `generate`: caches, and the room that decoding keeps for them, go with their call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import generation_memory


ROOT = Path(__file__).parents[2]
# What the allocator settles and libraries load late, by some calls and not by each. Of 2,000 calls that leave one
# layer's keys behind it would be 32 MB and more; of a few the counted tensors tell.
MOST_BYTES = 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("calls", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_generating_again_and_again_leaves_nothing_behind(calls):
    command = [sys.executable, "-m", generation_memory.__name__, str(calls)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(generation_memory.make_models())
    for name, growth in found.items():
        assert growth["tensors"] == 0, name
        assert growth["bytes"] < MOST_BYTES, (name, growth)
