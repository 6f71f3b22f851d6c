r"""Train an encoder-decoder to summarise documents, or to fill in what is left out of plain text.

python training/train_seq2seq.py training/configs/terraformer_small.json --pairs train.parquet \
    --validation validation.parquet --output_dir my-summarizer
python training/train_seq2seq.py --objective span_corruption --corpus "texts/*.txt" --recipe c4 --output_dir pretrained
python training/train_seq2seq.py --model pretrained --pairs "train-*.jsonl" --document_column article \
    --summary_column abstract --max_source_length 4096 --output_dir my-summarizer
torchrun --nproc_per_node 2 training/train_seq2seq.py training/configs/terraformer_small.json --pairs train.csv

After an interruption, the same command with --resume goes on to the same losses. Summaries of validation documents are
scored by ROUGE, beside their first sentences, and predictions.jsonl has all of them with their references. A document
that is longer than --max_source_length is cut in training; summaries of its pieces are joined in evaluation, as
pipeline("summarization") does with the folder that this script leaves. --recipe trains as the authors of Terraformer
did: c4 (span corruption), c4-dense (without sparse layers) or arxiv (summaries of articles). Of sparse feed-forward
layers the log and unit_usage.json of each checkpoint say what their controllers choose.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

import hf_efficient  # noqa: F401  (registers the models)
from hf_efficient.data.corpus import split_documents
from hf_efficient.data.pairs import PairEncoder, join_pieces, lead, load_pairs, pairs_digest
from hf_efficient.data.span_corruption import SpanCorruptionCollator, TextWindows, text_length
from hf_efficient.data.text_files import find_files
from hf_efficient.data.token_stream import encode
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from hf_efficient.data.unknown_tokens import report_unknown
from hf_efficient.metrics.rouge_metric import ROUGE_TYPES, load_rouge_metric
from hf_efficient.modules.sparse_layers import ModuleConv, SparseFeedForward
from hf_efficient.modules.unit_usage import UnitUsageCallback, sparse_feed_forwards
from hf_efficient.trainer import EfficientSeq2SeqTrainer
from hf_efficient.trainer.adafactor import RECIPES
from hf_efficient.trainer.arguments import CorpusArguments, PretrainingArguments, parse_overrides, parse_with_preset
from hf_efficient.trainer.memory_estimate import estimate_step, free_memory, shortage
from hf_efficient.trainer.model_setup import (
    build_config,
    check_block_size,
    load_or_build_tokenizer,
    published_fields,
)
from hf_efficient.trainer.run_directory import (
    RunDirectory,
    draw_losses,
    finite,
    resume_critical_args,
    resume_critical_config,
)
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.model_files import file_faults_named
from hf_efficient.utils.process import end_script, errors_in_one_line, start_script
from hf_efficient.utils.text_pieces import split_sentences


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

OBJECTIVES = ("pairs", "span_corruption")
UNKNOWN_ADVICE = "Give another tokenizer (--tokenizer), or let one be made (without --tokenizer and --model)."
# Settings that no loss depends on.
FREE = ("final_evaluation", "predictions", "memory_check")
MEMORY_CHECKS = ("warn", "refuse", "off")
# Axes of the authors' matrices, where a layer here has them in another order; see `TraxAdafactor`.
ORIGINAL_AXES: dict[type, dict[str, tuple[int, int]]] = {
    SparseFeedForward: {"controller_up": (0, 1), "up": (0, 1), "down": (0, 2)},
    ModuleConv: {"kernel": (0, 1)},
}


@dataclass
class Seq2SeqSettings(CorpusArguments):
    """The model, what it reads and writes, and how much of it."""

    objective: str = field(
        default="pairs",
        metadata={
            "help": "pairs (documents and their summaries, --pairs) or span_corruption (plain text, --corpus: the "
            "model writes the spans that are left out of it)."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Path, folder or pattern of parquet, jsonl, csv or tsv files with documents and summaries, or the "
            "name of a dataset on the Hub."
        },
    )
    document_column: str = field(default="document", metadata={"help": "Column that holds the document."})
    summary_column: str = field(default="summary", metadata={"help": "Column that holds its summary."})
    references_column: str | None = field(
        default=None,
        metadata={"help": "Column of lists of further summaries, of which the best counts for ROUGE."},
    )
    pairs_config: str | None = field(default=None, metadata={"help": "Configuration of pairs on the Hub."})
    pairs_split: str = field(default="train", metadata={"help": "Split of pairs on the Hub to train on."})
    validation: str | None = field(
        default=None,
        metadata={
            "help": "Pairs, or text, to measure on: files, a dataset on the Hub, or a split of the one to train on, "
            "such as 'validation'. Without it a part of what there is."
        },
    )
    validation_size: float = field(
        default=0.05, metadata={"help": "Without --validation, the share to measure on; 0 for none."}
    )
    model_type: str = field(
        default="terraformer", metadata={"help": "Kind of a new model: terraformer, or t5, bart, ... of transformers."}
    )
    config: str | None = field(
        default=None, metadata={"help": "Config file (JSON with model_type), folder or Hub name of a new model."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "Published configuration of that kind: terraformer-medium, 24+24x1024-all, ..."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the config, such as 'hidden_size=512,num_decoder_layers=4'."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a trained model to go on with, with its tokenizer."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a tokenizer. Without it one is made from the text."}
    )
    vocab_size: int = field(default=8192, metadata={"help": "Ids of a tokenizer that is made."})
    max_source_length: int = field(default=512, metadata={"help": "Most tokens that the model reads at once."})
    max_target_length: int = field(default=128, metadata={"help": "Most tokens of a summary, learned or written."})
    noise_density: float = field(default=0.15, metadata={"help": "Share of a text that span corruption leaves out."})
    mean_span_length: float = field(default=3.0, metadata={"help": "Mean tokens of a span."})
    recipe: str | None = field(
        default=None,
        metadata={
            "help": f"Train by Adafactor as the authors did: {', '.join(RECIPES)}; --optim, --learning_rate, "
            "--weight_decay, --lr_scheduler_type and --warmup_steps have no effect then, and gradients are not clipped."
        },
    )
    recipe_warmup: int | None = field(
        default=None, metadata={"help": "Updates before the rate of a recipe falls; 10,000 in all of them."}
    )
    lead_sentences: int = field(
        default=3, metadata={"help": "First sentences of a document that its summary is compared with; 0 for none."}
    )
    max_eval_samples: int | None = field(
        default=200, metadata={"help": "Measure on the first so many pairs while training; at the end on all."}
    )
    predictions: int = field(default=3, metadata={"help": "Summaries that each evaluation keeps in the history."})
    memory_check: str = field(
        default="warn",
        metadata={
            "help": "What to do where a step would take more memory than is free, by an estimate: warn, refuse, or off "
            "for no estimate."
        },
    )
    final_evaluation: bool = field(
        default=True, metadata={"help": "Summarise all validation documents at the end. --no_final_evaluation"}
    )

    def check(self) -> None:
        """
        Check the settings, before anything is read.

        Raises:
            ValueError: for settings that do not exist or do not fit together.
        """
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}.")
        if (self.objective == "pairs") != (self.pairs is not None):
            raise ValueError(
                "Give documents and summaries by --pairs, or plain text by --corpus and --objective span_corruption."
            )
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, not {self.recipe!r}.")
        if self.recipe_warmup is not None and (self.recipe is None or self.recipe_warmup < 1):
            raise ValueError("`recipe_warmup` is a number of updates, from 1, of a --recipe.")
        if self.model is not None and (self.config, self.preset) != (None, None):
            raise ValueError("A trained model (--model) has its config: give no --config or --preset beside it.")
        if self.preset is not None:
            published_fields(self.model_type, self.preset)
        if not 0 <= self.validation_size < 1:
            raise ValueError(f"`validation_size` must lie in [0, 1), not {self.validation_size}.")
        if not 0 < self.noise_density < 1 or not self.mean_span_length >= 1:
            raise ValueError("Span corruption wants a noise_density between 0 and 1, and a mean_span_length from 1.")
        if self.memory_check not in MEMORY_CHECKS:
            raise ValueError(f"`memory_check` must be one of {', '.join(MEMORY_CHECKS)}, not {self.memory_check!r}.")
        if self.lead_sentences < 0 or self.predictions < 0:
            raise ValueError("`lead_sentences` and `predictions` must not be negative.")


@dataclass
class SummarizationArguments(PretrainingArguments, Seq2SeqTrainingArguments):
    """[`PretrainingArguments`] and `Seq2SeqTrainingArguments` with the defaults of summaries."""

    output_dir: str = field(
        default="summarizer", metadata={"help": "Folder for the model, its checkpoints and the loss history."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest rate; 1e-4 for a trained model."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the rate falls after the warm-up."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pairs per step, process and device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Pairs per step of the evaluation."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Score summaries of the model in evaluations. --no_predict_with_generate"}
    )


def parse_arguments(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[Seq2SeqSettings, SummarizationArguments]:
    """Parse the command line; see [`parse_with_preset`]. A recipe turns clipping of gradients off."""
    settings, args = parse_with_preset([Seq2SeqSettings, SummarizationArguments], argv, description)
    if settings.recipe is not None:
        args.max_grad_norm = 0.0
    return settings, args


def load_split_pairs(settings: Seq2SeqSettings) -> "tuple[Dataset, Dataset | None]":
    """Load the pairs to train on, and those for validation or `None`."""
    assert settings.pairs is not None
    columns = {name: getattr(settings, name) for name in ("document_column", "summary_column", "references_column")}
    options = {**columns, "config_name": settings.pairs_config}
    pairs = load_pairs(settings.pairs, split=settings.pairs_split, **options)
    given = settings.validation
    if given is None:
        return _split_pairs(pairs, settings.validation_size)
    if Path(given).exists() or any(mark in given for mark in "*/."):
        return pairs, load_pairs(given, split="validation", **options)
    if find_files(settings.pairs):  # files have no splits: these would be the pairs to train on once more
        raise ValueError(f"--validation {given}: no such file, and --pairs {settings.pairs} is none with splits.")
    return pairs, load_pairs(settings.pairs, split=given, **options)


def _split_pairs(pairs: "Dataset", validation_size: float) -> "tuple[Dataset, Dataset | None]":
    if validation_size == 0:
        return pairs, None
    train, validation = split_documents(pairs.rename_column("document", "text"), validation_size)
    return train.rename_column("text", "document"), validation.rename_column("text", "document")


def rouge_of(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """
    Score summaries by ROUGE, for ROUGE-Lsum split into sentences.

    Args:
        summaries (`Sequence[str]`): one of each document.
        references (`Sequence[Sequence[str]]`): of each document, of which the one that scores highest counts.

    Returns:
        `dict[str, float]`: from 0 to 1, by the names of `ROUGE_TYPES`.
    """

    def lines(text: str) -> str:
        return "\n".join(split_sentences(text))

    given = [[lines(text) for text in texts] for texts in references]
    metric = load_rouge_metric(keep_in_memory=True)
    found = metric.compute(predictions=[lines(text) for text in summaries], references=given)
    return {name: found[name] for name in ROUGE_TYPES}


class Evaluation:
    """
    Scores of the summaries of some pairs.

    Args:
        pairs (`Dataset`): `document`, `summary` and `references`.
        encoder ([`PairEncoder`]): of the model.
        lead_sentences (`int`): sentences of the baseline; 0 for none.
    """

    def __init__(self, pairs: "Dataset", encoder: PairEncoder, lead_sentences: int):
        self.pairs, self.encoder, self.lead_sentences = pairs, encoder, lead_sentences
        self.rows = pairs.map(
            encoder.encode_in_pieces,
            batched=True,
            with_indices=True,
            remove_columns=pairs.column_names,
            desc="Tokenizing for evaluation",
        )
        self.documents = list(self.rows["document"])
        self.rows = self.rows.remove_columns("document")
        if len(self.rows) > len(pairs):
            logger.info("%d documents are read in %d pieces.", len(pairs), len(self.rows))
        self.last: list[str] = []

    @functools.cached_property
    def leads(self) -> list[str]:
        """Baseline summary of each document."""
        return [lead(text, self.lead_sentences) for text in self.pairs["document"]] if self.lead_sentences else []

    @functools.cached_property
    def lead_scores(self) -> dict[str, float]:
        """ROUGE of the baseline, by names that begin with `lead_`."""
        return (
            {f"lead_{name}": value for name, value in rouge_of(self.leads, self.pairs["references"]).items()}
            if self.leads
            else {}
        )

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """ROUGE of generated ids, those of the baseline, and the mean number of words of a summary."""
        summaries = self.encoder.decode(prediction.predictions)
        self.last = join_pieces(summaries, self.documents)
        words = sum(len(text.split()) for text in self.last) / len(self.last)
        return {**rouge_of(self.last, self.pairs["references"]), **self.lead_scores, "summary_words": words}

    def write(self, path: Path) -> None:
        """Write a line of JSON for each document: the last prediction, its references, and the baseline."""
        rows = []
        for index, (text, references) in enumerate(zip(self.last, self.pairs["references"], strict=True)):
            row = {"prediction": text, "references": references}
            rows.append({**row, "lead": self.leads[index]} if self.leads else row)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class KeepSummariesCallback(TrainerCallback):
    """Keep the first summaries of each evaluation in the history, beside the scores."""

    def __init__(self, evaluation: Evaluation, count: int):
        self.evaluation, self.count = evaluation, count

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.count:
            state.log_history[-1]["summaries"] = self.evaluation.last[: self.count]


@dataclass
class Task:
    """Rows to train and to validate on, and what turns them into batches and scores."""

    train: Any
    validation: Any | None
    digests: dict[str, str | None]
    lengths: list[int] | None = None
    evaluation: Evaluation | None = None  # of all pairs, at the end
    measured: Evaluation | None = None  # of those that are measured while training
    collators: Callable[[Any], tuple[Any, Any]] = lambda pad: (pad, pad)


def pairs_task(
    settings: Seq2SeqSettings, tokenizer: PreTrainedTokenizerBase, train: "Dataset", validation: "Dataset | None"
) -> Task:
    """Tokenise pairs."""
    encoder = PairEncoder(tokenizer, settings.max_source_length, settings.max_target_length)
    rows = train.map(encoder.encode, batched=True, remove_columns=train.column_names, desc="Tokenizing")
    lengths = list(rows["length"])
    cut = sum(length >= settings.max_source_length for length in lengths)
    if cut:
        logger.info("%d of %d documents fill %d tokens, and are cut there.", cut, len(lengths), max(lengths))
    digests = {"train_digest": pairs_digest(train), "validation_digest": validation and pairs_digest(validation)}
    task = Task(rows.remove_columns("length"), None, digests, lengths)
    if validation is not None:
        few = validation.take(min(len(validation), settings.max_eval_samples or len(validation)))
        task.measured = Evaluation(few, encoder, settings.lead_sentences)
        task.validation = task.measured.rows
        whole = len(few) == len(validation) or not settings.final_evaluation
        task.evaluation = task.measured if whole else Evaluation(validation, encoder, settings.lead_sentences)
    return task


def text_task(
    settings: Seq2SeqSettings, tokenizer: PreTrainedTokenizerBase, seed: int, train: Any, validation: Any
) -> Task:
    """Tokenise plain text for span corruption."""
    noise = (settings.noise_density, settings.mean_span_length)
    length = text_length(settings.max_source_length, settings.max_target_length, *noise)
    streams = [encode(part, tokenizer, "subword") if part is not None else None for part in (train, validation)]
    windows = [None if stream is None else TextWindows(stream.tokens, length) for stream in streams]
    digests = [None if stream is None else stream.digest for stream in streams]
    if not windows[0]:
        raise ValueError("The corpus holds no text of two tokens to leave one out of.")
    logger.info("%d pieces of %d tokens to train on.", len(windows[0]), length)

    def collators(pad: Any) -> tuple[Any, Any]:
        options = (pad, len(tokenizer), tokenizer.eos_token_id, *noise)
        return SpanCorruptionCollator(*options, seed=seed), SpanCorruptionCollator(*options, seed=0)

    return Task(
        windows[0],
        windows[1] or None,
        dict(zip(("train_digest", "validation_digest"), digests, strict=True)),
        collators=collators,
    )


def original_axes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Name the parameters whose matrices lie along other axes than in the authors' code, with these axes."""
    return {
        f"{prefix}.{name}": axes
        for prefix, module in model.named_modules()
        for kind, of_kind in ORIGINAL_AXES.items()
        if isinstance(module, kind)
        for name, axes in of_kind.items()
    }


