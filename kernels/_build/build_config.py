"""`build.toml`, edition 5, as Hugging Face's kernel-builder reads it: the part that a local build needs."""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


EDITION = 5
BACKENDS = ("cpu", "cuda")
HEADERS = (".h", ".hpp", ".cuh")
# Headers that kernels share. kernel-builder supplies a registration.h of its own.
SHARED = Path(__file__).resolve().parents[1] / "include"
REGISTRATION = "registration.h"

# Each key that a table may hold and the type of its value; those with a star must be there.
GENERAL = {
    "name*": str,
    "version*": int,
    "edition*": int,
    "license*": str,
    "backends*": list,
    "upstream": str,
    "source": str,
    "hub": dict,
}
TORCH = {"src*": list, "stable-abi*": (str, dict), "include": list, "cxx-flags": list}
CPU_KERNEL = {"backend*": str, "depends*": list, "src*": list, "include": list, "cxx-flags": list}
CUDA_KERNEL = {**CPU_KERNEL, "cuda-capabilities*": list, "cuda-flags": list}
KERNEL = {"cpu": CPU_KERNEL, "cuda": CUDA_KERNEL}

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
CAPABILITY = re.compile(r"\d+\.\d[af]?(\+PTX)?")


class BuildConfigError(Exception):
    """A `build.toml` that cannot be followed; the message names the file and the key."""


@dataclass(frozen=True)
class Section:
    """Sources that are compiled with the same flags: one `[kernel.<x>]`, or the binding in `[torch]`."""

    name: str
    src: tuple[str, ...]
    include: tuple[str, ...] = ()
    cxx_flags: tuple[str, ...] = ()
    cuda_flags: tuple[str, ...] = ()
    cuda_capabilities: tuple[str, ...] = ()
    backend: str | None = None
    needs_torch: bool = True

    @property
    def units(self) -> list[str]:
        """The files to compile: headers are listed in `src` too, since kernel-builder copies only what is listed."""
        return [path for path in self.src if not path.endswith(HEADERS)]


@dataclass(frozen=True)
class BuildConfig:
    """One kernel: where it lies, what it is called, and what each backend is made of."""

    folder: Path
    name: str
    version: int
    license: str
    links: dict[str, str]
    backends: tuple[str, ...]
    stable_abi: dict[str, str]
    binding: Section
    kernels: tuple[Section, ...]

    @property
    def python_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def package(self) -> Path:
        """The folder of the Python package."""
        return self.folder / "torch-ext" / self.python_name

    def sections(self, backend: str) -> list[Section]:
        """The sections that are linked into the library of `backend`, the binding first."""
        return [self.binding, *(section for section in self.kernels if section.backend == backend)]

    def inputs(self, backend: str) -> list[Path]:
        """
        The files that the library of `backend` is compiled from, headers included.

        Raises:
            BuildConfigError: if a listed file is not there.
        """
        listed = [self.folder / path for section in self.sections(backend) for path in section.src]
        needed = [self.package / "__init__.py", *listed]
        missing = [path.relative_to(self.folder).as_posix() for path in needed if not path.is_file()]
        if missing:
            raise BuildConfigError(f"{self.folder / 'build.toml'} needs files that are not there: {', '.join(missing)}")
        return [*listed, *self.unlisted(backend), *self.shared(self.sections(backend))]

    def unlisted(self, backend: str) -> list[Path]:
        """Headers of the kernel that files of `backend` include and no `src` names: kernel-builder needs the names."""
        known = {self.folder / path for section in (self.binding, *self.kernels) for path in section.src}
        included = self._included(self.sections(backend))
        return [path for path in included if path.is_relative_to(self.folder) and path not in known]

    def shared(self, sections: Iterable[Section]) -> list[Path]:
        """Headers that all kernels share and that files of `sections` include."""
        return [path for path in self._included(sections) if not path.is_relative_to(self.folder)]

    def _included(self, sections: Iterable[Section]) -> list[Path]:
        """Headers of this kernel and shared ones that the sources of `sections` include, directly or not."""
        sections = list(sections)
        folders = [*(self.folder / path for section in sections for path in section.include), SHARED]
        queue = [self.folder / path for section in sections for path in section.src]
        found: list[Path] = []
        for path in queue:
            for header in INCLUDE.findall(path.read_text()):
                candidates = (Path(os.path.normpath(folder / header)) for folder in (path.parent, *folders))
                target = next((candidate for candidate in candidates if candidate.is_file()), None)
                if target is not None and target not in found:
                    found.append(target)
                    queue.append(target)
        return found


