"""A tiny kernel (`tiny_kernel/`, which multiplies a tensor by 3 in place) in a copy of the builder, so that tests can
build, change and break it while the project's own kernels stay as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


def _run_python(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


class Workshop:
    """A copy of the builder with the tiny kernel beside it."""

    def __init__(self, root: Path):
        self.root = root
        self.kernel = root / "tiny-scale"

    @property
    def variant(self) -> Path:
        (variant,) = self.kernel.glob("build/torch-stable-abi211-cpu-*")
        return variant

    @property
    def library(self) -> Path:
        (library,) = self.variant.glob("*.abi3.so")
        return library

    def run(self, *arguments, backend="cpu", **environment):
        """The exit code and what was printed."""
        named = ("--backend", backend) if backend else ()
        result = _run_python(self.root / "build.py", *arguments, *named, cwd=self.root, **environment)
        assert not result.stderr, result.stderr
        return result.returncode, result.stdout

    def edit(self, file: str, old: str, new: str):
        text = (self.kernel / file).read_text()
        assert old in text
        (self.kernel / file).write_text(text.replace(old, new))

    def snapshot(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.variant.iterdir() if path.is_file()}


def make_workshop(folder: Path) -> Workshop:
    root = folder / "kernels"
    root.mkdir()
    shutil.copy(ROOT / "kernels" / "build.py", root)
    for name in ("_build", "include", "kernel_testing"):
        shutil.copytree(ROOT / "kernels" / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parent / "tiny_kernel", root / "tiny-scale")
    return Workshop(root)


@pytest.fixture(scope="session")
def run_python():
    """`run_python(*arguments, cwd=..., NAME="value")` runs this Python in a process of its own."""
    return _run_python


@pytest.fixture
def workshop(tmp_path):
    """Nothing is built yet."""
    return make_workshop(tmp_path)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    workshop = make_workshop(tmp_path_factory.mktemp("built"))
    code, said = workshop.run("--verbose")
    assert code == 0, said
    return workshop, said


@pytest.fixture
def built(built_once, tmp_path):
    """The tiny kernel's CPU variant is built."""
    shutil.copytree(built_once[0].root, tmp_path / "kernels")
    return Workshop(tmp_path / "kernels")
