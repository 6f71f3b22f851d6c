"""`kernels/build.py --publish` writes a kernel that needs nothing around it, as kernel-builder wants it."""

import ast
import shutil
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
KERNEL_NAMES = sorted(path.parent.name for path in KERNELS.glob("*/build.toml"))
OK, FAILED, USAGE, LACKING = range(4)
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
has_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=KERNEL_NAMES)
def published(request, tmp_path_factory, run_python):
    folder = tmp_path_factory.mktemp("publication") / "kernels" / request.param
    folder.parent.mkdir()
    result = run_python(KERNELS / "build.py", request.param, "--publish", folder)
    assert result.returncode == OK, result.stdout + result.stderr
    return folder


def test_build_toml_names_every_header_and_what_it_names_is_there(published):
    content = tomllib.loads((published / "build.toml").read_text())
    original = tomllib.loads((KERNELS / published.name / "build.toml").read_text())
    assert content["general"] == original["general"]
    for name, table in {"torch": content["torch"], **content["kernel"]}.items():
        before = original["torch"] if name == "torch" else original["kernel"][name]
        added = set(table["src"]) - set(before["src"])
        assert added
        assert {**table, "src": [], "include": []} == {**before, "src": [], "include": []}
        assert all((published / path).is_file() for path in table["src"]), table
    headers = {path.relative_to(published).as_posix() for path in (published / "include").iterdir()}
    named = {path for table in (content["torch"], *content["kernel"].values()) for path in table["src"]}
    assert headers <= named
    assert "include/registration.h" not in headers  # kernel-builder supplies its own


def test_its_python_files_need_torch_alone(published):
    allowed = {"torch", "pytest", "kernel_testing", *sys.stdlib_module_names}
    found = list(published.rglob("*.py"))
    assert found
    for path in found:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            tops = {name.partition(".")[0] for name in names}
            assert tops <= (allowed | {"kernels"} if path.parent.name == "benchmarks" else allowed), path


@has_compiler
def test_it_builds_and_passes_its_tests_alone(published, run_python):
    """With the builder and the one header that kernel-builder would supply; nothing of this repository is near.

    Without optimisation, which takes half of the time: files that are lacking or that do not fit show either way.
    """
    kernels = published.parent
    compiler = kernels.parent / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o755)
    shutil.copy(KERNELS / "build.py", kernels)
    for name in ("_build", "kernel_testing"):
        shutil.copytree(KERNELS / name, kernels / name, ignore=shutil.ignore_patterns("__pycache__"))
    (kernels / "include").mkdir()
    shutil.copy(KERNELS / "include" / "registration.h", kernels / "include")
    result = run_python(kernels / "build.py", "--backend", "cpu", cwd=kernels, CXX=str(compiler))
    assert result.returncode == OK, result.stdout
    assert "ran on the CPU" in result.stdout
    assert "should list" not in result.stdout
    alone = kernels.parent / "alone"
    shutil.move(published, alone)
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels_ci", "tests", cwd=alone)
    assert result.returncode == OK, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_one_kernel_is_written_into_a_new_folder(workshop, tmp_path):
    folder = tmp_path / "published"
    code, said = workshop.run("--publish", str(folder), backend=None)
    assert (code, (folder / "build.toml").is_file()) == (OK, True), said
    assert workshop.run("--publish", str(folder), backend=None)[0] == FAILED
    shutil.copytree(workshop.kernel, workshop.root / "tiny-copy")
    assert workshop.run("--publish", str(tmp_path / "other"), backend=None)[0] == USAGE


def test_two_headers_of_one_name_are_refused(workshop, tmp_path):
    (workshop.kernel / "include" / "host_device.h").write_text("#pragma once")
    code, said = workshop.run("--publish", str(tmp_path / "published"), backend=None)
    assert (code, "both hold host_device.h" in said) == (FAILED, True), said
    assert not (tmp_path / "published").exists()
