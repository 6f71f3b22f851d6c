"""A merger of what runs of the GPU agenda on one card have found: one result file, with a summary for cards.

    python -m training.benchmarks.gpu.report FOLDER/agenda.json ... --result training/results/gpu_h200.json

Of each part the last run that finished counts, else the last that found something. Each keeps the commit it ran at.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from training.benchmarks.environment import write_result
from training.benchmarks.gpu.context import MissingPrerequisiteError


Row = dict[str, Any]


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Merge the files of several runs, in the order in which they were made.

    Raises:
        MissingPrerequisiteError: if there are none, or they are of several cards, or one is a rehearsal.
    """
    cards = {run["machine"]["gpu"] for run in runs}
    if len(cards) != 1 or any(run["rehearsal"] for run in runs):
        raise MissingPrerequisiteError(
            f"runs of one card are wanted, and no rehearsals; these are of {sorted(map(str, cards))}"
        )
    parts: dict[str, dict[str, Any]] = {}
    for record in (item for run in runs for item in run["parts"].items()):
        name, found = record
        finished = found["state"] == "done"
        if finished or ("partial" in found and parts.get(name, {}).get("state") != "done"):
            parts[name] = found
    kept = ("torch", "transformers")
    if len({tuple(run["versions"].get(name) for name in kept) for run in runs}) != 1:
        raise MissingPrerequisiteError("the runs are of several versions of torch or transformers")
    last = runs[-1]
    return {"machine": last["machine"], "versions": last["versions"], "command": last["command"], "parts": parts}


def row(name: str, value: float, unit: str, goal: str | None = None) -> Row:
    return {"name": name, "value": value, "unit": unit, "goal": goal}


def recurrence_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Shares of the bandwidth of a copy, and ratios to the torch form."""
    for case in found["cases"]:
        for what, share in case["copy_bandwidth_fraction"].items():
            times = case["faster_than_torch"][what]
            name = f"recurrence, {what}, {case['batch']} x 512 x 3072, {case['dtype']}"
            yield row(name, share, f"of copy bandwidth ({times:.0f} times faster than torch)")
    step = found["step_nanoseconds"]
    if "bare" in step:
        yield row(
            "recurrence, one step of a narrow batch", step["as_run"], f"ns ({step['bare']:.0f} for the bare chain)"
        )


def lstm_rows(found: dict[str, Any]) -> Iterator[Row]:
    for what, ratio in found["faster_than_lstm"].items():
        yield row(f"recurrence, a layer of 1024 units, {what}: cuDNN's LSTM / ours", ratio, "times")


def triton_rows(found: dict[str, Any]) -> Iterator[Row]:
    for case in found["cases"]:
        name = f"recurrence, forward, {case['dtype']}: the best scan in Triton / ours"
        yield row(name, case["faster_than_triton"], "times")


def sparse_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Ratios of the dense layer's time to ours in bfloat16, and those of the torch form."""
    for case in found["cases"]:
        tokens = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
        cold = "cold" if case.get("layers", 1) > 1 else "the same weights again and again"
        size = f"d {case['width']}, F {case['hidden']}, N {case['units']}, {tokens}, {cold}"
        name = f"sparse feed-forward, {size}: dense / ours"
        torch_form, micros = case["faster_than_dense"]["torch"], case["microseconds"]["kernel"]
        unit = f"times (plain torch {torch_form:.2f}; {micros:.0f} us)"
        yield row(name, case["faster_than_dense"]["kernel"], unit)


def model_rows(found: dict[str, Any]) -> Iterator[Row]:
    for title, measured in found["measured"].items():
        for name, ratio in measured["tokens_per_second_over_peer"].items():
            peer = next(peer for peer in measured["models"] if peer not in measured["tokens_per_second_over_peer"])
            tokens = measured["models"][name]["tokens_per_second"]
            yield row(
                f"train step, {name}, {title}: tokens a second / {peer}'s", ratio, f"times ({tokens:,.0f} a second)"
            )


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "recurrence": recurrence_rows,
    "lstm": lstm_rows,
    "triton": triton_rows,
    "sparse-speed": sparse_rows,
    "encoder-steps": model_rows,
    "lm-steps": model_rows,
}


def commits_of(records: Iterable[dict[str, Any]]) -> str:
    """The commits of some records, in their order."""
    return ", ".join(dict.fromkeys(record["commit"] for record in records))


def headline(gpu: str, parts: dict[str, dict[str, Any]]) -> str | None:
    """The sentences that a newcomer reads, of the parts that finished."""
    done = {name: record["result"] for name, record in parts.items() if record["state"] == "done"}
    said = []
    if {"parity", "recurrence", "lstm"} <= done.keys():
        shares = [share for case in done["recurrence"]["cases"] for share in case["copy_bandwidth_fraction"].values()]
        lstm = done["lstm"]["faster_than_lstm"]["forward and backward, bfloat16"]
        said.append(
            f"the recurrence equals plain torch in {done['parity']['compared']:,} cases, runs at {min(shares):.0%} to "
            f"{max(shares):.0%} of the rate of a copy, and as a layer trains {lstm:.1f} times as fast as cuDNN's LSTM"
        )
    if {"sparse-ff", "sparse-speed"} <= done.keys():
        single = [case for case in done["sparse-speed"]["cases"] if case["tokens"] == 1]
        times = ", ".join(f"{case['faster_than_dense']['kernel']:.2g} at width {case['width']:,}" for case in single)
        said.append(
            f"the sparse feed-forward is right in {done['sparse-ff']['compared']} cases, and takes a single token, in "
            f"bfloat16, so many times as fast as the dense layer, each with the same weights again and again: {times}"
        )
    return f"On one {gpu}, {'; '.join(said)}." if said else None


def summarise(parts: dict[str, dict[str, Any]]) -> list[Row]:
    """The rows of all parts, marked where a part did not finish."""
    summary: list[Row] = []
    for name in [name for name in ROWS if name in parts]:
        record = parts[name]
        rows = list(ROWS[name](record.get("result") or record["partial"]))
        if record["state"] != "done":
            rows = [{**one, "name": f"{one['name']} (a part that did not finish)"} for one in rows]
        summary += rows
    return summary


def report(paths: list[Path], result: Path) -> dict[str, Any]:
    """Merge the files, write the result, and return it."""
    found = merge([json.loads(path.read_text()) for path in paths])
    said = headline(found["machine"]["gpu"], found["parts"])
    commits = commits_of(found["parts"].values())
    merged = {"headline": said, "summary": summarise(found["parts"]), **found, "commit": commits}
    write_result(result, merged)
    return merged


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.gpu.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("agendas", nargs="+", type=Path, metavar="agenda.json", help="in the order of the runs")
    parser.add_argument("--result", type=Path, required=True, help="JSON to write, named after the card")
    args = parser.parse_args(arguments)
    for name, record in report(args.agendas, args.result)["parts"].items():
        print(f"{name:<14} {record['state']:<10} {' '.join(record['line'].split())[:120]}")


if __name__ == "__main__":
    main()
