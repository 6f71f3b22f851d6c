"""Where compiled kernels are looked for, and that nothing is fetched or loaded unless asked."""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import types
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import kernel_loader
from hf_efficient.ops.kernel_loader import find_variant, load_implementation, load_kernel
from hf_efficient.ops.sru import KERNEL


ROOT = Path(__file__).resolve().parents[2]
HERE = f"{platform.machine()}-{platform.system().lower()}"
BUILT = find_variant(KERNEL, "cpu")
needs_build = pytest.mark.skipif(BUILT is None, reason=f"{KERNEL} is not built: run `python kernels/build.py`")
needs_kernels = pytest.mark.skipif(
    getattr(importlib.util.find_spec("kernels"), "origin", None) is None, reason="no `kernels` library"
)


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    monkeypatch.delenv(kernel_loader.HUB_VARIABLE, raising=False)
    monkeypatch.delenv(kernel_loader.FOLDERS_VARIABLE, raising=False)
    monkeypatch.setattr(kernel_loader, "_hub", {"allowed": None, "trust_remote_code": False})


@pytest.fixture
def make_variant(tmp_path, monkeypatch):
    """`make_variant(name)` writes a variant of the kernel "toy" whose package says its folder's name."""
    monkeypatch.setattr(kernel_loader, "kernel_folders", lambda: [tmp_path])
    monkeypatch.setitem(kernel_loader.KERNELS, "toy", ("org/toy", 3))

    def make(folder: str, source: str = "where = __file__", **changes) -> Path:
        variant = tmp_path / "toy" / "build" / folder
        variant.mkdir(parents=True)
        metadata = {"id": f"_toy_{uuid.uuid4().hex}", "name": "toy", "version": 3, **changes}
        (variant / "metadata.json").write_text(json.dumps(metadata))
        (variant / "__init__.py").write_text(source)
        return variant

    return make


def test_a_variant_of_this_machine_is_found(make_variant, monkeypatch):
    for foreign in (
        "torch-stable-abi299-cpu-" + HERE,  # of a torch to come
        "torch-stable-abi211-cpu-pdp11-linux",
        f"torch-stable-abi211-cpu-{platform.machine()}-plan9",
        "torch211-cxx11-cpu-" + HERE,  # for one version of torch only
        "torch-stable-abi211-cu130-" + HERE,
    ):
        make_variant(foreign)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find_variant("toy", "cpu") is None
    assert find_variant("toy", "cuda") is None
    with pytest.raises(ImportError) as error:
        load_kernel("toy", "cpu")
    for reason in ("needs torch 2.99", "is for pdp11-linux", "plan9", "stable ABI", "is not for cpu", "not asked for"):
        assert reason in str(error.value)
    mine = make_variant("torch-stable-abi211-cpu-" + HERE)
    assert find_variant("toy", "cpu") == mine
    module = load_kernel("toy", "cpu")
    assert str(mine / "__init__.py") == module.where
    assert load_kernel("toy", "cpu") is module


@pytest.mark.parametrize(
    ("version", "found"), [("13.0", True), ("13.2", True), ("12.9", False), ("14.0", False), (None, False)], ids=str
)
def test_a_cuda_variant_serves_its_major_version(make_variant, monkeypatch, version, found):
    make_variant("torch-stable-abi211-cu130-" + HERE)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert (find_variant("toy", "cuda") is not None) == found
    assert find_variant("toy", "cpu") is None


MINE = f"torch-stable-abi211-cpu-{HERE}"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda metadata: metadata.unlink(), "no readable metadata.json"),
        (lambda metadata: metadata.write_text(metadata.read_text()[:20]), "no readable metadata.json .JSONDecodeError"),
        (lambda metadata: metadata.write_text("{}"), "no readable metadata.json .KeyError: 'id'"),
        (lambda metadata: metadata.write_text("[]"), "no readable metadata.json .TypeError"),
    ],
    ids=["missing", "cut-off", "without-an-id", "a-list"],
)
def test_a_damaged_variant_is_passed_over(make_variant, damage, reason):
    damage(make_variant(MINE) / "metadata.json")
    assert find_variant("toy", "cpu") is None
    with pytest.raises(ImportError, match=reason):
        load_kernel("toy", "cpu")


