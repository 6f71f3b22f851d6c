r"""Pretrain an encoder on text.

python training/pretrain.py --corpus "texts/*.txt" --output_dir my-encoder --max_steps 10000
python training/pretrain.py training/configs/tupe_small.json --corpus texts.parquet --output_dir my-encoder
python training/pretrain.py --objective meta_controller --corpus "texts/*.txt" --tokenizer tokenizer \
    --notes rare-words/rare_words.json --output_dir my-encoder
python training/pretrain.py --streaming --corpus "texts/*.jsonl.gz" --max_steps 100000 --output_dir my-encoder
torchrun --nproc_per_node 2 training/pretrain.py --model_type bert --output_dir my-bert

After an interruption, the same command with --resume goes on to the same losses. The folder it leaves loads with
AutoModel and, for fine-tuning, AutoModelForSequenceClassification; after masked language modelling also with
AutoModelForMaskedLM and pipeline("fill-mask", ...).
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

import hf_efficient  # noqa: F401  (registers the models)
from hf_efficient.data.corpus import split_documents
from hf_efficient.data.document_stream import TOKENIZER_CHARACTERS, FirstTexts
from hf_efficient.data.packing import pack_blocks
from hf_efficient.data.rare_words import RareWords
from hf_efficient.data.row_streams import BlockStream
from hf_efficient.data.tokenizers import Texts, add_extra_tokens, train_tokenizer
from hf_efficient.data.unknown_tokens import report_unknown
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, RareWordCollator, attach
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.trainer import EfficientTrainer
from hf_efficient.trainer.arguments import (
    PretrainingArguments,
    StreamingArguments,
    parse_overrides,
    parse_with_preset,
)
from hf_efficient.trainer.model_setup import build_config, check_block_size, load_or_build_tokenizer
from hf_efficient.trainer.run_directory import (
    RunDirectory,
    draw_losses,
    resume_critical_args,
    resume_critical_config,
)
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import end_script, errors_in_one_line, start_script


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Runs with other seeds are measured on the same masks.
EVAL_MASK_SEED = 1
NOTA_TOKEN = "[NOTA]"  # none of the above: the meta-controller's reject option
OBJECTIVES: dict[str, Any] = {
    "mlm": MaskedLMObjective,
    "replaced_token": ReplacedTokenObjective,
    "meta_controller": MetaControllerObjective,
}
# Special tokens that an objective adds to any tokenizer.
EXTRA_TOKENS = {"meta_controller": [NOTA_TOKEN]}
UNKNOWN_ADVICE = (
    "Give a tokenizer that knows the text (--tokenizer), or let one be trained: --algorithm bpe loses nothing but "
    "accents (with --lowercase false not even those), wordpiece less with a larger --vocab_size."
)
# For objectives that replace what is masked: every target is hidden, and samples belong to a row.
ALL_MASKED = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0, "sample_seeds": True}
# Presets that mask otherwise; the paper of MC-BERT does so as BERT does.
PRESET_MASKING = {
    ("meta_controller", "paper"): {
        "mask_replace_prob": 0.8,
        "random_replace_prob": 0.1,
        "bernoulli": True,
        "sample_seeds": True,
    }
}


@dataclass
class PretrainingSettings(StreamingArguments):
    """The objective, the encoder and the text of a pretraining run."""

    objective: str = field(
        default="mlm",
        metadata={
            "help": "The objective: mlm (masked language modelling), replaced_token (ELECTRA), meta_controller "
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
    preset: str | None = field(
        default=None, metadata={"help": "Published configuration of that kind of encoder: base or large for tupe."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the config, such as 'hidden_size=256,num_hidden_layers=4'."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the tokenizer. Without it one is trained on the corpus, of a stream on its "
            "first 50 million characters."
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Size of a tokenizer that is trained."})
    algorithm: str = field(default="wordpiece", metadata={"help": "Kind of tokenizer that is trained: wordpiece, bpe."})
    lowercase: bool = field(default=True, metadata={"help": "Whether a tokenizer that is trained lower-cases."})
    validation_size: float = field(
        default=0.02,
        metadata={"help": "Without --validation, the fraction of the documents to measure on; 0 for none."},
    )
    max_eval_rows: int = field(
        default=2000, metadata={"help": "Measure the validation loss on at most so many rows; of a stream the first."}
    )
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

    def tokenizer_options(self) -> dict[str, Any]:
        """Arguments of `train_tokenizer`, besides the texts."""
        names = {"algorithm": self.algorithm, "vocab_size": self.vocab_size, "lowercase": self.lowercase}
        return {**names, "model_max_length": self.block_size}

    def caching_options(self) -> dict[str, Any]:
        """Arguments of `pack_documents` that a stream has no use for."""
        return {"max_eval_rows": self.max_eval_rows, "num_proc": self.num_proc}

    def packing_options(self) -> dict[str, Any]:
        """Arguments of [`~hf_efficient.data.packing.pack_blocks`], besides documents and tokenizer."""
        return {
            "block_size": self.block_size,
            "cross_documents": self.cross_documents,
            "word_ids": self.whole_word_mask or self.notes is not None,
        }

    def masking_options(self, seed: int) -> dict[str, Any]:
        """Arguments of the masking collator. An objective's own defaults fill in what is not given."""
        given = {name: getattr(self, name) for name in ("mask_replace_prob", "random_replace_prob", "bernoulli")}
        return {
            "mlm_probability": self.mlm_probability,
            "whole_word_mask": self.whole_word_mask,
            "mask_special_tokens": self.mask_special_tokens,
            "seed": seed,
            **{name: value for name, value in given.items() if value is not None},
        }


