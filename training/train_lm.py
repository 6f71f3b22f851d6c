"""Train a causal language model on a text, with memory carried from segment to segment where the model has one.

python training/train_lm.py training/configs/srupp_small.json --corpus text.xml.xz --holdout 300000 --output_dir my-lm
python training/train_lm.py training/configs/srupp_enwik8.json --corpus enwik8.train --output_dir enwik8-base
python training/train_lm.py --model_type gpt2 --level subword --corpus "texts/*.txt" --output_dir my-gpt2
torchrun --nproc_per_node 2 training/train_lm.py training/configs/srupp_small.json --output_dir my-lm

After an interruption, the same command with --resume goes on to the same losses. Held-out text is measured in bits per
byte or character and in perplexity, and a sample of the model's own text is kept with each measurement. The folder it
leaves loads with AutoModelForCausalLM and pipeline("text-generation"). An SRU++ learns to use its attention late: its
strength starts at 0 and is logged as alpha.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_args import LanguageModelArguments, LanguageModelSettings, parse_arguments
from lm_trainer import LanguageModelTrainer, SampleText
from pretrain import build_config, check_block_size, draw_losses
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

import hf_efficient
from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments
from hf_efficient.data.token_stream import (
    Documents,
    Stream,
    build_tokenizer,
    encode,
    load_documents,
    split_holdout,
)
from hf_efficient.metrics.language_model_metric import LanguageModelMetric, load_language_model_metric
from hf_efficient.trainer.arguments import parse_overrides
from hf_efficient.trainer.run_directory import RunFolder, decisive, decisive_fields, finite
from hf_efficient.trainer.segment_memory import takes_memory
from hf_efficient.trainer.segment_trainer import evaluate_segments, token_losses
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import keep_freed_memory, settle_process_group


logger = logging.getLogger(__name__)

# What bits are counted for at each level.
UNITS = {"byte": "byte", "char": "character", "word": "token", "subword": "byte"}
PROMPT_TOKENS = 32
# Settings that no loss depends on.
FREE = ("sample_prompt", "sample_tokens", "final_evaluation")


@dataclass
class Text:
    """The tokenised text: to train on, held out if any, and how bits are counted."""

    tokenizer: PreTrainedTokenizerBase
    train: Stream
    heldout: Stream | None
    metric: LanguageModelMetric

    def units_per_token(self, measured: int | None = None) -> float:
        """Mean bytes or characters of the first `measured` held-out tokens, or of all of them."""
        assert self.heldout is not None
        tokens = self.heldout.tokens
        if self.metric.config_name == "token" or self.heldout.size == len(tokens):
            return 1.0
        if measured is None or measured >= len(tokens):
            return self.heldout.size / len(tokens)
        return len(str(self.tokenizer.decode(tokens[:measured].tolist())).encode()) / measured

    def scores(self, losses: Any, labels: Any, units_per_token: float) -> dict[str, float]:
        """Perplexity and bits per unit."""
        scores = self.metric.compute(
            predictions=losses.ravel(), references=labels.ravel(), units_per_token=units_per_token
        )
        assert scores is not None
        return scores


def load_text(settings: LanguageModelSettings, args: LanguageModelArguments, resumed: bool) -> Text:
    """Read, hold out, tokenise. A tokenizer that is made is kept in `output_dir/tokenizer`, and taken up from there."""
    with args.main_process_first(desc="loading the text"):
        documents = load_documents(settings, settings.corpus)
    heldout: Documents | None
    if settings.validation is not None:
        train, heldout = documents, load_documents(settings, settings.validation)
    else:
        train, heldout = split_holdout(documents, settings.holdout)
    folder = settings.tokenizer
    if folder is None:
        folder = os.path.join(args.output_dir, "tokenizer")
        with args.main_process_first(desc="making the tokenizer"):
            kept = resumed and os.path.isfile(os.path.join(folder, "tokenizer.json"))
            if args.local_process_index == 0 and not kept:
                write_files(folder, build_tokenizer(settings, train, heldout).save_pretrained)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streams = [encode(part, tokenizer, settings.level) if part is not None else None for part in (train, heldout)]
    assert streams[0] is not None
    logger.info(
        "%d tokens to train on, %d held out, %d ids.",
        len(streams[0].tokens),
        0 if streams[1] is None else len(streams[1].tokens),
        len(tokenizer),
    )
    metric = load_language_model_metric(UNITS[settings.level], keep_in_memory=True)
    return Text(tokenizer, streams[0], streams[1], metric)


def build_model_config(settings: LanguageModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """
    The config that the settings name, with the tokenizer's vocabulary.

    Raises:
        ValueError: as `build_config` of pretraining.
    """
    if settings.preset is not None:
        fields = hf_efficient.SruppConfig.preset_fields(settings.preset)
        if "adaptive_cutoffs" not in fields:
            fields.pop("vocab_size")
        settings = replace(settings, config_overrides={**fields, **parse_overrides(settings.config_overrides)})  # type: ignore[arg-type]
    return build_config(settings, tokenizer)  # type: ignore[arg-type]  # it reads the three fields that both have


def check_labels(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if the model does not heed labels that are already moved, and so would learn the wrong thing.
    """
    ids = torch.arange(7, device=model.device)[None] % model.config.vocab_size
    labels = ids[:, 1:].contiguous()
    with torch.no_grad():
        outputs = model.eval()(input_ids=ids[:, :-1], labels=labels, shift_labels=labels)
    losses = getattr(outputs, "token_losses", None)
    losses = token_losses(outputs.logits if losses is None else losses, labels)
    if not torch.isclose(outputs.loss.float(), losses.mean(), rtol=1e-3):
        raise ValueError(
            f"{type(model).__name__} does not take labels that are already moved (`shift_labels`): its loss is "
            f"{outputs.loss.item():.4f} where {losses.mean().item():.4f} is right. It can't be trained by this script."
        )


