"""Tables and goals of `decode_speed`, out of the races that it has measured."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from .races import ANCHOR, FORMATS, IN_TORCH, KINDS


CONTEXTS = (16, 512, 2048)
# Blocks of the two models of width 9216; see the presets 14x9216-all and 15x9216-dense.
LINEARS = f"bf16 dense{IN_TORCH}"  # the dense model by the linear maps of torch
DEPTHS = {"all": 14, "dense": 15}
# Goals on AVX2: times llama.cpp's Q4_0 at contexts of 16, 512 and 2,048 tokens.
AVX2_GOALS = {"bf16 all": (2.2, 2.0, 1.8), "int8 all": (3.2, 2.7, 2.0), "int4 all": (3.5, 3.0, 2.2)}
TWIN_GOALS = {"fp32 all": 6.0, "fp32 all-r16": 9.0, "bf16 all": 5.0}
WIDE_GOALS = {"bf16 all": 11.0, "int8 all": 14.0}
Row = dict[str, Any]


class Race:
    """
    A measured race at one context.

    Args:
        found (`dict`): what its file holds.
    """

    def __init__(self, found: dict[str, Any]):
        self.found, self.context = found, found["context"]
        self.name, self.threads = found["race"], found["threads"]
        clock = "core" if self.threads == 1 else "wall"
        self.seconds = {name: statistics.median(times[clock]) for name, times in found["seconds"].items()}

    def times_faster(self, name: str, peer: str) -> float | None:
        """Compare the time of a peer with that of an engine; `None` where one is missing."""
        if name not in self.seconds or peer not in self.seconds:
            return None
        return self.seconds[peer] / self.seconds[name]

    def bytes(self, name: str) -> int:
        """Count the bytes that a token reads, of weights, keys and values."""
        engine = self.found["engines"][name]
        return engine["bytes_read"] + self.context * engine["bytes_of_a_position"]

    def share_of_bandwidth(self, name: str) -> float:
        return self.bytes(name) / self.seconds[name] / self.found["read_bandwidth"]

    def spread(self, name: str) -> float:
        """The distance of the quartiles over the median."""
        times = self.found["seconds"][name]["core" if self.threads == 1 else "wall"]
        if len(times) < 4:
            return (max(times) - min(times)) / self.seconds[name]
        quartiles = statistics.quantiles(times, n=4)
        return (quartiles[2] - quartiles[0]) / self.seconds[name]


def print_race(found: dict[str, Any]) -> None:
    """Print what a race has found."""
    race = Race(found)
    what = f"prompt of {found['prompt']}" if found["prompt"] else f"context {race.context}"
    print(f"{race.name}, {what}, {race.threads} thread(s), {found['instruction_set']}:", flush=True)
    for name in race.seconds:
        ratio = race.times_faster(name, ANCHOR)
        beside = "" if ratio is None else f", {ratio:.2f} x {ANCHOR}"
        rate = f"{(found['prompt'] or 1) / race.seconds[name]:.1f} tokens/s"
        engine = found["engines"][name]
        print(
            f"  {name}: {1e3 * race.seconds[name]:.2f} ms (+-{race.spread(name):.0%}), {rate}, "
            f"{engine['bytes_read'] / 1e6:.1f} MB, {engine['resident_bytes'] / 1e6:.0f} MB in memory{beside}",
            flush=True,
        )


def _decoding(races: Iterable[Race], threads: int) -> list[Race]:
    return [race for race in races if race.threads == threads and not race.found["prompt"] and race.context]


def _of(races: list[Race], form: str, engine: str, context: int) -> Race | None:
    """The race that has an engine at a context: of its format, or else of all formats."""
    there = [race for race in races if race.context == context and engine in race.seconds]
    own = (race for race in there if race.name.startswith(form))
    return next(own, next((race for race in there if race.name == "formats"), None))


def speed_rows(races: list[Race]) -> Iterator[Row]:
    """By format and kind: milliseconds at each context, what is read, and ratios to the dense twin and to Q4_0."""
    for form in FORMATS:
        for kind in KINDS:
            engine = f"{form} {kind}"
            at = {c: race for c in CONTEXTS if (race := _of(races, form, engine, c)) is not None}
            if not at:
                continue
            first = next(iter(at.values()))
            row: Row = {"engine": engine, "MB read": first.found["engines"][engine]["bytes_read"] / 1e6}
            row["MB in memory"] = first.found["engines"][engine]["resident_bytes"] / 1e6
            for context, race in at.items():
                row[f"ms at {context}"] = 1e3 * race.seconds[engine]
            row["tokens/s"] = 1 / first.seconds[engine]
            row["share of bandwidth"] = first.share_of_bandwidth(engine)
            row["x dense twin"] = first.times_faster(engine, f"{form} dense")
            for context, race in at.items():
                row[f"x Q4_0 at {context}"] = race.times_faster(engine, ANCHOR)
            yield row


def peer_rows(races: list[Race]) -> Iterator[Row]:
    """The other engines, from the first race that has each."""
    names = dict.fromkeys(name for race in races for name in race.seconds if "llama" in name or "gpt2" in name)
    for name in names:
        if name.endswith("/1"):
            continue
        at = {race.context: race for race in reversed(races) if name in race.seconds}
        first = at[min(at)]
        engine = first.found["engines"][name]
        row: Row = {"engine": name, "MB read": engine["bytes_read"] / 1e6}
        row["MB in memory"] = engine["resident_bytes"] / 1e6
        row |= {f"ms at {c}": 1e3 * at[c].seconds[name] for c in CONTEXTS if c in at}
        row |= {"tokens/s": 1 / first.seconds[name], "share of bandwidth": first.share_of_bandwidth(name)}
        yield row


def growth_rows(races: list[Race], overhead: dict[str, float]) -> Iterator[Row]:
    """The time that a context adds, beside that of reading its keys and values; and the shares of a token's time."""
    names = dict.fromkeys((race.name, engine) for race in races for engine in race.seconds)
    for name, engine in names:
        ends = [next((r for r in races if (r.name, r.context) == (name, c)), None) for c in (CONTEXTS[0], CONTEXTS[-1])]
        if None in ends:
            continue
        low, high = (race for race in ends if race is not None)
        a_token = (high.seconds[engine] - low.seconds[engine]) / (high.context - low.context)
        reading = low.found["engines"][engine]["bytes_of_a_position"] / low.found["read_bandwidth"]
        row: Row = {"engine": engine, "race": name, "ms added": 1e3 * a_token * (high.context - low.context)}
        row["x reading K and V"] = a_token / reading
        fixed = overhead.get(engine)
        for race in (low, high):
            attention = a_token * race.context / race.seconds[engine]
            row[f"attention at {race.context}"] = attention
            if fixed is not None:
                share = fixed * race.found["size"]["layers"] / race.seconds[engine]
                row[f"overhead at {race.context}"] = share
                row[f"weights at {race.context}"] = max(0.0, 1 - attention - share)
        yield row


