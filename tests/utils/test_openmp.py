"""How OpenMP's threads wait: chosen by programs that ask for it, before torch is loaded, and else left alone."""

import json
import os
import subprocess
import sys

import pytest

from hf_efficient.utils.openmp import SETTINGS


REPORT = f"; import json, os; print(json.dumps({{name: os.environ.get(name) for name in {list(SETTINGS)!r}}}))"


def settings(program, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", program + REPORT]
    result = subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_program_that_imports_the_module_gets_threads_that_sleep():
    loaded = "; import sys; assert 'torch' not in sys.modules"
    assert settings("from hf_efficient.utils import openmp" + loaded) == SETTINGS


@pytest.mark.parametrize(
    "own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=lambda own: next(iter(own))
)
def test_a_setting_of_the_users_own_stays_alone(own):
    assert settings("from hf_efficient.utils import openmp", **own) == dict.fromkeys(SETTINGS) | own


def test_nothing_is_set_where_it_comes_too_late_or_nobody_asked():
    assert settings("import torch; from hf_efficient.utils import openmp") == dict.fromkeys(SETTINGS)
    assert settings("import hf_efficient; hf_efficient.TupeConfig") == dict.fromkeys(SETTINGS)
