"""Fill in the numbers of the model cards, the kernels' cards and the README, so that none of them is typed by hand.

    python model_cards/build.py           rewrite the cards beside this file, kernels/*/CARD.md, docs/ and the README
    python model_cards/build.py --check   change nothing, and fail if a page is out of date

The text between an opening comment and the next `<!-- end -->` is generated. The opening comment names its source:

`<!-- sizes: MODEL_TYPE PRESET CLASS ... -->`
    Settings and parameter counts of a published configuration, counted on models built without memory (the meta
    device). PRESET is one of the names that the config's `presets()` lists, such as `large` or `enwik8-base`. Without a
    CLASS all classes of the family are counted.
`<!-- results: NAME ... -->`
    The `summary` of `training/results/NAME.json`. NAME may be a pattern, such as `glue*`; `NAME@WORD` takes only the
    rows with that word in their name.
`<!-- table: NAME ... | COLUMN, COLUMN = HEADING, ... -->`
    The `table` of the result files. Without the part after the bar all columns are shown. A COLUMN is the beginning of
    a recorded column's name, or its number, counted from 1; HEADING replaces that name. Rows that have no value in any
    of the chosen columns but the first are left out. The comment may span several lines.
`<!-- headline: NAME ... -->`
    The sentences under `headline` in the result files.
`<!-- models: MODEL_TYPE ... -->`, `<!-- language_models: MODEL_TYPE ... -->`
    A table of the published sizes of encoders or of language models, with their measured speed.
`<!-- sparse_models: MODEL_TYPE ... -->`
    A table of the published sizes of language models with sparse layers, and of the weights that a token reads.
`<!-- families -->`, `<!-- overview -->`
    A sentence a family, and the table of all of them, as overview.py beside this file makes them.
"""

import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_efficient.auto import FAMILIES, Family


CARDS = Path(__file__).parent
ROOT = CARDS.parent
RESULTS = ROOT / "training" / "results"
# Not imported: this file is a script, and is loaded by its path elsewhere.
OVERVIEW = runpy.run_path(str(CARDS / "overview.py"))
KINDS, WHOLE = "sizes|results|table|headline|models|language_models|sparse_models", "families|overview"
BLOCK = re.compile(
    rf"(?P<head><!-- (?:(?P<kind>{KINDS}): (?P<source>.+?)|(?P<whole>{WHOLE})) -->\n).*?(?P<tail><!-- end -->)",
    re.DOTALL,
)
SHOWN = (
    "num_encoder_layers",
    "num_decoder_layers",
    "decoder_type",
    "attentions_per_layer",
    "num_hidden_layers",
    "hidden_size",
    "projection_size",
    "attention_every_n_layers",
    "num_attention_heads",
    "intermediate_size",
    "ff_sparsity",
    "ff_rank",
    "attention_type",
    "attention_sparsity",
    "lm_head_type",
    "loss_sparsity",
    "max_position_embeddings",
    "vocab_size",
)


def configuration(family: Family, preset: str) -> Any:
    """Build a published configuration of a family."""
    config_class: Any = family.load(family.config)
    return config_class.preset(preset)


def sizes(model_type: str, preset: str, *classes: str) -> str:
    """Tables of a configuration's sizes and of the parameters of the named classes, or of all of the family."""
    family = FAMILIES[model_type]
    config = configuration(family, preset)
    names = classes or tuple(dict.fromkeys(family.classes.values()))
    fields = {name: getattr(config, name, None) for name in SHOWN}
    if fields["num_decoder_layers"] is not None:  # of an encoder-decoder, where the other counts attentions
        del fields["num_hidden_layers"]
    shown = {
        name: value if isinstance(value, str) else f"{value:,}" for name, value in fields.items() if value is not None
    }
    rows = [f"| `{name}` | {value} |" for name, value in shown.items()]
    lines = ["| config | |", "| --- | ---: |", *rows, "", "| class | parameters |", "| --- | ---: |"]
    for name in names:
        with torch.device("meta"):
            model: Any = family.load(name)(config)
        lines.append(f"| `{name}` | {model.num_parameters():,} |")
        if hasattr(model, "weights_read_per_token"):
            lines.append(f"| of them a token of `{name}` reads | {model.weights_read_per_token():,} |")
    heads = "Two labels in the classification heads; tied" if not classes else "Tied"
    return "\n".join([*lines, "", f"{heads} weights are counted once."])


