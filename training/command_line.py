"""What the command lines of this folder share: which text to read, and how their help looks."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


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
        from hf_efficient.data.corpus import load_corpus

        return load_corpus(
            self.corpus,
            text_column=self.text_column,
            config_name=self.corpus_config,
            split=self.corpus_split,
            txt_documents=self.txt_documents,
        )
