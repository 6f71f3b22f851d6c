"""
Figures of `make demo`: its scores and its time, from a whole run in a new folder or from what one has left; with
`--busy` also its time beside a program that keeps one core busy.

    python -m training.benchmarks.demo
    python -m training.benchmarks.demo --busy
    python -m training.benchmarks.demo --folder runs/quickstart
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training import quickstart

from .environment import RESULTS, describe, write_result


def summary_of(report: dict[str, Any], busy: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """
    Make the rows of a demo.

    Args:
        report (`dict`): the `quickstart.json` that it leaves.
        busy (`dict`, *optional*): that of a demo beside a busy core.
    """
    task, model, use = report["finetuning"], report["language_model"], report["pipelines"]
    rows = [
        ("time without installation", report["seconds"], "seconds", "at most 360 with AVX2 and two cores"),
        ("loss of masked LM", report["pretraining"]["loss"], "nats a masked token, held out", None),
        ("masked tokens right", report["pretraining"]["accuracy"], "of them, held out", None),
        ("hidden words right", use["masks_right"], "of them, unseen text", None),
        ("accuracy on word order, pretrained", task["accuracy"], "of unseen sentences", None),
        ("accuracy on word order, never pretrained", task["accuracy_never_pretrained"], "of unseen sentences", None),
        ("accuracy on word order, always one answer", task["one_answer"], "of unseen sentences", None),
        ("bits per byte, SRU++", model["bits_per_byte"], "bits, unseen text", None),
        ("bits per byte, byte frequencies", model["bits_per_byte_of_frequencies"], "bits, unseen text", None),
    ]
    if busy is not None:
        ratio = busy["seconds"] / report["seconds"]
        rows.append(("time beside one busy core, over that alone", ratio, "times", "at most 3"))
    return [{"name": name, "value": value, "unit": unit, "goal": goal} for name, value, unit, goal in rows]


def headline_of(report: dict[str, Any], busy: dict[str, Any] | None = None) -> str:
    """Say in sentences what [`summary_of`] has in rows."""
    task, model, threads = report["finetuning"], report["language_model"], report["plan"]["threads"]
    beside = "" if busy is None else f", and {busy['seconds']:.0f} s beside a program that keeps one core busy"
    return (
        f"On unseen sentences the pretrained encoder is right about {task['accuracy']:.1%} of word orders, the same "
        f"encoder never pretrained about {task['accuracy_never_pretrained']:.1%}, and always one answer about "
        f"{task['one_answer']:.1%} (one seed). It fills in {report['pipelines']['masks_right']:.0%} of hidden words. "
        f"SRU++ comes to {model['bits_per_byte']:.2f} bits per byte, and frequencies of bytes to "
        f"{model['bits_per_byte_of_frequencies']:.2f}. The demo takes {report['seconds']:.0f} s with {threads} threads"
        f"{beside}, installation not counted."
    )


def spin() -> None:
    while True:
        pass


@contextmanager
def one_busy_core() -> Iterator[None]:
    """Let another process compute all the while."""
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def run_demo(short: bool) -> dict[str, Any]:
    """Run the demo in a new folder, and return its report, with paths below that folder."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", str(Path(folder, "demo"))] + (["--short"] if short else [])
        report = quickstart.main(words)
    task = report["finetuning"]
    task["model"] = Path(task["model"]).relative_to(folder).as_posix()
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "demo.json")
    parser.add_argument("--short", action="store_true", help="A minute instead of some.")
    parser.add_argument("--busy", action="store_true", help="Run it once more, beside one busy core.")
    parser.add_argument("--folder", type=Path, help="Take the figures of the demo that was run there.")
    args = parser.parse_args(argv)
    if args.folder is None:
        report = run_demo(args.short)
    else:
        report = json.loads(Path(args.folder, "quickstart.json").read_text(encoding="utf-8"))
    busy = None
    if args.busy:
        with one_busy_core():
            busy = run_demo(args.short)
    result = {"headline": headline_of(report, busy), "summary": summary_of(report, busy), "report": report}
    if busy is not None:
        result["beside_a_busy_core"] = busy
    write_result(args.result, {**result, **describe()})


if __name__ == "__main__":
    main()
