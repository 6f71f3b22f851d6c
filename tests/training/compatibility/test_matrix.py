"""The command that runs the matrix: with consumers that are made up, and with a few that are there."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from hf_efficient.auto import FAMILIES
from training.compatibility import __main__ as command
from training.compatibility.consumers import CONSUMERS, Consumer, run_cell
from training.compatibility.subjects import Refused, Subject, assert_close, outputs_of
from training.compatibility.table import FAILED, NOT_RUN, REFUSED, YES, read


def answer(subject, folder):
    assert folder.is_dir()
    assert not list(folder.iterdir())
    return f"took {subject.family}"


def refuse(subject, folder):
    raise Refused("no such head")


def fail(subject, folder):
    raise KeyError(f"lost in {folder}/model")


def consumer(check, package="transformers", module="transformers"):
    return Consumer("made up", package, module, check)


@pytest.mark.parametrize(
    ("check", "result", "detail"),
    [
        (answer, YES, "took tupe"),
        (refuse, REFUSED, "no such head"),
        (fail, FAILED, "KeyError: 'lost in FOLDER/model'"),
    ],
)
def test_a_cell_says_what_came_of_it(check, result, detail):
    cell = run_cell(consumer(check), "tupe")
    assert (cell.result, cell.detail, cell.family) == (result, detail, "tupe")
    assert cell.version[0].isdigit()
    assert len(cell.date) == 10


@pytest.mark.parametrize(
    ("package", "module"), [("no-such", "no_such"), ("transformers", "no_such"), ("no-such", "os")]
)
def test_a_consumer_that_is_not_installed_is_not_run(package, module):
    cell = run_cell(consumer(fail, package, module), "tupe")
    assert (cell.result, cell.version) == (NOT_RUN, "-")


def test_the_page_is_written_and_a_part_of_it_renewed(tmp_path, capsys):
    page = tmp_path / "compatibility.md"
    one, other = (Consumer(name, "torch", "torch", answer) for name in ("DDP", "torch.compile"))
    in_process = lambda consumer, families: [run_cell(consumer, family) for family in families]  # noqa: E731
    assert len(command.run([one, other], ["tupe", "srupp"], page, in_process)) == 4
    renewed = Consumer("DDP", "torch", "torch", refuse)
    assert len(command.run([renewed], ["srupp"], page, in_process)) == 1
    found = {(cell.consumer, cell.family): cell.result for cell in read(page.read_text())}
    assert found == {
        ("DDP", "tupe"): YES,
        ("DDP", "srupp"): REFUSED,
        ("torch.compile", "tupe"): YES,
        ("torch.compile", "srupp"): YES,
    }
    assert "refused  DDP" in capsys.readouterr().out


def test_a_process_that_dies_costs_its_own_cell(monkeypatch):
    """The next family is run in a new process."""
    calls = []

    def die_at_srupp(words, **_):
        families = words[-1].split(",")
        calls.append(families)
        file = Path(words[words.index("--worker") + 1])
        for family in families:
            if family == "srupp":
                return subprocess.CompletedProcess(words, -11)
            cell = {"consumer": "made up", "version": "1", "date": "2026-11-28", "family": family, "result": YES}
            with file.open("a") as lines:
                lines.write(json.dumps({**cell, "detail": ""}) + "\n")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(command.subprocess, "run", die_at_srupp)
    cells = command.run_consumer(consumer(answer), ["tupe", "srupp", "terraformer"])
    assert [cell.result for cell in cells] == [YES, FAILED, YES]
    assert cells[1].detail == "its process ended with -11"
    assert calls == [["tupe", "srupp", "terraformer"], ["terraformer"]]


def test_mistakes_are_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["--consumers", "peft,nobody"])
    assert "argument --consumers: there is no 'nobody', but Auto classes" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_differences_are_seen(family):
    subject = Subject(family)
    model = subject.model()
    inputs = subject.inputs(model)
    outputs = outputs_of(model, inputs)
    assert assert_close(outputs_of(subject.model(), inputs), outputs, 1e-6) == "equal to 1e-06"
    changed = {name: value + 0.1 * value.abs().max() for name, value in outputs.items()}
    with pytest.raises(AssertionError, match=r"differ by 0\.1 of the largest"):
        assert_close(changed, outputs, 0.01)
    with pytest.raises(AssertionError, match="differ by nan"):
        assert_close({name: value * float("nan") for name, value in outputs.items()}, outputs, 0.01)


# The quick ones; `make matrix` runs all.
@pytest.mark.parametrize(
    ("name", "family", "result"),
    [
        ("pipelines", "terraformer", YES),
        ("pipelines", "tupe", YES),
        ("Seq2SeqTrainer", "tupe", REFUSED),
        ("peft", "scaling_transformer", YES),
    ],
)
def test_cells(name, family, result):
    if importlib.util.find_spec(CONSUMERS[name].module) is None:
        pytest.skip(f"{CONSUMERS[name].package} is not installed")
    cell = run_cell(CONSUMERS[name], family)
    assert cell.result == result, cell.detail
