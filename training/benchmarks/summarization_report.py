"""The report of the race of summaries: both models of each set of pairs beside the first sentences of documents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_efficient.metrics.rouge_metric import ROUGE_TYPES

from .environment import RESULTS, describe, write_result


RESULT = RESULTS / "summarization_race.json"
TITLES = {"dense": "dense twin", "terraformer": "Terraformer"}
# Below this share of distinct summaries, or this loss by exchanging documents, no claim is made.
LEAST_DISTINCT, LEAST_READING = 0.5, 0.05


def faults_of(run: dict[str, Any]) -> list[str]:
    """Say why a model's figures support no claim: it writes the same for most documents, or hardly reads them."""
    faults = []
    if run["distinct_summaries"] < LEAST_DISTINCT * run["summaries"]:
        faults.append(f"{run['distinct_summaries']} distinct summaries of {run['summaries']} documents")
    reading = run["loss_of_exchanged_documents"] - run["loss"]
    if reading < LEAST_READING:
        faults.append(f"exchanging documents costs {reading:.3f} nats")
    return faults


def verdict(dataset: str, runs: dict[str, dict[str, Any]]) -> str:
    """Compare both models of a set of pairs in a sentence, or say why not."""
    if set(runs) != set(TITLES):
        return f"{dataset}: {', '.join(TITLES[kind] for kind in TITLES if kind not in runs)} not trained."
    faults = {kind: faults_of(run) for kind, run in runs.items()}
    if any(faults.values()):
        said = "; ".join(f"{TITLES[kind]}: {', '.join(found)}" for kind, found in faults.items() if found)
        return f"{dataset}: no claim ({said})."
    ours, twin = runs["terraformer"], runs["dense"]
    return (
        f"{dataset}: after equal core time {ours['loss']:.3f} nats a token and ROUGE-1 {100 * ours['rouge1']:.1f}, its "
        f"dense twin {twin['loss']:.3f} and {100 * twin['rouge1']:.1f}."
    )


def table_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of all runs, and of the first sentences whose ROUGE-1 is best, in percent."""
    scores = [name.replace("rouge", "ROUGE-") for name in ROUGE_TYPES]
    columns = ["pairs", "summary by", "parameters", "steps", "nats a token", *scores, "distinct"]
    rows = [columns, ["---"] * len(columns)]
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == dataset]
        for run in own:
            sizes = [f"{run['parameters']:,}", f"{run['steps']:,}", f"{run['loss']:.3f}"]
            distinct = f"{run['distinct_summaries']} of {run['summaries']}"
            rows.append([dataset, TITLES[run["kind"]], *sizes, *_percents(run), distinct])
        leads = own[0]["leads"]
        count = max(leads, key=lambda count: leads[count]["rouge1"])
        who = "first sentence" if count == "1" else f"first {count} sentences"
        rows.append([dataset, who, "", "", "", *_percents(leads[count]), ""])
    return [f"| {' | '.join(row)} |" for row in rows]


def _percents(found: dict[str, Any]) -> list[str]:
    return [f"{100 * found[name]:.1f}" for name in ROUGE_TYPES]


def processors_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Say on what processor each set of pairs was trained, where it was not the same for all."""
    by_set = {run["dataset"]: run["machine"]["processor"] for run in runs}
    if len(set(by_set.values())) == 1:
        return []
    return ["Trained on: " + "; ".join(f"{name}, {processor}" for name, processor in by_set.items()) + "."]


def report(folder: Path, datasets: Sequence[str], path: Path) -> None:
    """
    Merge all runs that have finished into one file, and print them as a table.

    Args:
        folder (`Path`): where they were trained.
        datasets (`Sequence[str]`): sets of pairs, in the order of the table.
        path (`Path`): the JSON to write.
    """
    paths = [folder / name / f"{kind}.json" for name in datasets for kind in TITLES]
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not runs:
        raise SystemExit(f"{folder} holds no finished run: use `train` first.")
    by_set = {name: {run["kind"]: run for run in runs if run["dataset"] == name} for name in datasets}
    verdicts = [verdict(name, found) for name, found in by_set.items()]
    screens = {kind: folder / "screen" / f"{kind}.json" for kind in TITLES}
    found = {
        "headline": " ".join([*verdicts, *processors_of(runs)]),
        "verdicts": verdicts,
        "precision": json.loads((folder / "precision.json").read_text()),
        "screen": {kind: json.loads(path.read_text()) for kind, path in screens.items() if path.exists()},
    }
    # It may be written elsewhere than where the models were trained.
    trained = {key: runs[-1][key] for key in ("machine", "versions", "command")}
    trained["commit"] = ", ".join(dict.fromkeys(run["commit"] for run in runs if run["commit"]))
    write_result(path, {**found, "runs": runs, **describe(), **trained})
    print("\n".join([*table_of(runs), "", *verdicts]))
