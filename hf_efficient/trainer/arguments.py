"""What the command lines of this folder share: which text to read, presets, and how their help looks."""

import json
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser


if TYPE_CHECKING:
    from datasets import Dataset


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the examples of the description as they are, and shows defaults."""


@dataclass(kw_only=True)
class CorpusArguments:
    """Which text."""

    corpus: str = field(
        default="builtin",
        metadata={
            "help": "'builtin' (Python's own documentation, no download), a path, folder or pattern of txt, parquet or "
            "jsonl files, or the name of a dataset on the Hub."
        },
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    corpus_split: str = field(
        default="train", metadata={"help": "Split of a dataset on the Hub, such as 'train[:10%%]'."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    txt_documents: str = field(
        default="file", metadata={"help": "What a document is in txt files: file, blank_line or line."}
    )

    def load(self) -> "Dataset":
        """The documents, as [`~hf_efficient.data.corpus.load_corpus`] gives and refuses them."""
        from ..data.corpus import load_corpus

        return load_corpus(
            self.corpus,
            text_column=self.text_column,
            config_name=self.corpus_config,
            split=self.corpus_split,
            txt_documents=self.txt_documents,
        )


def parse_with_preset(
    kinds: list[type], argv: list[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Settings from the command line, one object of each of `kinds`. A first argument that ends in .json is a preset,
    which the others override.

    Raises:
        ValueError: if the preset names a setting that does not exist.
    """
    parser = HfArgumentParser(
        kinds,  # type: ignore[arg-type]
        description=description,
        usage="%(prog)s [PRESET.json] [--setting value ...]",
        formatter_class=HelpFormatter,
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith(".json"):
        preset: dict[str, Any] = json.loads(Path(argv.pop(0)).read_text(encoding="utf-8"))
        unknown = sorted(set(preset) - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"The preset names settings that do not exist: {', '.join(unknown)}.")
        parser.set_defaults(**preset)
    return parser.parse_args_into_dataclasses(argv)


def parse_overrides(text: str | dict[str, Any] | None) -> dict[str, Any]:
    """
    The fields of a config that `name=value,name=value` changes. Values are JSON, so that lists do, too
    (`attention_layers=[6,9]`), and else plain words.

    Raises:
        ValueError: if an item has no `=`.
    """
    if not text or isinstance(text, dict):
        return dict(text or {})
    values: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", text):  # not at the commas of a list
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"`config_overrides` must look like 'name=value,name=value'; got {item!r}.")
        try:
            values[name.strip()] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except json.JSONDecodeError:
            values[name.strip()] = value
    return values
