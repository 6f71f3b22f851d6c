"""The GPU agenda: parts that fail, hang, crash or lack something, kills, and a rehearsal of the whole."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from training.benchmarks import gpu_agenda
from training.benchmarks.environment import ROOT
from training.benchmarks.gpu import context as gpu_context
from training.benchmarks.gpu import race as gpu_race
from training.benchmarks.gpu_agenda import Part


TOYS = """
import os, subprocess, sys, time
from pathlib import Path


def good(context):
    with (context.out / "calls.txt").open("a") as file:
        file.write("good ")
    return {"line": "all is well"}


def fail(context):
    context.save({"line": "half of it"})
    raise ValueError("it is wrong")


def crash(context):
    os.kill(os.getpid(), 11)


def hang(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.out / "pids.txt").write_text(f"{os.getpid()} {child.pid}")
    context.save({"line": "half of it"})
    time.sleep(600)


def inputs(context):
    context.needs_gpu("the rest")
    return {"line": "inputs"}
"""


def toy(name: str, **settings) -> Part:
    return Part(name, "a toy", f"agenda_toys:{name}", **{"seconds": 1, "limit": 30, **settings})


class WorkerInThisProcess(gpu_agenda.Worker):
    """Runs parts at once, for tests of what the agenda keeps of them and in which order it takes them."""

    def __init__(self, log):
        pass

    def wait_until_ready(self, seconds):
        pass

    def run(self, settings):
        gpu_context.run_as_told(settings)

    def end(self):
        pass


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """A folder for results, and toys in place of what takes long."""
    (tmp_path / "agenda_toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_agenda, "PRELOADED", "agenda_toys")
    monkeypatch.setattr(gpu_agenda, "describe", lambda: {"machine": {"gpu": None}})
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "out"
    signal.signal(signal.SIGTERM, handler)
    sys.modules.pop("agenda_toys", None)


@pytest.fixture
def at_once(monkeypatch, toys):
    """Parts run in this process; each in one of its own would take a second and a half to start."""
    monkeypatch.setattr(gpu_agenda, "Worker", WorkerInThisProcess)
    monkeypatch.syspath_prepend(toys.parent)


def run(out, *parts: Part, more=()) -> tuple[int, dict]:
    """Exit code and records of a rehearsal of some parts."""
    gpu_agenda.PARTS = parts
    code = 0
    try:
        gpu_agenda.main(["--rehearse", "--out", str(out), *more])
    except SystemExit as end:
        code = int(end.code)
    return code, json.loads((out / "agenda.json").read_text())["parts"]


@pytest.fixture(autouse=True)
def _parts(monkeypatch):
    monkeypatch.setattr(gpu_agenda, "PARTS", gpu_agenda.PARTS)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_dead(pids, seconds=20.0):
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < until, f"{pids} live on"
        time.sleep(0.1)


def test_no_part_stops_another(toys, monkeypatch, capfd):
    # Timed parts are given their time once they are ready, however long that takes.
    monkeypatch.setattr(gpu_agenda, "REHEARSAL_LIMIT", 4)
    parts = [toy(name, timed=True) for name in ("fail", "crash", "hang", "inputs", "good")]
    parts.insert(0, Part("lacking", "a toy", "agenda_toys:good", 1, 9, ("text",), timed=True))
    toys.mkdir()
    code, found = run(toys, *parts, more=["--commit", "abc", "--pack_folder", str(toys)])
    assert code == 1
    expected = ["missing", "failed", "failed", "timed out", "rehearsed", "rehearsed"]
    assert [found[part.name]["state"] for part in parts] == expected
    assert found["lacking"]["line"].endswith("text.safetensors is not there: `--pack` writes it")
    assert found["fail"]["line"] == "ValueError: it is wrong"
    assert found["fail"]["partial"] == found["hang"]["partial"] == {"line": "half of it"}
    assert found["crash"]["line"] == "the process ended with exit code -11"
    assert found["hang"]["line"] == "killed after 4 seconds, having found: half of it"
    assert found["inputs"]["line"] == "inputs (not without a GPU: the rest)"
    assert found["good"]["result"] == {"line": "all is well"}
    assert {record["commit"] for record in found.values()} == {"abc"}
    assert not any(record["ran_on_gpu"] for record in found.values())
    assert_dead([int(pid) for pid in (toys / "pids.txt").read_text().split()])
    printed = capfd.readouterr().out
    assert "a rehearsal on a CPU, which measures nothing; commit abc" in printed
    assert len([line for line in printed.splitlines() if line.startswith("crash ")]) == 1
    assert "ValueError: it is wrong" in (toys / "agenda.log").read_text()


def test_what_is_finished_is_not_run_again(toys, at_once):
    assert run(toys, toy("good"), toy("fail"))[0] == 1
    later = Part("later", "a toy", "agenda_toys:good", 1, 30)
    fixed = Part("fail", "a toy", "agenda_toys:good", 1, 30)
    code, found = run(toys, toy("good"), fixed, later, more=["--only", "good", "fail", "later"])
    assert code == 0
    assert (toys / "calls.txt").read_text() == "good good good "
    assert {record["state"] for record in found.values()} == {"rehearsed"}
    assert [*found] == ["good", "fail", "later"]
    log = (toys / "agenda.log").read_text()
    assert log.rindex("] later: a toy") < log.rindex("] fail: a toy"), "what was never tried comes first"


def test_killed_it_leaves_no_process_and_goes_on(toys, monkeypatch):
    """By SIGKILL, as a machine ends that is taken back."""
    program = f"""
        from training.benchmarks import gpu_agenda
        from training.benchmarks.gpu_agenda import Part
        gpu_agenda.PRELOADED = "agenda_toys"
        gpu_agenda.PARTS = [Part(n, "a toy", "agenda_toys:" + n, 1, 30) for n in ("good", "hang", "inputs")]
        gpu_agenda.main(["--rehearse", "--out", {str(toys)!r}])
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
    until = time.monotonic() + 120
    while not (toys / "pids.txt").exists() or not (toys / "pids.txt").read_text().count(" "):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert_dead([int(pid) for pid in (toys / "pids.txt").read_text().split()])
    interrupted = json.loads((toys / "agenda.json").read_text())["parts"]
    assert {name: record["state"] for name, record in interrupted.items()} == {"good": "rehearsed", "hang": "running"}
    hang = Part("hang", "a toy", "agenda_toys:good", 1, 30)
    monkeypatch.setattr(gpu_agenda, "Worker", WorkerInThisProcess)
    monkeypatch.syspath_prepend(toys.parent)
    code, found = run(toys, toy("good"), hang, toy("inputs"))
    assert code == 0
    assert {record["state"] for record in found.values()} == {"rehearsed"}
    assert (toys / "calls.txt").read_text() == "good good "


