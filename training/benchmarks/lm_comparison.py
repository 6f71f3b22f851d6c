"""
Byte-level language models of equal size at equal time: SRU++ against transformers' GPT-2, the same bytes, seeds and
core time, on one core or one GPU.

    python -m training.benchmarks.lm_comparison screen --text enwiki.xml.xz
    python -m training.benchmarks.lm_comparison run --text enwiki.xml.xz --seed 0
    python -m training.benchmarks.lm_comparison run --text enwiki.xml.xz --seed 1
    python -m training.benchmarks.lm_comparison run --text enwiki.xml.xz --minutes 40 --output_dir runs/lm_race/long
    python -m training.benchmarks.lm_comparison report

`screen` gives each model short runs at three learning rates and in both orders of the data (contiguous columns, random
segments); `run` takes each model's best. Models take turns in slices of a few seconds of core time, schedules run by
time. `run` also gives SRU++ a quarter of the time with a schedule of its own. Killed, the same command goes on from the
last save. `report` writes training/results/lm_race.json and the picture beside it.
"""

import argparse
import json
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments
from hf_efficient.models.srupp.masking_srupp import SegmentMemory
from hf_efficient.trainer.segment_memory import takes_memory
from hf_efficient.utils.labels import IGNORE_INDEX

from .environment import describe, write_result
from .equal_time import TimedTrainer, TrainConfig, train_interleaved
from .lm_report import report


VALIDATION, TEST = 300_000, 300_000  # the last bytes, as the data's description suggests


def build_srupp(length: int, **overrides) -> nn.Module:
    """Build an SRU++ of 2.6 M parameters: 8 layers, 512 wide, d' 128, attention in all layers."""
    sizes = {"hidden_size": 512, "projection_size": 128, "num_hidden_layers": 8}
    return SruppForCausalLM(SruppConfig(**{"vocab_size": 256, **sizes, **overrides}))


def build_srupp_last(length: int) -> nn.Module:
    """Build the same with attention in the last layer only."""
    return build_srupp(length, attention_layers=[-1])


def build_gpt2(length: int) -> nn.Module:
    """Build a GPT-2 of 2.7 M parameters: 6 layers, 192 wide, tied embeddings."""
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=256, n_embd=192, n_layer=6, n_head=6, n_positions=length, **no_dropout)
    return GPT2LMHeadModel(config)


MODELS = {"srupp": build_srupp, "srupp_last": build_srupp_last, "gpt2": build_gpt2}
RATES = {"srupp": (2e-3, 5e-3, 1e-2), "gpt2": (1e-3, 2e-3, 4e-3)}


def eval_batches(tokens: np.ndarray, length: int, columns: int, with_memory: bool) -> list[dict]:
    """
    Cut the validation tokens into batches, the same tokens for every model: contiguous columns, read one segment after
    the other with memory, or, as is better for a model without, windows that share half of their length.
    """
    if with_memory:
        rows: Dataset = ColumnSegments(tokens, length, columns)
        batch_size = columns
    else:
        column = (len(tokens) - 1) // columns // length * length
        parts = [OverlappingWindows(tokens[i * column : (i + 1) * column + 1], length) for i in range(columns)]
        rows, batch_size = torch.utils.data.ConcatDataset(parts), 2 * columns
    indices = range(len(rows))  # type: ignore[arg-type]
    starts = indices[::batch_size]
    return [default_collate([rows[i] for i in indices[start : start + batch_size]]) for start in starts]


