"""What a wheel of this repository holds."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def setuptools_version() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@pytest.mark.skipif(setuptools_version() < 77, reason="setuptools >= 77 is not installed")
def test_a_wheel_holds_the_package_alone(tmp_path):
    """Built in a copy of the repository in which kernels have been built."""
    source, ignore = tmp_path / "source", shutil.ignore_patterns("__pycache__", "build")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_efficient", "kernels", "training", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for kernel in source.glob("kernels/*/build.toml"):
        library = kernel.parent / "build" / "torch-stable-abi211-cpu-x86_64-linux" / "_kernel.abi3.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(b"\x7fELF")
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"]
    result = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = source.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(source).as_posix() for path in (source / "hf_efficient").rglob("*") if path.is_file()}
    assert names == expected