def results(*names: str, folder: Path = RESULTS) -> str:
    """
    A table of the summary of each result file that a name matches, or that there is none.

    Raises:
        ValueError: if a file has no `summary`, a list of `{"name", "value", "unit", "goal"}`.
    """
    parts = []
    for named in names:
        name, _, word = named.partition("@")
        files = sorted(folder.glob(f"{name}.json"))
        parts += [_summary(file, word) for file in files] or [f"`{name}`: not measured yet."]
    return "\n\n".join(parts)


def _summary(file: Path, word: str = "") -> str:
    result = json.loads(file.read_text(encoding="utf-8"))
    summary = result.get("summary")
    if not isinstance(summary, list):
        raise ValueError(f"{file} has no list `summary` of entries with name, value, unit and goal.")
    if not any(word in str(entry["name"]) for entry in summary):
        raise ValueError(f"{file} has no row with {word!r} in its name.")
    lines = [
        f"`{file.stem}`{_provenance(result)}",
        "",
        "| measurement | value | unit | goal |",
        "| --- | ---: | --- | --- |",
    ]
    for entry in [entry for entry in summary if word in str(entry["name"])]:
        value = "not measured yet" if entry.get("value") is None else _text(entry["value"])
        lines.append(f"| {_text(entry['name'])} | {value} | {_text(entry.get('unit'))} | {_text(entry.get('goal'))} |")
    return "\n".join(lines)