def build_model(settings: Seq2SeqSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """
    Build a new model, or load a trained one, that writes at most `max_target_length` tokens by itself.

    Raises:
        ValueError: if its config or its vocabulary does not fit.
    """
    set_seed(seed)
    if settings.model is not None:
        with file_faults_named(settings.model):
            model = AutoModelForSeq2SeqLM.from_pretrained(
                settings.model, dtype=torch.float32, **parse_overrides(settings.config_overrides)
            )
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens and the model {settings.model} only "
                f"{model.config.vocab_size}: they do not belong together."
            )
    else:
        config = build_config(
            tokenizer, settings.model_type, settings.config, settings.config_overrides, settings.preset
        )
        if not config.is_encoder_decoder:
            raise ValueError(f"A {config.model_type} model of that config is no encoder-decoder.")
        if "decoder_start_token_id" not in parse_overrides(settings.config_overrides):
            starts = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)
            config.decoder_start_token_id = next(token for token in starts if token is not None)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    options = "--max_source_length and --max_target_length"
    check_block_size(model, model.config, settings.max_source_length, options, settings.max_target_length)
    model.generation_config.max_new_tokens = settings.max_target_length
    return model


def check_smoothing(args: SummarizationArguments, model: PreTrainedModel) -> None:
    """
    Check that the model sees the labels where it needs them.

    Raises:
        ValueError: for label smoothing where the decoder hashes.
    """
    if args.label_smoothing_factor and getattr(model.config, "decoder_long_attention", "none") != "none":
        raise ValueError(
            "Label smoothing takes the labels from the model, by which attention by hashing leaves the padding of "
            "targets out: use --label_smoothing_factor 0, or decoder_long_attention=none."
        )