@pytest.mark.parametrize(
    "changes", [{"version": 2}, {"version": "3"}, {"name": "other"}], ids=["older", "a-string", "another-kernel"]
)
def test_a_variant_of_another_version_is_passed_over(make_variant, changes):
    make_variant(MINE, **changes)
    with pytest.raises(ImportError, match="this package needs version 3"):
        load_kernel("toy", "cpu")


@pytest.mark.parametrize(
    "source",
    ["raise OSError('libfoo.so: cannot open')", "def :", "raise RuntimeError"],
    ids=["OSError", "SyntaxError", "RuntimeError"],
)
def test_a_variant_that_fails_leaves_nothing_behind(make_variant, source):
    variant = make_variant(MINE, source=source)
    for _ in range(2):
        with pytest.raises(ImportError, match=r"cannot be imported .* `--force` makes a build anew"):
            load_kernel("toy", "cpu")
    (variant / "__init__.py").write_text("mended = True")
    assert load_kernel("toy", "cpu").mended


def test_a_kernel_without_what_the_op_needs_is_refused(make_variant):
    make_variant(MINE, source="forward_last = None")
    with pytest.raises(ImportError, match="has no forward, backward: it is older than this package"):
        load_implementation("toy", ("forward", "forward_last", "backward"), "cpu")


def test_threads_get_one_whole_module(make_variant):
    make_variant(MINE, source="import time; time.sleep(0.1); whole = True")
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(lambda _: load_kernel("toy", "cpu"), range(8)))
    assert all(module is modules[0] and module.whole for module in modules)


def test_named_folders_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_loader.FOLDERS_VARIABLE, os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert kernel_loader.kernel_folders() == [tmp_path / "a", tmp_path / "b", ROOT / "kernels"]


