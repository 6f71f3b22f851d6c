"""Built variants of a kernel, loaded without the package and without the `kernels` library."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


VARIANTS = {"cpu": "torch-stable-abi*-cpu-*", "cuda": "torch-stable-abi*-cu[0-9]*"}


def find_variants(kernel: Path, backend: str) -> list[Path]:
    """The variants below `build/` of a kernel's folder that are for `backend`."""
    return sorted((kernel / "build").glob(VARIANTS[backend]))


def load_variant(variant: Path) -> ModuleType:
    """Import the Python package of a variant under the name that any other loader gives it."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{variant / '__init__.py'} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Run from a clone without the library, the name finds the folder of kernels, which has no file of its own.
HAS_KERNELS = getattr(importlib.util.find_spec("kernels"), "origin", None) is not None


def load_for_tests(kernel: Path, backend: str) -> ModuleType:
    """The package of a kernel's folder by the `kernels` library, where that is there, or as the build loads it; without
    one the module of tests that asks for it is skipped."""
    import pytest

    variants = find_variants(kernel, backend)
    if not variants:
        pytest.skip(f"not built for {backend}: run `python kernels/build.py`", allow_module_level=True)
    if HAS_KERNELS:
        return importlib.import_module("kernels").get_local_kernel(kernel, backend=backend)
    return load_variant(variants[-1])
