"""What encoder_speed.py says of its measurements: ratios, a table, a headline."""

import statistics
from typing import Any


GOALS = {"train": 1.10, "inference": 1.05, "inference, padded": 1.05, "memory": 1.10}
GPU_GOAL = 1.15
# Of what TUPE chooses by itself over the best of its forms.
CHOICE_GOAL = 1.05
NAMES = {"train": "train step", "memory": "peak memory of training"}


def rows_of(entry: dict[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Summary rows of one size and length."""
    where = f"{entry['size']}, length {entry['length']}"
    train = _medians(entry["seconds"]["train"])
    notes = {
        "train": f"times (of BERT's default, sdpa: {train['tupe_r'] / train['bert']:.3f})",
        "memory": f"times ({entry['peak_bytes']['tupe_r'] / 2**20:.0f} MiB)",
    }
    goals = dict.fromkeys(GOALS, GPU_GOAL) if on_gpu else GOALS
    rows = [
        {
            "name": f"{NAMES.get(mode, mode)}, TUPE-R / BERT, {where}",
            "value": round(ratio, 4),
            "unit": notes.get(mode, "times"),
            "goal": f"at most {goals[mode]:.2f}",
        }
        for mode, ratio in ratios(entry).items()
    ]
    choices = [
        {
            "name": f"{NAMES.get(mode, mode)}, what TUPE-R chooses ({entry['form_taken'][mode]}) / its best form "
            f"({best}), {where}",
            "value": round(ratio, 4),
            "unit": "times",
            "goal": f"at most {CHOICE_GOAL:.2f}",
        }
        for mode, (best, ratio) in choice_ratios(entry).items()
    ]
    return rows + choices


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """TUPE-R over the better of BERT's two forms of attention: times by mode, and memory."""
    measured = {mode: _medians(seconds) for mode, seconds in entry["seconds"].items()}
    measured["memory"] = entry["peak_bytes"]
    return {mode: values["tupe_r"] / min(values["bert"], values["bert_eager"]) for mode, values in measured.items()}


def choice_ratios(entry: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """By mode the fastest of TUPE's forms of attention, and the time of what it chooses by itself over that form's."""
    found = {}
    for mode, seconds in entry["seconds"].items():
        medians = _medians(seconds)
        forms = {name: value for name, value in medians.items() if name.startswith("tupe_") and name != "tupe_r"}
        best = min(forms, key=lambda name: forms[name])
        found[mode] = (best.removeprefix("tupe_"), medians["tupe_r"] / forms[best])
    return found


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def table_of(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The worst ratio of each size over the lengths, as the README shows it."""
    table: dict[str, dict[str, float]] = {}
    for entry in entries:
        worst = table.setdefault(entry["size"], {})
        for key, value in ratios(entry).items():
            worst[key] = round(max(worst.get(key, 0.0), value), 3)
    return table


def headline_of(entries: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    measured: dict[str, list[str]] = {}
    for entry in entries:
        measured.setdefault(entry["size"], []).append(str(entry["length"]))
    lengths = "; ".join(f"{size.replace('x', ' x ')}: {' and '.join(values)}" for size, values in measured.items())
    machine = environment["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread"
    versions = environment["versions"]
    return (
        "Ratios are medians of interleaved runs in one process against transformers' BERT of equal size in the better "
        f"of its two forms of attention, the worst over the lengths measured ({lengths}), without padding. "
        f"Machine: {where}; torch {versions['torch']}, transformers {versions['transformers']}."
    )


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """A result with headline, table and summary made from its entries."""
    on_gpu = result["machine"]["gpu"] is not None
    summary = [row for entry in result["entries"] for row in rows_of(entry, on_gpu)]
    if not on_gpu:
        goal = f"at most {GPU_GOAL:.2f}"
        row = {
            "name": "train step on a GPU, bf16, compiled: not run on a GPU yet",
            "value": None,
            "unit": "",
            "goal": goal,
        }
        summary.append(row)
    entries = result["entries"]
    return {
        "headline": headline_of(entries, result),
        "table": table_of(entries),
        "summary": summary,
        **{key: value for key, value in result.items() if key not in ("headline", "table", "summary")},
    }
