"""Who imports whom, and what `import hf_efficient` costs."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hf_efficient.auto import FAMILIES


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_efficient"

# Folder -> the folders that it may import besides itself, as CONTRIBUTING.md draws them: an arrow is an import. The two
# files at the top of the package stand for themselves. The console command imports what it runs by name.
ARROWS = {
    "utils": set(),
    "ops": set(),
    "modules": {"ops", "utils"},
    "models": {"modules", "ops", "utils"},
    "objectives": {"modules", "ops", "utils"},
    "data": {"utils"},
    "metrics": {"utils"},
    "trainer": {"data", "utils"},
    "auto": {"models", "utils"},
    "cli": {"utils"},
    "hub": {"auto", "models", "modules", "ops", "utils"},
    "__init__": {"auto", "hub", "models", "modules", "ops", "trainer", "utils"},
}
# Packages that are heavy or optional: imported where they are used, never with the package.
HEAVY = ("datasets", "evaluate", "sklearn", "scipy", "matplotlib", "peft", "kernels", "triton", "accelerate", "pandas")


def layer_of(module: str) -> str:
    """The layer of a module of the package; `hf_efficient.models.tupe.x` is in `models`, and so on."""
    layer = (module.split(".")[1:] or ["__init__"])[0]
    assert layer in ARROWS, f"{module} is in no layer: give its file or folder one in {Path(__file__).name}."
    return layer


def imports_of(source: str, module: str, is_package: bool) -> list[str]:
    """Full names of the modules, or of names in modules, that a module imports, at its top or inside functions."""
    found = []
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            found += [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return found


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """List the imports of a module that break the rules."""
    layer, wrong = layer_of(module), []
    for name in imports_of(source, module, is_package):
        top = name.split(".")[0]
        if top in ("training", "tests"):
            wrong.append(f"{module} imports {name}")
        elif top == PACKAGE:
            target = layer_of(name)
            other_family = layer == target == "models" and name.split(".")[2] != module.split(".")[2]
            if (target != layer and target not in ARROWS[layer]) or other_family:
                wrong.append(f"{module} ({layer}) imports {name} ({target})")
        elif layer == "ops" and top not in ("torch", "kernels") and top not in sys.stdlib_module_names:
            wrong.append(f"{module} imports {name}, but ops need torch alone, and `kernels` where it is asked for")
    return wrong


def modules():
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), is_package, path.read_text()


def test_arrows_of_the_design():
    wrong = [fault for module, is_package, source in modules() for fault in faults(source, module, is_package)]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_where_they_are_used():
    for module, _, source in modules():
        tops = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = imports_of("\n".join(ast.unparse(node) for node in tops), module, False)
        found = {name.split(".")[0] for name in names} & set(HEAVY)
        # A metric is a class of `evaluate`, and Trainer itself needs accelerate.
        needed = {"metrics": {"evaluate", "datasets"}, "trainer": {"accelerate"}}
        assert not found - needed.get(layer_of(module), set()), module


def test_the_ground_floor_needs_torch_and_transformers():
    # numpy comes with transformers, and knows the records of trax's files.
    allowed = {"torch", "transformers", "safetensors", "numpy", PACKAGE, *sys.stdlib_module_names}
    for module, is_package, source in modules():
        if module.startswith(f"{PACKAGE}.utils"):
            tops = {name.split(".")[0] for name in imports_of(source, module, is_package)}
            assert tops <= allowed, f"{module} imports {sorted(tops - allowed)}"


def test_every_module_is_looked_at():
    names = {module for module, _, _ in modules()}
    modeling = {module for family in FAMILIES.values() for module in family.modules}
    assert {PACKAGE, f"{PACKAGE}.auto", f"{PACKAGE}.ops.backend", *modeling} <= names
    found = imports_of((ROOT / PACKAGE / "models/tupe/modeling_tupe.py").read_text(), f"{PACKAGE}.models.tupe.x", False)
    assert f"{PACKAGE}.ops.position_bias.untied_position_bias" in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.x", "from ..models.tupe import modeling_tupe"),
        ("ops.x", "import numpy"),
        ("ops.x", "def f():\n    from transformers import AutoModel"),
        ("models.tupe.x", "from ...objectives.mlm import MaskedLM"),
        ("models.tupe.x", "from ... import auto"),
        ("models.tupe.x", "from ..srupp.modeling_srupp import SruppModel"),
        ("objectives.x", "from hf_efficient.models.tupe.modeling_tupe import TupeModel"),
        ("objectives.x", "from ..trainer import EfficientTrainer"),
        ("data.x", "from ..metrics import glue_metric"),
        ("ops.x", "from ..utils.process import bf16_support"),
        ("modules.x", "from ..models.tupe.modeling_tupe import TupeModel"),
        ("utils.x", "from ..ops.sru import sru_recurrence"),
        ("metrics.x", "import hf_efficient.data.corpus"),
        ("trainer.x", "from ..hub import export"),
        ("trainer.x", "from ..objectives.mlm import MaskedLMObjective"),
        ("auto", "from .ops.backend import use_backend"),
        ("hub.x", "from ..trainer import EfficientTrainer"),
        ("hub.x", "import training.pretrain"),
        ("models.tupe.x", "import importlib\nimportlib.import_module('hf_efficient.auto')"),
    ],
)
def test_the_check_sees_each_kind_of_fault(module, source):
    assert len(faults(source, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.x", "import math, torch\nfrom torch import nn\nfrom .backend import select"),
        ("models.tupe.x", "from ...ops.backend import select\nfrom .configuration_tupe import TupeConfig"),
        ("modules.x", "from ..ops.sru import sru_recurrence\nfrom ..utils.cache_naming import CACHE_NAME"),
        ("models.tupe.x", "from ...modules.losses import cross_entropy"),
        ("hub.x", "from ..auto import FAMILIES\nfrom .flat_code import flatten_code\nfrom ..models.tupe import x"),
        (
            "trainer.x",
            "from .checkpoints import find_damage\nfrom ..data.corpus import load_corpus\nimport transformers",
        ),
    ],
)
def test_the_check_lets_through_what_the_design_allows(module, source):
    assert not faults(source, f"{PACKAGE}.{module}")


def test_a_file_without_a_layer_is_refused():
    with pytest.raises(AssertionError, match="is in no layer"):
        layer_of(f"{PACKAGE}.helpers")


def scripts():
    """The files of `training`, and the names of the modules and of what they import of this repository."""
    for path in sorted((ROOT / "training").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imported = imports_of(path.read_text(), module, path.stem == "__init__")
        yield path, [name for name in imported if name.split(".")[0] in (PACKAGE, "training", "tests", "kernels")]


def test_scripts_import_the_package_and_never_each_other():
    """But for the quickstart's two parts, which call them, and the benchmarks."""
    seen = []
    for path, imported in scripts():
        assert not [name for name in imported if name.split(".")[0] in ("tests", "kernels")], path
        if path.parent.name == "training" and path.stem not in ("__init__", "quickstart", "quickstart_all"):
            seen.append(path.stem)
            assert not [name for name in imported if name.split(".")[0] == "training"], path
    assert {"pretrain", "train_lm", "finetune_glue", "train_tokenizer", "count_rare_words"} <= set(seen)