def check_memory(settings: Seq2SeqSettings, args: SummarizationArguments, model: PreTrainedModel) -> None:
    """
    Log how much memory a step of the longest rows takes, as an estimate, and say if that is not free.

    Raises:
        ValueError: where it is not free, with `--memory_check refuse`.
    """
    if settings.memory_check == "off":
        return
    estimate = estimate_step(
        model,
        args.per_device_train_batch_size,
        settings.max_source_length,
        settings.max_target_length,
        optimizer="adafactor" if settings.recipe is not None else str(args.optim),
        gradient_checkpointing=bool(args.gradient_checkpointing),
        half_precision=args.bf16 or args.fp16,
        device=args.device,
    )
    logger.info("A training step takes %s, as an estimate.", estimate)
    held = estimate.weights if args.device == model.device else 0
    said = shortage(estimate, free_memory(args.device), held)
    if said is not None and settings.memory_check == "refuse":
        raise ValueError(said)
    if said is not None:
        logger.warning("%s This is an estimate; --memory_check off leaves it out.", said)


def evaluate_finally(trainer: EfficientSeq2SeqTrainer, evaluation: Evaluation) -> None:
    """Summarise all validation documents; `predictions.jsonl` has the summaries afterwards."""
    trainer.compute_metrics = evaluation
    output = trainer.predict(evaluation.rows, metric_key_prefix="final")
    if not trainer.is_world_process_zero():
        return
    write_files(str(trainer.args.output_dir), lambda folder: evaluation.write(Path(folder, "predictions.jsonl")))
    scores = {name: value for name, value in (output.metrics or {}).items() if isinstance(value, float)}
    kept = {name: value for name, value in scores.items() if "runtime" not in name and "per_second" not in name}
    trainer.log(kept)


