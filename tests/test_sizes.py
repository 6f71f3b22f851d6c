"""Files and functions stay as short as CONTRIBUTING.md asks."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FUNCTION_LINES = 60  # without its docstring
FILES = sorted(
    path
    for folder in ("hf_efficient", "training", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if path.stat().st_size and "build" not in path.relative_to(ROOT).parts
)


def limit_of(path: Path) -> int:
    if path.name.startswith("modeling_"):
        return 900
    is_script = path.parent == ROOT / "training"
    return 700 if is_script or path.name.startswith("convert_") else 400


def lengths(source: str) -> dict[str, int]:
    """Count the lines of each function, without its docstring."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            found[f"{node.name}, line {node.lineno}"] = (node.end_lineno or 0) - node.lineno + 1 - docstring
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_are_within_their_limits(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= limit_of(path)
    assert not {name: count for name, count in lengths(source).items() if count > FUNCTION_LINES}


def test_a_docstring_does_not_count():
    assert list(lengths('def f():\n    """A\n\n    b.\n    """\n    return 1\n').values()) == [2]
