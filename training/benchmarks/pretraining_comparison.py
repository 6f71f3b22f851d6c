"""
Pretraining methods at equal time: the same text, sizes, seeds and core time for all, on one core or one GPU.

    python -m training.benchmarks.pretraining_comparison run --corpus 'data/*.parquet'
    python -m training.benchmarks.pretraining_comparison run --corpus 'data/*.parquet' --methods --long tupe_rtd tupe_mc
    python -m training.benchmarks.pretraining_comparison finetune --data_dir glue
    python -m training.benchmarks.pretraining_comparison report

The methods of a seed take turns in slices of a few seconds, so that whatever else the machine does hits all alike.
Killed at any moment, the same command goes on from the last save. Runs of one seed may be started one after the other,
or on a core each: the results of all are kept. `finetune` tries the encoders of one seed, and one that was never
trained, on GLUE tasks. `report` reads all there is, writes training/results/pretrain_race.json, by the name of
--output_dir, and draws the picture beside it.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from hf_efficient.data.corpus import load_corpus, split_documents
from hf_efficient.data.packing import pack_blocks
from hf_efficient.data.rare_words import RareWords, choose_band, count_words, describe_band
from hf_efficient.data.tokenizers import add_extra_tokens, train_tokenizer
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, RareWordCollator, attach
from hf_efficient.utils.loss_averages import Means, part_counts
from training.pretrain import ALL_MASKED

from .environment import COMMIT, describe, write_result
from .equal_time import TimedTrainer, TrainConfig, refuse_changes, train_interleaved
from .pretraining_methods import METHODS, Method
from .pretraining_report import EPOCHS, UNTRAINED, finetune_encoders, report
from .word_order_probe import word_order_probe


EVAL_MASK_SEED = 12345  # of masks that are the same for all
PROBES = 10  # of a run, besides that of its start; they cost nothing of its budget


def eval_batches(rows: Dataset, collator: Any, count: int, batch_size: int, device: torch.device) -> list[dict]:
    """Collate the first `count` validation rows, with masks and samples that never change."""
    batches = []
    for start in range(0, min(count, len(rows)), batch_size):
        batch = collator([rows[place] for place in range(start, min(start + batch_size, count, len(rows)))])
        batches.append({key: tensor.to(device) for key, tensor in batch.items() if key != "attention_mask"})
    return batches


class TimedObjectiveTrainer(TimedTrainer):
    """
    [`TimedTrainer`] of any objective, with or without notes, which calls the callbacks that Trainer calls.

    Args:
        model (`PreTrainedModel`): an objective, with an `encoder`.
        data (`tuple`): rows to train and to validate on, with `input_ids`, all of one length.
        collators (`tuple`): make batches of them; the masks of the first depend on the epoch that it is told.
        callbacks (`list[TrainerCallback]`): those of the objective and of its notes.
        probe (`Callable`): `accuracy` of an encoder in percent and its `standard_error`.
        eval_rows (`int`): rows to evaluate on.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        data: tuple[Dataset, Dataset],
        collators: tuple[Any, Any],
        callbacks: list[TrainerCallback],
        probe: Callable[[PreTrainedModel], dict[str, float]],
        config: TrainConfig,
        seed: int,
        device: torch.device,
        eval_rows: int = 320,
    ):
        super().__init__(name, model, config, seed, device)
        self.rows, self.collator = data[0], collators[0]
        self.eval_batches = eval_batches(data[1], collators[1], eval_rows, config.batch_size, device)
        self.callbacks, self.probe = callbacks, probe
        self._arguments: Any = SimpleNamespace(
            device=device, learning_rate=config.learning_rate, max_grad_norm=config.clip
        )
        self._latest: dict[str, torch.Tensor] = {}

    @property
    def encoder(self) -> PreTrainedModel:
        return self.model.encoder

    @property
    def product(self) -> PreTrainedModel:
        """The model that is saved in the end."""
        return self.model.model if isinstance(self.model, MaskedLMObjective) else self.model.encoder

    def resume_critical_args(self) -> dict[str, Any]:
        config = self.model.config.to_diff_dict()
        sizes = ("encoder_config", "model_config", "transformers_version")  # which weights show, or do not matter
        settings = {f"objective.{name}": value for name, value in config.items() if name not in sizes}
        notes = getattr(self.model, "notes", None)
        return settings if notes is None else {**settings, "notes": dataclasses.asdict(notes.settings)}

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Order and masks depend on seed and epoch alone."""
        batch_size = self.config.batch_size
        per_epoch = len(self.rows) // batch_size
        while True:
            epoch, start = divmod(self.progress.steps, per_epoch)
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + 7919 * epoch))
            self.collator.set_epoch(epoch)
            for index in range(start, per_epoch):
                chosen = order[index * batch_size : (index + 1) * batch_size].tolist()
                batch = self.collator([self.rows[place] for place in chosen])
                # All rows are full, and no mask is the fast path of every method.
                yield {key: tensor.to(self.device) for key, tensor in batch.items() if key != "attention_mask"}

    def _tell(self, event: str, **kwargs: Any) -> None:
        state = TrainerState(global_step=self.progress.steps, is_world_process_zero=True)
        for callback in self.callbacks:
            getattr(callback, event)(self._arguments, state, TrainerControl(), **kwargs)

    def run_slice(self, seconds: float) -> None:
        if not self.progress.probes:  # here, where no clock runs
            self._probe()
        super().run_slice(seconds)

    def before_step(self) -> None:
        self._tell("on_step_begin")

    def before_update(self) -> None:
        self._tell("on_pre_optimizer_step")

    def after_update(self) -> None:
        self._tell("on_optimizer_step")

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.model(**batch)
        self._latest = {name: value.detach() for name, value in output.items()}
        return output.loss

    def evaluate(self) -> float:
        """
        Validation loss in nats, the mean over all targets of fixed masks: of masked LM, or of the generator beside a
        discriminator. The other parts of the objective go into `progress.parts`; of notes, which have parts in training
        only, those of the last step.
        """
        means = Means()
        for batch in self.eval_batches:
            with self.autocast():
                output = self.model(**batch)
            means.add(output, *part_counts(self.model, output, batch))
        parts = means.take(lambda totals: totals)
        notes = {name: value.item() for name, value in self._latest.items() if name not in parts}
        parts |= {name: value for name, value in notes.items() if math.isfinite(value)}
        self.progress.parts.append(parts)
        self._tell("on_log", logs=parts)
        self._probe_when_due()
        return parts.get("generator_loss", parts["loss"])

    def _probe_when_due(self) -> None:
        if self.finished or self.progress.seconds >= self.config.budget_s / PROBES * len(self.progress.probes):
            self._probe()

    def _probe(self) -> None:
        self.model.eval()
        with self.autocast():
            found = self.probe(self.encoder)
        self.model.train()
        self.progress.probes.append((self.progress.seconds, found["accuracy"], found["standard_error"]))


def prepare_tokenizer(documents, text_column: str, folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a WordPiece vocabulary on the training documents, unless that is done."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(documents[text_column], vocab_size=vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def prepare_rare_words(documents, tokenizer, text_column: str, path: Path, band: tuple[int, int]) -> RareWords:
    """Count the words to keep notes on in the training documents, unless that is done."""
    if not path.exists():
        counts = count_words(documents, tokenizer, text_column)
        words = choose_band(counts, tokenizer, min_count=band[0], max_count=band[1])
        words.report.update(describe_band(counts, words))
        words.save(path)
    return RareWords.load(path, tokenizer)


def method_of(label: str) -> Method:
    """Look up the method of a run, whose name may say that it has another budget."""
    return METHODS[label.removesuffix("_half").removesuffix("_long")]


def make_trainer(args, label: str, minutes: float, shared: dict, device: torch.device) -> TimedObjectiveTrainer:
    """Make the trainer of one method, with a start of its own that depends on the seed alone."""
    method = method_of(label)
    tokenizer = copy.deepcopy(shared["tokenizer"])
    add_extra_tokens(tokenizer, method.extra_tokens)
    torch.manual_seed(args.seed)
    objective: Any = method.make(tokenizer, args.layers, args.width, args.length)
    callbacks = objective.callbacks()
    masking: dict[str, Any] = ALL_MASKED if method.all_masked else {}
    collators: list[Any] = [MaskingCollator(tokenizer, seed=seed, **masking) for seed in (args.seed, EVAL_MASK_SEED)]
    if method.notes is not None:
        keys = shared["rare_words"].keys
        callbacks.append(attach(objective, NoteDictionary(keys, args.width, method.notes)))
        collators = [RareWordCollator(collator, keys) for collator in collators]
    options = {"batch_size": args.batch_size, "learning_rate": args.learning_rate, **method.train_config}
    return TimedObjectiveTrainer(
        label,
        objective,
        shared["rows"],
        (collators[0], collators[1]),
        callbacks,
        shared["probe"],
        TrainConfig(budget_s=60 * minutes, **options),
        args.seed,
        device,
        args.eval_rows,
    )


def finish(args, trainers: Sequence[TimedObjectiveTrainer], shared: dict, folder: Path) -> None:
    """Save every encoder, and add the figures for the report to those that other runs of this seed have written."""
    path = folder / "result.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    own = ("command", "methods", "half", "long", "output_dir")
    settings = {name: value for name, value in vars(args).items() if name not in own}
    result = {**earlier, "seed": args.seed, "settings": settings, **describe(), "runs": earlier.get("runs", {})}
    for trainer in trainers:
        trainer.product.save_pretrained(folder / trainer.name)
        shared["tokenizer"].save_pretrained(folder / trainer.name)
        progress = trainer.progress
        _, accuracy, error = progress.probes[-1]
        result["runs"][trainer.name] = {
            "swap_probe": {"accuracy": accuracy, "standard_error": error},  # the last of `probes`
            "budget_s": trainer.config.budget_s,
            "learning_rate": trainer.config.learning_rate,
            "steps": progress.steps,
            "tokens": progress.steps * args.batch_size * args.length,
            "curve": progress.curve,
            "parts": progress.parts,
            "probes": progress.probes,
            "choices": getattr(trainer.model.config, "num_candidates", None),
            "commit": COMMIT,
        }
    if "rare_words" in shared:
        result["rare_words"] = shared["rare_words"].report
    write_result(path, result)


def same_settings(args, path: Path) -> None:
    """Make sure that all runs of a seed have the same text and sizes, whenever they are started."""
    named = ("corpus", "layers", "width", "length", "vocab_size", "batch_size", "eval_rows", "probe", "band")
    settings = {name: getattr(args, name) for name in named}
    settings["probe"], settings["band"] = list(args.probe), list(args.band)
    if path.exists():
        refuse_changes(path, json.loads(path.read_text()), settings)
    else:
        write_result(path, settings)


def run(args) -> None:
    """Train the methods of one seed in turn, and write their figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home = Path(args.output_dir)
    folder = home / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    same_settings(args, folder / "settings.json")
    train_documents, validation_documents = split_documents(load_corpus(args.corpus), 0.02)
    tokenizer = prepare_tokenizer(train_documents, "text", home / "tokenizer", args.vocab_size)
    entries = [(name, args.minutes) for name in args.methods]
    entries += [(f"{name}_half", args.minutes / 2) for name in args.half]
    entries += [(f"{name}_long", args.long_minutes) for name in args.long]
    with_notes = any(method_of(label).notes is not None for label, _ in entries)
    rows, validation_rows = (
        pack_blocks(part, tokenizer, args.length, word_ids=with_notes).filter(
            lambda row: len(row["input_ids"]) == args.length
        )
        for part in (train_documents, validation_documents)
    )
    print(f"{len(rows):,} rows of {args.length} tokens, {len(validation_rows):,} for validation")
    probe = functools.partial(
        word_order_probe,
        tokenizer=tokenizer,
        documents=validation_documents,
        text_column="text",
        train=args.probe[0],
        test=args.probe[1],
    )
    shared = {"tokenizer": tokenizer, "rows": (rows, validation_rows), "probe": probe}
    if with_notes:
        shared["rare_words"] = prepare_rare_words(
            train_documents, tokenizer, "text", home / "rare_words.json", args.band
        )
    trainers = [make_trainer(args, label, minutes, shared, device) for label, minutes in entries]
    train_interleaved(trainers, folder, args.slice)
    finish(args, trainers, shared, folder)
    print(json.dumps({trainer.name: trainer.progress.curve[-1] for trainer in trainers}, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.pretraining_comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train all methods with one seed")
    runs.add_argument("--corpus", required=True, help="text files (glob), a Hub data set, or 'builtin'")
    runs.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    runs.add_argument("--half", nargs="*", default=[], help="also run these with half the budget")
    runs.add_argument("--long", nargs="*", default=[], help="also run these with --long_minutes")
    runs.add_argument("--long_minutes", type=float, default=80.0, help="core time of those that need more")
    runs.add_argument("--minutes", type=float, default=20.0, help="core time of each method")
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--batch_size", type=int, default=16)
    runs.add_argument("--learning_rate", type=float, default=1e-3)
    runs.add_argument("--vocab_size", type=int, default=8192)
    runs.add_argument("--eval_rows", type=int, default=320)
    runs.add_argument("--probe", type=int, nargs=2, default=(10_000, 4_000), help="windows to train and test on")
    runs.add_argument("--band", type=int, nargs=2, default=(200, 400), help="words to keep notes on occur so often")
    runs.add_argument("--slice", type=float, default=4.0, help="core seconds of a turn")
    tunes = commands.add_parser("finetune", help="fine-tune the encoders of one seed on GLUE tasks")
    tunes.add_argument("--data_dir", help="folder with a folder for each task; from the Hub without it")
    tunes.add_argument("--tasks", nargs="+", default=list(EPOCHS))
    tunes.add_argument("--encoders", nargs="+", default=[UNTRAINED, *METHODS])
    tunes.add_argument("--seed", type=int, default=0, help="seed of the run whose encoders are taken")
    tunes.add_argument("--seeds", type=int, default=3, help="fine-tuning runs of each encoder and task")
    tunes.add_argument("--learning_rate", type=float, default=3e-4)
    for command in (runs, tunes):
        command.add_argument("--layers", type=int, default=4)
        command.add_argument("--width", type=int, default=256, help="a multiple of 64, the width of a head")
        command.add_argument("--length", type=int, default=128, help="tokens in a row, [CLS] included")
    reports = commands.add_parser("report", help="merge the seeds into one table and one picture")
    for command in (runs, tunes, reports):
        command.add_argument("--output_dir", default="runs/pretrain_race", help="its name is that of the result")
    reports.add_argument("--result", type=Path, help="JSON to write; by default one in training/results")
    args = parser.parse_args(argv)
    if args.command == "report":
        report(Path(args.output_dir), args.result)
    else:
        torch.set_num_threads(1)
        run(args) if args.command == "run" else finetune_encoders(args)


if __name__ == "__main__":
    main()
