"""What `kernels/build.py` builds, when it builds again, and what is left when a build fails."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


OK, FAILED, _, LACKING = range(4)

compiled = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
has_nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
has_kernels = importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels").origin


@compiled
def test_a_build_is_whole_and_says_what_it_did(built_once):
    workshop, said = built_once
    assert "[3/3] linked" in said
    assert "ran on the CPU" in said
    name = workshop.library.name.removesuffix(".abi3.so")
    assert name.startswith("_tiny_scale_cpu_")
    assert len(name) == len("_tiny_scale_cpu_") + 7
    metadata = json.loads((workshop.variant / "metadata.json").read_text())
    assert metadata == {
        "name": "tiny-scale",
        "id": name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    assert {path.name for path in workshop.variant.parent.iterdir()} == {".lock", workshop.variant.name}
    binding, source, link = (line for line in said.splitlines() if " -o " in line)
    assert "-ffast-math" in source
    assert "-ffast-math" not in binding + link  # on the link line it would turn denormals off for the whole process


@compiled
def test_loading_leaves_denormals_alone_and_two_builds_can_share_a_process(built, run_python):
    first = built.variant.rename(built.root / "first")
    built.edit("include/factor.h", "3.0f", "5.0f")
    built.edit("example.py", "3.0", "5.0")
    assert built.run()[0] == OK
    code = f"""
import sys, torch
sys.path.insert(0, {str(built.root)!r})
from pathlib import Path
from kernel_testing.loading import load_variant
kernels = [load_variant(Path(folder)) for folder in ({str(first)!r}, {str(built.variant)!r})]
print([kernel.scale_(torch.ones(1)).item() for kernel in kernels], (torch.tensor([1e-40]) * 0.5).item() > 0)
"""
    result = run_python("-c", code)
    assert result.stdout.strip() == "[3.0, 5.0] True", result.stderr


@compiled
def test_only_what_changed_is_built_again(built):
    before = built.snapshot()
    code, said = built.run()
    assert (code, "current" in said, "building" in said) == (OK, True, False)
    assert built.snapshot() == before
    built.edit("torch-ext/tiny_scale/__init__.py", "A kernel", "One kernel")
    code, said = built.run()
    assert (code, "renewing" in said, "building" in said) == (OK, True, False)  # no compiler for a Python file
    assert built.snapshot()[built.library.name] == before[built.library.name]
    assert "One kernel" in (built.variant / "__init__.py").read_text()
    built.edit("include/factor.h", "3.0f", "1.0f + 2.0f")
    assert built.run("--check") == (
        FAILED,
        "tiny-scale cpu: stale (include/factor.h changed). `python kernels/build.py` builds it.\n",
    )
    code, said = built.run()
    assert (code, "building (include/factor.h changed)" in said) == (OK, True)
    assert built.library.name not in before
    code, said = built.run("--force")
    assert (code, "building with" in said) == (OK, True)


@compiled
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("build.toml", "-ffast-math", "-fno-math-errno"),
        ("build.toml", "version = 1", "version = 2"),
        ("torch-ext/torch_binding.cpp", "-> ()", "->  ()"),
        ("../include/registration.h", "// ", "//  "),
        ("../include/tensor_view.h", "// ", "//  "),
        ("../include/host_device.h", "// ", "//  "),
    ],
    ids=["flags", "version", "binding", "registration", "shared-header", "header-of-a-shared-header"],
)
def test_each_input_counts(built, file, old, new):
    assert built.run("--check")[0] == OK
    built.edit(file, old, new)
    code, said = built.run("--check")
    assert (code, "stale" in said) == (FAILED, True)


@compiled
def test_a_variant_of_another_abi_is_replaced(built):
    old = built.variant
    other = old.rename(old.with_name(old.name.replace("abi211", "abi210")))
    assert "is not what would be built here" in built.run("--check")[1]
    assert built.run()[0] == OK
    assert old.is_dir()
    assert not other.exists()


@compiled
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tiny_cpu/scale.cpp", "*= FACTOR", "*= FACTORY", "FACTORY"),
        ("include/factor.h", "3.0f", "4.0f", "the check of it failed"),
        ("torch-ext/torch_binding.cpp", "TORCH_BOX(&scale)", "TORCH_BOX(&gone)", "gone"),
    ],
    ids=["does-not-compile", "wrong-results", "binding-does-not-compile"],
)
def test_a_failed_build_leaves_the_old_variant(built, file, old, new, message):
    before = built.snapshot()
    built.edit(file, old, new)
    code, said = built.run()
    assert (code, message in said, "NOT built" in said) == (FAILED, True, True), said
    assert built.snapshot() == before
    assert {path.name for path in built.variant.parent.iterdir()} == {".lock", built.variant.name}


@compiled
def test_a_killed_build_leaves_the_old_variant(built, tmp_path):
    before, marker, compiler = built.snapshot(), tmp_path / "started", tmp_path / "hangs"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\ntouch {marker}\nsleep 600\n')
    compiler.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, built.root / "build.py", "--backend", "cpu", "--force"],
        env={**os.environ, "CXX": str(compiler)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert marker.exists()
    left = [path for path in built.variant.parent.iterdir() if path.name.startswith(".building-")]
    assert len(left) == 1
    assert built.snapshot() == before
    assert built.run("--check")[0] == OK
    # The short moment in which the old variant is aside and the new one is not yet there.
    name = built.variant.name
    built.variant.rename(built.variant.with_name(f".previous-{name}"))
    code, said = built.run()
    assert (code, "current" in said) == (OK, True)
    assert built.snapshot() == before
    assert not left[0].exists()


@compiled
def test_what_is_built_stays_current_without_a_compiler(built):
    code, said = built.run(PATH="", CXX="")
    assert (code, "current (ran on the CPU)" in said) == (OK, True)
    assert built.run("--force", PATH="", CXX="")[0] == LACKING


@compiled
def test_a_damaged_library_is_built_again(built):
    os.truncate(built.library, 1000)
    code, said = built.run("--check")
    assert (code, f"stale ({built.library.name} is damaged)" in said) == (FAILED, True)
    code, said = built.run()
    assert (code, "building (" in said, "ran on the CPU" in said) == (OK, True, True)

    record = built.variant / "build_record.json"
    content = json.loads(record.read_text())
    assert content.pop("sha256") == hashlib.sha256(built.library.read_bytes()).hexdigest()
    record.write_text(json.dumps(content))
    assert "stale (the library has no checksum)" in built.run("--check")[1]


UNUSABLE = {
    "a-file-in-its-place": lambda build: build.write_text(""),
    "a-lock-that-cannot-be-opened": lambda build: (build / ".lock").mkdir(parents=True),
    "read-only": lambda build: build.mkdir(mode=0o500),
}


def make_unusable(build, how):
    if how == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    UNUSABLE[how](build)


@compiled
@pytest.mark.parametrize("how", UNUSABLE)
def test_a_folder_that_cannot_be_written_to_is_a_lack(workshop, how):
    """So that `make test` goes on in plain torch."""
    make_unusable(workshop.kernel / "build", how)
    code, said = workshop.run()
    assert (code, len(said.splitlines())) == (LACKING, 1), said
    assert said.startswith("tiny-scale cpu: missing. This machine cannot build it: ")
    assert os.path.join("tiny-scale", "build") in said
    assert "move it away" in said or "HF_EFFICIENT_KERNELS" in said


@compiled
def test_what_is_current_needs_no_folder_that_can_be_written_to(built):
    (built.variant.parent / ".lock").unlink()
    UNUSABLE["a-lock-that-cannot-be-opened"](built.variant.parent)
    code, said = built.run()
    assert (code, "current (ran on the CPU)" in said) == (OK, True), said
    assert built.run("--force")[0] == LACKING
    built.edit("include/factor.h", "3.0f", "4.0f")
    assert built.run()[0] == LACKING


@compiled
def test_other_errors_of_the_file_system_fail_without_a_traceback(workshop):
    (workshop.kernel / "build").mkdir()
    (workshop.kernel / "build" / ".building-left").write_text("what is cleared away is a folder")
    code, said = workshop.run()
    assert (code, "NOT built" in said, ".building-left" in said) == (FAILED, True, True), said


@compiled
def test_an_unlisted_header_counts_and_is_named(workshop):
    """kernel-builder would not find it."""
    workshop.edit("build.toml", ', "include/factor.h"', "")
    code, said = workshop.run()
    assert (code, "build.toml should list include/factor.h" in said) == (OK, True), said
    workshop.edit("include/factor.h", "3.0f", "4.0f")
    assert "include/factor.h changed" in workshop.run("--check")[1]


@compiled
@pytest.mark.skipif(not has_kernels, reason="the `kernels` library is not installed")
def test_the_kernels_library_loads_it(built, run_python):
    code = f"""