def parse_arguments(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[PretrainingSettings, PretrainingArguments]:
    """Parse the command line; see [`parse_with_preset`]."""
    settings, args = parse_with_preset([PretrainingSettings, PretrainingArguments], argv, description)
    return settings, args


def check_arguments(settings: PretrainingSettings, args: PretrainingArguments) -> None:
    """
    Refuse early, before anything is read.

    Raises:
        ValueError: for an unknown objective, or settings that do not go together.
        FileNotFoundError: if the file of rare words is missing.
    """
    settings.check_streaming(args)
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, not {settings.objective!r}.")
    if settings.notes is not None:
        if not settings.tokenizer:
            raise ValueError("Notes need the tokenizer that their words were counted with: give --tokenizer.")
        if not Path(settings.notes).is_file():
            raise FileNotFoundError(
                f"There is no file {settings.notes} (--notes): make it by training/count_rare_words.py."
            )
    by_loss = args.load_best_model_at_end and args.metric_for_best_model in (None, "loss", "eval_loss")
    if by_loss and settings.objective != "mlm":
        raise ValueError(
            "The loss rises when a discriminator joins after stage one, so it does not tell the best checkpoint: give "
            "--metric_for_best_model discriminator_loss, or leave out --load_best_model_at_end."
        )


def resume_critical_settings(settings: PretrainingSettings, args: PretrainingArguments) -> dict[str, Any]:
    """Collect what the losses depend on, as far as it is known before anything is read."""
    chosen = {name: value for name, value in settings.resume_critical(args).items() if name != "num_proc"}
    if settings.notes is not None:
        chosen["notes_sha256"] = hashlib.sha256(Path(settings.notes).read_bytes()).hexdigest()
    return {**chosen, **resume_critical_args(args, "seed", "dataloader_drop_last")}


def pack_documents(
    train: "Dataset",
    validation: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    args: PretrainingArguments,
    *,
    max_eval_rows: int,
    num_proc: int | None = None,
    **packing: Any,
) -> tuple["Dataset", "Dataset | None", dict[str, str | None]]:
    """
    Tokenise documents and pack them into rows.

    Args:
        train, validation (`datasets.Dataset`): documents; of validation possibly none.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        args (`PretrainingArguments`): the main process packs, the others find the rows in the cache.
        max_eval_rows (`int`): keep so many of the validation rows, chosen at random.
        num_proc (`int`, *optional*): number of processes that tokenise.
        packing: further arguments of [`~hf_efficient.data.packing.pack_blocks`].

    Returns:
        `tuple`: rows to train on, rows for validation or `None`, and digests of both by name.
    """
    with args.main_process_first(desc="packing the corpus"):
        rows = pack_blocks(train, tokenizer, num_proc=num_proc, **packing)
        eval_rows = pack_blocks(validation, tokenizer, **packing) if len(validation) else None
    # The fingerprint changes with text, tokenizer and packing; `datasets` has no public name for it.
    digests = {"rows": rows._fingerprint, "validation_rows": None if eval_rows is None else eval_rows._fingerprint}
    if eval_rows is not None:
        eval_rows = eval_rows.shuffle(seed=0).select(range(min(max_eval_rows, len(eval_rows))))
    return rows, eval_rows, digests


def prepare_tokenizer(
    settings: PretrainingSettings,
    args: PretrainingArguments,
    texts: Iterable[str],
    sample: Sequence[str],
    resumed: bool,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train it on `texts`, and see what it knows of a `sample`."""
    build = functools.partial(train_tokenizer, texts, **settings.tokenizer_options())
    tokenizer = load_or_build_tokenizer(settings.tokenizer, build, args, resumed)
    report_unknown(tokenizer, sample, UNKNOWN_ADVICE)
    add_extra_tokens(tokenizer, EXTRA_TOKENS.get(settings.objective, ()))
    return tokenizer


@dataclass
class Corpus:
    """
    The tokenizer and the rows of a corpus.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with the special tokens of the objective.
        rows (`datasets.Dataset` or `BlockStream`): to train on.
        eval_rows (`datasets.Dataset` or `list`, *optional*): for validation.
        digests (`dict`): of both, by name.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Any
    eval_rows: Any
    digests: dict[str, str | None]


def load_corpus_rows(settings: PretrainingSettings, args: PretrainingArguments, resumed: bool) -> Corpus:
    """Load all of the corpus and pack it; it is cached on the disk."""
    with args.main_process_first(desc="loading the corpus"):
        documents = settings.load()
        held_out = None if settings.validation is None else replace(settings, corpus=settings.validation).load()
    if held_out is None:
        documents, held_out = split_documents(documents, settings.validation_size)
    tokenizer = prepare_tokenizer(settings, args, Texts(documents), documents["text"], resumed)
    rows, eval_rows, digests = pack_documents(
        documents, held_out, tokenizer, args, **settings.caching_options(), **settings.packing_options()
    )
    if len(rows) < args.train_batch_size * args.world_size:
        args.dataloader_drop_last = False
    return Corpus(tokenizer, rows, eval_rows, digests)


def stream_corpus_rows(settings: PretrainingSettings, args: PretrainingArguments, resumed: bool) -> Corpus:
    """Read of the corpus what the tokenizer and the validation take, and the rest while training goes on."""
    documents = settings.document_settings(settings.validation_size)
    texts = FirstTexts(documents, TOKENIZER_CHARACTERS)
    tokenizer = prepare_tokenizer(settings, args, texts, FirstTexts.sample(documents), resumed)
    packing = settings.packing_options()
    order: dict[str, Any] = {"shuffle_buffer_size": settings.shuffle_buffer_size, "seed": args.seed}
    stream = settings.stream_documents(documents, args)
    rows = BlockStream(stream, tokenizer, **order, **packing)
    held_out = settings.validation_documents(documents)
    eval_rows, digest = None, None
    if held_out is not None:
        eval_rows = list(islice(BlockStream(held_out, tokenizer, **packing), settings.max_eval_rows))
        digest = hashlib.sha256(b"".join(row["input_ids"].tobytes() for row in eval_rows)).hexdigest()
    return Corpus(tokenizer, rows, eval_rows, {"rows": stream.digest, "validation_rows": digest})


@dataclass
class Objective:
    """
    An objective around a new encoder, with the batches that it takes.

    Args:
        model (`PreTrainedModel`): computes the loss; saved whole in checkpoints.
        product_name (`str`): the attribute of `model` that people load afterwards.
        collator, eval_collator (`Callable`): make its batches.
        callbacks (`list[TrainerCallback]`): what it asks of the trainer.
    """

    model: PreTrainedModel
    product_name: str
    collator: Any
    eval_collator: Any
    callbacks: list[TrainerCallback] = field(default_factory=list)

    @property
    def product(self) -> PreTrainedModel:
        return getattr(self.model, self.product_name)


def make_collators(tokenizer: PreTrainedTokenizerBase, masking: dict[str, Any]) -> dict[str, MaskingCollator]:
    """Make the collators of training and of evaluation, whose masks are the same for runs with other seeds."""
    collator = MaskingCollator(tokenizer, **masking)
    return {"collator": collator, "eval_collator": collator.with_seed(EVAL_MASK_SEED)}


def build_mlm(config: PreTrainedConfig, fields: dict[str, Any], collators: dict[str, MaskingCollator]) -> Objective:
    """Build masked language modelling, which has no options."""
    if fields:
        raise ValueError("mlm has no options (--objective_overrides).")
    model = MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config, dtype=torch.float32))
    return Objective(model, "model", **collators, callbacks=model.callbacks())