EVENTS = """
import os
import time
from pathlib import Path


def note(event):
    with Path(__file__).with_name("events.txt").open("a") as file:
        file.write(f"{event} ")


def untimed(context):
    return {}


def timed(context):
    note("begin")
    time.sleep(0.3)
    note("end")
    return {}


time.sleep(float(os.environ["SECONDS_OF_IMPORT"]))
note("ready")
"""


def test_no_process_is_starting_while_a_part_is_timed(toys, monkeypatch):
    """The processes of timed parts start beside the part before them, and have finished their imports."""
    (toys.parent / "agenda_toys.py").write_text(EVENTS)
    events = toys.parent / "events.txt"

    class NotingWorker(gpu_agenda.Worker):
        def __init__(self, log):
            with events.open("a") as file:
                file.write("start ")
            # Each takes longer than the one before it, so that none is ready just because its predecessor is.
            monkeypatch.setenv("SECONDS_OF_IMPORT", str(0.4 * events.read_text().count("start")))
            super().__init__(log)

    monkeypatch.setattr(gpu_agenda, "Worker", NotingWorker)
    timed = [Part(name, "a toy", "agenda_toys:timed", 1, 30, timed=True) for name in ("first", "second", "third")]
    code, found = run(toys, timed[0], toy("untimed"), *timed[1:], Part("last", "a toy", "agenda_toys:untimed", 1, 30))
    assert code == 0
    assert {record["state"] for record in found.values()} == {"rehearsed"}
    seen = events.read_text().split()
    assert seen[:4] == ["start", "ready", "begin", "end"], "nothing precedes the first part"
    assert seen[4:8] == 4 * ["start"], "the untimed part, two timed ones, and the next untimed one"
    begins = [index for index, event in enumerate(seen) if event == "begin"]
    assert len(begins) == 3
    for begin in begins:
        assert seen[begin + 1] == "end"
        assert seen[:begin].count("start") == seen[:begin].count("ready")


@pytest.mark.parametrize(("required", "expected"), [(True, 1), (False, 0)], ids=["required", "optional"])
def test_a_required_part_that_lacks_something_fails_the_agenda(toys, at_once, required, expected):
    lacking = Part("lacking", "a toy", "agenda_toys:good", 1, 30, ("text",), required=required)
    toys.mkdir()
    more = ["--pack_folder", str(toys)]
    code, found = run(toys, lacking, toy("good"), more=more)
    assert {name: record["state"] for name, record in found.items()} == {"lacking": "missing", "good": "rehearsed"}
    assert code == expected
    assert run(toys, lacking, toy("good"), more=[*more, "--only", "good"])[0] == 0