def build_datasets(
    settings: LanguageModelSettings, args: LanguageModelArguments, model: PreTrainedModel, text: Text
) -> dict[str, Any]:
    """Columns for a model whose memory is carried; random segments, and overlapping windows, for others."""
    carried = settings.carry_state and takes_memory(model)
    train = text.train.tokens
    heldout = None if text.heldout is None else text.heldout.tokens[: settings.max_eval_tokens]
    if not carried:
        windows = None if heldout is None else OverlappingWindows(heldout, settings.measured_unroll)
        return {"train_dataset": RandomSegments(train, settings.unroll_size, args.seed), "eval_dataset": windows}
    columns = None
    if heldout is not None:
        rows = args.eval_batch_size * args.world_size
        columns = ColumnSegments(heldout, settings.measured_unroll, rows, drop_tail=False)
    rows = args.train_batch_size * args.world_size
    return {"train_dataset": ColumnSegments(train, settings.unroll_size, rows), "eval_dataset": columns}


def evaluate_finally(trainer: LanguageModelTrainer, settings: LanguageModelSettings, text: Text) -> None:
    """All of the held-out text in one column, the paper's final number; by the main process."""
    assert text.heldout is not None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    length = settings.measured_unroll
    segments: Any = OverlappingWindows(text.heldout.tokens, length)
    if settings.carry_state and takes_memory(model):
        segments = ColumnSegments(text.heldout.tokens, length, drop_tail=False)
    rows = None if hasattr(segments, "columns") else trainer.args.eval_batch_size
    score = evaluate_segments(model, segments, rows, progress=not trainer.args.disable_tqdm)
    scores = text.scores(
        torch.tensor([score.loss]).double().numpy(), torch.zeros(1).long().numpy(), text.units_per_token()
    )
    trainer.log({"final_loss": score.loss, **{f"final_{name}": value for name, value in scores.items()}})
    logger.info(
        "All %d held-out tokens: %s.", score.tokens, ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    )


def save(trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, settings: LanguageModelSettings) -> None:
    """The model that people load, the history of the run, and its picture."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.config.use_cache = True  # Trainer turns it off for training
    log_history = trainer.state.log_history
    history = finite({"settings": asdict(settings), "log_history": log_history})

    def write(folder: str) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Path(folder, "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        draw_losses(log_history, os.path.join(folder, "loss_curve.png"))

    write_files(str(trainer.args.output_dir), write)


def build_trainer(
    settings: LanguageModelSettings, args: LanguageModelArguments, text: Text, config: PreTrainedConfig
) -> LanguageModelTrainer:
    """Model, segments, metrics and samples."""
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    datasets = build_datasets(settings, args, model, text)
    check_block_size(model, config, settings.longest, "--unroll_size and --eval_unroll_size")
    check_labels(model)
    callbacks: list[TrainerCallback] = []
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    if text.heldout is None:
        args.eval_strategy = "no"
    else:
        units_per_token = text.units_per_token(settings.max_eval_tokens)

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            return text.scores(prediction.predictions, prediction.label_ids, units_per_token)

        if settings.sample_tokens:
            prompt = text.heldout.tokens[:PROMPT_TOKENS].tolist()
            if settings.sample_prompt:
                prompt = text.tokenizer(settings.sample_prompt, add_special_tokens=False)["input_ids"]
            callbacks.append(SampleText(text.tokenizer, torch.tensor(prompt), settings.sample_tokens))
    return LanguageModelTrainer(
        model,
        args,
        **datasets,
        callbacks=callbacks,
        compute_metrics=metrics,
        carry_state=settings.carry_state,
        paper_recipe=settings.paper_recipe,
    )


def train_lm(settings: LanguageModelSettings, args: LanguageModelArguments) -> LanguageModelTrainer:
    """
    Run the whole of training; the model, `history.json` and `loss_curve.png` are in `args.output_dir` afterwards.

    Returns:
        [`LanguageModelTrainer`]: its `state.log_history` holds losses, scores and samples, its `model` the model.

    Raises:
        FileExistsError: if `output_dir` holds a run and `args.resume` is off.
        ValueError: for settings that do not fit together, or not to the run that is resumed.
    """
    settings.check()
    run = RunFolder(str(args.output_dir), checkpoints=".", result="history.json")
    chosen = {name: value for name, value in asdict(settings).items() if name not in FREE}
    decided = {**chosen, **decisive(args, "seed", "dataloader_drop_last")}
    before = run.check(decided, args.resume)  # early, before the text is read
    text = load_text(settings, args, resumed=before is not None)
    config = build_model_config(settings, text.tokenizer)
    decided |= {"text": text.train.digest, "heldout_text": text.heldout and text.heldout.digest}
    decided |= decisive_fields(config)
    trainer = build_trainer(settings, args, text, config)
    decided["columns"] = getattr(trainer.train_dataset, "columns", None)
    run.open(decided, args.resume)  # not before all the rest is known to fit together
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        if settings.final_evaluation and text.heldout is not None:
            evaluate_finally(trainer, settings, text)
        save(trainer, text.tokenizer, settings)
    return trainer


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("hf_efficient", "pretrain_args", "lm_trainer", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        settings, args = parse_arguments(argv, __doc__)
        trainer = train_lm(settings, args)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    if trainer.is_world_process_zero():
        print(f"The model is in {args.output_dir}.")
    settle_process_group()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