def masked_lm_stage_one(config: PreTrainedConfig, mlm_probability: float, steps: int) -> dict[str, Any]:
    """
    Options by which the encoder of [`ReplacedTokenObjective`] is a masked LM for a third of the run, since such a
    discriminator stays blind for very long if its encoder starts from random weights. Empty for an encoder whose
    embeddings are not as wide as its states.
    """
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        return {}
    logger.info(
        "For the first %d of %d steps the encoder is a masked language model, since a discriminator that starts from "
        "random weights stays blind for long. As ELECTRA's authors do it: --objective_overrides preset=electra",
        *(steps // 3, steps),
    )
    share = round(0.95 * mlm_probability, 4)  # the generator is seldom right
    return {"stage_one": "masked_lm", "discriminator_start_step": steps // 3, "initial_replaced_fraction": share}


def build_discriminator(
    name: str,
    config: PreTrainedConfig,
    fields: dict[str, Any],
    preset: str | None,
    collators: dict[str, MaskingCollator],
) -> Objective:
    """Build an objective with a generator; `fields` are those of its config, and `preset` stands for several."""
    objective = OBJECTIVES[name]
    config_class: Any = objective.config_class
    unknown = sorted(set(fields) - {known.name for known in dataclasses.fields(config_class)})
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)} (--objective_overrides).")
    make = config_class if preset is None else functools.partial(config_class.preset, preset)
    encoder = AutoModel.from_config(config, dtype=torch.float32)
    model = objective(make(**{"encoder_config": encoder.config.to_dict(), **fields}), encoder)
    return Objective(model, "encoder", **collators, callbacks=model.callbacks())


