"""One JSON and one picture of a comparison of language models, and of the ablation of attention on a GPU."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from .environment import RESULTS, write_result
from .equal_time import draw_curves, time_to_reach


NAMES = {"srupp": "SRU++", "gpt2": "GPT-2", "srupp_0.25": "SRU++, a quarter of the time"}
GOALS = {"same schedule": 0.4, "own schedule": 0.25}
GPU_RESULT = "lm_race_gpu.json"
PENDING = "not run on a GPU yet"
# Table 2 of arXiv 2102.12459: enwik8 at 42 M parameters, (bits per character of the test text, GPU hours).
PAPER = {"all": (1.022, 37), "2": (1.032, 24), "1": (1.033, 22), "0": (1.190, 20)}


def _seed_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Compare the runs of one seed: when SRU++ passes GPT-2's final value, in GPT-2's schedule and in its own."""
    runs = result["runs"]
    goal, budget = runs["gpt2"]["curve"][-1][2], runs["gpt2"]["budget_s"]
    reached = time_to_reach(runs["srupp"]["curve"], goal)
    own = {run["budget_s"] / budget: run["curve"][-1][2] for name, run in runs.items() if name.startswith("srupp_")}
    return {
        "seed": result["seed"],
        "minutes": budget / 60,
        "final": {name: run["curve"][-1][2] for name, run in runs.items()},
        "all_validation": {name: run["bits_per_byte_of_all_validation"] for name, run in runs.items()},
        "fraction_same_schedule": None if reached is None else reached / budget,
        "fractions_own_schedule": {f"{share:g}": value for share, value in own.items()},
        "reaches_in_own_schedule": min((share for share, value in own.items() if value <= goal), default=None),
    }


