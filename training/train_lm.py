r"""Train a causal language model on a text, with memory carried from segment to segment where the model has one.

python training/train_lm.py training/configs/srupp_small.json --corpus text.xml.xz --validation_size 300000 \
    --output_dir my-lm
python training/train_lm.py training/configs/srupp_enwik8.json --corpus enwik8.train --output_dir enwik8-base
python training/train_lm.py training/configs/scaling_transformer_small.json --corpus "texts/*.txt" --output_dir my-lm
python training/train_lm.py training/configs/scaling_transformer_24x1024.json --corpus "texts/*.parquet"
python training/train_lm.py --model_type gpt2 --level subword --corpus "texts/*.txt" --output_dir my-gpt2
python training/train_lm.py --streaming --corpus "texts/*.jsonl.gz" --max_steps 100000 --output_dir my-lm
torchrun --nproc_per_node 2 training/train_lm.py training/configs/srupp_small.json --output_dir my-lm

After an interruption, the same command with --resume goes on to the same losses. Validation text is measured in bits
per byte or character and in perplexity, and a sample of the model's own text is kept with each measurement. The folder
it leaves loads with AutoModelForCausalLM and pipeline("text-generation"). An SRU++ learns to use its attention late:
its strength starts at 0 and is logged as alpha. Of a Scaling Transformer with sparse feed-forward layers the log and
unit_usage.json of each checkpoint say what their controllers choose, and a warning tells if one collapses; --preset
takes 24x1024-dense, -ff, -qkv, -ff-qkv or -all, and --config_overrides makes any layer dense again. Its table of
positions may be longer than --unroll_size, for longer texts afterwards: these configs train all of it by a
position_max_offset of max_position_embeddings - unroll_size + 1 and a position_zero_probability of 0.5.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

import hf_efficient  # noqa: F401  (registers the models)
from hf_efficient.data.document_stream import TOKENIZER_CHARACTERS, DocumentStream, FirstTexts
from hf_efficient.data.row_streams import ColumnStream, SegmentStream
from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments
from hf_efficient.data.token_stream import (
    LEVELS,
    Documents,
    Stream,
    build_tokenizer,
    encode,
    encode_document,
    load_documents,
    split_validation,
    txt_decoder,
)
from hf_efficient.data.unknown_tokens import report_unknown
from hf_efficient.metrics.language_model_metric import LanguageModelMetric, load_language_model_metric
from hf_efficient.modules.unit_usage import UnitUsageCallback, sparse_feed_forwards
from hf_efficient.trainer import SegmentTrainer
from hf_efficient.trainer.arguments import PretrainingArguments, StreamingArguments, parse_with_preset
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
from hf_efficient.trainer.segment_memory import takes_memory
from hf_efficient.trainer.segment_trainer import evaluate_segments, token_losses
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import end_script, errors_in_one_line, start_script


logger = logging.getLogger(__name__)

# The unit that bits are counted for, by level.
UNITS = {"byte": "byte", "char": "character", "word": "token", "subword": "byte"}
PROMPT_TOKENS = 32
UNKNOWN_ADVICE = (
    "Give another tokenizer (--tokenizer), a larger --vocab_size, or a level that knows every text: --level subword or "
    "--level byte."
)
# Settings that no loss depends on.
FREE = ("sample_prompt", "sample_tokens", "final_evaluation")


@dataclass
class LanguageModelSettings(StreamingArguments):
    """The model, the text, and the pieces that it is read in."""

    model_type: str = field(
        default="srupp",
        metadata={"help": "Kind of model: srupp, scaling_transformer, or gpt2, llama, ... of transformers."},
    )
    config: str | None = field(
        default=None,
        metadata={"help": "Config file (JSON with model_type), folder or Hub name to build the model from."},
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Published configuration of that kind: enwik8-base, 24x1024-all, ..."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the config, such as 'hidden_size=512,num_hidden_layers=8'."}
    )
    level: str = field(
        default="byte",
        metadata={
            "help": "Kind of token: byte (files are read as they are), char, word (between white space; a line ends "
            "with <eos>) or subword (BPE)."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of a tokenizer of that level. Without it one is made from the text, of a "
            "stream from its first 50 million characters."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Ids of a tokenizer that is made: of subwords 8192, of words all. The model has as many, or the "
            "next multiple of its loss_sparsity."
        },
    )
    alphabet: str = field(
        default="all",
        metadata={"help": "Which bytes have an id: all 256, or corpus (those that occur, as the paper's 205)."},
    )
    validation_size: float = field(
        default=0.05,
        metadata={
            "help": "Without --validation, the part of the corpus to measure on: below 1 a fraction, of the end of "
            "files or of whole documents of a corpus of several, and of a stream; from 1 on the number of bytes or "
            "characters at the end of files. 0 for none."
        },
    )
    max_eval_tokens: int = field(
        default=200_000,
        metadata={
            "help": "Measure on at most so many validation tokens while training; at the end on all. A stream's are "
            "the first documents with so many."
        },
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
        metadata={"help": "Text that a sample continues at each evaluation; of the validation text if not given."},
    )
    sample_tokens: int = field(default=200, metadata={"help": "Tokens of that sample; 0 for none."})
    final_evaluation: bool = field(
        default=True,
        metadata={"help": "Measure all validation text at the end, in one column. --no_final_evaluation"},
    )

    def load_split(self) -> tuple[Documents, Documents | None]:
        """Load the documents to train on, and those for validation or `None`."""
        documents = load_documents(self.corpus, self.level, **self.loading_options)
        if self.validation is None:
            return split_validation(documents, self.validation_size)
        return documents, load_documents(self.validation, self.level, **self.loading_options)

    def check(self) -> None:
        """
        Check the settings, before anything is read.

        Raises:
            ValueError: for settings that do not exist or do not fit together.
        """
        if self.streaming and self.validation is None and self.validation_size >= 1:
            raise ValueError(
                "The end of a stream is not known: give --validation, or a fraction of the documents "
                "(--validation_size below 1)."
            )
        if self.streaming and self.alphabet == "corpus":
            raise ValueError("Which bytes occur in a stream is not known: --alphabet all, or a --tokenizer.")
        if self.level not in LEVELS:
            raise ValueError(f"`level` must be one of {', '.join(LEVELS)}, not {self.level!r}.")
        if self.alphabet not in ("all", "corpus"):
            raise ValueError(f"`alphabet` must be all or corpus, not {self.alphabet!r}.")
        if self.preset is not None:
            published_fields(self.model_type, self.preset)
        if self.unroll_size < 1 or (self.eval_unroll_size or 1) < 1:
            raise ValueError("Segments must be at least 1 token long (--unroll_size, --eval_unroll_size).")
        if not self.validation_size >= 0:
            raise ValueError(f"`validation_size` must not be negative, as {self.validation_size} is.")


@dataclass
class LanguageModelArguments(PretrainingArguments):
    """[`PretrainingArguments`] with the defaults of language models."""

    output_dir: str = field(
        default="language-model", metadata={"help": "Folder for the model, its checkpoints and the loss history."}
    )
    learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Highest rate: 5e-3 suits a small SRU++, 2e-3 a small Scaling Transformer, 1e-3 a small GPT-2, "
            "3e-4 large ones."
        },
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
    """Parse the command line; see [`parse_with_preset`]."""
    settings, args = parse_with_preset([LanguageModelSettings, LanguageModelArguments], argv, description)
    return settings, args


@dataclass
class Text:
    """Text to train on, tokenised or still to be read, tokenised text to validate on, if there is any, and how bits are
    counted."""

    tokenizer: PreTrainedTokenizerBase
    train: Stream | DocumentStream
    validation: Stream | None
    metric: LanguageModelMetric

    def units_per_token(self, measured: int | None = None) -> float:
        """Mean bytes or characters of the first `measured` validation tokens, or of all of them."""
        assert self.validation is not None
        tokens = self.validation.tokens
        if self.metric.config_name == "token" or self.validation.size == len(tokens):
            return 1.0
        if measured is None or measured >= len(tokens):
            return self.validation.size / len(tokens)
        return len(str(self.tokenizer.decode(tokens[:measured].tolist())).encode()) / measured

    def scores(self, losses: Any, labels: Any, units_per_token: float) -> dict[str, float]:
        """Perplexity and bits per unit."""
        scores = self.metric.compute(
            predictions=losses.ravel(), references=labels.ravel(), units_per_token=units_per_token
        )
        assert scores is not None
        return scores


def encode_text(level: str, tokenizer: PreTrainedTokenizerBase, train: Documents, validation: Documents | None) -> Text:
    """Tokenise the documents of both parts, as [`load_documents`] gives them."""
    streams = [encode(part, tokenizer, level) if part is not None else None for part in (train, validation)]
    assert streams[0] is not None
    logger.info(
        "%d tokens to train on, %d for validation, %d ids.",
        len(streams[0].tokens),
        0 if streams[1] is None else len(streams[1].tokens),
        len(tokenizer),
    )
    metric = load_language_model_metric(UNITS[level], keep_in_memory=True)
    return Text(tokenizer, streams[0], streams[1], metric)


def prepare_tokenizer(
    settings: LanguageModelSettings,
    args: LanguageModelArguments,
    resumed: bool,
    train: Documents | FirstTexts,
    validation: Documents | None,
    sample: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or make it from the text, and see what it knows of a `sample`."""
    options: dict[str, Any] = {"alphabet": settings.alphabet, "vocab_size": settings.vocab_size}
    build = functools.partial(build_tokenizer, settings.level, train, validation, **options)
    tokenizer = load_or_build_tokenizer(settings.tokenizer, build, args, resumed)
    if settings.level != "byte" or tokenizer.unk_token is not None:  # else an unknown byte is an error
        report_unknown(tokenizer, sample, UNKNOWN_ADVICE)
    return tokenizer


