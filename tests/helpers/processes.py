"""Fresh processes: programs of the tests as modules, by themselves or by torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parents[2]


def run_distributed(module: ModuleType | str, *arguments: object, processes: int = 2) -> None:
    """Run a module's `main` in several processes by torchrun; an error shows the end of what they said."""
    name = module if isinstance(module, str) else module.__name__
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", name]
    command = [sys.executable, *launcher, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