def _checked(table: dict, keys: Mapping[str, Any], where: str) -> dict:
    """`table`, if it holds the keys that it must, no other than it may, and values of the right type."""
    types = {key.rstrip("*"): kind for key, kind in keys.items()}
    for key, value in table.items():
        if key not in types:
            raise BuildConfigError(f"{where}: unknown key {key!r}. Known keys: {', '.join(types)}.")
        if not isinstance(value, types[key]):
            raise BuildConfigError(f"{where}: {key!r} is of type {type(value).__name__}, which does not fit.")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise BuildConfigError(f"{where}: {key!r} must be a list of strings.")
    for key in keys:
        if key.endswith("*") and key.rstrip("*") not in table:
            raise BuildConfigError(f"{where}: the key {key.rstrip('*')!r} is missing.")
    return table


def _section(name: str, table: dict) -> Section:
    return Section(
        name=name,
        backend=table.get("backend"),
        src=tuple(table["src"]),
        include=tuple(table.get("include", ())),
        cxx_flags=tuple(table.get("cxx-flags", ())),
        cuda_flags=tuple(table.get("cuda-flags", ())),
        cuda_capabilities=tuple(table.get("cuda-capabilities", ())),
        needs_torch="torch" in table.get("depends", ["torch"]),
    )


def _kernel(name: str, table: dict, where: str) -> Section:
    backend = table.get("backend")
    if backend not in KERNEL:
        raise BuildConfigError(f"{where}: 'backend' is {backend!r}; this builder knows {', '.join(KERNEL)}.")
    _checked(table, KERNEL[backend], where)
    wrong = [value for value in table.get("cuda-capabilities", ()) if not CAPABILITY.fullmatch(value)]
    if wrong:
        raise BuildConfigError(f"{where}: 'cuda-capabilities' holds {wrong[0]!r}; write them as 8.0, 9.0a or 9.0+PTX.")
    if set(table["depends"]) - {"torch"}:
        raise BuildConfigError(f"{where}: 'depends' is {table['depends']}; this builder knows only torch.")
    return _section(name, table)


def _stable_abi(value: str | dict, backends: list[str], where: str) -> dict[str, str]:
    versions = dict.fromkeys(backends, value) if isinstance(value, str) else value
    for backend in backends:
        if not re.fullmatch(r"\d\.\d+", str(versions.get(backend))):
            raise BuildConfigError(f"{where}: 'stable-abi' must give a version such as \"2.11\" for backend {backend!r}.")
    return versions


def read_build_config(path: Path) -> BuildConfig:
    """
    Read and check one `build.toml`.

    Raises:
        BuildConfigError: on anything that cannot be followed, with the file, the section and the key.
    """
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BuildConfigError(f"{path}: {error}") from error
    _checked(content, {"general*": dict, "torch*": dict, "kernel*": dict}, str(path))
    general = _checked(content["general"], GENERAL, f"{path} [general]")
    torch = _checked(content["torch"], TORCH, f"{path} [torch]")
    if general["edition"] != EDITION:
        raise BuildConfigError(f"{path} [general]: 'edition' is {general['edition']}, but this builder reads {EDITION}.")
    if not re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"]):
        raise BuildConfigError(f"{path} [general]: 'name' must be lower-case letters, digits and dashes.")
    unknown = set(general["backends"]) - set(BACKENDS)
    if unknown:
        raise BuildConfigError(f"{path} [general]: 'backends' names {sorted(unknown)}; this builder knows {BACKENDS}.")
    kernels = tuple(_kernel(name, table, f"{path} [kernel.{name}]") for name, table in content["kernel"].items())
    return BuildConfig(
        folder=path.parent,
        name=general["name"],
        version=general["version"],
        license=general["license"],
        links={key: general[key] for key in ("upstream", "source") if key in general},
        backends=tuple(general["backends"]),
        stable_abi=_stable_abi(torch["stable-abi"], general["backends"], f"{path} [torch]"),
        binding=_section("torch", torch),
        kernels=kernels,
    )
