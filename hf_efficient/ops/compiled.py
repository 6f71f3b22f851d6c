"""Where compiled kernels come from. Nothing here runs at import, and nothing contacts the Hub unless asked.

1. A folder that `kernels/build.py` filled: those that the environment variable `HF_EFFICIENT_KERNELS` names (separated
   as in `PATH`), then `kernels/` of the repository that this package is part of.
2. The `kernels` library, which fetches a pinned version from the Hub, once `allow_hub_kernels()` was called or
   `HF_EFFICIENT_HUB_KERNELS=1` is set.
"""

import importlib
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch


FOLDERS_VARIABLE = "HF_EFFICIENT_KERNELS"
HUB_VARIABLE = "HF_EFFICIENT_HUB_KERNELS"
# Repository on the Hub and version: a new version of a kernel is taken when this package says so.
HUB_KERNELS = {"sru-recurrence": ("hf-efficient/sru-recurrence", 1)}
# Libraries against libtorch's stable ABI serve the torch that they name and all later ones.
_VARIANT = re.compile(
    r"torch-stable-abi(?P<major>\d)(?P<minor>\d+)-(?P<backend>cpu|cu(?P<cuda>\d+)(?P<cuda_minor>\d))-"
    r"(?P<machine>\w+)-(?P<system>\w+)"
)

_hub = {"allowed": False, "trust_remote_code": False}


def allow_hub_kernels(allow: bool = True, *, trust_remote_code: bool = False) -> None:
    """
    Let the `kernels` library fetch kernels that are not built here, from now on in this process.

    Call it before the first op runs: an op that fell back to plain torch stays there.

    Args:
        allow (`bool`, defaults to `True`): whether to fetch.
        trust_remote_code (`bool`, defaults to `False`): whether to run kernels of a publisher that the Hub does not
            list as trusted, as `kernels.get_kernel` asks it.
    """
    _hub.update(allowed=allow, trust_remote_code=trust_remote_code)


def hub_kernels_allowed() -> bool:
    """Whether kernels may be fetched: by `allow_hub_kernels`, else by `HF_EFFICIENT_HUB_KERNELS`."""
    return _hub["allowed"] or os.environ.get(HUB_VARIABLE, "0").lower() in ("1", "true", "yes")


def kernel_folders() -> list[Path]:
    """The folders that are searched for built kernels, in their order."""
    named = [Path(part) for part in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if part]
    return [*named, Path(__file__).resolve().parents[2] / "kernels"]


def _serves(match: re.Match, backend: str) -> bool:
    """Whether a variant of this name runs in this process."""
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if (int(match["major"]), int(match["minor"])) > here:
        return False
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    if (match["machine"], match["system"]) != (machine, platform.system().lower()):
        return False
    if backend == "cpu" or match["backend"] == "cpu" or torch.version.cuda is None:
        return backend == match["backend"]
    # The same major version of CUDA, and no newer minor one.
    major, minor = torch.version.cuda.split(".")[:2]
    return match["cuda"] == major and int(match["cuda_minor"]) <= int(minor)


def find_variant(name: str, backend: str) -> Path | None:
    """
    The built variant of a kernel that runs in this process, or `None`.

    Args:
        name (`str`): the kernel's name, such as `"sru-recurrence"`.
        backend (`str`): `"cpu"` or `"cuda"`.
    """
    for folder in kernel_folders():
        build = folder / name / "build"
        variants = sorted(build.iterdir(), reverse=True) if build.is_dir() else []
        for variant in variants:
            match = _VARIANT.fullmatch(variant.name)
            if match and _serves(match, backend) and (variant / "metadata.json").is_file():
                return variant
    return None


def _import_variant(variant: Path) -> ModuleType:
    """A variant's Python package, under the name by which the `kernels` library imports it too: two modules would
    register the same ops twice."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{variant} holds no Python package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_hub(name: str, backend: str) -> ModuleType:
    repository, version = HUB_KERNELS[name]
    try:
        # Not by an import statement: type checkers take the repository's folder of this name for it.
        get_kernel = importlib.import_module("kernels").get_kernel
    except ImportError as error:
        raise ImportError("the `kernels` library is not installed; `pip install kernels` brings it") from error
    try:
        return get_kernel(
            repository, version=version, backend=backend, trust_remote_code=bool(_hub["trust_remote_code"])
        )
    except Exception as error:  # whatever it is, an op has another way to run
        raise ImportError(f"the `kernels` library could not load {repository}, version {version}: {error}") from error


def _searched(name: str, backend: str) -> Iterator[str]:
    for folder in kernel_folders():
        build = folder / name / "build"
        found = sorted(entry.name for entry in build.glob("[!.]*"))
        yield f"not in {build}" if not found else f"{build} holds {', '.join(found)}, none for {backend} here"
    if not hub_kernels_allowed():
        yield f"not asked for from the Hub ({HUB_VARIABLE}=1)"


def load_kernel(name: str, backend: str) -> ModuleType:
    """
    The Python package of a compiled kernel.

    Args:
        name (`str`): the kernel's name, such as `"sru-recurrence"`.
        backend (`str`): `"cpu"` or `"cuda"`.

    Raises:
        ImportError: if there is none that runs here; says where it was searched for.
        OSError: if a library cannot be loaded.
    """
    variant = find_variant(name, backend)
    if variant is not None:
        return _import_variant(variant)
    if hub_kernels_allowed():
        return _from_hub(name, backend)
    raise ImportError("; ".join(_searched(name, backend)))
