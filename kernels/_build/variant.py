"""The folder `build/<variant>/` of a kernel: what it is made from, whether it is current, putting it there."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from _build import compilation
from _build.build_config import BuildConfig
from _build.toolchain import MissingDependencyError, Toolchain, platform_tag


RECORD = "build_record.json"
OPS_FILE = "_ops.py"
COMPILER_LOG = "compiler.log"
# Folders that start with a dot are no variants to whoever loads kernels.
STAGING, PREVIOUS = ".building-", ".previous-"

OPS_MODULE = '''"""Written by the build: the ops of this library, under a name that no other build has."""

import torch

from . import {ops}  # noqa: F401  (loading the library registers its ops)


ops = torch.ops.{ops}


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` as it is registered."""
    return f"{ops}::{{op_name}}"
'''


@dataclass(frozen=True)
class State:
    """State of a variant: "current", "stale" or "missing"; what changed; where it is; how far its check went."""

    status: str
    reason: str = ""
    folder: Path | None = None
    checked: str = ""


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(config: BuildConfig, backend: str, tools: Toolchain | None) -> dict:
    """Description of everything that the library depends on; without a toolchain, flags and versions are left out."""
    content = {
        "name": config.name,
        "version": config.version,
        "stable_abi": config.stable_abi[backend],
        "builder": _sha1(Path(compilation.__file__).read_bytes()),
        "files": {_label(path, config): _sha1(path.read_bytes()) for path in config.inputs(backend)},
    }
    if tools is not None:
        content["flags"] = {
            section.name: [*compilation.compiler_flags(section, tools), *section.include]
            for section in config.sections(backend)
        }
        content["compiler"] = tools.versions
    return content


def _label(path: Path, config: BuildConfig) -> str:
    return path.relative_to(config.folder).as_posix() if path.is_relative_to(config.folder) else path.name


def package_fingerprint(folder: Path) -> dict[str, str]:
    """The Python files that go beside the library, less the one that is written; a change needs no compiler."""
    return {path.name: _sha1(path.read_bytes()) for path in sorted(folder.glob("*.py")) if path.name != OPS_FILE}


def ops_name(config: BuildConfig, backend: str, content: dict) -> str:
    """The name of library, module and op namespace. It must differ between builds, or a process that loads two of
    them gets a mixture."""
    digest = _sha1(json.dumps(content, sort_keys=True).encode())
    return f"_{config.python_name}_{backend}_{digest[:7]}"


def variant_name(config: BuildConfig, tools: Toolchain) -> str:
    """The folder's name as the `kernels` library reads it, such as `torch-stable-abi211-cu130-x86_64-linux`."""
    abi = config.stable_abi[tools.backend].replace(".", "")
    device = f"cu{''.join(tools.cuda.split('.')[:2])}" if tools.cuda else "cpu"
    return f"torch-stable-abi{abi}-{device}-{platform_tag()}"


def variants(config: BuildConfig, backend: str) -> list[Path]:
    """The variants that are there for a backend on this platform, of whatever ABI or CUDA version."""
    device = "cpu" if backend == "cpu" else "cu[0-9]*"
    return sorted((config.folder / "build").glob(f"torch*-{device}-{platform_tag()}"))


def _difference(old: dict, new: dict) -> str:
    """The entries of `new` that differ from `old`, in a few words; entries that `new` lacks are not compared."""
    changed = [key for key, value in new.items() if key != "files" and old.get(key) != value]
    files = old.get("files", {}), new.get("files", {})
    changed += [name for name in sorted({*files[0], *files[1]}) if files[0].get(name) != files[1].get(name)]
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return f"{', '.join(changed[:4])}{more} changed" if changed else ""


def find_state(config: BuildConfig, backend: str, tools: Toolchain | None) -> State:
    """Compare what is built with the sources; without a toolchain, as far as can be told."""
    content, found = fingerprint(config, backend, tools), variants(config, backend)
    if not found:
        return State("missing")
    if len(found) > 1 or (tools is not None and found[0].name != variant_name(config, tools)):
        return State("stale", f"{', '.join(path.name for path in found)} is not what would be built here", found[0])
    try:
        record = json.loads((found[0] / RECORD).read_text())
        changed = _difference(record["library"], content)
        if not changed and record["package"] != package_fingerprint(config.package):
            changed = "Python files changed"
        library = found[0] / record["file"]
        if not library.is_file():
            changed = "the library is gone"
        elif record.get("sha256") != sha256(library):
            changed = f"{library.name} is damaged" if "sha256" in record else "the library has no checksum"
        return State("stale" if changed else "current", changed, found[0], record["checked"])
    except (OSError, ValueError, KeyError) as error:
        return State("stale", f"its {RECORD} cannot be read: {error}", found[0])


def reusable_library(state: State, content: dict) -> Path | None:
    """The library that is there, if it is compiled from just this: then only Python files have to be renewed."""
    if state.folder is None:
        return None
    try:
        record = json.loads((state.folder / RECORD).read_text())
        library = state.folder / record["file"]
        whole = (state.folder / COMPILER_LOG).is_file() and record["sha256"] == sha256(library)
        return library if whole and record["library"] == content else None
    except (OSError, ValueError, KeyError):
        return None


def write_package(config: BuildConfig, tools: Toolchain, ops: str, folder: Path) -> None:
    """The Python files and `metadata.json` that go with the library."""
    for path in config.package.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    (folder / OPS_FILE).write_text(OPS_MODULE.format(ops=ops))
    backend: dict = {"type": tools.backend}
    if tools.nvcc is not None:
        sections = [section for section in config.kernels if section.backend == "cuda"]
        found = {value for section in sections for value in compilation.supported_capabilities(section, tools.nvcc)}
        backend["archs"] = sorted(found, key=lambda value: float(value.removesuffix("+PTX").rstrip("af")))
    metadata = {
        "name": config.name,
        "id": ops,
        "version": config.version,
        "license": config.license,
        **config.links,
        "python-depends": [],
        "backend": backend,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_record(content: dict, library: str, checked: str, folder: Path) -> None:
    """Write down what the variant is made from, and the checksum by which loaders tell a damaged library."""
    record = {
        "library": content,
        "package": package_fingerprint(folder),
        "file": library,
        "sha256": sha256(folder / library),
        "checked": checked,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def open_lock(build: Path) -> TextIO:
    """
    The lock of the folder `build`, which is made if it is not there.

    Raises:
        MissingDependencyError: if nothing can be written to that folder.
    """
    try:
        build.mkdir(exist_ok=True)
        if not os.access(build, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open(build / ".lock", "w")
    except OSError as error:
        where = os.path.relpath(build)
        if build.exists() and not build.is_dir():
            raise MissingDependencyError(f"{where} is not a folder; move it away") from error
        raise MissingDependencyError(
            f"the folder {where} cannot be written to ({error.strerror}); change whose it is, or build in a copy of "
            "the repository and name its folder kernels/ by HF_EFFICIENT_KERNELS"
        ) from error


@contextlib.contextmanager
def locked(config: BuildConfig, say: Callable[[str], None]) -> Iterator[Path]:
    """
    The kernel's `build` folder, for one build at a time, cleared of what an interrupted one left.

    Raises:
        MissingDependencyError: if nothing can be written to that folder.
    """
    import fcntl  # not on Windows, where nothing is built

    build = config.folder / "build"
    with open_lock(build) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{config.name}: waiting for another build of it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in build.glob(f"{STAGING}*"):
            shutil.rmtree(left)
        for left in build.glob(f"{PREVIOUS}*"):
            put_back = build / left.name.removeprefix(PREVIOUS)
            shutil.rmtree(left) if put_back.exists() else left.rename(put_back)
        yield build


def install(new: Path, config: BuildConfig, tools: Toolchain) -> Path:
    """Put a finished variant in its place and remove others of its backend: there is always a whole one or none."""
    target = config.folder / "build" / variant_name(config, tools)
    previous = target.with_name(PREVIOUS + target.name)
    if target.exists():
        target.rename(previous)
    try:
        new.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    for stale in variants(config, tools.backend):
        if stale != target:
            shutil.rmtree(stale)
    return target