def table(*names: str, columns: str = "", folder: Path = RESULTS) -> str:
    """
    The table that each result file holds, `{"columns": [...], "rows": [[...], ...]}`, or that there is none.

    Args:
        names (`str`): names of the result files.
        columns (`str`, *optional*): the columns to show, such as `"encoder = method, cola"`; all by default.
        folder (`Path`, *optional*): folder of the result files.

    Raises:
        ValueError: if a column of the selection is not exactly one of the table's.
    """
    parts = []
    for name in names:
        file = folder / f"{name}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "table" not in result:
            parts.append(f"`{name}`: not measured yet.")
            continue
        headings, rows = result["table"]["columns"], result["table"]["rows"]
        if columns:
            headings, rows = _select(headings, rows, columns)
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
        parts.append("\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines))
    return "\n\n".join(parts)


def _select(recorded: list[str], rows: list[list], columns: str) -> tuple[list[str], list[list]]:
    """Headings and rows of the chosen columns, without the rows that are empty there."""
    headings, indices = [], []
    for entry in columns.split(","):
        column, _, heading = (part.strip() for part in entry.partition("="))
        if column.isdecimal():
            found = [int(column) - 1] if 0 < int(column) <= len(recorded) else []
        else:
            found = [index for index, name in enumerate(recorded) if column and name.startswith(column)]
        if len(found) != 1:
            raise ValueError(f"Column {column!r} stands for {len(found)} columns of {recorded}; name exactly one.")
        headings.append(heading or recorded[found[0]])
        indices += found
    chosen = [[row[index] for index in indices] for row in rows]
    return headings, [row for row in chosen if any(cell not in (None, "-") for cell in row[1:])]


def headline(*names: str, folder: Path = RESULTS) -> str:
    """The sentences under `headline` in each result file, with its processor's name, unless they have it, and units for
    bf16, unless a GPU was measured; or that there is none."""
    sentences = []
    for name in names:
        file = folder / f"{name}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        found, machine = result.get("headline"), result.get("machine") or {}
        units = f"units for bf16 ({', '.join(machine['bf16'])})" if machine.get("bf16") else "no units for bf16"
        if found and machine.get("processor") and not machine.get("gpu"):
            named = machine["processor"] in found
            found += f" The processor{'' if named else ', ' + machine['processor'] + ','} has {units}."
        sentences.append(found or f"`{name}`: not measured yet.")
    return "\n\n".join(sentences)


def models(*model_types: str, folder: Path = RESULTS, prefix: str = "") -> str:
    """A row for each published size of the families: parameters, and speed relative to BERT where it was measured."""
    file = folder / "encoder_speed.json"
    measured = json.loads(file.read_text(encoding="utf-8")).get("table", {}) if file.is_file() else {}
    lines = [
        "| model | parameters | training step / BERT | inference / BERT | peak memory / BERT | card |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for model_type in model_types:
        family = FAMILIES[model_type]
        for preset in family.presets:
            config = configuration(family, preset)
            with torch.device("meta"):
                model: Any = family.load(family.classes["AutoModel"])(config)
            shape = f"{config.num_hidden_layers}x{config.hidden_size}"
            ratios = measured.get(shape, {})
            cells = [_text(ratios.get(key, "not measured yet")) for key in ("train", "inference", "memory")]
            card = f"[{model_type}-{preset}]({prefix}model_cards/{model_type}-{preset}.md)"
            name = f"`{type(model).__name__}` {preset}"
            lines.append(f"| {name} | {model.num_parameters() / 1e6:.1f} M | {' | '.join(cells)} | {card} |")
            measured.pop(shape, None)
    for shape, ratios in measured.items():
        cells = [_text(ratios.get(key)) for key in ("train", "inference", "memory")]
        lines.append(f"| TUPE-R, {shape.replace('x', ' layers, ')} wide | - | {' | '.join(cells)} | |")
    return "\n".join(lines)


def language_models(*model_types: str, folder: Path = RESULTS, prefix: str = "") -> str:
    """A row for each published size of the families: parameters, and speed relative to GPT-2 where it was measured."""
    file = folder / "lm_speed.json"
    measured = json.loads(file.read_text(encoding="utf-8")).get("table", {}) if file.is_file() else {}
    lines = [
        "| model | parameters | attention layers | training step / GPT-2 | decoding / GPT-2 |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for model_type in model_types:
        family = FAMILIES[model_type]
        for preset in family.presets:
            config = configuration(family, preset)
            with torch.device("meta"):
                model: Any = family.load(family.classes["AutoModelForCausalLM"])(config)
            attending = len(config.attention_layer_indices)
            layers = "all" if attending == config.num_hidden_layers else f"{attending} of {config.num_hidden_layers}"
            cells = [_text(measured.get(preset, {}).get(key, "not measured yet")) for key in ("train", "decode")]
            card = CARDS / f"{model_type}-{preset}.md"
            name = f"[{preset}]({prefix}model_cards/{card.name})" if card.is_file() else preset
            lines.append(f"| {name} | {model.num_parameters() / 1e6:.1f} M | {layers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sparse_models(*model_types: str, folder: Path = RESULTS, prefix: str = "") -> str:
    """A row for each published size of the families: parameters, and how many of them decoding a token reads; of
    encoder-decoders without the encoder, which runs once a text."""
    lines = [
        "| model | parameters | weights read a token | sparse in | units of a block, modules, of the output layer |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for model_type in model_types:
        family = FAMILIES[model_type]
        for preset in family.presets:
            config = configuration(family, preset)
            task = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
            with torch.device("meta"):
                model: Any = family.load(family.classes[task])(config)
            total, read = model.num_parameters(), model.weights_read_per_token()
            named = {
                "feed-forward": config.ff_sparsity,
                "attention": config.attention_sparsity,
                "loss": config.loss_sparsity,
            }
            sparse = ", ".join(name for name, value in named.items() if value) or "nothing"
            values = ", ".join(str(value or "-") for value in named.values())
            card = CARDS / f"{preset if preset.startswith(model_type) else f'{model_type}-{preset}'}.md"
            name = f"[{preset}]({prefix}model_cards/{card.name})" if card.is_file() else preset
            lines.append(
                f"| {name} | {total / 1e6:,.0f} M | {read / 1e6:,.0f} M ({read / total:.0%}) | {sparse} | {values} |"
            )
    return "\n".join(lines)


def _provenance(result: dict) -> str:
    """Machine, versions, commit and command, as far as the file records them."""
    machine, versions = result.get("machine") or {}, result.get("versions") or {}
    said = [str(machine[key]) for key in ("processor", "vector_instructions", "gpu") if machine.get(key)]
    said += [f"units for bf16 ({', '.join(machine['bf16'])})"] if machine.get("bf16") else []
    said += [f"{machine['threads']} thread(s)"] if machine.get("threads") else []
    said += [f"{package} {versions[package]}" for package in ("torch", "transformers") if versions.get(package)]
    commits = [commit.partition("-dirty") for commit in (result.get("commit") or "").split(", ") if commit]
    named = [f"{commit[:10]}{' with changes' if dirty else ''}" for commit, dirty, _ in commits]
    # A command is that of its commit: programs have moved since.
    said += [f"at commit{'s' if len(named) > 1 else ''} {', '.join(named)}"] if named else []
    said += [f"by `{result['command']}`"] if result.get("command") else []
    return f": {', '.join(said)}" if said else ""


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


MAKERS: dict[str, Callable[..., str]] = {"results": results, "headline": headline}
# Those that link to cards.
LINKING: dict[str, Callable[..., str]] = {
    "models": models,
    "language_models": language_models,
    "sparse_models": sparse_models,
}


def fill(card: str, folder: Path = RESULTS, prefix: str = "") -> str:
    """
    Regenerate the blocks of a card.

    Args:
        card (`str`): its text.
        folder (`Path`, *optional*): folder of the result files.
        prefix (`str`, *optional*): what links to other pages begin with, such as `"../"`.

    Raises:
        ValueError: if a block has no end, or its opening comment asks for columns that are not there.
    """

    def block(match: re.Match) -> str:
        if match["whole"]:
            return f"{match['head']}\n{OVERVIEW[match['whole']](folder, prefix)}\n\n{match['tail']}"
        names, bar, columns = " ".join(match["source"].split()).partition(" | ")
        kind, words = match["kind"], names.split()
        if bar and kind != "table":
            raise ValueError(f"Only a table has columns to choose from: <!-- {kind}: {match['source']} -->")
        if kind == "sizes":
            body = sizes(*words)
        elif kind == "table":
            body = table(*words, columns=columns, folder=folder)
        elif kind in LINKING:
            body = LINKING[kind](*words, folder=folder, prefix=prefix)
        else:
            body = MAKERS[kind](*words, folder=folder)
        return f"{match['head']}\n{body}\n\n{match['tail']}"

    opened = len(re.findall(rf"<!-- (?:(?:{KINDS}): |(?:{WHOLE}) -->)", card))
    filled, count = BLOCK.subn(block, card)
    if not count == opened == card.count("<!-- end -->"):
        raise ValueError(f"{opened} blocks begin, but {card.count('<!-- end -->')} `<!-- end -->` stand in the card.")
    return filled


def pages(folder: Path) -> dict[str, Path]:
    """Pages with generated blocks, by name: the cards in `folder`; with our own, the kernels' cards, the pages of docs/
    and the README."""
    found = sorted(folder.glob("*.md"))
    if folder == CARDS:
        found += [*sorted(ROOT.glob("kernels/*/CARD.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
    return {str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name: path for path in found}


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check every page, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Change nothing; fail if a card is out of date.")
    parser.add_argument("--cards", type=Path, default=CARDS, help="Folder of the cards (*.md).")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the result files (*.json).")
    args = parser.parse_args(argv)
    stale = []
    for name, path in pages(args.cards).items():
        card = path.read_text(encoding="utf-8")
        filled = fill(card, args.results, "../" if path.parent == ROOT / "docs" else "")
        if filled != card:
            stale.append(name)
            if not args.check:
                path.write_text(filled, encoding="utf-8")
    if args.check and stale:
        print(f"Out of date: {', '.join(stale)}. Run `python model_cards/build.py`.", file=sys.stderr)
        return 1
    print(f"Rewrote {', '.join(stale)}." if stale else "The cards are up to date.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
