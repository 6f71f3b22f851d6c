"""The short suites in the kernels' own folders, run alone as they must be, and what their cards say."""

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import kernel_loader


ROOT = Path(__file__).resolve().parents[2]
HAS_KERNELS = getattr(importlib.util.find_spec("kernels"), "origin", None) is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no `kernels` library")
# By kernel: a small shape for its benchmark, what that measures, and what the examples of its card print with `CHECKS`.
SHAPES = {"decode-layer": (33, 20, 3), "sparse-ff": (33, 3, 5, 4), "sru-recurrence": (2, 7, 33)}
MEASURED = {
    "decode-layer": {"linear", "multiplicative", "feed_forward"},
    "sru-recurrence": {"forward", "forward_last", "forward_backward"},
    "sparse-ff": {"one_token", "many_tokens"},
}
CHECKS = {
    "decode-layer": "print(torch.equal(y, kernel.linear(x, codes, scales)))",
    "sru-recurrence": """
loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
loss.backward()
print(type(model.model.layers[0].recurrence).forward is not model.model.layers[0].recurrence.forward.__func__)
""",
    "sparse-ff": "print(torch.equal(winners, kernel.sparse_feed_forward(x, *controller, up, down)[1]))",
}
per_kernel = pytest.mark.parametrize("name", kernel_loader.KERNELS)


def folder_of(name):
    return ROOT / "kernels" / name


def card_of(name):
    return (folder_of(name) / "CARD.md").read_text(encoding="utf-8")


@pytest.fixture
def variant(name):
    """The built variant for CPUs of the kernel that a test is about."""
    found = kernel_loader.find_variant(name, "cpu")
    if found is None:
        pytest.skip(f"{name} is not built: run `python kernels/build.py`")
    return found


def test_every_kernel_is_known():
    """A kernel that the loader does not know is neither loaded nor tested."""
    assert {path.parent.name for path in ROOT.glob("kernels/*/build.toml")} == set(kernel_loader.KERNELS)


@per_kernel
def test_the_kernels_own_suite_passes(name, variant, run_python):
    tests = folder_of(name) / "tests"
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels_ci", tests)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@per_kernel
@needs_kernels
@pytest.mark.skipif(bool(torch.version.cuda) and not torch.cuda.is_available(), reason="it would want a GPU")
def test_the_benchmark_runs_in_the_library_s_conventions(name, variant, monkeypatch, tmp_path):
    """As `kernels benchmark` runs it, at a small size."""
    library = importlib.import_module("kernels.cli.benchmark")
    (script,) = library.discover_benchmark_scripts(name, folder_of(name))
    for benchmark in library.discover_benchmark_classes(script, tmp_path):
        monkeypatch.setattr(benchmark, "shape", SHAPES[name])
        results, sha = library.run_benchmark_class(
            benchmark, 2, 1, str(folder_of(name)), is_local=True, revision="local"
        )
        assert set(results) == MEASURED[name]
        verified = {result.verified for result in results.values()}
        assert verified == ({True} if benchmark.dtype == torch.float32 else {None})
        assert len(sha) == 7


@per_kernel
def test_the_card_says_what_build_toml_says(name):
    card = card_of(name)
    general = tomllib.loads((folder_of(name) / "build.toml").read_text())["general"]
    front = card.split("---\n")[1]
    assert "library_name: kernels" in front
    assert f"license: {general['license'].lower()}" in front
    assert f"# {general['name']}\n" in card
    repository, version = kernel_loader.KERNELS[name]
    assert version == general["version"]
    # Without `backend` a CUDA build of torch looks for a CUDA variant alone, whether or not there is a GPU.
    assert f'get_kernel("{repository}", version={version}, backend=device)' in card
    assert not re.search(r"\{\{|\{%|\{#", card), "kernel-builder would take it for a template"
    modules = [module.replace(".", "/") for module in re.findall(r"^python -m (training\S+)", card, re.MULTILINE)]
    paths = re.findall(r"^python (?:-m pytest )?(?!-m)(\S+)", card, re.MULTILINE)
    assert modules
    assert paths
    for module in modules:  # a file, or a package that can be run
        assert any((ROOT / path).exists() for path in (f"{module}.py", f"{module}/__main__.py")), module
    for path in paths:
        assert (ROOT / path).exists(), path


@per_kernel
def test_the_card_names_all_that_the_package_exports(name, variant, run_python):
    code = f"""
import sys; sys.path.append("kernels")
from pathlib import Path
from kernel_testing.loading import load_variant
print(*load_variant(Path({str(variant)!r})).__all__)
"""
    result = run_python("-c", code)
    names = set(result.stdout.split())
    if name == "sru-recurrence":  # of which `layers` is a module that the library looks into
        names = names - {"layers"} | {"layers.SruRecurrence"}
    table = card_of(name).partition("| name | what it is |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert {found for row in rows for found in re.findall(r"`([\w.]+)`", row)} == names, result.stderr


@per_kernel
@needs_kernels
def test_the_examples_of_the_card_run(name, variant, run_python):
    """By `LOCAL_KERNELS`, as the card says, until the kernel is on the Hub."""
    card = card_of(name)
    (exported,) = re.findall(r"^export LOCAL_KERNELS=(\S+)$", card, re.MULTILINE)
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) >= 2
    result = run_python("-c", "\n".join([*examples, CHECKS[name]]), LOCAL_KERNELS=exported)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpu", "True"]