class TimedLanguageModelTrainer(TimedTrainer):
    """
    [`TimedTrainer`] of a causal LM, on contiguous columns with memory or on random segments without.

    Args:
        model (`nn.Module`): a causal LM; one that takes `memory` carries it from segment to segment in `columns` order.
        order (`str`): `"columns"`, contiguous, or `"random"`.
        tokens, validation (`numpy.ndarray`): ids of the training text and of the text that the curve is measured on.
        eval_columns (`int`): columns that the validation text is cut into.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        order: str,
        tokens: np.ndarray,
        validation: np.ndarray,
        length: int,
        config: TrainConfig,
        seed: int,
        device: torch.device,
        eval_columns: int = 16,
    ):
        super().__init__(name, model, config, seed, device)
        self.has_memory = takes_memory(model)
        self.carries = self.has_memory and order == "columns"
        self.rows: ColumnSegments | RandomSegments = (
            ColumnSegments(tokens, length, config.batch_size)
            if order == "columns"
            else RandomSegments(tokens, length, seed)
        )
        self.eval_batches = eval_batches(validation, length, eval_columns, self.has_memory)

    def _chosen(self, epoch: int) -> list[int]:
        if isinstance(self.rows, ColumnSegments):
            return list(range(len(self.rows)))
        self.rows.set_epoch(epoch)
        generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.config.batch_size
        per_epoch = len(self.rows) // size
        while True:
            epoch, start = divmod(self.progress.steps, per_epoch)
            chosen = self._chosen(epoch)
            for index in range(start, per_epoch):
                if index == 0:
                    self.carried = {}
                yield default_collate([self.rows[i] for i in chosen[index * size : (index + 1) * size]])

    def _forward(self, batch: dict[str, torch.Tensor], memory: SegmentMemory | None, carry: bool):
        inputs = {"input_ids": batch["input_ids"].to(self.device), "use_cache": False}
        labels = batch["labels"].to(self.device)
        if self.has_memory:
            inputs |= {"memory": memory, "return_memory": carry}
        return self.model(labels=labels, shift_labels=labels, **inputs)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        memory = SegmentMemory(**self.carried) if self.carried else None
        output = self._forward(batch, memory, self.carries)
        if self.carries:
            # Plain containers, since they are saved with the rest.
            self.carried = output.memory.detach()._asdict()
        return output.loss

    def score(self, batches: list[dict]) -> float:
        """Compute the mean loss of the targets of `batches`, in nats."""
        total, count, memory = 0.0, 0, None
        for batch in batches:
            targets = int((batch["labels"] != IGNORE_INDEX).sum())
            with self.autocast():
                output = self._forward(batch, memory, self.has_memory)
            memory = output.memory if self.has_memory else None
            total += output.loss.item() * targets
            count += targets
        return total / count

    def evaluate(self) -> float:
        return self.score(self.eval_batches)


def bits(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2)


class LanguageModelRun(NamedTuple):
    """One run: its model, learning rate and time in minutes, the order of its data, the number of its evaluations."""

    name: str
    model: str
    learning_rate: float
    order: str
    minutes: float
    evaluations: int


def screening_runs(rates: Mapping[str, Sequence[float]], minutes: float) -> list[LanguageModelRun]:
    """List short runs of every model at each of its rates and in both orders of the data."""
    return [
        LanguageModelRun(f"{model}-{rate:g}-{order}", model, rate, order, minutes, evaluations=1)
        for model, tried in rates.items()
        for rate in tried
        for order in ("columns", "random")
    ]


def best_of(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Choose the short run of each model that ended lowest."""
    best: dict[str, dict[str, Any]] = {}
    for outcome in sorted(found, key=lambda outcome: outcome["bits_per_byte"]):
        best.setdefault(outcome["model"], outcome)
    return best


def read_bytes(path: Path) -> np.ndarray:
    """Read the bytes of a file, or of an .xz of one."""
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return np.frombuffer(data, dtype=np.uint8)


