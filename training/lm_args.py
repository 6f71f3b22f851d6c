"""Settings of language-model training."""

from dataclasses import dataclass, field

from pretrain_args import PretrainingArguments

from hf_efficient import SruppConfig
from hf_efficient.trainer.arguments import CorpusArguments, parse_with_preset


LEVELS = ("byte", "char", "word", "subword")


@dataclass
class LanguageModelSettings(CorpusArguments):
    """Which model, of which text, in which pieces."""

    model_type: str = field(
        default="srupp", metadata={"help": "Kind of model: srupp, or gpt2, llama, ... of transformers."}
    )
    config: str | None = field(
        default=None,
        metadata={"help": "Config file (JSON with model_type), folder or Hub name to build the model from."},
    )
    preset: str | None = field(
        default=None, metadata={"help": "A published SRU++: enwik8-base, wikitext103-large, billionword-base, ..."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the config, such as 'hidden_size=512,num_hidden_layers=8'."}
    )
    level: str = field(
        default="byte",
        metadata={
            "help": "What a token is: byte (files are read as they are), char, word (between white space; a line ends "
            "with <eos>) or subword (BPE)."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a tokenizer of that level. Without it one is made from the text."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Ids of a tokenizer that is made: of subwords 8192, of words all."}
    )
    alphabet: str = field(
        default="all",
        metadata={"help": "Which bytes have an id: all 256, or corpus (those that occur, as the paper's 205)."},
    )
    validation: str | None = field(
        default=None, metadata={"help": "Text to measure on, named as the corpus is. Without it some is held out."}
    )
    holdout: float = field(
        default=0.05,
        metadata={
            "help": "Share that is held out: the end of files, or whole documents of a corpus of several. From 1 on, "
            "the number of bytes or characters at the end of files. 0 for none."
        },
    )
    max_eval_tokens: int = field(
        default=200_000,
        metadata={"help": "Measure on at most so many held-out tokens while training; at the end on all."},
    )
    unroll_size: int = field(default=128, metadata={"help": "Tokens in a segment of training."})
    eval_unroll_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a segment of evaluation, which may be longer: the paper's 3072. As in training."},
    )
    carry_state: bool = field(
        default=True,
        metadata={
            "help": "Hand the memory of a model that has one from segment to segment of contiguous columns. Others, "
            "and with --no_carry_state, see random segments and are measured in half-overlapping windows."
        },
    )
    paper_recipe: bool = field(
        default=False,
        metadata={
            "help": "As in the SRU++ paper: RAdam, decoupled decay of all weights, its warm-up and cosine, instead of "
            "--optim and --lr_scheduler_type."
        },
    )
    sample_prompt: str | None = field(
        default=None,
        metadata={"help": "Text that a sample continues at each evaluation; of the held-out text if not given."},
    )
    sample_tokens: int = field(default=200, metadata={"help": "Tokens of that sample; 0 for none."})
    final_evaluation: bool = field(
        default=True,
        metadata={"help": "Measure all held-out text at the end, in one column. --no_final_evaluation"},
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: for settings that do not exist or do not fit together.
        """
        if self.level not in LEVELS:
            raise ValueError(f"`level` must be one of {', '.join(LEVELS)}, not {self.level!r}.")
        if self.alphabet not in ("all", "corpus"):
            raise ValueError(f"`alphabet` must be all or corpus, not {self.alphabet!r}.")
        if self.preset is not None and (self.config is not None or self.model_type != "srupp"):
            raise ValueError("A preset is a whole SRU++: give no --config and no other --model_type beside it.")
        if self.preset is not None and self.preset not in SruppConfig.presets():
            raise ValueError(
                f"There is no preset {self.preset!r}. The presets are: {', '.join(SruppConfig.presets())}."
            )
        if self.unroll_size < 1 or (self.eval_unroll_size or 1) < 1:
            raise ValueError("Segments must be at least 1 token long (--unroll_size, --eval_unroll_size).")
        if not self.holdout >= 0:
            raise ValueError(f"`holdout` must not be negative, as {self.holdout} is.")

    @property
    def longest(self) -> int:
        """The longest row that the model gets."""
        return max(self.unroll_size, self.measured_unroll)

    @property
    def measured_unroll(self) -> int:
        """Tokens in a segment of evaluation."""
        return self.eval_unroll_size or self.unroll_size


@dataclass
class LanguageModelArguments(PretrainingArguments):
    """Trainer's arguments, with defaults for language models."""

    output_dir: str = field(
        default="language-model", metadata={"help": "Folder for the model, its checkpoints and the loss history."}
    )
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Highest rate: 5e-3 suits a small SRU++, 1e-3 a small GPT-2, 3e-4 large ones."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the rate falls after the warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decay of the weights."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Adam's second beta."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Rows per step, process and device: with carried state, columns of text."}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows, or columns, of the evaluation."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  (the parser looks at the first two)
        default="auto",
        metadata={"help": "Where else to log: tensorboard, trackio, ..., none; auto: these two where installed."},
    )

    def __post_init__(self):
        from transformers.integrations import get_available_reporting_integrations

        if self.report_to in ("auto", ["auto"]):
            installed = get_available_reporting_integrations()
            self.report_to = [name for name in ("tensorboard", "trackio") if name in installed]
        super().__post_init__()


def parse_arguments(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[LanguageModelSettings, LanguageModelArguments]:
    """Settings from the command line; see [`parse_with_preset`]."""
    settings, args = parse_with_preset([LanguageModelSettings, LanguageModelArguments], argv, description)
    return settings, args
