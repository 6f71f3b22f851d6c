"""The table, the sentence and the picture of a GPT-2 made sparse: what `sparsify_quality` has measured."""

import json
from pathlib import Path
from typing import Any

from .environment import describe, write_result, write_whole


def table_of(
    runs: list[dict[str, Any]], dense: float, dense_read: int, speeds: dict[str, float]
) -> list[dict[str, Any]]:
    """One row a block size and kind of blocks, with ratios to the dense model."""
    rows = []
    for one in sorted(runs, key=lambda one: (one["block_size"], one["kind"])):
        bits_of = {when: one[when] for when in ("at_once", "distilled")}
        ratios = {when: {name: value / dense for name, value in found.items()} for when, found in bits_of.items()}
        read = one["weights_read_per_token"]
        rows.append(
            {
                **{name: one[name] for name in ("kind", "block_size", "rank", "parameters", "steps")},
                "bits_per_byte": bits_of,
                "of_dense": ratios,
                "weights_read_per_token": read,
                "read_of_dense": read / dense_read,
                "tokens_per_s": speeds.get(str(one["block_size"])),
                "accuracy": sum(layer["accuracy"] for layer in one["layers"]) / len(one["layers"]),
                "active_units": sum(layer["active_units"] for layer in one["layers"]) / len(one["layers"]),
            }
        )
    return rows


def shown(rows: list[dict[str, Any]], dense: float, speeds: dict[str, float]) -> dict[str, list]:
    """The table for pages: columns, and a row for the dense model and for each sparse one."""
    columns = [
        "N",
        "units of a block",
        "bits per byte at once",
        "of dense at once",
        "of dense with the best units at once",
    ]
    columns += ["bits per byte distilled", "of dense distilled", "of dense with the best units distilled"]
    columns += ["weights read of dense", "tokens per second"]
    found = [["dense", "-", f"{dense:.3f}", *["-"] * 6, f"{speeds['dense']:.0f}" if speeds else "-"]]
    for row in rows:
        line = [row["block_size"], {"coactivation": "seldom active together"}.get(row["kind"], row["kind"])]
        for when in ("at_once", "distilled"):
            line.append(f"{row['bits_per_byte'][when]['controller']:.3f}")
            line += [f"{row['of_dense'][when][name]:.4f}" for name in ("controller", "best_unit")]
        speed = row["tokens_per_s"] if row["kind"] == "coactivation" else None
        found.append([*line, f"{row['read_of_dense']:.0%}", "-" if speed is None else f"{speed:.0f}"])
    return {"columns": columns, "rows": found}


