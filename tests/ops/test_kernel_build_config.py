"""What `kernels/build.py` says of a wrong `build.toml`, and of machines that cannot build."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, USAGE, LACKING = range(4)


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CXX": "no-such-compiler"}], ids=["none", "a-wrong-name"])
def test_no_compiler(workshop, environment):
    """The message says what is missing and how to get it; the exit code is one that `make` can tell from a failure."""
    for arguments in ([], ["--check"]):
        code, said = workshop.run(*arguments, **{"CXX": "", **environment})
        assert code == LACKING
        assert said.startswith("tiny-scale cpu: missing. This machine cannot build it: ")
        assert len(said.splitlines()) == 1
        assert environment.get("CXX", "no C++ compiler") in said
        assert "apt install g++" in said or "xcode-select --install" in said
        assert not (workshop.kernel / "build").exists()


def test_cuda_is_no_duty_unless_it_is_named(workshop):
    code, said = workshop.run("--check", backend=None, PATH="", CXX="")
    assert code == LACKING
    assert [line.split(":")[0] for line in said.splitlines()] == ["tiny-scale cpu", "tiny-scale cuda"]
    workshop.edit("build.toml", 'backends = ["cpu", "cuda"]', 'backends = ["cuda"]')
    assert workshop.run("--check", backend=None, PATH="", CXX="")[0] == OK
    assert workshop.run("--check", backend="cuda", PATH="", CXX="")[0] == LACKING


@pytest.mark.parametrize("driver", ["exit 9", "echo GPU 0: a card"], ids=["no-driver", "a-GPU"])
def test_cuda_can_be_left_out_where_no_gpu_would_run_it(workshop, tmp_path, driver):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{driver}\n")
    command.chmod(0o755)
    has_gpu = driver != "exit 9" or Path("/dev/nvidiactl").exists()
    for backend in (None, "cuda"):
        code, said = workshop.run("--check", "--runnable", backend=backend, PATH=str(tmp_path), CXX="")
        last = said.splitlines()[-1]
        assert last.startswith("tiny-scale cuda: missing" if has_gpu else "tiny-scale cuda: left out"), said
        assert code == (LACKING if has_gpu or backend is None else OK)
    assert "left out" not in workshop.run("--check", backend=None, PATH=str(tmp_path), CXX="")[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("target", "runnable"), [("kernels", False), ("demo", True), ("test", True)])
def test_demo_and_test_build_what_can_run_alone(target, runnable):
    command = ["make", "--dry-run", target]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    (line,) = (line for line in said.splitlines() if "kernels/build.py" in line)
    assert ("--runnable" in line) == runnable


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("depends = ", "dependz = ", "[kernel.tiny_cpu]: unknown key 'dependz'"),
        ("license = ", "licence = ", "[general]: unknown key 'licence'"),
        ("[torch]", "[torch]\nminver = '2.11'", "[torch]: unknown key 'minver'"),
        ("[general]", "[flags]\n[general]", "build.toml: unknown key 'flags'"),
        ('license = "Apache-2.0"\n', "", "[general]: the key 'license' is missing"),
        ("version = 1", "version = '1'", "[general]: 'version' is of type str"),
        ("edition = 5", "edition = 4", "'edition' is 4"),
        ('name = "tiny-scale"', 'name = "tiny_scale"', "'name' must be"),
        ('stable-abi = "2.11"', "stable-abi = { cuda = '2.11' }", "for backend 'cpu'"),
        ('backend = "cpu"', 'backend = "metal"', "[kernel.tiny_cpu]: 'backend' is 'metal'"),
        ('"9.0+PTX"', '"sm_90"', "'cuda-capabilities' holds 'sm_90'"),
        ('src = ["torch-ext', 'src = [1, "torch-ext', "[torch]: 'src' must be a list of strings"),
        ("[general]", "[general", "build.toml: Expected"),
        ('src = ["tiny_cpu/scale.cpp", ', 'src = ["tiny_cpu/gone.cpp", ', "tiny_cpu/gone.cpp"),
    ],
    ids=[
        "unknown-key-of-a-kernel",
        "unknown-key-of-general",
        "unknown-key-of-torch",
        "unknown-table",
        "missing-key",
        "wrong-type",
        "wrong-edition",
        "wrong-name",
        "no-stable-abi",
        "unknown-backend",
        "wrong-capability",
        "wrong-item",
        "no-toml",
        "missing-source",
    ],
)
def test_a_wrong_build_toml_is_refused_by_name(workshop, old, new, message):
    workshop.edit("build.toml", old, new)
    code, said = workshop.run("--check")
    assert (code, "build.toml" in said, message in said) == (USAGE, True, True), said


def test_an_unknown_kernel_is_refused_by_name(workshop):
    code, said = workshop.run("huge-scale")
    assert (code, "huge-scale" in said, "tiny-scale" in said) == (USAGE, True, True)


def test_the_build_tomls_of_the_project_are_in_order(run_python):
    result = run_python(ROOT / "kernels" / "build.py", "--check")
    assert result.returncode in (OK, FAILED, LACKING), result.stdout + result.stderr
    for path in (ROOT / "kernels").glob("*/build.toml"):
        backends = tomllib.loads(path.read_text())["general"]["backends"]
        assert all(f"{path.parent.name} {backend}: " in result.stdout for backend in backends)