@pytest.mark.parametrize(
    ("package", "built_here"),
    [("hf_efficient", True), ("remote_code", True), ("hf_efficient", False)],
    ids=["the-repository", "remote-code", "site-packages"],
)
def test_a_folder_beside_the_package_is_ours_or_left_alone(tmp_path, monkeypatch, package, built_here):
    """In site-packages it is the `kernels` library; beside remote code it may be anything."""
    (tmp_path / "kernels").mkdir()
    if built_here:
        (tmp_path / "kernels" / "build.py").touch()
    monkeypatch.setattr(kernel_loader, "__file__", str(tmp_path / package / "ops" / "kernel_loader.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours = package == "hf_efficient" and built_here
    assert kernel_loader.kernel_folders() == ([tmp_path / "kernels"] if ours else [])
    command = "python kernels/build.py" if ours else "hf-efficient kernels build"
    assert kernel_loader.build_command() == command
    assert f"`{command}` builds it" in kernel_loader.how_to_build()


def test_the_users_cache_is_searched_after_the_clone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_loader.importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setenv(kernel_loader.FOLDERS_VARIABLE, str(tmp_path / "named"))
    monkeypatch.setattr(torch, "__version__", "2.13.1+cpu")
    folder = tmp_path / "hf_efficient" / "kernels" / "1.2-torch2.13"
    assert kernel_loader.cache_folder() == folder
    assert kernel_loader.kernel_folders() == [tmp_path / "named", ROOT / "kernels"]
    folder.mkdir(parents=True)
    assert kernel_loader.kernel_folders() == [tmp_path / "named", ROOT / "kernels", folder]
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    assert folder not in kernel_loader.kernel_folders()


def test_a_package_that_is_not_installed_has_no_cache(monkeypatch):
    def missing(name):
        raise kernel_loader.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kernel_loader.importlib.metadata, "version", missing)
    assert kernel_loader.cache_folder() is None


def test_the_hub_is_asked_only_when_allowed(monkeypatch):
    calls = []

    class Library:
        @staticmethod
        def get_kernel(repository, **options):
            calls.append((repository, options))
            if not options["trust_remote_code"]:
                raise ValueError("not from a trusted publisher")
            return sys

    monkeypatch.setitem(sys.modules, "kernels", Library)
    monkeypatch.setattr(kernel_loader, "kernel_folders", list)
    with pytest.raises(ImportError, match=f"not asked for from the Hub \\({kernel_loader.HUB_VARIABLE}=1\\)"):
        load_kernel(KERNEL, "cpu")
    assert not calls
    monkeypatch.setenv(kernel_loader.HUB_VARIABLE, "1")
    with pytest.raises(ImportError, match="version 1: not from a trusted publisher"):
        load_kernel(KERNEL, "cpu")
    kernel_loader.allow_hub_kernels(False)  # against the environment
    with pytest.raises(ImportError, match="not asked for"):
        load_kernel(KERNEL, "cpu")
    monkeypatch.delenv(kernel_loader.HUB_VARIABLE)
    kernel_loader.allow_hub_kernels(trust_remote_code=True)
    assert load_kernel(KERNEL, "cpu") is sys
    assert calls[-1] == (
        "hf-efficient/sru-recurrence",
        {"version": 1, "backend": "cpu", "trust_remote_code": True},
    )


@pytest.mark.parametrize("found", [None, types.ModuleType("kernels")], ids=["nothing", "a-folder"])
def test_without_the_library_the_hub_cannot_be_asked(found, monkeypatch):
    """In a clone of the repository its folder of that name is imported instead."""
    monkeypatch.setitem(sys.modules, "kernels", found)
    monkeypatch.setattr(kernel_loader, "kernel_folders", list)
    kernel_loader.allow_hub_kernels()
    with pytest.raises(ImportError, match=r"pip install 'hf_efficient\[kernels\]'"):
        load_kernel(KERNEL, "cpu")


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A fresh process, in which the package of this repository can be imported from anywhere."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


RUN_BOTH = """
    import sys, torch
    from hf_efficient.ops.backend import last_backend
    from hf_efficient.ops.sru import sru_recurrence
    u = torch.randn(2, 3, 3, 5, requires_grad=True)
    sru_recurrence(u)[0].sum().backward()
    print(last_backend("sru_recurrence"), last_backend("sru_recurrence_backward"), "kernels" in sys.modules)
"""


@needs_build
def test_a_variant_built_on_another_machine_is_taken(tmp_path):
    """The record says which compiler made it: that matters to who builds, not to who loads."""
    (tmp_path / "sru-recurrence" / "build").mkdir(parents=True)
    carried = tmp_path / "sru-recurrence" / "build" / BUILT.name
    shutil.copytree(BUILT, carried)
    record = json.loads((carried / "build_record.json").read_text())
    record["library"]["compiler"] = "c++ (Another 99) 99.0"
    (carried / "build_record.json").write_text(json.dumps(record))
    print_origin = (
        "import sys; print([m.__file__ for n, m in sys.modules.items() if n.startswith('_sru_recurrence_')][0])"
    )
    result = run(textwrap.dedent(RUN_BOTH) + print_origin, HF_EFFICIENT_KERNELS=str(tmp_path))
    assert result.stdout.split()[:2] == ["cpu", "cpu"], result.stderr
    assert str(carried) in result.stdout


DAMAGE = {
    "cut off": lambda library: os.truncate(library, library.stat().st_size // 2),
    "empty": lambda library: os.truncate(library, 0),
    "altered": lambda library: library.write_bytes(library.read_bytes()[:-9] + b"\0" + library.read_bytes()[-8:]),
    "gone": lambda library: library.unlink(),
}


@pytest.fixture
def make_damaged_variant(make_variant):
    """`make_damaged_variant(how)` writes a variant that ends the process when it is imported, as a cut-off one does."""

    def make(how: str) -> Path:
        variant = make_variant(MINE, source="import os; os.abort()")
        library = variant / "_toy.abi3.so"
        library.write_bytes(bytes(range(1, 200)))
        checksum = hashlib.sha256(library.read_bytes()).hexdigest()
        (variant / kernel_loader.RECORD).write_text(json.dumps({"file": library.name, "sha256": checksum}))
        assert find_variant("toy", "cpu") == variant
        DAMAGE[how](library)
        return variant

    return make


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_library_is_not_loaded(make_damaged_variant, how):
    make_damaged_variant(how)
    assert find_variant("toy", "cpu") is None
    with pytest.raises(ImportError, match=r"has (a damaged|lost its) library, _toy\.abi3\.so"):
        load_kernel("toy", "cpu")


def test_a_damaged_library_makes_way_for_another(make_damaged_variant, make_variant):
    make_damaged_variant("cut off")
    whole = make_variant("torch-stable-abi210-cpu-" + HERE)  # without a record, as others build it
    assert find_variant("toy", "cpu") == whole


def test_a_damaged_record_is_named(make_damaged_variant):
    variant = make_damaged_variant("cut off")
    (variant / kernel_loader.RECORD).write_text("{")
    with pytest.raises(ImportError, match=r"has no readable build_record\.json .JSONDecodeError"):
        load_kernel("toy", "cpu")


@needs_build
def test_a_cut_off_kernel_leaves_the_work_to_torch_or_is_refused(tmp_path):
    carried = tmp_path / "kernels" / "sru-recurrence" / "build" / BUILT.name
    shutil.copytree(BUILT, carried)
    (library,) = carried.glob("*.abi3.so")
    DAMAGE["cut off"](library)
    shutil.copytree(ROOT / "hf_efficient", tmp_path / "hf_efficient")
    place = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path), "HF_EFFICIENT_KERNELS": str(tmp_path / "kernels")}
    result = run(RUN_BOTH, **place)
    assert result.stdout.split() == ["reference", "reference", "False"], result.stderr
    assert result.stderr.count("runs in plain torch") == 1
    refused = run(RUN_BOTH, **place, HF_EFFICIENT_BACKEND="cpu")
    assert refused.returncode == 1
    for said in (result.stderr, refused.stderr):
        assert f"has a damaged library, {library.name}" in said
        assert "`hf-efficient kernels build` builds it" in said
    assert "BackendUnavailableError" in refused.stderr