from pathlib import Path
import torch
from kernels import get_loaded_kernels, get_local_kernel
kernel = get_local_kernel(Path({str(built.kernel)!r}), backend="cpu")
(loaded,) = get_loaded_kernels()
print(kernel.scale_(torch.ones(1)).item(), loaded.metadata.name, loaded.metadata.id)
"""
    result = run_python("-c", code)
    expected = f"3.0 tiny-scale {built.library.name.removesuffix('.abi3.so')}"
    assert result.stdout.strip() == expected, result.stderr


@compiled
@pytest.mark.skipif(not has_nvcc, reason="no nvcc")
def test_cuda_is_built_where_nvcc_is(workshop):
    code, said = workshop.run(backend="cuda")
    assert code == OK, said
    (variant,) = workshop.kernel.glob("build/torch-stable-abi211-cu*")
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0+PTX"]}
    log = (variant / "compiler.log").read_text()
    assert "'sm_80'" in log
    assert "0 bytes spill stores" in log
    assert "ran on" in said or "not run: no GPU" in said


@pytest.mark.skipif(not has_kernels, reason="the `kernels` library is not installed")
def test_our_folder_does_not_hide_the_kernels_library(run_python):
    result = run_python("-c", "import kernels; print(hasattr(kernels, 'get_local_kernel'))")
    assert result.stdout.strip() == "True", result.stderr