def split(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split into training and validation bytes; the test bytes at the end are left alone."""
    edge = len(data) - TEST - VALIDATION
    return data[:edge], data[edge : edge + VALIDATION]


def make_trainer(
    run: LanguageModelRun, build: Callable[[int], nn.Module], args: argparse.Namespace
) -> TimedLanguageModelTrainer:
    """Make the trainer of a run, whose model starts as the seed says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    train, validation = split(read_bytes(args.text))
    config = TrainConfig(
        budget_s=60 * run.minutes,
        batch_size=args.batch_size,
        learning_rate=run.learning_rate,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        evaluations=run.evaluations,
        schedule="cosine",
        final_fraction=0.02,
        decay_matrices_only=True,
        bf16=args.bf16,
    )
    validation = validation[: args.eval_bytes + 1]
    network = build(args.length)
    return TimedLanguageModelTrainer(
        run.name, network, run.order, train, validation, args.length, config, args.seed, device
    )


def screening_outcome(run: LanguageModelRun, trainer: TimedLanguageModelTrainer) -> dict[str, Any]:
    """Take the figures of a short run that has finished."""
    return {
        "model": run.model,
        "learning_rate": run.learning_rate,
        "order": run.order,
        "bits_per_byte": bits(trainer.progress.curve[-1][2]),
    }


def figures_of(trainer: TimedLanguageModelTrainer, args: argparse.Namespace) -> dict[str, Any]:
    """Take the figures of a run that has finished, and score it on all validation bytes."""
    _, validation = split(read_bytes(args.text))
    batches = eval_batches(validation, args.length, 16, trainer.has_memory)
    trainer.model.eval()
    with torch.no_grad():
        final = trainer.score(batches)
    progress = trainer.progress
    tokens = progress.steps * args.batch_size * args.length
    named = trainer.model.named_parameters()
    return {
        "budget_s": trainer.config.budget_s,
        "learning_rate": trainer.config.learning_rate,
        "parameters": trainer.model.num_parameters(),
        "steps": progress.steps,
        "tokens": tokens,
        "step_s": progress.seconds / progress.steps,
        "tokens_per_s": tokens / progress.seconds,
        "curve": [(seconds, steps, bits(nats)) for seconds, steps, nats in progress.curve],
        "bits_per_byte_of_all_validation": bits(final),
        "alpha": {name: parameter.item() for name, parameter in named if name.endswith(".alpha")},
    }


def screen(args: argparse.Namespace) -> None:
    """Make short runs of every model, rate and order, and write which served each model best."""
    folder = args.output_dir / "screen"
    folder.mkdir(parents=True, exist_ok=True)
    runs = screening_runs(RATES, args.minutes)
    trainers = [make_trainer(run, MODELS[run.model], args) for run in runs]
    train_interleaved(trainers, folder, args.slice)
    found = [screening_outcome(run, trainer) for run, trainer in zip(runs, trainers, strict=True)]
    result = {"minutes": args.minutes, "runs": found, "best": best_of(found), **describe()}
    write_result(folder / "result.json", result)
    print(json.dumps(found, indent=1))


def run(args: argparse.Namespace) -> None:
    """Train the models of one seed in turn, and write their figures."""
    screened = args.screen_dir / "screen" / "result.json"
    if not screened.exists():
        raise SystemExit(f"{screened} is missing: run `screen` first.")
    best = json.loads(screened.read_text())["best"]
    folder = args.output_dir / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    times = [("srupp", "srupp", args.minutes), ("gpt2", "gpt2", args.minutes)]
    times += [(f"srupp_{share:g}", "srupp", share * args.minutes) for share in args.shares]
    trainers = []
    for name, model, minutes in times:
        rate, order = best[model]["learning_rate"], best[model]["order"]
        one = LanguageModelRun(name, model, rate, order, minutes, args.evaluations)
        trainers.append(make_trainer(one, MODELS[model], args))
    train_interleaved(trainers, folder, args.slice)
    finish(args, trainers, folder)


def finish(args: argparse.Namespace, trainers: list[TimedLanguageModelTrainer], folder: Path) -> None:
    """Save every model with its tokenizer, and write the figures for the report."""
    settings = {**vars(args), "text": args.text.name, "output_dir": str(args.output_dir)}
    settings.pop("screen_dir")
    result: dict[str, Any] = {"seed": args.seed, "settings": settings, **describe(), "runs": {}}
    for trainer in trainers:
        result["runs"][trainer.name] = figures_of(trainer, args)
        trainer.model.save_pretrained(folder / trainer.name)
        byte_tokenizer().save_pretrained(folder / trainer.name)
    write_result(folder / "result.json", result)
    print(json.dumps({name: entry["curve"][-1] for name, entry in result["runs"].items()}, indent=1))


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of every command that trains; `defaults` replace those of this comparison."""
    parser.add_argument("--text", type=Path, required=True, help="the bytes: a file, or an .xz of one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=128, help="bytes in a segment (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="segments in a step (%(default)s)")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute in bf16 (autocast) where the processor or GPU is fast at it; weights stay in fp32",
    )
    parser.add_argument("--eval_bytes", type=int, default=32_768, help="validation bytes of the curve (%(default)s)")
    parser.add_argument("--slice", type=float, default=4.0, help="core seconds of a turn (%(default)s)")
    parser.set_defaults(**defaults)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.lm_comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    screens = commands.add_parser("screen", help="find each model's learning rate and order of the data")
    runs = commands.add_parser("run", help="train all models with one seed")
    reports = commands.add_parser("report", help="merge all that is there into one table and one picture")
    screens.add_argument("--minutes", type=float, default=1.25, help="core time of each short run")
    runs.add_argument("--minutes", type=float, default=8.0, help="core time of each model")
    runs.add_argument(
        "--shares", type=float, nargs="*", default=[0.25], help="also give SRU++ these shares of the time"
    )
    runs.add_argument("--screen_dir", type=Path, default=Path("runs/lm_race"), help="where `screen` wrote")
    for command in (screens, runs):
        add_training_arguments(command)
    runs.add_argument("--evaluations", type=int, default=20, help="points of a curve")
    for command in (screens, runs, reports):
        command.add_argument("--output_dir", type=Path, default=Path("runs/lm_race"))
    reports.add_argument("--result", type=Path, help="JSON to write; by default one in training/results")
    args = parser.parse_args(argv)
    if args.command == "report":
        report(args.output_dir, args.result)
        return
    torch.set_num_threads(1)
    {"screen": screen, "run": run}[args.command](args)


if __name__ == "__main__":
    main()
