"""Command-line arguments that training scripts share: corpus, presets, and Trainer's with pretraining's defaults."""

import difflib
import inspect
import json
import logging
import re
import shutil
import sys
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml  # which transformers needs too
from transformers import HfArgumentParser, TrainingArguments

from ..utils.process import OneLineErrorParser, bf16_support


if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.document_stream import DocumentSettings, DocumentStream

logger = logging.getLogger(__name__)


_COMMAND = "hf-efficient"
# Options of transformers that its users look for first.
_MUCH_USED = ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "seed", "use_cpu", "optim")


class HelpFormatter(RawDescriptionHelpFormatter):
    """Help that keeps the description as it is, and gives each option one name, the kind of its value, and its default
    where it says something."""

    _KINDS = {int: "INT", float: "FLOAT", str: "TEXT"}

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120), **kwargs)

    def _format_action_invocation(self, action: Action) -> str:
        names = {name.lstrip("-").replace("-", "_"): name for name in reversed(action.option_strings)}
        told = ", ".join(reversed(names.values()))
        if action.const is True:
            return told.replace("--", "--[no_]", 1) if action.default is True else told
        return told if action.nargs == 0 else f"{told} {self._KINDS.get(action.type, 'VALUE')}"  # type: ignore[call-overload]

    def _get_help_string(self, action: Action) -> str | None:
        if action.help is None or action.default in (None, False, SUPPRESS, "") or "default" in action.help:
            return action.help
        return action.help if isinstance(action.default, list) else f"{action.help} (default: %(default)s)"


class _HelpAll(Action):
    """Prints the help with all options, and ends."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class ScriptParser(OneLineErrorParser, HfArgumentParser):
    """
    Command line of a script, whose options are the fields of dataclasses. `--help` shows those that this package
    declares, `--help-all` also those of transformers.

    Args:
        kinds (`list[type]`): the dataclasses.
        description (`str`, *optional*): what the help shows above the options.
    """

    shows_all = False

    def __init__(self, kinds: list[type], description: str | None = None):
        super().__init__(kinds, description=description, formatter_class=HelpFormatter)  # type: ignore[arg-type]
        if self.prog.startswith(f"{_COMMAND} "):
            self.description = _by_command(self.description or "")
        self.add_argument("--help-all", nargs=0, action=_HelpAll, default=SUPPRESS, help="show Trainer's options too")
        own = {"help", "help_all", *_MUCH_USED, *(name for kind in kinds for name in _own_fields(kind))}
        self._others = [action for action in self._actions if action.dest not in own]
        for action in self._actions:
            if action.const is False:
                action.help = SUPPRESS  # said at its twin: --[no_]name
        required = [f"{action.option_strings[0]} VALUE" for action in self._actions if action.required]
        self.usage = " ".join(["%(prog)s [PRESET]", *required, "[--setting value ...]"])
        if self._others:
            self.epilog = "--help-all shows the options of transformers' Trainer too. All of them are taken."

    def format_help(self) -> str:
        """Format the help: with all options once `shows_all` is true."""
        hidden = [] if self.shows_all else self._others
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def set_preset(self, preset: dict[str, Any]) -> None:
        """
        Make the settings of a preset the defaults.

        Raises:
            ValueError: if it names a setting that does not exist.
        """
        unknown = sorted(set(preset) - {action.dest for action in self._actions})
        if unknown:
            raise ValueError(f"The preset names settings that do not exist: {', '.join(unknown)}.")
        self.set_defaults(**preset)
        for action in self._actions:
            action.required = action.required and action.dest not in preset

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line, of which all must be known."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            names = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(rest[0].partition("=")[0], names, 1)
            self.error(f"there is no option {rest[0]}{f', but {near[0]}' if near else ''}")
        return found, rest


def _by_command(text: str) -> str:
    """Rewrite command lines of a clone as those of the installed console command."""

    def renamed(match: re.Match) -> str:
        launcher = f"{_COMMAND} " if match[1] == "python " else f"{match[1]}-m hf_efficient.cli "
        return launcher + match[2].replace("_", "-")

    text = re.sub(r"(python |torchrun (?:--\S+ \d+ )?)(?:-m training\.|training/)(\w+)(?:\.py)?", renamed, text)
    return re.sub(r"training/configs/(\w+)\.json", r"\1", text)


def _own_fields(kind: type) -> Iterator[str]:
    """Names of the fields that this package declares or gives another default, of a dataclass and those it is made
    from."""
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] not in ("transformers", "builtins"):
            yield from inspect.get_annotations(cls)


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


@dataclass(kw_only=True)
class StreamingArguments(CorpusArguments):
    """The text to learn from, in memory or read while training goes on."""

    streaming: bool = field(
        default=False,
        metadata={"help": "Read the corpus while training, for --max_steps: one larger than the disk, or on the Hub."},
    )
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={"help": "With --streaming: rows to draw from; 0 keeps their order."},
    )
    validation: str | None = field(
        default=None, metadata={"help": "Text to measure on, named as the corpus is. Without it a part of the corpus."}
    )

    def check_streaming(self, args: TrainingArguments) -> None:
        """
        Check the settings of a stream, before anything is read.

        Raises:
            ValueError: for those that a stream cannot follow.
        """
        if not self.streaming:
            return
        if args.max_steps <= 0:
            raise ValueError("--streaming does not know how long the corpus is: give --max_steps.")
        if args.dataloader_num_workers:
            raise ValueError("--streaming reads in the process that trains: leave out --dataloader_num_workers.")
        if self.shuffle_buffer_size < 0:
            raise ValueError(f"`shuffle_buffer_size` must not be negative, as {self.shuffle_buffer_size} is.")

    def resume_critical(self, args: TrainingArguments) -> dict[str, Any]:
        """Collect the settings, which must be the same when a run is resumed; those of a stream only if it is one."""
        if self.streaming:
            return {**asdict(self), "processes": args.world_size}
        left_out = ["streaming", "shuffle_buffer_size", *(["validation"] if self.validation is None else [])]
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def document_settings(self, validation_size: float, **options: Any) -> "DocumentSettings":
        """Settings of streams of the corpus's documents, of which without --validation a fraction of
        `validation_size` is held out; `options` are further ones."""
        from ..data.document_stream import DocumentSettings

        held_out = validation_size if self.validation is None else 0.0
        return DocumentSettings(corpus=self.corpus, validation_size=held_out, **self.loading_options, **options)

    def stream_documents(self, settings: "DocumentSettings", args: TrainingArguments) -> "DocumentStream":
        """Open the stream of this process's documents, without end."""
        from ..data.document_stream import DocumentStream

        return DocumentStream(settings, process=args.process_index, processes=args.world_size)

    def validation_documents(self, settings: "DocumentSettings") -> "DocumentStream | None":
        """Open the documents to measure on, those of --validation or of the corpus; `None` if there are to be none."""
        from ..data.document_stream import DocumentStream

        if self.validation is not None:
            return DocumentStream(replace(settings, corpus=self.validation, validation_size=0.0), passes=1)
        return DocumentStream(settings, "validation", passes=1) if settings.validation_size else None


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


