"""A kernel's folder for publication: whole by itself, as kernel-builder wants it."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

from _build.build_config import REGISTRATION, SHARED, BuildConfig, BuildConfigError


LEFT_BEHIND = shutil.ignore_patterns("build", "__pycache__", ".*")
KERNEL_TESTING = SHARED.parent / "kernel_testing"


def publish(config: BuildConfig, folder: Path) -> None:
    """
    Copy a kernel into `folder`, with the headers and the test helpers that kernels share.

    The shared headers go to `include/`, and `build.toml` names them; the helpers go to `tests/`.

    Raises:
        BuildConfigError: if a shared header has the name of one of the kernel's own.
        FileExistsError: if `folder` is there.
    """
    headers = [path for path in config.shared([config.binding, *config.kernels]) if path.name != REGISTRATION]
    clash = [path.name for path in headers if (config.folder / "include" / path.name).exists()]
    if clash:
        raise BuildConfigError(f"{config.folder / 'include'} and {SHARED} both hold {', '.join(clash)}")
    shutil.copytree(config.folder, folder, ignore=LEFT_BEHIND)
    (folder / "include").mkdir(exist_ok=True)
    for header in headers:
        shutil.copyfile(header, folder / "include" / header.name)
    shutil.copytree(KERNEL_TESTING, folder / "tests" / KERNEL_TESTING.name, ignore=LEFT_BEHIND)
    content = tomllib.loads((config.folder / "build.toml").read_text())
    tables = {"torch": content["torch"], **content["kernel"]}
    for section in (config.binding, *config.kernels):
        names = sorted(f"include/{path.name}" for path in config.shared([section]) if path.name != REGISTRATION)
        table = tables[section.name]
        table["src"] = [*table["src"], *(name for name in names if name not in table["src"])]
        if names:
            table["include"] = list(dict.fromkeys([*table.get("include", []), "include"]))
    (folder / "build.toml").write_text(_toml(content))


def _toml(content: dict[str, Any]) -> str:
    tables = {"general": content["general"], "torch": content["torch"]}
    tables |= {f"kernel.{name}": table for name, table in content["kernel"].items()}
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {_toml_value(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value)
