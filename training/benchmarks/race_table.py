"""A race in one table: for each contestant what it learned, how soon, and what fine-tuning makes of it."""

from statistics import mean, median
from typing import Any

from race_finetune import UNTRAINED


# Of tasks with two metrics the table holds one.
METRICS = {"mrpc": "accuracy", "stsb": "spearmanr"}


def _minutes(seeds: list[dict[str, Any]], name: str) -> str:
    """When the probe has passed the baseline's last, in each seed."""
    passed = [seed["runs"][name]["probe_passed_s"] for seed in seeds]
    return ", ".join("never" if seconds is None else f"{seconds / 60:.1f}" for seconds in passed)


def _of_blind(seeds: list[dict[str, Any]], name: str) -> str:
    parts = [seed["runs"][name].get("parts", {}) for seed in seeds]
    if any("fraction_of_chance_level_loss" not in found for found in parts):
        return "-"
    loss = mean(found["fraction_of_chance_level_loss"] for found in parts)
    return f"{loss:.2f}, {100 * mean(found['recall_replaced'] for found in parts):.0f} %"


def _scores(values: list[float] | None) -> str:
    return "-" if not values else f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def race_table(
    seeds: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    titles: dict[str, str],
    baseline: str,
    discriminators: set[str],
) -> dict[str, list]:
    """
    Columns and rows, as text.

    Args:
        seeds (`list[dict]`): figures of each seed of the race, as in the report.
        scores (`list[dict]`): of fine-tuning, from `race_finetune.collect`.
        titles (`dict[str, str]`): what to call the contestants.
        baseline (`str`): whose last probe the others are to pass.
        discriminators (`set[str]`): contestants whose encoder is no masked LM in the end.
    """
    by_place: dict[tuple[str, str, str], list[float]] = {}
    for entry in scores:
        by_place.setdefault((entry["encoder"], entry["task"], entry["metric"]), []).extend(entry["scores"])
    tasks = sorted({place[1:] for place in by_place if place[2] == METRICS.get(place[1], place[2])})
    columns = [
        "encoder",
        "held-out masked-LM loss, nats",
        "exchanged neighbours seen, % (chance 50)",
        f"minutes until that is above {titles[baseline]}'s last by two standard errors",
        "discriminator's loss, of a blind one's; replaced tokens found",
        *(f"{task}, {metric.replace('_', ' ')}, %" for task, metric in tasks),
    ]
    rows = []
    for name in seeds[0]["probe"]:
        runs, probes = [seed["runs"][name] for seed in seeds], [seed["probe"][name] for seed in seeds]
        error = max(probe["standard_error"] for probe in probes)
        rows.append(
            [
                titles[name],
                "-" if name in discriminators else f"{mean(run['final_loss'] for run in runs):.2f}",
                f"{mean(probe['accuracy'] for probe in probes):.1f} ± {error:.1f}",
                "-" if name == baseline else _minutes(seeds, name),
                _of_blind(seeds, name),
                *(_scores(by_place.get((name, *task))) for task in tasks),
            ]
        )
    if tasks:
        untrained = [_scores(by_place.get((UNTRAINED, *task))) for task in tasks]
        rows.append(["never pretrained", "-", "-", "-", "-", *untrained])
    return {"columns": columns, "rows": rows}
