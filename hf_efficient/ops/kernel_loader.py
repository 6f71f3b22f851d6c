"""Lookup of compiled kernels. Nothing here runs at import, and nothing contacts the Hub unless asked.

1. A folder that `kernels/build.py` filled: those that the environment variable `HF_EFFICIENT_KERNELS` names (separated
   as in `PATH`), then `kernels/` of the repository, if this package is part of it, then the folder in the user's cache
   (`XDG_CACHE_HOME`, `~/.cache` by default) that `hf-efficient kernels build` fills.
2. The `kernels` library, which fetches a pinned version from the Hub, once `allow_hub_kernels()` was called or
   `HF_EFFICIENT_HUB_KERNELS=1` is set.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch


FOLDERS_VARIABLE = "HF_EFFICIENT_KERNELS"
HUB_VARIABLE = "HF_EFFICIENT_HUB_KERNELS"
RECORD = "build_record.json"  # of `kernels/build.py`
# By kernel, its repository on the Hub and the version that this package was written for: no other is taken.
KERNELS = {
    "decode-layer": ("hf-efficient/decode-layer", 3),
    "sparse-ff": ("hf-efficient/sparse-ff", 1),
    "sru-recurrence": ("hf-efficient/sru-recurrence", 1),
}
# Libraries against libtorch's stable ABI serve the torch that they name and all later ones.
_VARIANT = re.compile(
    r"torch-stable-abi(?P<major>\d)(?P<minor>\d+)-(?P<backend>cpu|cu(?P<cuda>\d+)(?P<cuda_minor>\d))-"
    r"(?P<machine>\w+)-(?P<system>\w+)"
)

_hub: dict[str, bool | None] = {"allowed": None, "trust_remote_code": False}
_lock = threading.RLock()  # two threads must not import one kernel at a time


def allow_hub_kernels(allow: bool = True, *, trust_remote_code: bool = False) -> None:
    """
    Let the `kernels` library fetch kernels that are not built here, from now on in this process, or forbid it, whatever
    `HF_EFFICIENT_HUB_KERNELS` says.

    Call it before the first op runs: an op that fell back to plain torch stays there.

    Args:
        allow (`bool`, defaults to `True`): whether to fetch.
        trust_remote_code (`bool`, defaults to `False`): whether to run kernels of a publisher that the Hub does not
            list as trusted, as `kernels.get_kernel` asks it.
    """
    _hub.update(allowed=allow, trust_remote_code=trust_remote_code)


def hub_kernels_allowed() -> bool:
    """Return whether kernels may be fetched: by `allow_hub_kernels`, else by `HF_EFFICIENT_HUB_KERNELS`."""
    if _hub["allowed"] is not None:
        return _hub["allowed"]
    return os.environ.get(HUB_VARIABLE, "0").lower() in ("1", "true", "yes")


class KernelNotBuiltError(ImportError):
    """No kernel of this name was found, not even one that cannot serve."""


def _repository() -> Path | None:
    """The folder `kernels` of the clone that this package is part of; `None` elsewhere."""
    package = Path(__file__).resolve().parents[1]
    folder = package.parent / "kernels"
    # Only this repository's: beside an installed package there may be anything of that name.
    return folder if package.name == "hf_efficient" and (folder / "build.py").is_file() else None


def cache_folder() -> Path | None:
    """
    The folder in the user's cache for kernels that are built for this release of the package and of torch; another
    release has a folder of its own, and needs a build of its own.

    Returns:
        `Path` or `None`: `None` where the package is not installed, or the user has no folder.
    """
    try:
        release = importlib.metadata.version("hf_efficient")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (importlib.metadata.PackageNotFoundError, RuntimeError):
        return None
    torch_release = ".".join(torch.__version__.split(".")[:2])
    return cache / "hf_efficient" / "kernels" / f"{release}-torch{torch_release}"


def kernel_folders() -> list[Path]:
    """The folders that are searched for built kernels, in their order."""
    folders = [Path(part) for part in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if part]
    repository, cache = _repository(), cache_folder()
    if repository is not None:
        folders.append(repository)
    if cache is not None and cache.is_dir():
        folders.append(cache)
    return folders


def build_command() -> str:
    """The command that builds the kernels where this package looks for them."""
    return "hf-efficient kernels build" if _repository() is None else "python kernels/build.py"


def how_to_build() -> str:
    """Say in a sentence how to come by a kernel."""
    return (
        f"`{build_command()}` builds it and says what the machine lacks; {HUB_VARIABLE}=1 lets the `kernels` library "
        "fetch it."
    )


def _unfit_name(name: str, backend: str) -> str | None:
    """Why a variant of this name does not run in this process; `None` if it does."""
    match = _VARIANT.fullmatch(name)
    if match is None:
        return "is not built against libtorch's stable ABI"
    if (int(match["major"]), int(match["minor"])) > tuple(int(part) for part in torch.__version__.split(".")[:2]):
        return f"needs torch {match['major']}.{match['minor']}"
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    if (match["machine"], match["system"]) != (machine, platform.system().lower()):
        return f"is for {match['machine']}-{match['system']}"
    if (match["cuda"] is None) != (backend == "cpu"):
        return f"is not for {backend}"
    # The same major version of CUDA, and no newer minor one.
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    if match["cuda"] is not None and (match["cuda"] != major or int(match["cuda_minor"]) > int(minor)):
        return f"needs CUDA {match['cuda']}.{match['cuda_minor']}; this torch has {torch.version.cuda or 'none'}"
    return None


def _unfit(variant: Path, name: str, backend: str) -> str | None:
    """Why a variant cannot serve; `None` if it can."""
    reason = _unfit_name(variant.name, backend)
    if reason is not None:
        return reason
    try:
        metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        found = metadata["id"], metadata["name"], metadata["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has no readable metadata.json ({type(error).__name__}: {error})"
    if found[1:] != (name, KERNELS[name][1]):
        return f"is {found[1]} of version {found[2]}, and this package needs version {KERNELS[name][1]}"
    return _damage(variant)


def _damage(variant: Path) -> str | None:
    """Find damage of a variant's library by the checksum that the build wrote down; `None` if there is none.

    To load a library that was cut off ends the process (SIGBUS) instead of raising an error. Variants that others built
    have no such record, and are taken as they are.
    """
    if not (variant / RECORD).exists():
        return None
    try:
        record = json.loads((variant / RECORD).read_text(encoding="utf-8"))
        library, expected = variant / record["file"], record.get("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has no readable {RECORD} ({type(error).__name__}: {error})"
    if not library.is_file():
        return f"has lost its library, {library.name}"
    if expected not in (None, hashlib.sha256(library.read_bytes()).hexdigest()):
        return f"has a damaged library, {library.name}, which was cut off or altered since it was built"
    return None


def _variants(name: str, backend: str) -> Iterator[tuple[Path, str | None]]:
    """Yield the built variants of a kernel, with the reasons why they cannot serve."""
    for folder in kernel_folders():
        for variant in sorted((folder / name / "build").glob("[!.]*"), reverse=True):
            yield variant, _unfit(variant, name, backend)


def find_variant(name: str, backend: str) -> Path | None:
    """
    The built variant of a kernel that runs in this process, or `None`.

    Args:
        name (`str`): the kernel's name, such as `"sru-recurrence"`.
        backend (`str`): `"cpu"` or `"cuda"`.
    """
    return next((variant for variant, reason in _variants(name, backend) if reason is None), None)


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
    except Exception as error:  # whatever is wrong with it, an op has another way to run
        del sys.modules[name]
        found = f"{type(error).__name__}: {error}"
        raise ImportError(f"{variant} cannot be imported ({found}); `--force` makes a build anew") from error
    return module


def _from_hub(name: str, backend: str) -> ModuleType:
    repository, version = KERNELS[name]
    try:
        # Not by an import statement: type checkers take the repository's folder of this name for it.
        get_kernel = importlib.import_module("kernels").get_kernel
    except (ImportError, AttributeError) as error:  # in a clone, the repository's folder of that name is found
        raise ImportError(
            "the `kernels` library is not installed; `pip install 'hf_efficient[kernels]'` brings it"
        ) from error
    try:
        return get_kernel(
            repository, version=version, backend=backend, trust_remote_code=bool(_hub["trust_remote_code"])
        )
    except Exception as error:  # whatever it is, an op has another way to run
        raise ImportError(f"the `kernels` library could not load {repository}, version {version}: {error}") from error


def _searched(name: str, backend: str) -> Iterator[str]:
    for folder in kernel_folders():
        yield f"searched in {folder / name / 'build'}"
    for variant, reason in _variants(name, backend):
        yield f"{variant} {reason}"
    if not hub_kernels_allowed():
        yield f"not asked for from the Hub ({HUB_VARIABLE}=1)"


def load_kernel(name: str, backend: str) -> ModuleType:
    """
    The Python package of a compiled kernel.

    Args:
        name (`str`): the kernel's name, such as `"sru-recurrence"`.
        backend (`str`): `"cpu"` or `"cuda"`.

    Raises:
        ImportError: if there is none that runs here; says where it was searched for, and what is wrong with what is
            there.
    """
    with _lock:
        variant = find_variant(name, backend)
        if variant is not None:
            return _import_variant(variant)
        if hub_kernels_allowed():
            return _from_hub(name, backend)
        kind = ImportError if any(_variants(name, backend)) else KernelNotBuiltError
    raise kind("; ".join(_searched(name, backend)))


def load_implementation(name: str, functions: Iterable[str], backend: str) -> ModuleType:
    """
    The Python package of a compiled kernel as the implementation of an op, for the loaders of `backend.register_op`.

    Args:
        name (`str`): the kernel's name, such as `"sru-recurrence"`.
        functions (`Iterable[str]`): names of what the op calls.
        backend (`str`): `"cpu"` or `"cuda"`.

    Raises:
        ImportError: if there is none that runs here, see [`load_kernel`], or it lacks one of the functions.
    """
    kernel = load_kernel(name, backend)
    missing = [function for function in functions if not hasattr(kernel, function)]
    if missing:
        raise ImportError(f"{kernel.__file__} has no {', '.join(missing)}: it is older than this package")
    return kernel