def test_the_kernels_are_required():
    assert [part.name for part in gpu_agenda.PARTS if part.required] == ["load"]


def test_parts_that_measure_time_are_marked():
    modules = (gpu_agenda.SPEED, gpu_agenda.MODELS, gpu_agenda.RACE, gpu_agenda.DECODE)
    measuring = {
        part.name
        for part in gpu_agenda.PARTS
        if part.function.startswith((*modules, f"{gpu_agenda.SPARSE_FF}:measure"))
    }
    assert {part.name for part in gpu_agenda.PARTS if part.timed} == measuring


def test_what_there_is_no_time_for_is_left(toys, at_once):
    code, found = run(toys, toy("good"), more=["--minutes", "0"])
    assert code == 0
    assert (found["good"]["state"], found["good"]["line"]) == ("left", "it wants 2 seconds, and 0 are left")
    assert run(toys, toy("good"))[1]["good"]["state"] == "rehearsed"


def test_a_rehearsal_does_not_stand_beside_measurements(toys, at_once):
    run(toys, toy("good"))
    content = json.loads((toys / "agenda.json").read_text())
    (toys / "agenda.json").write_text(json.dumps({**content, "rehearsal": False}))
    with pytest.raises(SystemExit, match="is of no rehearsal: name another --out"):
        gpu_agenda.main(["--rehearse", "--out", str(toys)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path):
    with pytest.raises(SystemExit, match="no GPU that torch can use"):
        gpu_agenda.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_where_results_go(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_agenda.parse([]).out == ROOT / "training" / "results" / "gpu"
    assert gpu_agenda.parse(["--rehearse"]).out == ROOT / "runs" / "gpu_rehearsal"
    monkeypatch.setenv("OUT", "/somewhere")
    assert str(gpu_agenda.parse([]).out) == "/somewhere"


def test_the_table_of_parts_holds_together(capsys):
    gpu_agenda.main(["--list"])
    printed = capsys.readouterr().out
    for part in gpu_agenda.PARTS:
        module, name = part.function.split(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
        assert set(part.needs) <= set(gpu_context.NEEDS)
        assert part.seconds <= part.limit
        assert part.name in printed
    assert sum(part.seconds for part in gpu_agenda.PARTS) <= 10 * 60


def test_a_packed_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"first "))
    (folder / "b.txt").write_bytes(b"second, of which the end is left out")
    assert "12 bytes of texts" in gpu_race.write_pack(folder, tmp_path / "pack", size=12)
    with safe_open(tmp_path / "pack" / "text.safetensors", framework="pt") as file:
        assert bytes(file.get_tensor("text").tolist()) == b"first second"
    with pytest.raises(SystemExit, match="cannot be read"):
        gpu_race.write_pack(tmp_path / "nothing", tmp_path / "pack")


def test_models_race_on_the_same_text_in_the_same_order(make_context, tmp_path):
    gpu_race.write_pack(ROOT / "README.md", tmp_path)
    race, source = gpu_race.read_text(make_context(), rows=2, length=16)
    assert source == "README.md"
    one, other = (next(race.batches()) for _ in range(2))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["input_ids"][:, 1:], one["labels"][:, :-1])
    assert bytes(race.train.tolist()) + bytes(race.validation.tolist()) == (ROOT / "README.md").read_bytes()
    figures = gpu_race.train(race, "gpt2", gpu_race.build_racer, 1e-3, 2, seconds=0.5)
    assert figures["steps"] >= 1
    assert 5 < figures["bits_per_byte"] < 9


def assert_small(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert sum(path.stat().st_size for path in files) < 16 << 20


def test_a_rehearsal_of_some_parts(tmp_path):
    """Of the real ones, each in a process that has imported what all of them need."""
    handler = signal.getsignal(signal.SIGTERM)
    code, found = run(tmp_path, *gpu_agenda.PARTS, more=["--only", "smoke", "race"])
    signal.signal(signal.SIGTERM, handler)
    assert_small(tmp_path)
    assert code == 0, found
    assert {found[name]["state"] for name in ("smoke", "race")} <= {"rehearsed", "missing"}
    assert set(found["race"]["result"]["runs"]) == {"srupp", "gpt2"}


@pytest.mark.slow
def test_a_rehearsal_of_the_whole_agenda(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-m", "training.benchmarks.gpu_agenda", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert_small(tmp_path)
    found = json.loads((tmp_path / "agenda.json").read_text())["parts"]
    assert done.returncode == 0, done.stdout
    assert [*found] == [part.name for part in gpu_agenda.PARTS]
    lacking = {name for name, record in found.items() if record["state"] == "missing"}
    assert lacking <= {"triton"}, found
    assert {record["state"] for record in found.values()} <= {"rehearsed", "missing"}
    assert time.monotonic() - started < 4 * 60