def load_text(settings: LanguageModelSettings, args: LanguageModelArguments, resumed: bool) -> Text:
    """Load and tokenise all of the text."""
    with args.main_process_first(desc="loading the text"):
        train, validation = settings.load_split()
    sample = train if isinstance(train, list) else train["text"]
    tokenizer = prepare_tokenizer(settings, args, resumed, train, validation, sample)
    return encode_text(settings.level, tokenizer, train, validation)


def stream_text(settings: LanguageModelSettings, args: LanguageModelArguments, resumed: bool) -> Text:
    """Read of the text what the tokenizer and the validation take, and the rest while training goes on."""
    decode = txt_decoder(settings.corpus, settings.level, settings.txt_documents)
    documents = settings.document_settings(settings.validation_size, decode=decode)
    sample = FirstTexts.sample(documents)
    texts = FirstTexts(documents, TOKENIZER_CHARACTERS)
    tokenizer = prepare_tokenizer(settings, args, resumed, texts, None, sample)
    held_out = settings.validation_documents(documents)
    validation = None
    if held_out is not None:
        texts_held_out = (document.text for document in held_out)
        validation = encode(texts_held_out, tokenizer, settings.level, settings.max_eval_tokens)
    metric = load_language_model_metric(UNITS[settings.level], keep_in_memory=True)
    return Text(tokenizer, settings.stream_documents(documents, args), validation, metric)