def _summary(seeds: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    minutes = f"{seeds[0]['minutes']:g} min, {len(seeds)} seed(s)"
    same = [seed["fraction_same_schedule"] for seed in seeds]
    rows = [
        {
            "name": f"{what}: SRU++ reaches GPT-2's final value within the same schedule (worst seed)",
            "value": "not reached" if None in same else max(same),
            "unit": f"of the time; {minutes}",
            "goal": f"at most {GOALS['same schedule']}",
        }
    ]
    own = [seed["reaches_in_own_schedule"] for seed in seeds]
    if any(seed["fractions_own_schedule"] for seed in seeds):
        rows.append(
            {
                "name": f"{what}: SRU++ reaches it annealed in its own schedule (worst seed)",
                "value": "not reached" if None in own else max(own),
                "unit": "of the time, the least that was tried",
                "goal": f"at most {GOALS['own schedule']}",
            }
        )
    for name in seeds[0]["final"]:
        values = [seed["all_validation"][name] for seed in seeds]
        label = NAMES.get(name, name.replace("srupp_", "SRU++, share of the time ", 1))
        rows.append(
            {
                "name": f"{what}: bits per byte of all validation, {label}",
                "value": mean(values),
                "unit": f"bits ({', '.join(f'{value:.3f}' for value in values)})",
                "goal": None,
            }
        )
    return rows


def _headline(comparisons: dict[str, list[dict[str, Any]]], machine: dict[str, Any], screen: dict[str, Any]) -> str:
    seeds = comparisons["race"]
    finals = {name: mean(seed["final"][name] for seed in seeds) for name in ("srupp", "gpt2")}
    shares = [seed["fraction_same_schedule"] for seed in seeds]
    reached = " and ".join("never" if share is None else f"{share:.0%}" for share in shares)
    where = machine["gpu"] or f"one core ({machine['processor']})"
    chosen = [
        f"{NAMES[name]} {'random segments' if best['order'] == 'random' else 'contiguous columns with state'} at "
        f"{best['learning_rate']:g}"
        for name, best in screen["best"].items()
    ]
    return (
        f"Byte-level language models of equal size on English Wikipedia, {where}, {seeds[0]['minutes']:g} minutes of "
        f"core time each, order of the data and learning rate the best of six short runs ({', '.join(chosen)}): "
        f"{finals['srupp']:.2f} bits per byte for SRU++, "
        f"{finals['gpt2']:.2f} for GPT-2. SRU++ passes GPT-2's final value after {reached} of the time "
        f"({len(seeds)} seed(s)).{_long_sentence(comparisons.get('long race'))}"
    )


def _long_sentence(seeds: list[dict[str, Any]] | None) -> str:
    """Say how much is left of an early lead."""
    if not seeds:
        return ""
    final, share = seeds[0]["final"], seeds[0]["fraction_same_schedule"]
    reached = "never" if share is None else f"after {share:.0%} of the time"
    return (
        f" The lead shrinks: after {seeds[0]['minutes']:g} minutes it is {final['srupp']:.2f} against "
        f"{final['gpt2']:.2f}, passed {reached} (1 seed)."
    )


def report(folder: Path, output: Path | None = None) -> None:
    """
    Merge `folder/seed-*/result.json`, and longer runs in `folder/long`, into `output`, and draw both.

    Raises:
        FileNotFoundError: if no seed has finished.
    """
    places = {"race": folder, "long race": folder / "long"}
    results = {
        what: [json.loads(path.read_text()) for path in sorted(place.glob("seed-*/result.json"))]
        for what, place in places.items()
    }
    results = {what: found for what, found in results.items() if found}
    if "race" not in results:
        raise FileNotFoundError(f"No seed has finished in {folder}: run the comparison first.")
    comparisons = {what: [_seed_figures(result) for result in found] for what, found in results.items()}
    first = results["race"][0]
    if output is None:
        output = RESULTS / ("lm_race_small_gpu.json" if first["machine"]["gpu"] else "lm_race.json")
    summary = [row for what, seeds in comparisons.items() for row in _summary(seeds, what)]
    screen = json.loads((folder / "screen" / "result.json").read_text())
    if not (RESULTS / GPU_RESULT).exists():
        for what in ("42 M parameters, 4 minutes each", "attention in 0, 1, 2 and all layers"):
            summary.append(_pending(what))
    write_result(
        output,
        {
            "headline": _headline(comparisons, first["machine"], screen),
            "summary": summary,
            **{key: first[key] for key in ("machine", "versions", "commit", "command")},
            "figures": comparisons,
            "screen": screen,
            "races": results,
        },
    )
    for what, found in results.items():
        picture = output.with_name(f"{output.stem}{'' if what == 'race' else '_long'}.png")
        draw_curves([result["runs"] for result in found], NAMES, picture, {"curve": "validation bits per byte"})
    for row in summary:
        print(f"{row['name']}: {row['value']} {row['unit']}")


def _pending(what: str) -> dict[str, Any]:
    return {"name": f"{what}: {PENDING}", "value": None, "unit": "", "goal": None}


def _settle(path: Path) -> None:
    """Take the rows that waited for a GPU out of a table, once another file answers them."""
    if path.exists():
        result = json.loads(path.read_text())
        result["summary"] = [row for row in result["summary"] if not row["name"].endswith(PENDING)]
        write_result(path, result)


def _labels(layers: int) -> dict[str, str]:
    """Name the runs of the ablation, in the order of its table."""
    counts = {layers: f"attention in all {layers} layers", 2: "attention in 2 layers", 1: "attention in the last layer"}
    names = {f"attention_{count}": f"SRU++, {label}" for count, label in counts.items()}
    return {**names, "attention_0": "SRU++, no attention", "gpt2": "GPT-2"}


def _ablation_table(runs: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """Make a line for each run that has finished, with the paper's figures where it has such a model."""
    table = []
    for name, label in _labels(layers).items():
        if name not in runs:
            continue
        run = runs[name]
        kept = ("parameters", "learning_rate", "order", "steps", "passes", "step_s", "tokens_per_s")
        values = [value for _, _, value in run["curve"]]
        line = {"name": label, "run": name, **{key: run[key] for key in kept}, "final": values[-1]}
        line |= {"lowest": min(values), "all_validation": run["bits_per_byte_of_all_validation"]}
        count = name.removeprefix("attention_")
        if name != "gpt2":
            strengths = [abs(value) for value in run["alpha"].values()]
            line |= {"recurrence": run["recurrence"], "largest_alpha": max(strengths, default=None)}
            bits, hours = PAPER["all" if count == str(layers) else count]
            line["paper"] = {"table": 2, "enwik8_test_bits_per_character": bits, "gpu_hours": hours}
        table.append(line)
    return table


def _ablation_row(line: dict[str, Any], minutes: float) -> dict[str, Any]:
    unit = (
        f"bits; {line['parameters'] / 1e6:.1f} M parameters, {minutes:g} min, {1000 * line['step_s']:.1f} ms a step, "
        f"{line['tokens_per_s']:,.0f} tokens/s, {line['passes']:.1f} passes over the text"
    )
    if "paper" in line:
        bits, hours = line["paper"]["enwik8_test_bits_per_character"], line["paper"]["gpu_hours"]
        unit += f"; the paper's table 2: {bits:.3f} on enwik8 after {hours} GPU hours"
    name = f"bits per byte of all validation, {line['name']}"
    return {"name": name, "value": line["all_validation"], "unit": unit, "goal": None}


def _crossings(runs: dict[str, Any], full: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Tell when one passes the other's lowest value: a text that is read many times may be learned by heart, and then
    the last value is not the best."""
    rows = []
    for name, rival in ((full, "gpt2"), ("gpt2", full)):
        lowest = min(value for _, _, value in runs[rival]["curve"])
        reached = time_to_reach(runs[name]["curve"], lowest)
        share = "not reached" if reached is None else reached / runs[rival]["budget_s"]
        what = f"{labels[name]}, passes the lowest value of {labels[rival]}"
        rows.append({"name": what, "value": share, "unit": "of the time", "goal": None})
    return rows


def _ablation_headline(table: list[dict[str, Any]], where: str, settings: dict[str, Any]) -> str:
    measured = "; ".join(f"{line['name']} {line['all_validation']:.3f}" for line in table)
    paper = ", ".join(
        f"{line['paper']['enwik8_test_bits_per_character']:.3f} ({line['name'].removeprefix('SRU++, ')})"
        for line in table
        if "paper" in line
    )
    counts = [line["parameters"] / 1e6 for line in table]
    spread = " to ".join(dict.fromkeys(f"{count:.1f}" for count in (min(counts), max(counts))))
    return (
        f"Byte-level language models of {spread} M parameters on {settings['text']} ({settings['bytes']:,} bytes), "
        f"{where}, {settings['minutes']:g} minutes each: bits per byte of the validation text {measured}. The SRU++ "
        f"paper's table 2, enwik8 after 20 to 37 GPU hours: {paper}."
    )


def report_ablation(path: Path, output: Path | None = None) -> None:
    """
    Write the table and the picture of the runs of the ablation that have finished. By default that is
    `training/results/lm_race_gpu.json` for the real size on a GPU, and `report.json` beside `path` for a trial.

    Raises:
        FileNotFoundError: if no run has finished.
    """
    content = json.loads(path.read_text()) if path.exists() else {}
    settings, runs = content.get("settings", {}), content.get("runs", {})
    if not runs:
        raise FileNotFoundError(f"No run has finished in {path.parent}: run the ablation first.")
    cards = sorted({run["machine"]["gpu"] or "no GPU" for run in runs.values()})
    real = settings["size"] != "tiny" and "no GPU" not in cards
    output = output or (RESULTS / GPU_RESULT if real else path.with_name("report.json"))
    layers = settings["layers"]
    table, labels = _ablation_table(runs, layers), _labels(layers)
    full = f"attention_{layers}"
    summary = [_ablation_row(line, settings["minutes"]) for line in table]
    summary += _crossings(runs, full, labels) if {full, "gpt2"} <= runs.keys() else []
    summary += [_pending(label) for name, label in labels.items() if name not in runs]
    first = next(iter(runs.values()))
    write_result(
        output,
        {
            "headline": _ablation_headline(table, " and ".join(cards), settings),
            "summary": summary,
            **{key: first[key] for key in ("machine", "versions", "commit", "command")},
            "table": table,
            **content,
        },
    )
    draw_curves([runs], labels, output.with_suffix(".png"), {"curve": "validation bits per byte"})
    if output == RESULTS / GPU_RESULT:
        _settle(RESULTS / "lm_race.json")
    for row in summary:
        print(f"{row['name']}: {row['value']} {row['unit']}")
