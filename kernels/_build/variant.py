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
from _build.recipe import Recipe
from _build.toolchain import Lack, Toolchain, platform_tag


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
    """How a variant stands: "current", "stale" or "missing"; what changed; where it is; how far its check went."""

    status: str
    reason: str = ""
    folder: Path | None = None
    checked: str = ""


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def fingerprint(recipe: Recipe, backend: str, tools: Toolchain | None) -> dict:
    """All that the library depends on. What only a toolchain can tell is left out where there is none."""
    content = {
        "name": recipe.name,
        "version": recipe.version,
        "stable_abi": recipe.stable_abi[backend],
        "builder": _sha1(Path(compilation.__file__).read_bytes()),
        "files": {_label(path, recipe): _sha1(path.read_bytes()) for path in recipe.inputs(backend)},
    }
    if tools is not None:
        content["flags"] = {
            section.name: [*compilation.compiler_flags(section, tools), *section.include]
            for section in recipe.sections(backend)
        }
        content["compiler"] = tools.versions
    return content


def _label(path: Path, recipe: Recipe) -> str:
    return path.relative_to(recipe.folder).as_posix() if path.is_relative_to(recipe.folder) else path.name


def package_fingerprint(folder: Path) -> dict[str, str]:
    """The Python files that go beside the library, less the one that is written; a change needs no compiler."""
    return {path.name: _sha1(path.read_bytes()) for path in sorted(folder.glob("*.py")) if path.name != OPS_FILE}


def ops_name(recipe: Recipe, backend: str, content: dict) -> str:
    """The name of library, module and op namespace. It must differ between builds, or a process that loads two of
    them gets a mixture."""
    digest = _sha1(json.dumps(content, sort_keys=True).encode())
    return f"_{recipe.python_name}_{backend}_{digest[:7]}"


def variant_name(recipe: Recipe, tools: Toolchain) -> str:
    """The folder's name as the `kernels` library reads it, such as `torch-stable-abi211-cu130-x86_64-linux`."""
    abi = recipe.stable_abi[tools.backend].replace(".", "")
    device = f"cu{''.join(tools.cuda.split('.')[:2])}" if tools.cuda else "cpu"
    return f"torch-stable-abi{abi}-{device}-{platform_tag()}"


def variants(recipe: Recipe, backend: str) -> list[Path]:
    """The variants that are there for a backend on this platform, of whatever ABI or CUDA version."""
    device = "cpu" if backend == "cpu" else "cu[0-9]*"
    return sorted((recipe.folder / "build").glob(f"torch*-{device}-{platform_tag()}"))


def _difference(old: dict, new: dict) -> str:
    """What of `new` is not as in `old`, in a few words; what `new` does not hold is not looked at."""
    changed = [key for key, value in new.items() if key != "files" and old.get(key) != value]
    files = old.get("files", {}), new.get("files", {})
    changed += [name for name in sorted({*files[0], *files[1]}) if files[0].get(name) != files[1].get(name)]
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return f"{', '.join(changed[:4])}{more} changed" if changed else ""


def find_state(recipe: Recipe, backend: str, tools: Toolchain | None) -> State:
    """Whether what is built is what the sources say; without a toolchain, as far as can be told."""
    content, found = fingerprint(recipe, backend, tools), variants(recipe, backend)
    if not found:
        return State("missing")
    if len(found) > 1 or (tools is not None and found[0].name != variant_name(recipe, tools)):
        return State("stale", f"{', '.join(path.name for path in found)} is not what would be built here", found[0])
    try:
        record = json.loads((found[0] / RECORD).read_text())
        changed = _difference(record["library"], content)
        if not changed and record["package"] != package_fingerprint(recipe.package):
            changed = "Python files changed"
        if not (found[0] / record["file"]).is_file():
            changed = "the library is gone"
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
        whole = library.is_file() and (state.folder / COMPILER_LOG).is_file()
        return library if whole and record["library"] == content else None
    except (OSError, ValueError, KeyError):
        return None


def write_package(recipe: Recipe, tools: Toolchain, ops: str, folder: Path) -> None:
    """The Python files and `metadata.json` that go with the library."""
    for path in recipe.package.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    (folder / OPS_FILE).write_text(OPS_MODULE.format(ops=ops))
    backend: dict = {"type": tools.backend}
    if tools.backend == "cuda":
        backend["archs"] = sorted({value for section in recipe.kernels for value in section.cuda_capabilities})
    metadata = {
        "name": recipe.name,
        "id": ops,
        "version": recipe.version,
        "license": recipe.license,
        **recipe.links,
        "python-depends": [],
        "backend": backend,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_record(content: dict, library: str, checked: str, folder: Path) -> None:
    record = {"library": content, "package": package_fingerprint(folder), "file": library, "checked": checked}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def open_lock(build: Path) -> TextIO:
    """
    The lock of the folder `build`, which is made if it is not there.

    Raises:
        Lack: if nothing can be written to that folder.
    """
    try:
        build.mkdir(exist_ok=True)
        if not os.access(build, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open(build / ".lock", "w")
    except OSError as error:
        where = os.path.relpath(build)
        if build.exists() and not build.is_dir():
            raise Lack(f"{where} is not a folder; move it away") from error
        raise Lack(
            f"the folder {where} cannot be written to ({error.strerror}); change whose it is, or build in a copy of "
            "the repository and name its folder kernels/ by HF_EFFICIENT_KERNELS"
        ) from error


@contextlib.contextmanager
def locked(recipe: Recipe, say: Callable[[str], None]) -> Iterator[Path]:
    """
    The kernel's `build` folder, for one build at a time, cleared of what an interrupted one left.

    Raises:
        Lack: if nothing can be written to that folder.
    """
    import fcntl  # not on Windows, where nothing is built

    build = recipe.folder / "build"
    with open_lock(build) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{recipe.name}: waiting for another build of it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in build.glob(f"{STAGING}*"):
            shutil.rmtree(left)
        for left in build.glob(f"{PREVIOUS}*"):
            put_back = build / left.name.removeprefix(PREVIOUS)
            shutil.rmtree(left) if put_back.exists() else left.rename(put_back)
        yield build


def install(new: Path, recipe: Recipe, tools: Toolchain) -> Path:
    """Put a finished variant in its place and remove others of its backend: there is always a whole one or none."""
    target = recipe.folder / "build" / variant_name(recipe, tools)
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
    for stale in variants(recipe, tools.backend):
        if stale != target:
            shutil.rmtree(stale)
    return target
