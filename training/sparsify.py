r"""Make the feed-forward layers of a trained GPT-2 sparse, so that decoding reads a fraction of their weights.

python -m training.sparsify --model my-gpt2 --text "texts/*.txt" --block_size 4 --rank 64 --output_dir my-sparse-gpt2
python -m training.sparsify --model my-gpt2 --text "texts/*.txt" --block_size 4 --rank 64 --output_dir my-sparse-gpt2 \
    --resume --distill_steps 1000

Give text of the kind that the model is for, such as what it was fine-tuned on. Of each layer one unit in --block_size
is computed for a token; which, a controller of rank --rank chooses. All is fitted to what the model does on the text,
and then, with --distill_steps, trained for a while on the text and towards the dense model's own logits. A tenth of the
steps that the model itself was trained for is a good number. Attention and output layer stay dense.

It prints bits per byte of held-out text for the dense model, for the sparse one at once, and after distillation. After
an interruption the same command with --resume goes on to the same losses, and a run that ended with the fit goes on to
a distillation by --resume --distill_steps. The folder loads, where hf_efficient is imported, with AutoModelForCausalLM
and pipeline("text-generation"). docs/sparsify.md says what to expect.

--model takes a folder or a name on the Hub: a GPT-2 of transformers, or a dense Scaling Transformer. Models with gated
feed-forward layers, such as Llama, have no place in this layer.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import hashlib
import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_efficient import DistillationTrainer, ScalingTransformerForCausalLM, from_gpt2, sparsify
from hf_efficient.data.segments import OverlappingWindows, RandomSegments
from hf_efficient.data.token_stream import Stream, encode, load_documents, split_validation
from hf_efficient.modules.unit_usage import UnitUsageCallback
from hf_efficient.trainer import evaluate_segments
from hf_efficient.trainer.arguments import CorpusArguments, PretrainingArguments, parse_with_preset
from hf_efficient.trainer.distillation_trainer import check_distillation
from hf_efficient.trainer.model_setup import load_tokenizer
from hf_efficient.trainer.run_directory import (
    RunDirectory,
    draw_losses,
    finite,
    resume_critical_args,
    resume_critical_config,
)
from hf_efficient.utils.atomic_write import new_folder, write_files
from hf_efficient.utils.model_files import file_faults_named
from hf_efficient.utils.process import errors_in_one_line, settle_process_group, start_script


logger = logging.getLogger(__name__)

FITTED = "fitted"  # folder of the model before distillation
# Settings of distillation, which may be chosen when the fit is done.
_OF_DISTILLATION = ("distill_steps", "distillation_weight", "temperature")


@dataclass(kw_only=True)
class SparsifySettings(CorpusArguments):
    """The model, the text, and how sparse it shall be."""

    model: str = field(
        metadata={"help": "Folder or Hub name of a GPT-2 of transformers, or of a dense Scaling Transformer."}
    )
    corpus: str = field(
        default="builtin",
        metadata={
            "aliases": ["--text"],
            "help": "Text to fit to: a path, folder or pattern of txt, parquet, jsonl or csv files, compressed or not, "
            "the name of a dataset on the Hub, or 'builtin' (Python's own documentation).",
        },
    )
    block_size: int = field(
        default=4, metadata={"help": "One unit in so many is computed (N): 4 is close to the dense model, 64 far."}
    )
    rank: int = field(
        default=64, metadata={"help": "Inner width of the controllers (r): of a sparse layer most of what is read."}
    )
    validation: str | None = field(
        default=None, metadata={"help": "Text to measure on, named as the corpus is. Without it a part of the corpus."}
    )
    validation_size: float = field(
        default=0.05,
        metadata={
            "help": "Without --validation, the part of the corpus to measure on: below 1 a fraction, from 1 on the "
            "number of characters at the end of files."
        },
    )
    max_eval_tokens: int = field(default=100_000, metadata={"help": "Measure on at most so many validation tokens."})
    window: int | None = field(
        default=None, metadata={"help": "Tokens that are read together; what the model takes, up to 512."}
    )
    fit_tokens: int = field(
        default=65_536, metadata={"help": "Tokens to fit to: some 20 for each unit of a layer are good."}
    )
    distill_steps: int = field(default=0, metadata={"help": "Steps of distillation afterwards; 0 for none."})
    distillation_weight: float = field(
        default=0.5,
        metadata={
            "help": "Share of the distance from the dense model's logits in the loss; the rest is cross entropy."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits in that distance."})


@dataclass
class SparsifyArguments(PretrainingArguments):
    """[`PretrainingArguments`] with the defaults of a short distillation."""

    output_dir: str = field(
        default="sparse-model", metadata={"help": "Folder for the model, its checkpoints and the figures."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Highest rate of the distillation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the rate falls after the warm-up."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per step, process and device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows per step of the measurements."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    eval_strategy: str = field(default="no", metadata={"help": "When to measure in between: steps, epoch or no."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  (the parser looks at the first two)
        default="none", metadata={"help": "Where else to log: tensorboard, trackio, ..., none."}
    )


@dataclass
class Measure:
    """
    Held-out text, and how it is measured.

    Args:
        rows (`OverlappingWindows`): windows of its ids, half of each context alone.
        bytes_per_token (`float`): of its text.
        batch_size (`int`): windows a step.
        progress (`bool`): show a progress bar.
    """

    rows: OverlappingWindows
    bytes_per_token: float
    batch_size: int
    progress: bool

    def bits_per_byte(self, model: PreTrainedModel) -> float:
        """Bits per byte of the text under a model, which is left in its mode."""
        mode = model.training
        score = evaluate_segments(model, self.rows, self.batch_size, progress=self.progress)
        model.train(mode)
        return score.loss / math.log(2) / self.bytes_per_token


def parse_arguments(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[SparsifySettings, SparsifyArguments]:
    """
    Parse the command line; see [`parse_with_preset`].

    Raises:
        ValueError: for what would end a run after the fit, which takes most of its time.
    """
    settings, args = parse_with_preset([SparsifySettings, SparsifyArguments], argv, description)
    if args.max_steps not in (-1, settings.distill_steps):
        raise ValueError("The number of steps is that of distillation: give --distill_steps, not --max_steps.")
    if settings.distill_steps < 0:
        raise ValueError(f"--distill_steps must be at least 0, not {settings.distill_steps}.")
    if settings.max_eval_tokens < 2:
        raise ValueError(
            f"--max_eval_tokens must be at least 2, not {settings.max_eval_tokens}: the first token is context alone."
        )
    if args.label_smoothing_factor:
        raise ValueError("Distillation has no label smoothing: leave --label_smoothing_factor at 0.")
    check_distillation(settings.distillation_weight, settings.temperature)
    args.max_steps = settings.distill_steps or -1
    return settings, args


def load_dense(name: str) -> Any:
    """
    Load the dense model from a folder or the Hub, a GPT-2 as its twin, in float32.

    Returns:
        [`ScalingTransformerForCausalLM`]

    Raises:
        ValueError: for a model that cannot be made sparse, or a folder whose files are damaged.
    """
    with file_faults_named(name):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model if isinstance(model, ScalingTransformerForCausalLM) else from_gpt2(model)


def load_text(
    settings: SparsifySettings, args: SparsifyArguments, tokenizer: PreTrainedTokenizerBase, window: int
) -> tuple[Stream, Measure]:
    """
    Load and tokenise the text to fit to, and the text to measure on.

    Raises:
        ValueError: if there is nothing to measure on.
    """
    documents = load_documents(settings.corpus, "subword", **settings.loading_options)
    if settings.validation is None:
        documents, held_out = split_validation(documents, settings.validation_size)
    else:
        held_out = load_documents(settings.validation, "subword", **settings.loading_options)
    if held_out is None:
        raise ValueError("There is no text to measure on: give --validation, or a --validation_size above 0.")
    train, validation = (encode(part, tokenizer, "subword") for part in (documents, held_out))
    tokens, size = validation.tokens, validation.size
    if len(tokens) > settings.max_eval_tokens:
        tokens = tokens[: settings.max_eval_tokens]
        size = len(str(tokenizer.decode(tokens.tolist())).encode())
    rows, quiet = OverlappingWindows(tokens, window), bool(args.disable_tqdm)
    return train, Measure(rows, size / len(tokens), args.per_device_eval_batch_size, not quiet)


def digest_of(model: PreTrainedModel) -> str:
    """Checksum of the settings and weights of a model."""
    found = hashlib.blake2b(json.dumps(resume_critical_config(model.config), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().flatten().numpy())
    return found.hexdigest()


def open_run(
    directory: RunDirectory, of_fit: dict[str, Any], settings: SparsifySettings, args: SparsifyArguments
) -> dict[str, Any] | None:
    """
    Start the run, or make sure that it may be resumed: with the same settings, texts and model, except that one which
    has ended with the fit goes on to a distillation.

    Args:
        directory (`RunDirectory`): of the run.
        of_fit (`dict`): settings that both stages depend on, and checksums of texts and model.
        settings ([`SparsifySettings`]), args ([`SparsifyArguments`]): of the command line.

    Returns:
        `dict` or `None`: the result, if the run is finished.
    """
    resume = bool(args.resume)
    before = directory.check(of_fit, resume)
    if before is not None and before.get("distill_steps") == 0 and settings.distill_steps:
        directory.reopen()
    return directory.open({**asdict(settings), **of_fit, **resume_critical_args(args)}, resume)


def fit(
    dense: ScalingTransformerForCausalLM,
    tokens: Any,
    settings: SparsifySettings,
    args: SparsifyArguments,
    window: int,
    of_fit: dict[str, Any],
) -> tuple[Any, list[dict[str, float]]]:
    """
    Make the model sparse, or take up the one that this run has made of the same model and text.

    Args:
        dense ([`ScalingTransformerForCausalLM`]): the model.
        tokens (`numpy.ndarray` of shape `(tokens,)`): ids of the text.
        settings ([`SparsifySettings`]), args ([`SparsifyArguments`]): of the command line.
        window (`int`): tokens that are read together.
        of_fit (`dict`): as [`open_run`] takes it.

    Returns:
        `tuple`: the sparse model, and the figures of its layers.
    """
    folder = Path(str(args.output_dir), FITTED)
    names = ("block_size", "rank", "fit_tokens", "seed", "text", "weights")
    wanted = {name: of_fit[name] for name in names} | {"window": window}
    kept = folder / "fit.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if found.get("settings") == wanted:
        logger.info("Taking up the fitted model in %s.", folder)
        return ScalingTransformerForCausalLM.from_pretrained(folder), found["layers"]
    if found:
        logger.warning("The model in %s was fitted to another text, model or setting: fitting anew.", folder)
    shutil.rmtree(folder, ignore_errors=True)
    layers: list[dict[str, float]] = []
    model = sparsify(
        dense,
        torch.from_numpy(tokens.astype("int64")),
        settings.block_size,
        settings.rank,
        length=window,
        max_tokens=settings.fit_tokens,
        seed=args.seed,
        progress=not args.disable_tqdm,
        figures=layers,
    )
    with new_folder(folder) as staged:
        model.save_pretrained(staged)
        content = json.dumps({"settings": wanted, "layers": layers}, indent=1) + "\n"
        (staged / "fit.json").write_text(content, encoding="utf-8")
    return model, layers


def distill(
    model: ScalingTransformerForCausalLM,
    dense: ScalingTransformerForCausalLM,
    segments: RandomSegments,
    measure: Measure,
    settings: SparsifySettings,
    args: SparsifyArguments,
) -> DistillationTrainer:
    """Train the sparse model on the text and towards the dense one's logits."""
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model,
        args,
        teacher=dense,
        distillation_weight=settings.distillation_weight,
        temperature=settings.temperature,
        train_dataset=segments,
        eval_dataset=measure.rows,
        callbacks=[UnitUsageCallback(model)],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer


def save(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str, history: dict[str, Any], log: list[dict[str, Any]]
) -> None:
    """Write the model that people load and the figures; the history last, whose presence says that all is there."""
    model.config.use_cache = True  # Trainer turns it off for training

    def write(staged: str) -> None:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if log:
            draw_losses(log, str(Path(staged, "loss_curve.png")))

    write_files(folder, write)
    text = json.dumps(finite(history), indent=1) + "\n"
    write_files(folder, lambda staged: Path(staged, "history.json").write_text(text, encoding="utf-8"))


def run(settings: SparsifySettings, args: SparsifyArguments) -> dict[str, Any]:
    """
    Make a model sparse; model, tokenizer and `history.json` are in `args.output_dir` afterwards.

    Returns:
        `dict`: what `history.json` holds: settings, `bits_per_byte` of the held-out text by model, the figures of the
        layers, parameters and weights that a token reads, and the log of the distillation.

    Raises:
        FileExistsError: if `output_dir` holds a run and `args.resume` is off.
        ValueError: for settings that do not fit together, or not to the run that is resumed, and for a model that
            cannot be made sparse.
    """
    directory = RunDirectory(str(args.output_dir), checkpoints=".", result="history.json")
    of_fit = {name: value for name, value in asdict(settings).items() if name not in _OF_DISTILLATION}
    of_fit["seed"] = args.seed
    directory.check(of_fit, bool(args.resume))  # early, before the text is read
    tokenizer, dense = load_tokenizer(settings.model), load_dense(settings.model)
    if len(tokenizer) > dense.config.vocab_size:
        raise ValueError(
            f"The tokenizer of {settings.model} has {len(tokenizer)} ids, more than the model, which has "
            f"{dense.config.vocab_size}."
        )
    window = settings.window or min(dense.config.max_position_embeddings, 512)
    train, measure = load_text(settings, args, tokenizer, window)
    segments = RandomSegments(train.tokens, window, args.seed) if settings.distill_steps else None
    validation = hashlib.blake2b(measure.rows.tokens.tobytes(), digest_size=16).hexdigest()
    of_fit |= {"text": train.digest, "validation_text": validation, "weights": digest_of(dense)}
    finished = open_run(directory, of_fit, settings, args)
    if finished is not None:
        return finished
    dense.to(args.device)
    with args.main_process_first(desc="making the model sparse"):  # the others load what it has written
        model, layers = fit(dense, train.tokens, settings, args, window, of_fit)
    bits = {"dense": measure.bits_per_byte(dense)}
    logger.info("Dense: %.4f bits per byte.", bits["dense"])
    model.to(args.device)
    bits["sparse"] = measure.bits_per_byte(model)
    logger.info("Sparse, at once: %.4f bits per byte.", bits["sparse"])
    log: list[dict[str, Any]] = []
    if segments is not None:
        trainer = distill(model, dense, segments, measure, settings, args)
        log, model = trainer.state.log_history, trainer.accelerator.unwrap_model(trainer.model)
        bits["distilled"] = measure.bits_per_byte(model)
        logger.info("Sparse, after %d steps: %.4f bits per byte.", settings.distill_steps, bits["distilled"])
    history = {
        "settings": asdict(settings),
        "bits_per_byte": bits,
        "parameters": model.num_parameters(),
        "weights_read_per_token": model.weights_read_per_token(),
        "dense_weights_read_per_token": dense.weights_read_per_token(),
        "layers": layers,
        "log_history": log,
    }
    if args.process_index == 0:
        save(model, tokenizer, str(args.output_dir), history, log)
    return history


def main(argv: list[str] | None = None) -> None:
    start_script(__name__)
    settings, args = parse_arguments(argv, __doc__)
    found = run(settings, args)
    bits = found["bits_per_byte"]
    for name, value in bits.items():
        print(f"{name:10} {value:.4f} bits per byte ({value / bits['dense']:.4f} of dense)")
    read, before = found["weights_read_per_token"], found["dense_weights_read_per_token"]
    print(f"A token reads {read:,} weights; of the dense model it reads {before:,}.")
    print(f"The model is in {args.output_dir}.")
    settle_process_group()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
