"""
Figures of `make demo`: its loss, its accuracy and its time, from a whole run in a new folder.

    python -m training.benchmarks.demo
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from training import quickstart

from .environment import RESULTS, describe, write_result


def summary_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the rows of a demo by the `quickstart.json` that it leaves."""
    found = report["pretraining"]
    rows = (
        ("time without installation", report["seconds"], "seconds"),
        ("controller's loss", found["generator_loss"], "nats a masked token, held out"),
        ("encoder's loss", found["discriminator_loss"], "nats a token, held out"),
        ("a blind choice's loss", found["chance_level_loss"], "nats a token"),
        ("replaced tokens that are found", found["recall_replaced"], "of them"),
        ("variance between tokens", found["token_variance_fraction"], "share"),
        ("updates of a note", found["note_updates"], "mean over words"),
        ("accuracy on the sentence pairs", report["accuracy"], "of them"),
        ("always one answer", report["accuracy_of_always_one_answer"], "of them"),
    )
    return [{"name": name, "value": value, "unit": unit, "goal": None} for name, value, unit in rows]


def headline_of(report: dict[str, Any], threads: int) -> str:
    found = report["pretraining"]
    return (
        f"On held-out text the controller ends at {found['generator_loss']:.2f} nats, the encoder's choice among "
        f"{quickstart.CANDIDATES} costs {found['discriminator_loss']:.3f} nats where a blind one costs "
        f"{found['chance_level_loss']:.3f}, it finds {found['recall_replaced']:.0%} of the replaced tokens, a note is "
        f"moved {found['note_updates']:.0f} times, and the sentence pairs come out at {report['accuracy']:.2f} (always "
        f"one answer: {report['accuracy_of_always_one_answer']:.3f}; one seed). It takes {report['seconds']:.0f} s "
        f"with {threads} threads, installation not counted."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "demo.json")
    parser.add_argument("--short", action="store_true", help="A minute instead of some.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", str(Path(folder, "demo"))] + (["--short"] if args.short else [])
        report = quickstart.main(words)
    environment = describe()
    headline = headline_of(report, environment["machine"]["threads"])
    write_result(args.result, {"headline": headline, "summary": summary_of(report), **environment})


if __name__ == "__main__":
    main()