def read_preset(name: str, folder: Path) -> dict[str, Any]:
    """
    Read a preset: settings by name.

    Not by the readers of `HfArgumentParser`, which take no further options, and leave the `1e-4` of YAML a text.

    Args:
        name (`str`): a JSON or YAML file, or one of those in `folder`, with or without its suffix.
        folder (`Path`): of the presets that come with a script.

    Raises:
        ValueError: if there is no such preset, or it is damaged.
    """
    path = Path(name)
    if not path.is_file():
        known = {file.stem: file for file in sorted(folder.glob("*.json"))}
        # By the path in a clone too, wherever the package is.
        alone = path.parent in (Path(), Path(folder.parent.name, folder.name))
        if not alone or path.stem not in known or path.suffix not in ("", ".json"):
            names = ", ".join(known) or "none"
            raise ValueError(f"There is no preset {name}: give a .json or .yaml file, or a name: {names}.")
        path = known[path.stem]
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"A preset is a .json or .yaml file, and {name} is neither.")
    try:
        preset = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The preset {path} cannot be read: {error}") from error
    if not isinstance(preset, dict):
        raise ValueError(f"The preset {path} holds no settings by name.")
    return preset


def parse_with_preset(
    kinds: list[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Parse a command line whose first argument may be a preset, settings that the others override: a .json or .yaml file,
    or the name of a file in the folder `configs` beside the script that declares the first of the dataclasses.

    Args:
        kinds (`list[type]`): dataclasses whose fields are the options.
        argv (`list[str]`, *optional*): the command line, by default that of the process.
        description (`str`, *optional*): what `--help` shows above the options.

    Returns:
        `tuple`: one object of each of `kinds`.

    Raises:
        ValueError: if there is no such preset, it is damaged, or it names a setting that does not exist.
    """
    parser = ScriptParser(kinds, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        parser.set_preset(read_preset(argv.pop(0), Path(inspect.getfile(kinds[0])).with_name("configs")))
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
