"""Pretrain an encoder on text.

python training/pretrain.py --corpus "texts/*.txt" --output_dir my-encoder --max_steps 10000
python training/pretrain.py training/configs/tupe_small.json --corpus texts.parquet --output_dir my-encoder
python training/pretrain.py --objective meta_controller --corpus "texts/*.txt" --tokenizer tokenizer \
    --notes rare-words/rare_words.json --output_dir my-encoder
torchrun --nproc_per_node 2 training/pretrain.py --model_type bert --output_dir my-bert

After an interruption, the same command with --resume goes on to the same losses. The folder it leaves loads with
AutoModel and, for fine-tuning, AutoModelForSequenceClassification; after masked language modelling also with
AutoModelForMaskedLM and pipeline("fill-mask", ...).
"""

import hashlib
import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pretrain_args import PretrainingArguments, PretrainingSettings, parse_arguments
from pretrain_objectives import add_special_tokens, build_objective, check_settings
from train_tokenizer import Texts, train_tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import hf_efficient  # noqa: F401  (registers the models)
from hf_efficient.data.corpus import pack_blocks, split_documents
from hf_efficient.trainer import EfficientTrainer
from hf_efficient.trainer.arguments import parse_overrides
from hf_efficient.trainer.run_directory import RunFolder, decisive, decisive_fields
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import keep_freed_memory, settle_process_group


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def build_config(settings: PretrainingSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """
    The encoder's config, with the special tokens of the tokenizer, and its vocabulary, unless an override wants others,
    or a larger one.

    Raises:
        ValueError: if an override names a field that the config does not have, or a vocabulary that is too small.
    """
    given: dict[str, Any] = {"model_type": settings.model_type}
    if settings.config is not None:
        given, _ = PreTrainedConfig.get_config_dict(settings.config)
        if "model_type" not in given:
            raise ValueError(f"The config {settings.config} does not say its `model_type`.")
    model_type = given.pop("model_type")
    base = AutoConfig.for_model(model_type)
    fields: dict[str, Any] = parse_overrides(settings.config_overrides)
    unknown = [name for name in fields if not hasattr(base, name)]
    if unknown:
        raise ValueError(f"A {model_type} config has no {', '.join(unknown)} (--config_overrides).")
    if fields.setdefault("vocab_size", len(tokenizer)) < len(tokenizer):
        raise ValueError(
            f"vocab_size={fields['vocab_size']} (--config_overrides) has no room for the tokenizer's {len(tokenizer)} "
            "tokens. Leave it out, or give at least that many. (--vocab_size sets the size of a tokenizer to train.)"
        )
    for name in ("pad", "cls", "sep", "mask", "bos", "eos"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None and name in ("bos", "eos"):
            token_id = tokenizer.cls_token_id if name == "bos" else tokenizer.sep_token_id
            if getattr(base, f"{name}_token_id", None) is None:
                continue  # only replaces an id of another vocabulary
        if hasattr(base, f"{name}_token_id"):
            fields.setdefault(f"{name}_token_id", token_id)
    return AutoConfig.for_model(model_type, **{**given, **fields})


def get_tokenizer(
    settings: PretrainingSettings, args: PretrainingArguments, documents: "Dataset", resumed: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, or one trained on the documents, kept in `output_dir/tokenizer`; that of a run
    that is resumed is taken up from there."""
    folder = settings.tokenizer
    if folder is None:
        folder = os.path.join(args.output_dir, "tokenizer")
        with args.main_process_first(desc="training the tokenizer"):
            kept = resumed and os.path.isfile(os.path.join(folder, "tokenizer.json"))
            if args.local_process_index == 0 and not kept:
                trained = train_tokenizer(
                    Texts(documents),
                    algorithm=settings.algorithm,
                    vocab_size=settings.vocab_size,
                    lowercase=settings.lowercase,
                    model_max_length=settings.block_size,
                )
                write_files(folder, trained.save_pretrained)
    return AutoTokenizer.from_pretrained(folder)


def check_block_size(
    model: PreTrainedModel, config: PreTrainedConfig, block_size: int, option: str = "--block_size"
) -> None:
    """Run one full row, so that a limit of the model shows now and not in the middle of the run."""
    first = next((i for i in (getattr(config, "cls_token_id", None), config.pad_token_id) if i is not None), 0)
    row = torch.full((1, block_size), (config.pad_token_id or 0) + 1, device=model.device) % config.vocab_size
    row[0, 0] = first
    try:
        with torch.no_grad():
            model.eval()(input_ids=row, attention_mask=torch.ones_like(row))
    except (IndexError, RuntimeError, ValueError) as error:
        limit = getattr(config, "max_position_embeddings", None)
        raise ValueError(
            f"The model can't take rows of {block_size} tokens (its max_position_embeddings is {limit}). Lower "
            f"{option} or raise the limit, say --config_overrides max_position_embeddings={2 * block_size}. It "
            f"said: {error}"
        ) from error


@dataclass
class Rows:
    """The tokenised corpus: rows to train on, held-out rows if there are any, and digests of all rows."""

    tokenizer: PreTrainedTokenizerBase
    train: "Dataset"
    heldout: "Dataset | None"
    digests: dict[str, str | None]


def _load_rows(settings: PretrainingSettings, args: PretrainingArguments, resumed: bool) -> Rows:
    with args.main_process_first(desc="loading the corpus"):
        corpus = settings.load()
    documents, heldout = split_documents(corpus, settings.holdout)
    tokenizer = get_tokenizer(settings, args, documents, resumed)
    add_special_tokens(settings, tokenizer)
    word_ids = settings.whole_word_mask or settings.notes is not None
    packing: dict[str, Any] = {"cross_documents": settings.cross_documents, "word_ids": word_ids}
    with args.main_process_first(desc="packing the corpus"):  # the others find the rows in the cache
        rows = pack_blocks(documents, tokenizer, settings.block_size, num_proc=settings.num_proc, **packing)
        eval_rows = pack_blocks(heldout, tokenizer, settings.block_size, **packing) if len(heldout) else None
    # What `pack_blocks` calls its rows changes with text, tokenizer and packing; `datasets` has no public name for it.
    digests = {"rows": rows._fingerprint, "heldout_rows": None if eval_rows is None else eval_rows._fingerprint}
    if eval_rows is not None:
        eval_rows = eval_rows.shuffle(seed=0).select(range(min(settings.max_eval_rows, len(eval_rows))))
    return Rows(tokenizer, rows, eval_rows, digests)


def _save(
    trainer: EfficientTrainer, product: str, tokenizer: PreTrainedTokenizerBase, settings: PretrainingSettings
) -> None:
    """The part of the objective that people load, the history of the run, and its picture."""
    args = trainer.args
    objective = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if args.process_index != 0:
        return
    if state is not None:
        prefix = f"{product}."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    log_history = trainer.state.log_history
    history = {"settings": asdict(settings), "log_history": log_history}

    def write(folder: str) -> None:
        getattr(objective, product).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        if getattr(objective, "notes", None) is not None:
            objective.notes.save(folder)  # apart from the encoder, which is used without them
        Path(folder, "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        draw_losses(log_history, os.path.join(folder, "loss_curve.png"))

    write_files(str(args.output_dir), write)


def draw_losses(log_history: list[dict[str, Any]], path: str) -> None:
    """Training and held-out loss over steps, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("No picture of the losses, since matplotlib is not installed: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.set_xlabel("step")
    weighted = any("discriminator_loss" in entry for entry in log_history)
    axes.set_ylabel("generator's loss + weighted discriminator's loss" if weighted else "loss (nats per target)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def decisive_settings(settings: PretrainingSettings, args: PretrainingArguments) -> dict[str, Any]:
    """What the losses depend on, as far as it is known before anything is read."""
    chosen = {name: value for name, value in asdict(settings).items() if name != "num_proc"}
    if settings.notes is not None:
        chosen["notes_sha256"] = hashlib.sha256(Path(settings.notes).read_bytes()).hexdigest()
    return {**chosen, **decisive(args, "seed", "dataloader_drop_last")}


def planned_steps(args: PretrainingArguments, rows: int) -> int:
    """Optimiser steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(args.num_train_epochs * max(rows // per_step, 1))


def pretrain(settings: PretrainingSettings, args: PretrainingArguments) -> EfficientTrainer:
    """
    Run the whole of pretraining; the model, `history.json` and `loss_curve.png` are in `args.output_dir` afterwards.

    Returns:
        [`EfficientTrainer`]: its `state.log_history` holds the losses, its `model` the trained objective.

    Raises:
        FileExistsError: if `output_dir` holds a run and `args.resume` is off.
        FileNotFoundError: if the file of rare words is missing.
        ValueError: for settings that do not fit together, or not to the run that is resumed.
    """
    check_settings(settings, args)
    run = RunFolder(str(args.output_dir), checkpoints=".", result="history.json")
    decided = decisive_settings(settings, args)
    before = run.check(decided, args.resume)  # early, before the corpus is read
    rows = _load_rows(settings, args, resumed=before is not None)
    if rows.heldout is None:
        args.eval_strategy = "no"
    if len(rows.train) < args.train_batch_size * args.world_size:
        args.dataloader_drop_last = False
    config = build_config(settings, rows.tokenizer)
    decided |= {**rows.digests, **decisive_fields(config)}
    set_seed(args.seed)
    steps = planned_steps(args, len(rows.train))
    objective = build_objective(settings, config, rows.tokenizer, args.seed, steps)
    check_block_size(objective.product, config, settings.block_size)
    trainer = EfficientTrainer(
        objective.model,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.heldout,
        data_collator=objective.collator,
        eval_data_collator=objective.eval_collator,
        callbacks=objective.callbacks,
    )
    run.open(decided, args.resume)  # not before all the rest is known to fit together
    trainer.train(resume_from_checkpoint=args.resume)
    _save(trainer, objective.product_name, rows.tokenizer, settings)
    return trainer


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("hf_efficient", "pretrain_args", "pretrain_objectives", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    settings, args = parse_arguments(argv, __doc__)
    trainer = pretrain(settings, args)
    if trainer.is_world_process_zero():
        print(f"The model is in {args.output_dir}.")
    settle_process_group()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
