"""Flattened code: what transformers' scanner finds is all that the code needs, and the code still runs."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hf_efficient.auto import FAMILIES
from hf_efficient.hub.flat_code import flatten_code


PACKAGE = {
    "__init__.py": "",
    "models/__init__.py": "",
    "models/toy/__init__.py": "",
    "models/toy/modeling_toy.py": '''"""Modèle. It mentions import toyzoo, as text."""
import math
from ...ops.scan import (  # kept
    double as twice,  # comment
    triple,
)
from ...ops import tables, names as words
from .configuration_toy import SIZE as GRÖSSE; OTHER = GRÖSSE


def late():
    from toyzoo.ops.late import LATE
    from ...ops import tables as again
    return LATE, again.TABLE


VALUE = (twice(GRÖSSE), triple(OTHER), tables.TABLE, words.NAME, math.floor(1.5))
''',
    "models/toy/configuration_toy.py": "SIZE = 3\n",
    "ops/__init__.py": "shortcut = 1\n",
    "ops/scan.py": "from .factor import *\n\ndef double(x): return TWO * x\ndef triple(x): return 3 * x\n",
    "ops/factor.py": "TWO = 2\n",
    "ops/tables.py": "TABLE = 5\n",
    "ops/names.py": "NAME = 'n'\r\n",
    "ops/late.py": "LATE = 7\n",
    "ops/unused.py": "raise RuntimeError\n",
}  # fmt: skip


@pytest.fixture
def toyzoo(tmp_path, monkeypatch):
    """Writes the toy package, with changes, where it can be imported."""

    def write(**changes: str) -> None:
        for name, source in (PACKAGE | changes).items():
            path = tmp_path / "toyzoo" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.encode())

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in ("toyzoo", "flat")]:
        del sys.modules[name]


def test_a_flat_folder_is_complete_and_runs(toyzoo, tmp_path):
    toyzoo()
    files = flatten_code(["toyzoo.models.toy.configuration_toy", "toyzoo.models.toy.modeling_toy"])
    stems = ("configuration_toy", "factor", "late", "modeling_toy", "names", "scan", "tables")
    assert list(files) == [f"{stem}.py" for stem in stems]
    (tmp_path / "flat").mkdir()
    for name, source in files.items():
        (tmp_path / "flat" / name).write_text(source, encoding="utf-8")

    found = get_relative_import_files(tmp_path / "flat" / "modeling_toy.py")
    assert {Path(file).name for file in found} == set(files) - {"modeling_toy.py"}
    flat = import_module("flat.modeling_toy")
    assert not any(name.startswith("toyzoo.ops") and name != "toyzoo.ops" for name in sys.modules)
    assert flat.VALUE == (6, 9, 5, "n", 1)
    assert flat.late() == (7, 5)
    assert '"""Modèle. It mentions import toyzoo, as text."""\nimport math\n' in files["modeling_toy.py"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from ...ops import shortcut", "'shortcut' comes out of the __init__.py of toyzoo.ops"),
        ("from ...ops import *", r"'\*' comes out of the __init__.py"),
        ("import toyzoo.ops.scan", "write `from toyzoo.module import name`"),
        ("if True: from ...ops.scan import double", "only at the start of a line"),
        ("from .absent import x", "there is no module toyzoo.models.toy.absent"),
        ("from ...ops.modeling_toy import x", "would both become modeling_toy.py"),
    ],
)
def test_what_cannot_be_flattened_is_refused_with_its_place(toyzoo, line, message):
    toyzoo(**{"models/toy/modeling_toy.py": f"\n{line}\n", "ops/modeling_toy.py": ""})
    with pytest.raises(ValueError, match=message) as error:
        flatten_code(["toyzoo.models.toy.modeling_toy"])
    assert "line 2" in str(error.value) or "would both" in str(error.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_code_of_every_family_needs_transformers_and_torch_alone(model_type, tmp_path):
    for name, source in flatten_code(FAMILIES[model_type].modules).items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    needed = {package for file in tmp_path.iterdir() for package in get_imports(file)}
    assert needed - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub", "safetensors"}
    modeling = FAMILIES[model_type].modules[1].rpartition(".")[2]
    found = {Path(file).name for file in get_relative_import_files(tmp_path / f"{modeling}.py")}
    assert found | {f"{modeling}.py"} == {file.name for file in tmp_path.iterdir()}
