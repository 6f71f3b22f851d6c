"""From the results of a language-model race to one JSON and one picture."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from environment import RESULTS, write_result
from race_report import draw_curves, time_to_reach


NAMES = {"srupp": "SRU++", "gpt2": "GPT-2", "srupp_0.25": "SRU++, a quarter of the time"}
GOALS = {"same schedule": 0.4, "own schedule": 0.25}


def _seed_figures(result: dict[str, Any]) -> dict[str, Any]:
    """What one seed shows: when SRU++ passes GPT-2's final value, and which share with a schedule of its own does."""
    runs = result["runs"]
    goal, budget = runs["gpt2"]["curve"][-1][2], runs["gpt2"]["budget_s"]
    reached = time_to_reach(runs["srupp"]["curve"], goal)
    own = {run["budget_s"] / budget: run["curve"][-1][2] for name, run in runs.items() if name.startswith("srupp_")}
    return {
        "seed": result["seed"],
        "minutes": budget / 60,
        "final": {name: run["curve"][-1][2] for name, run in runs.items()},
        "all_validation": {name: run["bits_per_byte_of_all_validation"] for name, run in runs.items()},
        "share_same_schedule": None if reached is None else reached / budget,
        "shares_own_schedule": {f"{share:g}": value for share, value in own.items()},
        "reaches_in_own_schedule": min((share for share, value in own.items() if value <= goal), default=None),
    }


def _summary(seeds: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    minutes = f"{seeds[0]['minutes']:g} min, {len(seeds)} seed(s)"
    same = [seed["share_same_schedule"] for seed in seeds]
    rows = [
        {
            "name": f"{what}: SRU++ reaches GPT-2's final value within the same schedule (worst seed)",
            "value": None if None in same else max(same),
            "unit": f"of the time; {minutes}",
            "goal": f"at most {GOALS['same schedule']}",
        }
    ]
    own = [seed["reaches_in_own_schedule"] for seed in seeds]
    if any(seed["shares_own_schedule"] for seed in seeds):
        rows.append(
            {
                "name": f"{what}: SRU++ reaches it annealed in its own schedule (worst seed)",
                "value": None if None in own else max(own),
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


def _headline(races: dict[str, list[dict[str, Any]]], machine: dict[str, Any], screen: dict[str, Any]) -> str:
    seeds = races["race"]
    finals = {name: mean(seed["final"][name] for seed in seeds) for name in ("srupp", "gpt2")}
    shares = [seed["share_same_schedule"] for seed in seeds]
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
        f"({len(seeds)} seed(s)).{_long_sentence(races.get('long race'))}"
    )


def _long_sentence(seeds: list[dict[str, Any]] | None) -> str:
    """What is left of an early lead."""
    if not seeds:
        return ""
    final, share = seeds[0]["final"], seeds[0]["share_same_schedule"]
    reached = "never" if share is None else f"after {share:.0%} of the time"
    return (
        f" The lead shrinks: after {seeds[0]['minutes']:g} minutes it is {final['srupp']:.2f} against "
        f"{final['gpt2']:.2f}, passed {reached} (1 seed)."
    )


def report(folder: Path, output: Path | None = None) -> None:
    """
    Merge `folder/seed-*/result.json`, and a longer race in `folder/long`, into `output`, and draw both.

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
        raise FileNotFoundError(f"No seed has finished in {folder}: run the race first.")
    races = {what: [_seed_figures(result) for result in found] for what, found in results.items()}
    first = results["race"][0]
    if output is None:
        output = RESULTS / ("lm_race_gpu.json" if first["machine"]["gpu"] else "lm_race.json")
    summary = [row for what, seeds in races.items() for row in _summary(seeds, what)]
    screen = json.loads((folder / "screen" / "result.json").read_text())
    if not first["machine"]["gpu"]:
        for what in ("42 M parameters, 4 minutes each", "attention in 0, 1, 2 and all layers"):
            summary.append({"name": f"{what}: not run on a GPU yet", "value": None, "unit": "", "goal": None})
    write_result(
        output,
        {
            "headline": _headline(races, first["machine"], screen),
            "summary": summary,
            **{key: first[key] for key in ("machine", "versions", "commit", "command")},
            "figures": races,
            "screen": screen,
            "races": results,
        },
    )
    for what, found in results.items():
        picture = output.with_name(f"{output.stem}{'' if what == 'race' else '_long'}.png")
        draw_curves([result["runs"] for result in found], NAMES, picture, "validation bits per byte")
    for row in summary:
        print(f"{row['name']}: {row['value']} {row['unit']}")
