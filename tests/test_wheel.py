"""What a wheel of this repository holds, and that it serves where there is no clone."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from hf_efficient import cli
from hf_efficient.utils.version import __version__


ROOT = Path(__file__).resolve().parents[1]
# What the console command does that an installer writes.
PROGRAM = "import sys; sys.argv[0] = 'hf-efficient'; from hf_efficient.cli import main; main()"
NO_TORCH = "assert not {'torch', 'transformers'} & set(sys.modules)"
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "HF_EFFICIENT_KERNELS", "HF_EFFICIENT_BACKEND")


def setuptools_version() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def carried() -> set[str]:
    """What a wheel holds: the package, scripts with their presets, and what the kernels are built from."""
    files = {path: path for path in (ROOT / "hf_efficient").rglob("*")}
    scripts = [*(ROOT / "training").glob("*.py"), *(ROOT / "training" / "configs").glob("*.json")]
    sources = ["build.py", "_build/*.py", "include/*.h", "*/build.toml", "*/example.py", "*/include/*.h"]
    sources += ["*/*_cpu/*", "*/*_cuda/*", "*/torch-ext/*.cpp", "*/torch-ext/*.h", "*/torch-ext/*/*.py"]
    kernels = [path for pattern in sources for path in (ROOT / "kernels").glob(pattern)]
    files |= {path: ROOT / "hf_efficient" / path.relative_to(ROOT) for path in [*scripts, *kernels]}
    return {
        place.relative_to(ROOT).as_posix()
        for path, place in files.items()
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy of the repository in which kernels have been built."""
    if setuptools_version() < 77:
        pytest.skip("setuptools >= 77 is not installed")
    source, ignore = tmp_path_factory.mktemp("wheel") / "source", shutil.ignore_patterns("__pycache__", "build")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_efficient", "kernels", "training", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for kernel in source.glob("kernels/*/build.toml"):
        library = kernel.parent / "build" / "torch-stable-abi211-cpu-x86_64-linux" / "_kernel.abi3.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(b"\x7fELF")
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"]
    result = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = source.glob("*.whl")
    return wheel


def test_a_wheel_holds_package_scripts_and_sources_of_kernels(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == carried()
    for name in ("training/pretrain.py", "training/configs/tupe_small.json", "kernels/include/lanes.h"):
        assert f"hf_efficient/{name}" in names
    assert not [name for name in names if "benchmarks" in name or "/tests/" in name or name.endswith(".so")]


class Installed:
    """A wheel in a folder of its own, and its console command, far from any clone."""

    def __init__(self, wheel: Path, root: Path):
        self.site, self.work, self.cache = root / "site", root / "work", root / "cache"
        self.work.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)

    def run(self, *arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
        environment |= {"PYTHONPATH": str(self.site), "XDG_CACHE_HOME": str(self.cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=self.work,
            capture_output=True,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
            timeout=400,
        )


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_command_of_an_installed_wheel_answers_without_torch(installed):
    result = installed.run("--help", program=f"{PROGRAM.replace('main()', 'main')}\ntry: main()\nfinally: {NO_TORCH}")
    assert (result.returncode, result.stderr) == (0, "")
    assert {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")} == set(cli.COMMANDS)
    unknown = installed.run("pretrian")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "Error: there is no command pretrian, but pretrain. hf-efficient --help lists them.\n"


def test_an_installed_wheel_pretrains_by_a_preset(installed):
    (installed.work / "text.txt").write_text("".join(f"the film {i} is fine and so is the book\n\n" for i in range(60)))
    sizes = "hidden_size=12,num_hidden_layers=1,num_attention_heads=3,intermediate_size=20"
    options = "--corpus text.txt --txt_documents blank_line --vocab_size 99 --block_size 16 --validation_size 0.2"
    training = "--max_steps 2 --logging_steps 1 --use_cpu --report_to none --output_dir out"
    result = installed.run("pretrain", "tupe_small", "--config_overrides", sizes, *options.split(), *training.split())
    assert result.returncode == 0, result.stderr
    assert (installed.work / "out" / "model.safetensors").is_file()
    assert "pin_memory" not in result.stderr
    assert "{" not in result.stdout
    fault = installed.run("pretrain", "tupe_small", "--corpus", "nowhere.txt", "--output_dir", "other", "--use_cpu")
    assert fault.returncode == 2
    assert "nowhere.txt" in fault.stderr.splitlines()[-1]
    assert "Traceback" not in fault.stderr


def test_an_installed_wheel_checks_kernels_in_the_users_cache(installed):
    result = installed.run("kernels", "check", "--backend", "cpu")
    states = [line for line in result.stdout.splitlines() if " cpu: missing." in line]
    assert len(states) == 3, result.stdout + result.stderr
    assert "`hf-efficient kernels build` builds it." in states[0] or "cannot build it" in states[0]
    (folder,) = (installed.cache / "hf_efficient" / "kernels").iterdir()
    release = ".".join(torch.__version__.split(".")[:2])
    assert folder.name == f"{__version__}-torch{release}"
    (folder / "include" / "lanes.h").write_text("of an older release")
    (folder / "include" / "dropped.h").write_text("")
    (folder / "sparse-ff" / "build").mkdir()
    (folder / "sparse-ff" / "build" / "kept").write_text("")
    assert installed.run("kernels", "check", "--backend", "cpu").returncode == result.returncode
    assert (folder / "include" / "lanes.h").read_text() == (ROOT / "kernels" / "include" / "lanes.h").read_text()
    assert not (folder / "include" / "dropped.h").exists()
    assert (folder / "sparse-ff" / "build" / "kept").exists()


@pytest.mark.slow
def test_kernels_that_an_installed_wheel_has_built_are_used(installed):
    result = installed.run("kernels", "build", "sru-recurrence", "--backend", "cpu")
    if result.returncode == 3:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    program = """
import torch, hf_efficient
from hf_efficient.ops.backend import last_backend
config = hf_efficient.SruppConfig(vocab_size=9, hidden_size=6, projection_size=3, num_hidden_layers=1)
hf_efficient.SruppForCausalLM(config)(torch.tensor([[0, 5]]))
print(last_backend("sru_recurrence"))
"""
    used = installed.run(program=program)
    assert (used.stdout.strip(), used.stderr) == ("cpu", "")