def overhead_of(races: list[Race]) -> dict[str, float]:
    """Seconds of a layer whose weights and keys cost nothing: of a narrow model of equal depth."""
    for race in races:
        if race.name == "overhead":
            return {name: seconds / race.found["size"]["layers"] for name, seconds in race.seconds.items()}
    return {}


def prompt_rows(races: Iterable[Race], threads: int) -> Iterator[Row]:
    """Reading a prompt: tokens a second, and the time until the first token."""
    for race in races:
        if race.found["prompt"] and race.threads == threads:
            for name, seconds in race.seconds.items():
                row: Row = {"engine": name, "tokens": race.found["prompt"]}
                row |= {"tokens/s": race.found["prompt"] / seconds, "seconds to the first token": seconds}
                yield {**row, "x Q4_0": race.times_faster(name, ANCHOR)}


def wide_rows(races: list[Race]) -> Iterator[Row]:
    """Blocks of width 9216, by the difference of models of two layers and one; whole models are composed of them."""
    for race in races:
        if not race.name.startswith("wide"):
            continue
        blocks = {n: s - race.seconds[f"{n}/1"] for n, s in race.seconds.items() if f"{n}/1" in race.seconds}
        for name, block in blocks.items():
            read = race.found["engines"]
            row: Row = {"engine": name, "race": race.name, "ms a block": 1e3 * block}
            row["MB a block"] = (read[name]["bytes_read"] - read[f"{name}/1"]["bytes_read"]) / 1e6
            for peer in ("bf16 dense", LINEARS, ANCHOR):
                row[f"block x {peer}"] = blocks[peer] / block if peer in blocks else None
            rest = race.seconds[f"{name}/1"] - block
            depth = DEPTHS["all" if name.endswith("all") else "dense"]
            row |= {"ms of head and rest": 1e3 * rest, "ms of the model, composed": 1e3 * (depth * block + rest)}
            yield row