def build_objective(
    name: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    masking: dict[str, Any],
    steps: int,
    overrides: str | dict[str, Any] | None = None,
) -> Objective:
    """
    Build an objective around a new encoder.

    Args:
        name (`str`): a key of `OBJECTIVES`.
        config (`PreTrainedConfig`): config of the encoder.
        tokenizer (`PreTrainedTokenizerBase`): with the `EXTRA_TOKENS` of the objective.
        masking (`dict`): arguments of [`MaskingCollator`], see [`PretrainingSettings.masking_options`].
        steps (`int`): length of the run.
        overrides (`str` or `dict`, *optional*): options of the objective.

    Raises:
        ValueError: for options that it does not have, or an encoder that it can't train.
    """
    treats_cls_apart = config.model_type == "tupe" and config.cls_token_id is not None
    if masking["mask_special_tokens"] and treats_cls_apart:
        raise ValueError(
            "TUPE treats [CLS] apart, which --mask_special_tokens would hide: add --config_overrides cls_token_id=null."
        )
    fields = parse_overrides(overrides)
    if name == "mlm":
        return build_mlm(config, fields, make_collators(tokenizer, masking))
    preset, mlm_probability = fields.pop("preset", None), masking["mlm_probability"]
    given: dict[str, Any] = {"target_fraction": mlm_probability}
    if name == "meta_controller":
        given["nota_token_id"] = tokenizer.convert_tokens_to_ids(NOTA_TOKEN)
    elif preset is None and not {"stage_one", "discriminator_start_step", "discriminator_start_loss"} & set(fields):
        given |= masked_lm_stage_one(config, mlm_probability, steps)
    masking = {**PRESET_MASKING.get((name, preset), ALL_MASKED), **masking}
    return build_discriminator(name, config, {**given, **fields}, preset, make_collators(tokenizer, masking))