def draw(rows: list[dict[str, Any]], speeds: dict[str, float], path: Path) -> None:
    """Draw bits per byte, as shares of the dense model's, over tokens/s and over the weights that a token reads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "tokens per second over the dense model's": "speed",
        "weights read per token over the dense model's": "read",
    }
    figure, grid = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    styles = {("coactivation", "at_once"): "C0--o", ("coactivation", "distilled"): "C0-o"}
    styles |= {("random", "at_once"): "C1--s", ("random", "distilled"): "C1-s"}
    words = {
        "coactivation": "seldom active together",
        "random": "random",
        "at_once": "at once",
        "distilled": "distilled",
    }
    for axes, (label, over) in zip(grid, panels.items(), strict=True):
        for (kind, when), style in styles.items():
            own = [row for row in rows if row["kind"] == kind and (over == "read" or row["tokens_per_s"])]
            if not own:
                continue
            places = [row["read_of_dense"] if over == "read" else row["tokens_per_s"] / speeds["dense"] for row in own]
            values = [row["of_dense"][when]["controller"] for row in own]
            axes.plot(places, values, style, label=f"blocks {words[kind]}, {words[when]}")
            if (kind, when) == ("coactivation", "distilled"):
                for row, place, value in zip(own, places, values, strict=True):
                    axes.annotate(f"N {row['block_size']}", (place, value), (4, -12), textcoords="offset points")
        axes.plot([1.0], [1.0], "k*", label="dense")
        axes.margins(x=0.12)
        axes.axhline(1.03, color="grey", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("bits per byte over the dense model's")
    grid[0].legend(fontsize="small")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    pyplot.close(figure)


def headline_of(rows: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """The sentence about what the sparse models lose."""
    own = [row for row in rows if row["kind"] == "coactivation"]
    said = [
        f"N {row['block_size']} {row['of_dense']['at_once']['controller']:.3f} times the dense model's at once and "
        f"{row['of_dense']['distilled']['controller']:.3f} after distillation"
        for row in own
    ]
    first = own[0]
    scored = dense["score"]
    return (
        f"A GPT-2 of {dense['parameters'] / 1e6:.1f} M parameters ({dense['bits_per_byte']:.3f} bits per byte of all "
        f"held-out text, {scored['bits_per_byte']:.3f} of the {scored['eval_bytes']:,} bytes that all were scored on), "
        f"whose feed-forward layers were made sparse with controllers of rank {first['rank']} and distilled for "
        f"{first['steps']} steps, a tenth of its training: bits per byte {'; '.join(said)}."
    )


def summary_of(rows: list[dict[str, Any]], dense: dict[str, Any]) -> list[dict[str, Any]]:
    """List what was measured with its goal, for cards."""
    name = "bits per byte of all validation, dense GPT-2"
    found = [{"name": name, "value": dense["bits_per_byte"], "unit": "bits", "goal": "below 2.6"}]
    for row in rows:
        for when, words in (("at_once", "at once"), ("distilled", "distilled")):
            goal = (
                "at most 1.03" if (row["block_size"], row["kind"], when) == (4, "coactivation", "distilled") else None
            )
            name = f"bits per byte / dense, N {row['block_size']}, {row['kind']} blocks, {words}"
            unit = f"times (best unit of each block: {row['of_dense'][when]['best_unit']:.4f})"
            found.append({"name": name, "value": row["of_dense"][when]["controller"], "unit": unit, "goal": goal})
    return found


def write_report(folder: Path, result: Path, dense_read: int) -> None:
    """
    Merge all that was measured into one file and a picture, and print the table.

    Args:
        folder (`Path`): what the benchmark's commands wrote.
        result (`Path`): the JSON to write; the picture lies beside it.
        dense_read (`int`): weights that the dense model reads for a token.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*/result.json"))]
    if not runs:
        raise SystemExit(f"{folder} holds no finished run: use `run` first.")
    trained, scored = (json.loads((folder / "dense" / f"{name}.json").read_text()) for name in ("result", "score"))
    path = folder / "speed.json"
    timed = json.loads(path.read_text()) if path.exists() else None
    speeds = {} if timed is None else timed["tokens_per_s"]
    rows = table_of(runs, scored["bits_per_byte"], dense_read, speeds)
    measured = {**trained, "score": scored}
    machine = {name: runs[-1][name] for name in ("machine", "versions", "command")}
    machine["commit"] = ", ".join(dict.fromkeys(run["commit"] for run in runs if run["commit"]))
    write_result(
        result,
        {
            **describe(),
            **machine,
            "headline": headline_of(rows, measured),
            "summary": summary_of(rows, measured),
            "dense": measured,
            "table": shown(rows, scored["bits_per_byte"], speeds),
            "models": rows,
            "speed": timed,
            "runs": runs,
        },
    )
    draw(rows, speeds, result.with_suffix(".png"))
    for row in rows:
        once, later = row["of_dense"]["at_once"], row["of_dense"]["distilled"]
        print(
            f"N {row['block_size']:2} {row['kind']:12} at once {once['controller']:.4f} (best units "
            f"{once['best_unit']:.4f}), distilled {later['controller']:.4f} ({later['best_unit']:.4f}), reads "
            f"{row['read_of_dense']:.0%}"
        )