def test_scripts_choose_how_openmp_waits_before_anything_loads_torch():
    for path, _ in scripts():
        if path.parent.name == "training" and "__main__" in path.read_text():
            first = next(
                node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
            )
            assert ast.unparse(first) == "from hf_efficient.utils import openmp", path


def test_scripts_take_public_names_and_leave_the_search_path_alone():
    for path, imported in scripts():
        private = [name for name in imported if any(part[0] == "_" and part[1] != "_" for part in name.split("."))]
        assert not private, path
        assert "sys.path" not in path.read_text(), path


def test_kernels_need_torch_alone():
    """Tests included; benchmarks take their base class, and nothing else, from the `kernels` library."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        imported = imports_of(path.read_text(), f"own.{path.stem}", False)
        if "benchmarks" in path.parts:
            imported = [name for name in imported if name != "kernels.benchmark.Benchmark"]
        tops = {name.split(".")[0] for name in imported}
        # A test of loading by the `kernels` library is skipped where there is none.
        allowed = {
            "torch",
            "own",
            "_build",
            "kernel_testing",
            *({"pytest", "kernels"} if {"tests", "kernel_testing"} & set(path.parts) else ()),
        }
        assert not tops - allowed - set(sys.stdlib_module_names), path


IMPORT_AND_REPORT = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise OSError("a socket was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
real_socket = socket.socket
class NoSocket(real_socket):
    def __init__(self, *args, **kwargs):
        refuse()
import torch, transformers
from transformers import AutoModel
socket.socket = NoSocket

def libraries():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if ".so" in line}

before, loaded = libraries(), set(sys.modules)
import hf_efficient
json.dump(
    {
        "libraries": sorted(libraries() - before),
        "modules": sorted(set(sys.modules) - loaded),
        "operators": [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_efficient::")],
        "compilers": sorted({"torch._dynamo.convert_frame", "torch._inductor.compile_fx"} & set(sys.modules) - loaded),
    },
    open(sys.argv[1], "w"),
)
"""