def check_labels(model: PreTrainedModel) -> None:
    """
    Make sure that a model takes labels that are already moved by one place.

    Raises:
        ValueError: if it does not, and so would learn the wrong thing.
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


def train_segments(
    args: LanguageModelArguments, settings: LanguageModelSettings, text: Text, carries: bool
) -> ColumnSegments | RandomSegments | SegmentStream:
    """Cut the text to train on into columns for a model whose memory is carried, else into segments in random order."""
    length, rows = settings.unroll_size, args.train_batch_size
    if isinstance(text.train, Stream):
        tokens = text.train.tokens
        if carries:
            return ColumnSegments(tokens, length, rows * args.world_size)
        return RandomSegments(tokens, length, args.seed)

    def ids(document: Any, is_next: bool) -> list[Any]:
        return encode_document(document, text.tokenizer, settings.level, is_next)[0]

    if carries:
        return ColumnStream(text.train, ids, length, rows)
    order = {"shuffle_buffer_size": settings.shuffle_buffer_size, "seed": args.seed}
    return SegmentStream(text.train, ids, length, **order)


def build_datasets(
    model: PreTrainedModel, args: LanguageModelArguments, settings: LanguageModelSettings, text: Text
) -> dict[str, Any]:
    """
    Cut text into contiguous columns for a model whose memory is carried; into random segments, and overlapping windows
    of the validation text, for others.
    """
    carries = settings.carry_state and takes_memory(model)
    segments: Any = None
    if text.validation is not None:
        length = settings.eval_unroll_size or settings.unroll_size
        tokens = text.validation.tokens[: settings.max_eval_tokens]
        segments = OverlappingWindows(tokens, length)
        if carries:
            segments = ColumnSegments(tokens, length, args.eval_batch_size * args.world_size, drop_tail=False)
    return {"train_dataset": train_segments(args, settings, text, carries), "eval_dataset": segments}


def paper_rate(step: int, warmup: int, total: int) -> float:
    """
    Factor of the learning rate at an update, counted from 0: linear up to 1, then a cosine to 0 that runs since the
    start.

    Source: the training code of arXiv 2102.12459, which steps a cosine from the first update on and overwrites its rate
    during the warm-up; torch's cosine multiplies, so it goes on from where the warm-up ends.
    """
    if step < warmup:
        return (step + 1) / warmup
    end = max(warmup - 1, 0)
    return (1 + math.cos(math.pi * min(step, total) / total)) / (1 + math.cos(math.pi * end / total))


def attention_strengths(model: torch.nn.Module) -> dict[int, float]:
    """Read alpha of each attending layer of an SRU++, which starts at 0; other models have none."""
    named = ((re.search(r"\.(\d+)\..*\.alpha$", name), value) for name, value in model.named_parameters())
    return {int(match[1]): value.item() for match, value in named if match and value.numel() == 1}


class LanguageModelTrainer(SegmentTrainer):
    """[`SegmentTrainer`] that can follow the paper's recipe, and logs how strong attention is."""

    def __init__(self, *args: Any, paper_recipe: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.paper_recipe = paper_recipe
        if paper_recipe:
            # The paper's package decays as AdamW does; torch's RAdam does so on demand.
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            options = {"lr": self.args.learning_rate, "betas": betas, "eps": self.args.adam_epsilon}
            self.optimizer_cls_and_kwargs = (torch.optim.RAdam, {**options, "decoupled_weight_decay": True})

    def get_decay_parameter_names(self, model) -> list[str]:
        if self.paper_recipe:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.paper_recipe and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            optimized: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimized, lambda step: paper_rate(step, warmup, num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        strengths = attention_strengths(self.accelerator.unwrap_model(self.model))
        if strengths and "loss" in logs:
            logs = {**logs, "alpha": max(strengths.values(), key=abs)}
        elif strengths and "eval_loss" in logs:
            logs = {**logs, **{f"eval_alpha_{layer}": alpha for layer, alpha in strengths.items()}}
        super().log(logs, start_time)


class GenerateSampleCallback(TrainerCallback):
    """Let the model go on with a prompt at each evaluation; the text is kept in the history, beside the measurement."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int):
        self.tokenizer, self.prompt, self.tokens = tokenizer, prompt, tokens

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        text = sample(kwargs["model"], self.tokenizer, self.prompt, self.tokens)
        logger.info("Step %d, a sample:\n%s", state.global_step, text)
        state.log_history[-1]["sample"] = text


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int) -> str:
    """Continue a prompt with tokens drawn from the model's whole distribution. The random numbers of training stay
    as they are."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        prompt = prompt[: max(1, limit // 2)]
        tokens = min(tokens, limit - len(prompt))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.eval().generate(
            prompt[None].to(model.device),
            attention_mask=torch.ones_like(prompt)[None].to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        )
    return str(tokenizer.decode(ids[0]))


def evaluate_finally(trainer: LanguageModelTrainer, text: Text, eval_unroll_size: int, carry_state: bool) -> None:
    """Measure all of the validation text in one column, the paper's final number; by the main process."""
    assert text.validation is not None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    segments: Any = OverlappingWindows(text.validation.tokens, eval_unroll_size)
    if carry_state and takes_memory(model):
        segments = ColumnSegments(text.validation.tokens, eval_unroll_size, drop_tail=False)
    rows = None if hasattr(segments, "columns") else trainer.args.eval_batch_size
    score = evaluate_segments(model, segments, rows, progress=not trainer.args.disable_tqdm)
    scores = text.scores(
        torch.tensor([score.loss]).double().numpy(), torch.zeros(1).long().numpy(), text.units_per_token()
    )
    trainer.log({"final_loss": score.loss, **{f"final_{name}": value for name, value in scores.items()}})
    logger.info(
        "All %d validation tokens: %s.",
        score.tokens,
        ", ".join(f"{name} {value:.4f}" for name, value in scores.items()),
    )


def save(trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> None:
    """Write the model that people load, the history of the run, and its picture."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.config.use_cache = True  # Trainer turns it off for training
    # Not before: embeddings do not learn the row of the padding id, which may be that of the end of a text.
    for config in (model.config, model.generation_config):
        if config is not None and config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    log_history = trainer.state.log_history
    history = finite({"settings": settings, "log_history": log_history})

    def write(folder: str) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Path(folder, "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        draw_losses(log_history, os.path.join(folder, "loss_curve.png"))

    write_files(str(trainer.args.output_dir), write)


def build_evaluation(
    text: Text, max_eval_tokens: int, sample_prompt: str | None, sample_tokens: int
) -> tuple[Callable[[EvalPrediction], dict[str, float]], list[TrainerCallback]]:
    """Build the metrics of the validation text, and the callback that keeps samples, if there are to be any."""
    assert text.validation is not None
    units_per_token = text.units_per_token(max_eval_tokens)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return text.scores(prediction.predictions, prediction.label_ids, units_per_token)

    if not sample_tokens:
        return metrics, []
    prompt = text.validation.tokens[:PROMPT_TOKENS].tolist()
    if sample_prompt:
        prompt = text.tokenizer(sample_prompt, add_special_tokens=False)["input_ids"]
    return metrics, [GenerateSampleCallback(text.tokenizer, torch.tensor(prompt), sample_tokens)]


def train_lm(settings: LanguageModelSettings, args: LanguageModelArguments) -> LanguageModelTrainer:
    """
    Train a language model; the model, `history.json` and `loss_curve.png` are in `args.output_dir` afterwards.

    Returns:
        [`LanguageModelTrainer`]: its `state.log_history` holds losses, scores and samples, its `model` the model.

    Raises:
        FileExistsError: if `output_dir` holds a run and `args.resume` is off.
        ValueError: for settings that do not fit together, or not to the run that is resumed.
    """
    settings.check()
    settings.check_streaming(args)
    run = RunDirectory(str(args.output_dir), checkpoints=".", result="history.json")
    chosen = {name: value for name, value in settings.resume_critical(args).items() if name not in FREE}
    critical = {**chosen, **resume_critical_args(args, "seed", "dataloader_drop_last")}
    before = run.check(critical, args.resume)  # early, before the text is read
    text = (stream_text if settings.streaming else load_text)(settings, args, before is not None)
    tokenizer = text.tokenizer

    config = build_config(tokenizer, settings.model_type, settings.config, settings.config_overrides, settings.preset)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unroll_size, eval_unroll_size = settings.unroll_size, settings.eval_unroll_size or settings.unroll_size
    segments = build_datasets(model, args, settings, text)
    check_block_size(model, config, max(unroll_size, eval_unroll_size), "--unroll_size and --eval_unroll_size")
    check_labels(model)

    metrics, callbacks = None, list[TrainerCallback]()
    if text.validation is None:
        args.eval_strategy = "no"
    else:
        sampling = (settings.sample_prompt, settings.sample_tokens)
        metrics, callbacks = build_evaluation(text, settings.max_eval_tokens, *sampling)
    if sparse_feed_forwards(model):
        callbacks.append(UnitUsageCallback(model))
    trainer = LanguageModelTrainer(
        model,
        args,
        **segments,
        callbacks=callbacks,
        compute_metrics=metrics,
        carry_state=settings.carry_state,
        paper_recipe=settings.paper_recipe,
    )
    critical |= {"text": text.train.digest, "validation_text": text.validation and text.validation.digest}
    critical |= {**resume_critical_config(config), "columns": getattr(trainer.train_dataset, "columns", None)}
    run.open(critical, args.resume)  # not before all the rest is known to fit together
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        if settings.final_evaluation and text.validation is not None:
            evaluate_finally(trainer, text, eval_unroll_size, settings.carry_state)
        save(trainer, tokenizer, asdict(settings))
    return trainer


def main(argv: list[str] | None = None) -> None:
    start_script(__name__)
    settings, args = parse_arguments(argv, __doc__)
    end_script(train_lm(settings, args))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
