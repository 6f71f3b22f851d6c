"""The short suite in the kernel's own folder, run alone as it must be, and what its card says."""

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import kernel_loader
from hf_efficient.ops.sru import KERNEL


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / KERNEL
CARD = (FOLDER / "CARD.md").read_text(encoding="utf-8")
VARIANT = kernel_loader.find_variant(KERNEL, "cpu")
needs_build = pytest.mark.skipif(VARIANT is None, reason=f"{KERNEL} is not built: run `python kernels/build.py`")
HAS_KERNELS = getattr(importlib.util.find_spec("kernels"), "origin", None) is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no `kernels` library")


@needs_build
def test_the_kernels_own_suite_passes(run_python):
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels_ci", FOLDER / "tests")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@needs_build
@needs_kernels
@pytest.mark.skipif(bool(torch.version.cuda) and not torch.cuda.is_available(), reason="it would want a GPU")
def test_the_benchmark_runs_in_the_library_s_conventions(monkeypatch, tmp_path):
    """As `kernels benchmark` runs it, at a small size."""
    library = importlib.import_module("kernels.cli.benchmark")
    (script,) = library.discover_benchmark_scripts(KERNEL, FOLDER)
    for benchmark in library.discover_benchmark_classes(script, tmp_path):
        monkeypatch.setattr(benchmark, "shape", (2, 7, 33))
        results, sha = library.run_benchmark_class(benchmark, 2, 1, str(FOLDER), is_local=True, revision="local")
        assert set(results) == {"forward", "forward_last", "forward_backward"}
        verified = {result.verified for result in results.values()}
        assert verified == ({True} if benchmark.dtype == torch.float32 else {None})
        assert len(sha) == 7


def test_the_card_says_what_build_toml_says():
    general = tomllib.loads((FOLDER / "build.toml").read_text())["general"]
    front = CARD.split("---\n")[1]
    assert "library_name: kernels" in front
    assert f"license: {general['license'].lower()}" in front
    assert f"# {general['name']}\n" in CARD
    repository, version = kernel_loader.KERNELS[KERNEL]
    assert version == general["version"]
    # Without `backend` a CUDA build of torch looks for a CUDA variant alone, whether or not there is a GPU.
    assert f'get_kernel("{repository}", version={version}, backend=device)' in CARD
    assert not re.search(r"\{\{|\{%|\{#", CARD), "kernel-builder would take it for a template"
    modules = [name.replace(".", "/") for name in re.findall(r"^python -m (training\S+)", CARD, re.MULTILINE)]
    paths = re.findall(r"^python (?:-m pytest )?(?!-m)(\S+)", CARD, re.MULTILINE)
    assert modules
    assert paths
    for module in modules:  # a file, or a package that can be run
        assert any((ROOT / path).exists() for path in (f"{module}.py", f"{module}/__main__.py")), module
    for path in paths:
        assert (ROOT / path).exists(), path


@needs_build
def test_the_card_names_all_that_the_package_exports(run_python):
    code = f"""
import sys; sys.path.append("kernels")
from pathlib import Path
from kernel_testing.loading import load_variant
print(*load_variant(Path({str(VARIANT)!r})).__all__)
"""
    result = run_python("-c", code)
    names = {"layers.SruRecurrence" if name == "layers" else name for name in result.stdout.split()}
    table = CARD.partition("| name | what it is |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row)} == names, result.stderr


@needs_build
@needs_kernels
def test_the_examples_of_the_card_run(run_python):
    """By `LOCAL_KERNELS`, as the card says, until the kernel is on the Hub."""
    (exported,) = re.findall(r"^export LOCAL_KERNELS=(\S+)$", CARD, re.MULTILINE)
    examples = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    assert len(examples) == 3
    check = """
loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
loss.backward()
print(type(model.model.layers[0].recurrence).forward is not model.model.layers[0].recurrence.forward.__func__)
"""
    result = run_python("-c", "\n".join([*examples, check]), LOCAL_KERNELS=exported)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpu", "True"]