@needs_build
def test_a_built_kernel_is_used_and_quiet():
    result = run(RUN_BOTH)
    assert result.stdout.split() == ["cpu", "cpu", "False"]
    assert not result.stderr


@pytest.mark.parametrize("beside", ["nothing", "folder", "package"])
def test_without_a_kernel_torch_does_the_work_and_says_so_once(tmp_path, beside):
    """In a copy of the package, beside it a user's own folder or package named `kernels`, or nothing."""
    shutil.copytree(ROOT / "hf_efficient", tmp_path / "hf_efficient")
    if beside != "nothing":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / ("__init__.py" if beside == "package" else "notes.txt")).write_text("")
    result = run(RUN_BOTH, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == ["reference", "reference", "False"], result.stderr
    (line,) = result.stderr.splitlines()
    assert line.endswith(
        "runs in plain torch, since its 'cpu' kernel is not built: `hf-efficient kernels build` builds it."
    )


@needs_build
@needs_kernels
def test_the_kernels_library_serves_the_same_files(tmp_path):
    """`LOCAL_KERNELS` stands in for the Hub, so that the call is the one that is shipped."""
    shutil.copytree(ROOT / "hf_efficient", tmp_path / "hf_efficient")
    result = run(
        RUN_BOTH,
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
        HF_EFFICIENT_HUB_KERNELS="1",
        LOCAL_KERNELS=f"hf-efficient/sru-recurrence={BUILT.parents[1]}",
    )
    assert result.stdout.split() == ["cpu", "cpu", "True"], result.stderr
    assert "plain torch" not in result.stderr


@needs_build
@needs_kernels
def test_kernelize_puts_the_layer_in_place():
    """Training and inference through the `kernels` library: the same numbers, and our own dispatch did not run."""
    code = """
        import torch
        from pathlib import Path
        from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
        from hf_efficient import SruppConfig, SruppForCausalLM
        from hf_efficient.ops.backend import last_backend, use_backend
        import sys

        config = SruppConfig(vocab_size=11, hidden_size=16, projection_size=8, num_hidden_layers=2)
        model = SruppForCausalLM(config).eval()
        ids = torch.randint(0, 11, (2, 7))
        with use_backend("reference"):
            model(input_ids=ids, labels=ids).loss.backward()
            expected = {name: p.grad.clone() for name, p in model.named_parameters()}
            logits = model(input_ids=ids).logits
        model.zero_grad()
        layer = LocalLayerRepository(Path(sys.argv[1]), layer_name="SruRecurrence")
        mapping = {"SruRecurrence": {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: layer, Mode.INFERENCE: layer}}}
        with use_kernel_mapping(mapping, inherit_mapping=False):
            model = kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)
        with use_backend("cuda"):  # it would be refused
            torch.testing.assert_close(model(input_ids=ids).logits, logits)
            model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        print("replaced")
    """
    result = run(code.replace("sys.argv[1]", repr(str(BUILT))))
    assert result.stdout.split() == ["replaced"], result.stderr
