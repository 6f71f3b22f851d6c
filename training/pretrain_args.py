"""Settings of a pretraining run."""

import logging
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_efficient.trainer.arguments import CorpusArguments, parse_with_preset
from hf_efficient.utils.process import bf16_support


logger = logging.getLogger(__name__)


@dataclass
class PretrainingSettings(CorpusArguments):
    """What is learned, by which encoder, from which text."""

    objective: str = field(
        default="mlm",
        metadata={
            "help": "What is learned: mlm (masked language modelling), replaced_token (ELECTRA), meta_controller "
            "(MC-BERT). The last two collapse at learning rates that the first one likes."
        },
    )
    objective_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Options of the objective, such as 'discriminator_weight=20,discriminator_start_loss=6.0' or "
            "'num_candidates=20'. 'preset=NAME' stands for several, which further ones change: "
            "'preset=paper,loss_weight=30' (meta_controller), 'preset=electra' or 'preset=mcbert_baseline' "
            "(replaced_token)."
        },
    )
    notes: str | None = field(
        default=None,
        metadata={"help": "Keep notes on these rare words (TNF): the file that training/count_rare_words.py wrote."},
    )
    notes_overrides: str | None = field(
        default=None, metadata={"help": "Options of the notes, such as 'start_step=2000,scale_to_tokens=true'."}
    )
    model_type: str = field(
        default="tupe",
        metadata={"help": "Kind of encoder: tupe, or bert, roberta, electra, modernbert, ... of transformers."},
    )
    config: str | None = field(
        default=None,
        metadata={"help": "Config file (JSON with model_type), folder or Hub name to build the model from."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the config, such as 'hidden_size=256,num_hidden_layers=4'."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of the tokenizer. Without it one is trained on the corpus."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Size of a tokenizer that is trained."})
    algorithm: str = field(default="wordpiece", metadata={"help": "Kind of tokenizer that is trained: wordpiece, bpe."})
    lowercase: bool = field(default=True, metadata={"help": "Whether a tokenizer that is trained lower-cases."})
    holdout: float = field(
        default=0.02, metadata={"help": "Share of the documents that are held out to measure the loss on; 0 for none."}
    )
    max_eval_rows: int = field(default=2000, metadata={"help": "Measure the held-out loss on at most so many rows."})
    block_size: int = field(default=128, metadata={"help": "Longest row in tokens, special tokens included."})
    cross_documents: bool = field(
        default=False, metadata={"help": "Let rows go on into the next document: less padding, unrelated text."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that become targets."})
    mask_replace_prob: float | None = field(
        default=None,
        metadata={
            "help": "Share of the targets that become the mask token: 0.8 by default, and 1 where a generator replaces "
            "what is masked."
        },
    )
    random_replace_prob: float | None = field(
        default=None,
        metadata={"help": "Share of the targets that become a random token: 0.1 by default, and 0 beside a generator."},
    )
    bernoulli: bool | None = field(
        default=None,
        metadata={
            "help": "Draw each target by itself, not a fixed number in each row; off by default, but for the "
            "meta-controller's preset=paper."
        },
    )
    mask_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "Let [CLS], [SEP] and [UNK] be targets too, as the released TUPE and MC-BERT do. TUPE encoders "
            "then need --config_overrides cls_token_id=null."
        },
    )
    whole_word_mask: bool = field(default=False, metadata={"help": "Mask whole words instead of single tokens."})
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that tokenise the corpus."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """Trainer's arguments, with defaults for pretraining."""

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
    eval_strategy: str = field(default="steps", metadata={"help": "When to measure the held-out loss."})
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


def parse_arguments(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[PretrainingSettings, PretrainingArguments]:
    """Settings from the command line; see [`parse_with_preset`]."""
    settings, args = parse_with_preset([PretrainingSettings, PretrainingArguments], argv, description)
    return settings, args
