"""From the results of a race's seeds to one JSON and one picture."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from environment import RESULTS, write_result
from race_curves import draw_curves, time_to_reach
from race_finetune import collect, summary_rows


NAMES = {
    "bert": "BERT",
    "bert_relative": "BERT with T5's relative bias",
    "tupe_r": "TUPE-R",
    "tupe_r_half": "TUPE-R, half the time",
}


def _seed_figures(result: dict[str, Any], baseline: str) -> dict[str, Any]:
    """What one seed shows against its own baseline."""
    runs = {name: run for name, run in result["runs"].items() if "curve" in run}
    goal, budget = runs[baseline]["curve"][-1][2], runs[baseline]["budget_s"]
    figures: dict[str, Any] = {"seed": result["seed"], "runs": {}}
    for name, run in runs.items():
        reached = time_to_reach(run["curve"], goal)
        figures["runs"][name] = {
            "final_loss": run["curve"][-1][2],
            "steps": run["steps"],
            "budget_s": run["budget_s"],
            "share_of_baseline_time": None if reached is None else reached / budget,
        }
    figures["probe"] = {name: run["swap_probe"] for name, run in result["runs"].items()}
    return figures


def _summary(seeds: list[dict[str, Any]], baseline: str, candidate: str) -> list[dict[str, Any]]:
    shares = [seed["runs"][candidate]["share_of_baseline_time"] for seed in seeds]
    rows = [
        {
            "name": f"{candidate} passes {baseline}'s final held-out loss, share of its time (worst seed)",
            "value": None if None in shares else max(shares),
            "unit": "of core time",
            "goal": "at most 0.60 in every seed",
        }
    ]
    half = f"{candidate}_half"
    if half in seeds[0]["runs"]:
        gaps = [seed["runs"][half]["final_loss"] - seed["runs"][baseline]["final_loss"] for seed in seeds]
        rows.append(
            {
                "name": f"{candidate} with half the time and its own decay, final loss less {baseline}'s (worst seed)",
                "value": max(gaps),
                "unit": "nats",
                "goal": "below 0",
            }
        )
    for name in seeds[0]["runs"]:
        losses = [seed["runs"][name]["final_loss"] for seed in seeds]
        rows.append(
            {
                "name": f"held-out MLM loss, {name}",
                "value": mean(losses),
                "unit": f"nats, mean of {_seeds(len(losses))}, {seeds[0]['runs'][name]['budget_s'] / 60:g} min",
                "goal": None,
            }
        )
    for name in seeds[0]["probe"]:
        rows.append(
            {
                "name": f"swap probe, {name}",
                "value": mean(seed["probe"][name]["accuracy"] for seed in seeds),
                "unit": "% accuracy (chance 50)",
                "goal": None,
            }
        )
    return rows


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _headline(seeds: list[dict[str, Any]], results: list[dict[str, Any]], baseline: str, candidate: str) -> str:
    """What the race shows, in words for the README."""
    settings, machine = results[0]["settings"], results[0]["machine"]
    names = [name for name in seeds[0]["runs"] if not name.endswith("_half")]
    losses = [f"{mean(seed['runs'][name]['final_loss'] for seed in seeds):.2f} for {NAMES[name]}" for name in names]
    shares = [seed["runs"][candidate]["share_of_baseline_time"] for seed in seeds]
    reached = (
        f"{NAMES[candidate]} passes {NAMES[baseline]}'s final loss after "
        f"{' and '.join(f'{share:.0%}' for share in shares)} of its time ({_seeds(len(shares))})"
        if None not in shares
        else f"{NAMES[candidate]} does not pass {NAMES[baseline]}'s final loss in every seed"
    )
    half = f"{candidate}_half"
    confirmed = ""
    if half in seeds[0]["runs"]:
        values = ", ".join(f"{seed['runs'][half]['final_loss']:.3f}" for seed in seeds)
        goals = ", ".join(f"{seed['runs'][baseline]['final_loss']:.3f}" for seed in seeds)
        confirmed = f" With half the time and a schedule of its own it ends at {values}, against {goals}."
    return (
        f"Masked-LM pretraining of {settings['layers']} layers, {settings['width']} wide, on "
        f"{machine['gpu'] or 'one core (' + machine['processor'] + ')'}, {settings['minutes']:g} minutes each at equal "
        f"core time. Held-out loss in nats: {', '.join(losses)}. {reached}.{confirmed}"
    )


def report(folder: Path, output: Path | None = None, baseline: str = "bert", candidate: str = "tupe_r") -> None:
    """
    Merge `folder/seed-*/result.json` into `output`, and draw `output` with the suffix .png. By default that is
    `training/results/pretrain_race.json`, or `pretrain_race_gpu.json` for a race on a GPU.

    Raises:
        FileNotFoundError: if no seed has finished.
    """
    paths = sorted(folder.glob("seed-*/result.json"))
    if not paths:
        raise FileNotFoundError(f"No seed has finished in {folder}: run the race first.")
    results = [json.loads(path.read_text()) for path in paths]
    if output is None:
        output = RESULTS / ("pretrain_race_gpu.json" if results[0]["machine"]["gpu"] else "pretrain_race.json")
    seeds = [_seed_figures(result, baseline) for result in results]
    scores = collect(folder)
    summary = _summary(seeds, baseline, candidate) + summary_rows(scores)
    environment = {key: results[0][key] for key in ("machine", "versions", "commit", "command")}
    headline = _headline(seeds, results, baseline, candidate)
    write_result(
        output,
        {"headline": headline, "summary": summary, **environment, "seeds": seeds, "glue": scores, "races": results},
    )
    races = [result["runs"] for result in results]
    draw_curves(races, NAMES, output.with_suffix(".png"), "held-out masked-LM loss, nats")
    for row in summary:
        print(f"{row['name']}: {row['value']} {row['unit']}")
