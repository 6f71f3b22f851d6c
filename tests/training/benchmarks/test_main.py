"""The one entry point of the benchmarks."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest

from training import benchmarks
from training.benchmarks import __main__ as entry


def test_list_names_every_benchmark_and_its_time(capsys):
    entry.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(entry.BENCHMARKS)
    assert all("minutes" in line for line in lines)


def test_every_module_with_a_command_line_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - {"__main__"}
    with_main = {name for name in modules if hasattr(importlib.import_module(f"training.benchmarks.{name}"), "main")}
    assert with_main == set(entry.BENCHMARKS)


def test_run_passes_the_options_on(monkeypatch):
    given = []
    monkeypatch.setattr(entry, "import_module", lambda *name: SimpleNamespace(main=given.append))
    entry.main(["run", "demo", "--short", "--result", "x.json"])
    entry.main(["run", "lm_comparison", "run", "--seed", "3"])
    assert given == [["--short", "--result", "x.json"], ["run", "--seed", "3"]]


@pytest.mark.parametrize("argv", [["run", "dmeo"], ["--lits"]], ids=["unknown-benchmark", "unknown-option"])
def test_mistakes_are_refused(argv):
    with pytest.raises(SystemExit):
        entry.main(argv)