def add_notes(
    objective: Objective,
    words_file: str,
    tokenizer: PreTrainedTokenizerBase,
    overrides: str | dict[str, Any] | None = None,
) -> None:
    """Keep notes on the rare words of a file (TNF), whatever the objective; `overrides` are options of the notes."""
    words = RareWords.load(words_file, tokenizer)
    fields = parse_overrides(overrides)
    unknown = set(fields) - {known.name for known in dataclasses.fields(NoteSettings)}
    if unknown:
        raise ValueError(f"Notes have no option {', '.join(sorted(unknown))} (--notes_overrides).")
    encoder: Any = objective.model.encoder
    notes = NoteDictionary(words.keys, encoder.config.hidden_size, NoteSettings(**fields))
    objective.callbacks.append(attach(objective.model, notes))
    objective.collator = RareWordCollator(objective.collator, words.keys)
    objective.eval_collator = RareWordCollator(objective.eval_collator, words.keys)


def planned_steps(args: PretrainingArguments, rows: int) -> int:
    """Count the optimiser steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(args.num_train_epochs * max(rows // per_step, 1))


def save(trainer: EfficientTrainer, product: str, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> None:
    """Write the part of the objective that people load, the history of the run, and its picture."""
    args = trainer.args
    objective = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if args.process_index != 0:
        return
    if state is not None:
        prefix = f"{product}."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    log_history = trainer.state.log_history
    history = {"settings": settings, "log_history": log_history}

    def write(folder: str) -> None:
        getattr(objective, product).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        if getattr(objective, "notes", None) is not None:
            objective.notes.save(folder)  # apart from the encoder, which is used without them
        Path(folder, "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        draw_losses(log_history, os.path.join(folder, "loss_curve.png"))

    write_files(str(args.output_dir), write)


def pretrain(settings: PretrainingSettings, args: PretrainingArguments) -> EfficientTrainer:
    """
    Pretrain; the model, `history.json` and `loss_curve.png` are in `args.output_dir` afterwards.

    Returns:
        [`EfficientTrainer`]: its `state.log_history` holds the losses, its `model` the trained objective.

    Raises:
        FileExistsError: if `output_dir` holds a run and `args.resume` is off.
        FileNotFoundError: if the file of rare words is missing.
        ValueError: for settings that do not fit together, or not to the run that is resumed.
    """
    check_arguments(settings, args)
    run = RunDirectory(str(args.output_dir), checkpoints=".", result="history.json")
    critical = resume_critical_settings(settings, args)
    before = run.check(critical, args.resume)  # early, before the corpus is read

    read = stream_corpus_rows if settings.streaming else load_corpus_rows
    corpus = read(settings, args, before is not None)
    tokenizer = corpus.tokenizer
    if corpus.eval_rows is None:
        args.eval_strategy = "no"

    config = build_config(tokenizer, settings.model_type, settings.config, settings.config_overrides, settings.preset)
    critical |= {**corpus.digests, **resume_critical_config(config)}
    set_seed(args.seed)
    masking = settings.masking_options(args.seed)
    steps = planned_steps(args, 0 if settings.streaming else len(corpus.rows))
    objective = build_objective(settings.objective, config, tokenizer, masking, steps, settings.objective_overrides)
    if settings.notes is not None:
        add_notes(objective, settings.notes, tokenizer, settings.notes_overrides)
    check_block_size(objective.product, config, settings.block_size)

    trainer = EfficientTrainer(
        objective.model,
        args,
        train_dataset=corpus.rows,
        eval_dataset=corpus.eval_rows,
        data_collator=objective.collator,
        eval_data_collator=objective.eval_collator,
        callbacks=objective.callbacks,
    )
    run.open(critical, args.resume)  # not before all the rest is known to fit together
    trainer.train(resume_from_checkpoint=args.resume)
    save(trainer, objective.product_name, tokenizer, asdict(settings))
    return trainer


def main(argv: list[str] | None = None) -> None:
    start_script(__name__)
    settings, args = parse_arguments(argv, __doc__)
    end_script(pretrain(settings, args))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