def goals(result: dict[str, list[Row]], instruction_set: str) -> list[Row]:
    """The figures that have goals."""
    found: list[Row] = []

    def add(name: str, value: float | None, unit: str, goal: str | None) -> None:
        if value is not None:
            found.append({"name": name, "value": value, "unit": unit, "goal": goal})

    for row in result["speed"]:
        if (least := TWIN_GOALS.get(row["engine"])) is not None:
            add(f"{row['engine']} against its dense twin at 16", row["x dense twin"], "times", f"at least {least:g}")
        for context, least in zip(CONTEXTS, AVX2_GOALS.get(row["engine"], ()), strict=False):
            goal = f"at least {least:g}" if instruction_set == "avx2" else None
            if instruction_set != "avx2" and (row["engine"], context) == ("int8 all", 16):
                goal = "at least 2"
            add(f"{row['engine']} against {ANCHOR} at {context}", row.get(f"x Q4_0 at {context}"), "times", goal)
    for row in result["overhead"]:
        ours = row["engine"].endswith((" all", " dense"))
        add(f"overhead a layer, {row['engine']}", row["us a layer"], "us", "at most 40" if ours else None)
    growing = {row["engine"]: row for row in reversed(result["growth"]) if row["engine"].endswith((" all", " dense"))}
    for row in reversed(growing.values()):
        if row["engine"].partition(" ")[0] in FORMATS:
            most = 1.5 if row["engine"].startswith("fp32") else 2.2
            name = f"added from 16 to 2,048 tokens over reading K and V, {row['engine']}"
            add(name, row["x reading K and V"], "times", f"at most {most:g}")
    for row in result["prompt"]:
        if row["engine"].endswith(" all"):
            name = f"prompt of {row['tokens']} tokens, {row['engine']} against {ANCHOR}"
            add(name, row["x Q4_0"], "times", "at least 1")
    for row in result["wide"]:
        if row["engine"].endswith(" all"):
            goal = "at least 45" if instruction_set == "avx2" else None
            add(f"17B block, {row['engine']}, against dense bf16 in torch", row[f"block x {LINEARS}"], "times", goal)
            add(f"17B block, {row['engine']}, against dense bf16", row["block x bf16 dense"], "times", None)
            least = WIDE_GOALS.get(row["engine"])
            goal = None if least is None else f"at least {least:g}"
            add(f"17B block, {row['engine']}, against {ANCHOR}", row[f"block x {ANCHOR}"], "times", goal)
            for peer, goal, how in ((LINEARS, "at least 40", " in torch"), ("bf16 dense", None, "")):
                dense = next((r for r in result["wide"] if (r["engine"], r["race"]) == (peer, row["race"])), None)
                if dense is not None:
                    ratio = dense["ms of the model, composed"] / row["ms of the model, composed"]
                    add(f"17B model, composed, {row['engine']} against dense bf16{how}", ratio, "times", goal)
    return found


