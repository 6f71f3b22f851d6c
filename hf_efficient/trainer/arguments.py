"""Command-line arguments that training scripts share: corpus, presets, and Trainer's with pretraining's defaults."""

import json
import logging
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..utils.process import bf16_support


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help that keeps the examples of the description as they are, and shows defaults."""


@dataclass(kw_only=True)
class CorpusArguments:
    """The text to learn from."""

    corpus: str = field(
        default="builtin",
        metadata={
            "help": "'builtin' (Python's own documentation, no download), a path, folder or pattern of txt, parquet, "
            "jsonl or csv files, compressed or not, or the name of a dataset on the Hub."
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

    @property
    def loading_options(self) -> dict[str, Any]:
        """Keyword arguments of [`~hf_efficient.data.corpus.load_corpus`], besides the corpus itself."""
        return {
            "text_column": self.text_column,
            "config_name": self.corpus_config,
            "split": self.corpus_split,
            "txt_documents": self.txt_documents,
        }

    def load(self) -> "Dataset":
        """Load the documents by [`~hf_efficient.data.corpus.load_corpus`]."""
        from ..data.corpus import load_corpus

        return load_corpus(self.corpus, **self.loading_options)


@dataclass
class PretrainingArguments(TrainingArguments):
    """Arguments of `Trainer` with the defaults of pretraining, and bf16 where the machine is fast at it."""

    output_dir: str = field(
        default="pretrained", metadata={"help": "Folder for the model, its checkpoints and the loss history."}
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the newest complete checkpoint in output_dir, or start if there is none."},
    )
    auto_bf16: bool = field(
        default=True, metadata={"help": "Use bf16 autocast where the processor or GPU is fast at it. --no_auto_bf16"}
    )
    learning_rate: float = field(
        default=3e-4,
        metadata={
            "help": "Highest rate. 3e-4 is safe for every objective at a few million parameters, where mlm learns "
            "faster at 1e-3; take 1e-4 for a base model."
        },
    )
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps of warm-up, or below 1 their share."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of the weights."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Adam's second beta."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Adam's epsilon."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per step, process and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows per step of the evaluation."})
    dataloader_drop_last: bool = field(
        default=True,
        metadata={
            "help": "Drop an epoch's last rows if they fill no batch, so that any number of processes sees the same."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs."})
    eval_strategy: str = field(
        default="steps", metadata={"help": "When to measure the validation loss: steps, epoch or no."}
    )
    eval_steps: float | None = field(default=500, metadata={"help": "Steps between two evaluations."})
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})

    def __post_init__(self):
        support = bf16_support() if self.auto_bf16 and not self.fp16 and not self.bf16 else None
        if support is not None:
            self.bf16 = True
            self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # The rows hold what the collator needs and the model does not take.
        self.remove_unused_columns = False
        if self.process_index == 0:
            how = "bf16 autocast" if self.bf16 else "fp16 autocast" if self.fp16 else "fp32"
            why = f" (fast with {support}; --no_auto_bf16 for fp32)" if support else ""
            logger.info("Training in %s%s on %s.", how, why, self.device)


def parse_with_preset(
    kinds: list[type], argv: list[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Parse a command line whose first argument may be a preset, a .json file of settings that the others override.

    Args:
        kinds (`list[type]`): dataclasses whose fields are the options.
        argv (`list[str]`, *optional*): the command line, by default that of the process.
        description (`str`, *optional*): what `--help` shows above the options.

    Returns:
        `tuple`: one object of each of `kinds`.

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
    Read `name=value,name=value`. Values are JSON, lists included (`attention_layers=[6,9]`), or else plain words.

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
