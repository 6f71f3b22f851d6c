"""A package's modules as the files of one flat folder, in the form that the Hub's loader of remote code understands.

The loader copies the Python files of a repository one by one, and finds them by reading lines of the form
`from .module import name`; it knows no folders (`from ..ops.module import name`) and does not follow
`from . import module`. So the imports between modules of one package are rewritten. Statements are found by `ast`
and everything outside them, comments and layout included, stays as it was.
"""

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def flatten_code(modules: Iterable[str]) -> dict[str, str]:
    """
    The source of modules, and of all that they import from their own package, as the files of one flat folder.

    Args:
        modules (`Iterable[str]`): full names, such as `"hf_efficient.models.tupe.modeling_tupe"`.

    Returns:
        `dict[str, str]`: file name to source.

    Raises:
        ValueError: if two modules have the same last name, or an import cannot be written for a flat folder.
    """
    sources: dict[str, str] = {}
    origins: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2]
        if origins.setdefault(name, module) != module:
            raise ValueError(
                f"{module} and {origins[name]} would both become {name}.py in one flat folder: rename one of them."
            )
        if f"{name}.py" not in sources:
            sources[f"{name}.py"], imported = _flatten(module)
            waiting += imported
    return dict(sorted(sources.items()))


def _flatten(module: str) -> tuple[str, list[str]]:
    """Source of one module with flat imports, and the full names of the package's modules that it imports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        raise ValueError(f"{module} is not a module with a source file of its own.")
    root, imported = module.partition(".")[0], []
    # As `ast` sees it: columns count bytes, and only line feeds end a line
    lines = Path(spec.origin).read_bytes().replace(b"\r\n", b"\n").split(b"\n")
    nodes = [n for n in ast.walk(ast.parse(b"\n".join(lines))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):  # last first: line numbers stay valid
        where = f"{module}, line {node.lineno}"
        if isinstance(node, ast.Import):
            if any(alias.name.partition(".")[0] == root for alias in node.names):
                raise ValueError(f"{where}: write `from {root}.module import name`, not `import {root}`.")
            continue
        if node.level == 0 and (node.module or "").partition(".")[0] != root:
            continue
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
        statements, needed = _flat_statements(node, target, where)
        imported += needed
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        if lines[first][: node.col_offset].strip():
            raise ValueError(f"{where}: the Hub's loader sees an import only at the start of a line.")
        code = ("\n" + " " * node.col_offset).join(statements).encode()
        lines[first : last + 1] = [lines[first][: node.col_offset] + code + lines[last][node.end_col_offset :]]
    return b"\n".join(lines).decode(), imported


def _flat_statements(node: ast.ImportFrom, target: str, where: str) -> tuple[list[str], list[str]]:
    """The statements that replace one import from module or package `target`, and the modules that they need."""
    spec = importlib.util.find_spec(target)
    if spec is None:
        raise ValueError(f"{where}: there is no module {target}.")
    if spec.submodule_search_locations is None:
        flat = ast.ImportFrom(module=target.rpartition(".")[2], names=node.names, level=1)
        return [ast.unparse(flat)], [target]
    statements, needed = [], []
    for alias in node.names:
        submodule = f"{target}.{alias.name}"
        if alias.name == "*" or importlib.util.find_spec(submodule) is None:
            raise ValueError(
                f"{where}: {alias.name!r} comes out of the __init__.py of {target}, which has no place in a flat "
                f"folder. Import it from the module that defines it."
            )
        # The first line only names the file, in the one form that the Hub's loader follows
        statements.append(f"from .{alias.name} import __name__ as _{alias.name}")
        statements.append(ast.unparse(ast.ImportFrom(module=None, names=[alias], level=1)))
        needed.append(submodule)
    return statements, needed