def save(trainer: EfficientSeq2SeqTrainer, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> None:
    """Write the model that people load, the history of the run, and its picture."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    model.config.use_cache = True  # Trainer turns it off for training
    # What a pipeline gives the model at once: positions beyond were never trained.
    tokenizer.model_max_length = settings["max_source_length"]
    log_history = trainer.state.log_history
    history = finite({"settings": settings, "log_history": log_history})

    def write(folder: str) -> None:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        Path(folder, "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        draw_losses(log_history, os.path.join(folder, "loss_curve.png"))

    write_files(str(trainer.args.output_dir), write)


def load_texts(settings: Seq2SeqSettings) -> tuple[Any, Any | None, list[str]]:
    """Load what to train and to validate on, and the texts that a tokenizer is made from."""
    if settings.objective == "pairs":
        train, validation = load_split_pairs(settings)
        return train, validation, [text for name in ("document", "summary") for text in train[name]]
    documents = settings.load()
    if settings.validation is not None:
        from hf_efficient.data.corpus import load_corpus

        return documents, load_corpus(settings.validation, **settings.loading_options), list(documents["text"])
    if settings.validation_size == 0:
        return documents, None, list(documents["text"])
    train, validation = split_documents(documents, settings.validation_size)
    return train, validation, list(train["text"])


def train_seq2seq(settings: Seq2SeqSettings, args: SummarizationArguments) -> EfficientSeq2SeqTrainer:
    """
    Train an encoder-decoder; the model, `history.json`, `predictions.jsonl` and `loss_curve.png` are in
    `args.output_dir` afterwards.

    Returns:
        [`EfficientSeq2SeqTrainer`]: its `state.log_history` holds losses, scores and samples, its `model` the model.

    Raises:
        FileExistsError: if `output_dir` holds a run and `args.resume` is off.
        ValueError: for settings that do not fit together, or not to the run that is resumed.
    """
    settings.check()
    if settings.recipe is not None and args.fsdp:
        raise ValueError("A --recipe scales updates by whole matrices, which FSDP cuts apart: use --optim, or DDP.")
    run = RunDirectory(str(args.output_dir), checkpoints=".", result="history.json")
    chosen = {name: value for name, value in asdict(settings).items() if name not in FREE}
    critical = {**chosen, **resume_critical_args(args, "seed", "dataloader_drop_last", "generation_num_beams")}
    before = run.check(critical, args.resume)  # early, before the text is read

    with args.main_process_first(desc="loading the text"):
        train, validation, texts = load_texts(settings)
    build = functools.partial(seq2seq_tokenizer, texts, settings.vocab_size)
    tokenizer = load_or_build_tokenizer(settings.tokenizer or settings.model, build, args, resumed=before is not None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    report_unknown(tokenizer, texts, UNKNOWN_ADVICE)
    if settings.objective == "pairs":
        task = pairs_task(settings, tokenizer, train, validation)
    else:
        task = text_task(settings, tokenizer, args.seed, train, validation)
        args.predict_with_generate = False

    model = build_model(settings, tokenizer, args.seed)
    check_smoothing(args, model)
    check_memory(settings, args, model)
    callbacks = list[TrainerCallback]()
    if task.validation is None:
        args.eval_strategy = "no"
    if task.measured is not None and args.predict_with_generate:
        callbacks.append(KeepSummariesCallback(task.measured, settings.predictions))
    if sparse_feed_forwards(model):
        callbacks.append(UnitUsageCallback(model))
    collator, eval_collator = task.collators(DataCollatorForSeq2Seq(tokenizer, model=model))
    trainer = EfficientSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=tokenizer,
        data_collator=collator,
        eval_data_collator=eval_collator,
        compute_metrics=task.measured if args.predict_with_generate else None,
        callbacks=callbacks,
        lengths=task.lengths,
        recipe=None if settings.recipe is None else RECIPES[settings.recipe],
        recipe_warmup=settings.recipe_warmup,
        factored_axes=original_axes(model),
    )
    critical |= {**task.digests, **resume_critical_config(model.config)}
    run.open(critical, args.resume)  # not before all the rest is known to fit together
    trainer.train(resume_from_checkpoint=args.resume)
    if settings.final_evaluation and task.evaluation is not None and args.predict_with_generate:
        evaluate_finally(trainer, task.evaluation)
    save(trainer, tokenizer, asdict(settings))
    return trainer


def main(argv: list[str] | None = None) -> None:
    start_script(__name__)
    settings, args = parse_arguments(argv, __doc__)
    end_script(train_seq2seq(settings, args))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
