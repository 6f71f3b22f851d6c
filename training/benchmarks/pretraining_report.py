"""Results of a comparison of pretraining methods: encoders fine-tuned on GLUE tasks, one JSON and one picture."""

import json
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_efficient.data.glue import load_glue
from hf_efficient.objectives.diagnostics import chance_level_loss
from hf_efficient.utils.process import bf16_support
from training.finetune_glue import FinetuningArguments, finetune

from .environment import RESULTS, write_result
from .equal_time import draw_curves, time_to_reach
from .pretraining_methods import METHODS


NAMES = {name: method.title for name, method in METHODS.items()}
NAMES |= {
    **{f"{name}_half": f"{title}, half the time" for name, title in NAMES.items()},
    **{f"{name}_long": f"{title}, longer" for name, title in NAMES.items()},
}
UNTRAINED = "random"
# Short on purpose: at this size the encoders cannot be told apart anyway.
EPOCHS = {"sst2": 1.0, "cola": 2.0, "mrpc": 2.0, "rte": 2.0, "stsb": 2.0}
MAX_TRAIN_SAMPLES = {"sst2": 8_000}
# Of tasks with two metrics the table holds one.
METRICS = {"mrpc": "accuracy", "stsb": "spearmanr"}


def _folder_of(encoder: str, home: Path, seed: int, sizes: tuple[int, int, int]) -> Path:
    """Find the folder of an encoder; the untrained one, a TUPE-R, is made here."""
    folder = home / f"seed-{seed}" / encoder
    if encoder == UNTRAINED and not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer")
        torch.manual_seed(seed)
        METHODS["tupe_r"].make(tokenizer, *sizes).model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def finetune_encoders(args) -> None:
    """Fine-tune every encoder on every task with every seed; finished runs are kept, an interrupted one starts anew."""
    home = Path(args.output_dir)
    fast_bf16 = bf16_support() is not None
    for task in args.tasks:
        data = load_glue(task, args.data_dir)
        for encoder in args.encoders:
            model = _folder_of(encoder, home, args.seed, (args.layers, args.width, args.length))
            for seed in range(args.seeds):
                training = FinetuningArguments(
                    output_dir=str(home / f"seed-{args.seed}" / "glue" / encoder),
                    num_train_epochs=EPOCHS.get(task, 2.0),
                    per_device_train_batch_size=32,
                    learning_rate=args.learning_rate,
                    save_strategy="no",
                    bf16=fast_bf16,
                    use_cpu=not torch.accelerator.is_available(),
                    report_to=[],
                    seed=seed,
                )
                samples = MAX_TRAIN_SAMPLES.get(task)
                result = finetune(
                    str(model), task, training, data, max_length=args.length, max_train_samples=samples, resume=True
                )
                print(f"{task}, {encoder}, seed {seed}: {result['metrics']}", flush=True)


def collect(home: Path) -> list[dict[str, Any]]:
    """Collect the scores of all finished runs: an entry an encoder, task and metric, with its seeds' in percent."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(home.glob("seed-*/glue/*/*/seed-*/results.json")):
        result = json.loads(path.read_text())
        for metric, value in result["metrics"].items():
            if value is not None:
                scores.setdefault((path.parts[-4], result["task"], metric), []).append(100 * value)
    return [
        {"encoder": encoder, "task": task, "metric": metric, "scores": values}
        for (encoder, task, metric), values in sorted(scores.items(), key=lambda item: item[0][1:])
    ]


def summary_rows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{entry['task']} {entry['metric']}, fine-tuned from {entry['encoder']}",
            "value": round(median(entry["scores"]), 2),
            "unit": f"%, median of {len(entry['scores'])} seeds (from {min(entry['scores']):.1f} to "
            f"{max(entry['scores']):.1f}, mean {mean(entry['scores']):.1f})",
            "goal": "no claim",
        }
        for entry in entries
    ]


def _minutes(seeds: list[dict[str, Any]], name: str) -> str:
    """Tell when the probe has passed the baseline's last, in each seed."""
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


def comparison_table(
    seeds: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    titles: dict[str, str],
    baseline: str,
    discriminators: set[str],
) -> dict[str, list]:
    """
    Make one table of all methods, as text: the losses, the probe and the fine-tuning.

    Args:
        seeds (`list[dict]`): figures of each seed.
        scores (`list[dict]`): of fine-tuning, see [`collect`].
        titles (`dict[str, str]`): what to call the methods.
        baseline (`str`): whose last probe the others are to pass.
        discriminators (`set[str]`): methods whose encoder is no masked LM in the end.
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


def probe_passed(run: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    """Find the core seconds at which a run's probe first lies two standard errors of their difference above the
    baseline's last; `None` if it never does."""
    goal = baseline["probes"][-1]
    margin = 2 * math.hypot(goal[2], run["probes"][-1][2])
    return time_to_reach([[seconds, 0, -accuracy] for seconds, accuracy, _ in run["probes"]], -goal[1] - margin)


def _discriminator_figures(run: dict[str, Any]) -> dict[str, float]:
    """Take the figures that a run ends with besides its loss; empty for masked LM without notes."""
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
    """Compare the runs of one seed to its own baseline."""
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
    """Tell whether a run's loss is a generator's, since its encoder is not a masked LM."""
    return any("generator_loss" in parts for parts in run.get("parts", []))


def _row(name: str, value: float | None, unit: str, goal: str | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": goal}


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _candidate_rows(seeds: list[dict[str, Any]], baseline: str, candidate: str) -> list[dict[str, Any]]:
    """Tell how soon the candidate reaches what the baseline ends with."""
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
    """Make the rows of one method, means over seeds."""
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
    """Say in a few sentences, for the README, how the methods compare."""
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
    """Choose the curves to draw of each run, and the panels that have something in them."""
    runs_by_seed = [
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
    drawn = {key for runs in runs_by_seed for run in runs.values() for key, points in run.items() if points}
    return runs_by_seed, {key: label for key, label in labels.items() if key in drawn}


def report(folder: Path, output: Path | None = None, baseline: str = "bert", candidate: str = "tupe_r") -> None:
    """
    Merge `folder/seed-*/result.json` into `output`, and draw `output` with the suffix .png. By default that is in
    `training/results`, by the name of the folder, with `_gpu` behind it for runs on a GPU.

    Raises:
        FileNotFoundError: if no seed has finished.
        ValueError: if a seed lacks the baseline, or runs that another one has.
    """
    paths = sorted(folder.glob("seed-*/result.json"))
    if not paths:
        raise FileNotFoundError(f"No seed has finished in {folder}: run the comparison first.")
    results = [json.loads(path.read_text()) for path in paths]
    for result in results:  # in the order of `METHODS`, whenever they ran
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
        found["table"] = comparison_table(seeds, scores, NAMES, baseline, discriminators)
    write_result(output, {**found, **environment, "seeds": seeds, "glue": scores, "races": results})
    runs_by_seed, panels = _panels(results)
    draw_curves(runs_by_seed, NAMES, output.with_suffix(".png"), panels)
    for row in summary:
        print(f"{row['name']}: {row['value']} {row['unit']}")
