"""What `kernels/build.py` says of recipes (`build.toml`) that are wrong, and of machines that cannot build."""

from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, USAGE, LACKING = range(4)


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CXX": "no-such-compiler"}])
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
)
def test_a_wrong_recipe_is_refused_by_name(workshop, old, new, message):
    workshop.edit("build.toml", old, new)
    code, said = workshop.run("--check")
    assert (code, "build.toml" in said, message in said) == (USAGE, True, True), said


def test_an_unknown_kernel_is_refused_by_name(workshop):
    code, said = workshop.run("huge-scale")
    assert (code, "huge-scale" in said, "tiny-scale" in said) == (USAGE, True, True)


def test_the_project_s_recipes_are_in_order(run_python):
    result = run_python(ROOT / "kernels" / "build.py", "--check")
    assert result.returncode in (OK, FAILED, LACKING), result.stdout + result.stderr
    assert "sru-recurrence cpu: " in result.stdout
