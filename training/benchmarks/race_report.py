"""From the results of a race's seeds to one JSON and one picture."""

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

from contestants import CONTESTANTS
from environment import RESULTS, write_result
from race_curves import draw_curves, time_to_reach
from race_finetune import collect, summary_rows
from race_table import race_table

from hf_efficient.objectives.diagnostics import chance_level_loss


NAMES = {name: contestant.title for name, contestant in CONTESTANTS.items()}
NAMES |= {
    **{f"{name}_half": f"{title}, half the time" for name, title in NAMES.items()},
    **{f"{name}_long": f"{title}, longer" for name, title in NAMES.items()},
}


def probe_passed(run: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    """Core seconds at which a run's probe first lies two standard errors of their difference above the baseline's last;
    `None` if it never does."""
    goal = baseline["probes"][-1]
    margin = 2 * math.hypot(goal[2], run["probes"][-1][2])
    return time_to_reach([[seconds, 0, -accuracy] for seconds, accuracy, _ in run["probes"]], -goal[1] - margin)


def _discriminator_figures(run: dict[str, Any]) -> dict[str, float]:
    """What a run ends with besides its loss; empty for masked LM without notes."""
    parts = run["parts"][-1]
    if "discriminator_loss" in parts:
        blind = chance_level_loss(parts["replaced_fraction"], run["choices"])
        parts = {**parts, "fraction_of_chance_level_loss": parts["discriminator_loss"] / blind}
        joined = [
            point for point, found in zip(run["curve"], run["parts"], strict=True) if "discriminator_loss" in found
        ]
        parts["joined_s"] = joined[0][0]
    return {name: value for name, value in parts.items() if name not in ("loss", "accuracy")}


def _seed_figures(result: dict[str, Any], baseline: str) -> dict[str, Any]:
    """What one seed shows against its own baseline."""
    runs = {name: run for name, run in result["runs"].items() if "curve" in run}
    goal, budget = runs[baseline]["curve"][-1][2], runs[baseline]["budget_s"]
    figures: dict[str, Any] = {"seed": result["seed"], "runs": {}}
    for name, run in runs.items():
        reached = None if is_discriminator(run) else time_to_reach(run["curve"], goal)
        figures["runs"][name] = {
            "final_loss": run["curve"][-1][2],
            "steps": run["steps"],
            "budget_s": run["budget_s"],
            "share_of_baseline_time": None if reached is None else reached / budget,
        }
        if run.get("probes"):
            passed = probe_passed(run, runs[baseline])
            figures["runs"][name]["probe_passed_s"] = passed
            figures["runs"][name]["parts"] = _discriminator_figures(run)
    figures["probe"] = {name: run["swap_probe"] for name, run in result["runs"].items()}
    return figures


def is_discriminator(run: dict[str, Any]) -> bool:
    """Whether a run's loss is a generator's, since its encoder is not a masked LM."""
    return any("generator_loss" in parts for parts in run.get("parts", []))


def _row(name: str, value: float | None, unit: str, goal: str | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": goal}


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _candidate_rows(seeds: list[dict[str, Any]], baseline: str, candidate: str) -> list[dict[str, Any]]:
    """How soon the candidate has what the baseline ends with."""
    shares = [seed["runs"][candidate]["share_of_baseline_time"] for seed in seeds]
    rows = [
        _row(
            f"{candidate} passes {baseline}'s final held-out loss, share of its time (worst seed)",
            None if None in shares else max(shares),
            "of core time",
            "at most 0.60 in every seed",
        )
    ]
    half = f"{candidate}_half"
    if half in seeds[0]["runs"]:
        gaps = [seed["runs"][half]["final_loss"] - seed["runs"][baseline]["final_loss"] for seed in seeds]
        name = f"{candidate} with half the time and its own decay, final loss less {baseline}'s (worst seed)"
        rows.append(_row(name, max(gaps), "nats", "below 0"))
    return rows


_PART_ROWS = {
    "joined_s": ("first evaluation with a discriminator, {}", "core seconds", None),
    "fraction_of_chance_level_loss": (
        "discriminator's loss, {}",
        "of what a blind discriminator reaches",
        "at most 0.95",
    ),
    "recall_replaced": ("replaced tokens that are found, {}", "of them", "at least 0.10"),
    "replaced_fraction": ("tokens that are replaced, {}", "of all", None),
    "token_variance_fraction": ("variance between tokens, {}", "share", "above 0.1"),
    "note_updates": ("updates of a note, {}", "mean over words", "100 or more"),
    "note_hits": ("words that read a note, {}", "a row", None),
    "note_norm": ("norm of notes as mixed, {}", "(scaled to their tokens)", None),
}


def _run_rows(seeds: list[dict[str, Any]], name: str, baseline: str) -> list[dict[str, Any]]:
    """What one contestant ends with, means over seeds."""
    runs = [seed["runs"][name] for seed in seeds]
    parts = runs[0].get("parts", {})
    kind = "held-out loss of the generator" if "generator_loss" in parts else "held-out MLM loss"
    unit = f"nats, mean of {_seeds(len(runs))}, {runs[0]['budget_s'] / 60:g} min"
    rows = [_row(f"{kind}, {name}", mean(run["final_loss"] for run in runs), unit)]
    if "generator_loss" in parts and "discriminator_loss" not in parts:
        rows.append(_row(f"discriminator's loss, {name}", None, "the discriminator never joined", "at most 0.95"))
    for part, (title, unit, goal) in _PART_ROWS.items():
        if part in parts:
            rows.append(_row(title.format(name), mean(run["parts"][part] for run in runs), unit, goal))
    if "probe_passed_s" in runs[0] and name != baseline:
        times = [run["probe_passed_s"] for run in runs]
        budget = seeds[0]["runs"][baseline]["budget_s"]
        passed = None if None in times else max(times) / budget
        title = f"swap probe 2 standard errors above the baseline's last, {name}"
        rows.append(_row(title, passed, "of the baseline's core time"))
    return rows


def _summary(seeds: list[dict[str, Any]], baseline: str, candidate: str) -> list[dict[str, Any]]:
    rows = _candidate_rows(seeds, baseline, candidate) if candidate in seeds[0]["runs"] else []
    for name in seeds[0]["runs"]:
        rows += _run_rows(seeds, name, baseline)
    for name in seeds[0]["probe"]:
        accuracy = mean(seed["probe"][name]["accuracy"] for seed in seeds)
        error = max(seed["probe"][name]["standard_error"] for seed in seeds)
        rows.append(_row(f"swap probe, {name}", accuracy, f"% accuracy (chance 50; standard error {error:.1f})"))
    return rows


def _headline(seeds: list[dict[str, Any]], results: list[dict[str, Any]], baseline: str, candidate: str) -> str:
    """What the race shows, in words for the README."""
    settings, machine = results[0]["settings"], results[0]["machine"]
    runs = results[0]["runs"]
    names = [
        name for name in seeds[0]["runs"] if not name.endswith(("_half", "_long")) and not is_discriminator(runs[name])
    ]
    losses = [f"{mean(seed['runs'][name]['final_loss'] for seed in seeds):.2f} for {NAMES[name]}" for name in names]
    text = (
        f"Pretraining of {settings['layers']} layers, {settings['width']} wide, on "
        f"{machine['gpu'] or 'one core (' + machine['processor'] + ')'}, {settings['minutes']:g} minutes each at equal "
        f"core time. Held-out masked-LM loss in nats: {', '.join(losses)}."
    )
    if candidate in seeds[0]["runs"]:
        text += f" {_time_of(seeds, baseline, candidate)}"
    discriminators = [name for name in seeds[0]["runs"] if is_discriminator(runs[name])]
    if discriminators:
        probes = [f"{mean(s['probe'][name]['accuracy'] for s in seeds):.1f} for {NAMES[name]}" for name in runs]
        text += f" Exchanged neighbours seen, in percent (chance 50): {', '.join(probes)}."
    return text


def _time_of(seeds: list[dict[str, Any]], baseline: str, candidate: str) -> str:
    shares = [seed["runs"][candidate]["share_of_baseline_time"] for seed in seeds]
    if None in shares:
        return f"{NAMES[candidate]} does not pass {NAMES[baseline]}'s final loss in every seed."
    text = (
        f"{NAMES[candidate]} passes {NAMES[baseline]}'s final loss after "
        f"{' and '.join(f'{share:.0%}' for share in shares)} of its time ({_seeds(len(shares))})."
    )
    half = f"{candidate}_half"
    if half in seeds[0]["runs"]:
        values = ", ".join(f"{seed['runs'][half]['final_loss']:.3f}" for seed in seeds)
        goals = ", ".join(f"{seed['runs'][baseline]['final_loss']:.3f}" for seed in seeds)
        text += f" With half the time and a schedule of its own it ends at {values}, against {goals}."
    return text


def _panels(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What to draw of each run, and the panels that have something in them."""
    races = [
        {
            name: {
                "loss": [] if is_discriminator(run) else run.get("curve", []),
                "probe": [(seconds, 0, accuracy, error) for seconds, accuracy, error in run.get("probes", [])],
            }
            for name, run in result["runs"].items()
        }
        for result in results
    ]
    labels = {"loss": "held-out masked-LM loss, nats", "probe": "exchanged neighbours seen, % (chance 50)"}
    drawn = {key for runs in races for run in runs.values() for key, points in run.items() if points}
    return races, {key: label for key, label in labels.items() if key in drawn}


def report(folder: Path, output: Path | None = None, baseline: str = "bert", candidate: str = "tupe_r") -> None:
    """
    Merge `folder/seed-*/result.json` into `output`, and draw `output` with the suffix .png. By default that is in
    `training/results`, by the name of the folder, with `_gpu` behind it for a race on a GPU.

    Raises:
        FileNotFoundError: if no seed has finished.
        ValueError: if a seed lacks the baseline, or runs that another one has.
    """
    paths = sorted(folder.glob("seed-*/result.json"))
    if not paths:
        raise FileNotFoundError(f"No seed has finished in {folder}: run the race first.")
    results = [json.loads(path.read_text()) for path in paths]
    for result in results:  # in the order of the contestants, whenever they ran
        result["runs"] = {name: result["runs"][name] for name in sorted(result["runs"], key=list(NAMES).index)}
    names = [set(result["runs"]) for result in results]
    if any(baseline not in runs or runs != names[0] for runs in names):
        raise ValueError(
            f"Every seed needs a run of {baseline}, and the same runs as the others; they have "
            f"{'; '.join(', '.join(sorted(runs)) for runs in names)}. Run what is missing first."
        )
    if output is None:
        output = RESULTS / f"{folder.name}{'_gpu' if results[0]['machine']['gpu'] else ''}.json"
    seeds = [_seed_figures(result, baseline) for result in results]
    scores = collect(folder)
    summary = _summary(seeds, baseline, candidate) + summary_rows(scores)
    environment = {key: results[0][key] for key in ("machine", "versions", "commit", "command")}
    found: dict[str, Any] = {"headline": _headline(seeds, results, baseline, candidate), "summary": summary}
    runs = results[0]["runs"]
    if all(run.get("probes") for run in runs.values()):
        discriminators = {name for name, run in runs.items() if is_discriminator(run)}
        found["table"] = race_table(seeds, scores, NAMES, baseline, discriminators)
    write_result(output, {**found, **environment, "seeds": seeds, "glue": scores, "races": results})
    races, panels = _panels(results)
    draw_curves(races, NAMES, output.with_suffix(".png"), panels)
    for row in summary:
        print(f"{row['name']}: {row['value']} {row['unit']}")
