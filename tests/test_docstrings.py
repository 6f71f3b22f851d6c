"""Docstrings open with a noun phrase or an imperative, as in transformers, and not with half a question."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
REFUSED = {"What", "Those", "Who", "Whether", "How", "Where", "Which", "As", "All", "These"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def refused_openings(source: str) -> Iterator[tuple[int, str]]:
    """Line and first line of each docstring that opens with a refused word."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and text.split()[0].rstrip(".,:;") in REFUSED:
            yield node.body[0].lineno, text.splitlines()[0]


@pytest.mark.parametrize("folder", ["hf_efficient", "training", "kernels"])
def test_docstrings_open_with_a_noun_phrase_or_an_imperative(folder):
    paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if "build" not in path.relative_to(ROOT).parts]
    assert paths
    found = [
        f"{path.relative_to(ROOT)}:{line}: {opening}"
        for path in paths
        for line, opening in sorted(refused_openings(path.read_text()))
    ]
    assert not found, "\n".join(["docstrings that open with a refused word:", *found])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Whether it runs."""', [(1, "Whether it runs.")]),
        ('class A:\n    """\n    What it is.\n\n    More.\n    """', [(2, "What it is.")]),
        ('class A:\n    @property\n    def b(self):\n        """All: of it."""', [(4, "All: of it.")]),
        ('async def f():\n    """How."""', [(2, "How.")]),
        ('def f():\n    """Return whether it runs."""', []),
        ('def f():\n    """Allow all."""\n    "What is no docstring"', []),
        ('def f():\n    """ """', []),
    ],
    ids=["module", "class", "property", "async", "imperative", "longer-word", "empty"],
)
def test_refused_openings_are_found(source, expected):
    assert list(refused_openings(source)) == expected