def run_python(*arguments, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT, **kwargs)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of loaded libraries that Linux keeps")
def test_import_is_quiet_and_loads_little(tmp_path):
    result = run_python("-c", IMPORT_AND_REPORT, tmp_path / "report.json")
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")
    report = json.loads((tmp_path / "report.json").read_text())
    ours = [name for name in report["modules"] if name.startswith(PACKAGE)]
    assert f"{PACKAGE}.auto" in ours
    assert not [name for name in ours if "modeling" in name or ".ops" in name or "convert" in name]
    loaded = {name.split(".")[0] for name in report["modules"]}
    assert not loaded & set(HEAVY)
    assert not report["operators"]
    own = ("/torch/", "/transformers/", "/tokenizers/", "/safetensors/", "/lib-dynload/")  # transformers' own
    assert not [path for path in report["libraries"] if not any(folder in path for folder in own)]
    assert not report["compilers"]


def test_import_needs_no_heavy_package():
    """With each of them missing, `import hf_efficient` and its models still work."""
    block = f"""
import sys, torch
for name in {[name for name in HEAVY if name not in ("accelerate", "triton", "kernels")]}:
    sys.modules[name] = None
import hf_efficient
sizes = {{"vocab_size": 9, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 3}}
tupe = hf_efficient.TupeForMaskedLM(hf_efficient.TupeConfig(**sizes))
srupp = hf_efficient.SruppForCausalLM(hf_efficient.SruppConfig(**sizes, projection_size=3))
print(*(tuple(model(torch.tensor([[0, 5]])).logits.shape) for model in (tupe, srupp)))
"""
    result = run_python("-c", block)
    assert result.stdout.strip() == "(1, 2, 9) (1, 2, 9)", result.stderr


def test_models_are_registered_with_the_first_that_needs_them():
    """Until then neither torch nor transformers is loaded, and nothing of ours is loaded twice."""
    light = "import sys, hf_efficient, hf_efficient.cli; print({'torch', 'transformers'} & set(sys.modules) or 'none')"
    assert run_python("-c", light).stdout.strip() == "none"
    by_transformers = (
        "import hf_efficient; from transformers import AutoConfig; print(AutoConfig.for_model('tupe').model_type)"
    )
    assert run_python("-c", by_transformers).stdout.strip() == "tupe"
    by_own_module = """
import sys
import hf_efficient.utils.carried_code as first
from transformers import AutoConfig
config = AutoConfig.for_model("srupp")
print(isinstance(config, first.CarriedCodeMixin), first.CarriedCodeMixin.write_code is not None, first.__spec__.name)
"""
    assert run_python("-c", by_own_module).stdout.split() == ["True", "True", "hf_efficient.utils.carried_code"]


def cpu_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_python("-c", code).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_costs_little_more_than_transformers():
    """Processor time, the best of some interleaved runs: as many as are needed for one quiet moment each, at most 6."""
    peer, ours = [], []
    for _ in range(6):
        peer.append(cpu_seconds("import torch, transformers; from transformers import AutoModel"))
        ours.append(cpu_seconds("import hf_efficient"))
        if min(ours) <= 1.25 * min(peer):
            break
    assert min(ours) <= 1.25 * min(peer), f"import hf_efficient: {min(ours):.2f} s, transformers: {min(peer):.2f} s"