def headline_of(tables: dict[str, list[Row]], first: dict[str, Any]) -> str:
    """The speed of sparse models beside llama.cpp's dense one, in a sentence for each format."""

    def joined(row: Row, name: str, scale: float = 1.0, power: int = 1) -> str:
        found = [scale * row[f"{name} {c}"] ** power for c in CONTEXTS if row.get(f"{name} {c}") is not None]
        return " / ".join(f"{value:.3g}" for value in found)

    size, machine = first["size"], first["machine"]
    where = f"{machine['processor']}, {', '.join(machine['instructions'])}"
    if first["limits"]:
        where = f"{machine['processor']}, held to {first['instruction_set'].upper()} on both sides"
    peer = next((row for row in tables["peers"] if row["engine"] == ANCHOR), None)
    parts = [
        f"Tokens a second at batch 1 on one core ({where}) of {size['layers']} layers, {size['width']} wide, with "
        f"{size['vocabulary']:,} tokens, after {' / '.join(map(str, CONTEXTS))} tokens."
    ]
    if peer is not None:
        parts.append(f"{ANCHOR}, dense: {joined(peer, 'ms at', 1e3, -1)}, {peer['MB in memory']:.0f} MB in memory.")
    for row in tables["speed"]:
        form, _, kind = row["engine"].partition(" ")
        if kind != "all":
            continue
        beside = "" if peer is None else f", {joined(row, 'x Q4_0 at')} times that"
        twin = "" if row["x dense twin"] is None else f"; {row['x dense twin']:.3g} times its dense twin at 16"
        memory = f"{row['MB in memory']:.0f} MB"
        parts.append(f"Sparse in {form}: {joined(row, 'ms at', 1e3, -1)}{beside}{twin}, {memory}.")
    return " ".join(parts)


def result_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Put races together: tables for one thread and for two, figures with goals, and every repetition."""
    races = [Race(one) for one in found]
    result: dict[str, Any] = {}
    for threads in sorted({race.threads for race in races}):
        decoding = _decoding(races, threads)
        overhead = overhead_of(decoding)
        full = [race for race in decoding if race.name != "overhead" and not race.name.startswith("wide")]
        tables: dict[str, list[Row]] = {
            "speed": list(speed_rows(full)),
            "peers": list(peer_rows(full)),
            "growth": list(growth_rows(full, overhead)),
            "overhead": [{"engine": name, "us a layer": 1e6 * seconds} for name, seconds in overhead.items()],
            "prompt": list(prompt_rows(races, threads)),
            "wide": list(wide_rows(decoding)),
        }
        result[f"{threads} thread{'s' if threads > 1 else ''}"] = tables
    environment = {name: found[0][name] for name in ("machine", "versions", "commit", "command", "llama", "limits")}
    # Races are kept, so that they may be of several; each has its own in its entry.
    environment["commits"] = sorted({one["commit"] for one in found})
    summary = []
    for threads, tables in result.items():
        for row in goals(tables, found[0]["instruction_set"]):
            name = row["name"] if threads == "1 thread" else f"{row['name']}, {threads}"
            summary.append({**row, "name": name})
    first = next((one for one in found if one["threads"] == 1 and one["race"] in FORMATS), found[0])
    tables = result.get("1 thread") or next(iter(result.values()))
    shown = {"headline": headline_of(tables, first), "summary": summary}
    return {**shown, "tables": result, **environment, "races": found}


def table_of(rows: list[Row]) -> str:
    """A Markdown table of rows that need not have the same columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def shown(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
        return "" if value is None else str(value)

    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def text_of(result: dict[str, Any]) -> str:
    """Put all tables of a result into Markdown."""
    parts = []
    for threads, tables in result["tables"].items():
        parts += [f"### {name}, {threads}\n\n{table_of(rows)}\n" for name, rows in tables.items() if rows]
    if result["summary"]:
        parts.append(f"### goals\n\n{table_of(result['summary'])}\n")
    return "\n".join(parts)
