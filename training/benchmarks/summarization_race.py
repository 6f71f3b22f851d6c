"""
Summaries by a small Terraformer and by its dense twin of equal size, after equal core time on the same pairs.

    python -m training.benchmarks run summarization_race precision --data summarization
    python -m training.benchmarks run summarization_race screen --data summarization
    python -m training.benchmarks run summarization_race train --data summarization --datasets scitldr --kinds dense
    python -m training.benchmarks run summarization_race report

`--data` is a folder of parquet files such as `dialogsum-train.parquet`, with documents and summaries. `precision` times
train steps in fp32 and bf16, and `screen` gives both models short runs at three learning rates on one set of pairs;
`train` takes what they found. It trains for 20 core minutes a run, takes the weights whose loss on validation pairs was
lowest, and measures on test pairs: the loss, and the loss with the documents exchanged, which says how much a model
reads, ROUGE of 200 summaries written greedily, how many of these are distinct, and what the controllers of sparse
layers choose. Killed, the same command goes on from the last save. `report` writes
training/results/summarization_race.json, beside the first sentences of the documents. Of a model that writes the same
for most documents, or reads none, it makes no claim.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.data.pairs import PairEncoder, lead, load_pairs
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from hf_efficient.modules.unit_usage import observed_units
from hf_efficient.utils.labels import IGNORE_INDEX
from hf_efficient.utils.process import bf16_support
from training.train_seq2seq import rouge_of

from .environment import describe, write_result
from .equal_time import TimedTrainer, TrainConfig, refuse_changes, train_interleaved
from .summarization_report import RESULT, TITLES, report
from .timing import interleave, medians


COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "attentions_per_layer": 1,
    "position_init_scale": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
# What the sparse model saves in attention and output layer makes its feed-forward layers wider, as in the paper. Rows
# are short, so that activations are kept: the same numbers, and layers do not run twice.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"decoder_type": "cross_attention", "intermediate_size": 512},
    "terraformer": {
        "intermediate_size": 1040,
        "ff_sparsity": 16,
        "ff_rank": 16,
        "ff_sru_layers": 1,
        "reversible": False,
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 8,
        "lm_head_type": "multiplicative",
        "loss_sparsity": 4,
    },
}
RATES = (1e-3, 2e-3, 4e-3)
LEADS = (1, 2, 3)


class PairSet(NamedTuple):
    """
    A set of pairs.

    Args:
        file (`str`): the name that its files begin with.
        source, target (`int`): most tokens of a document and of a summary.
        references (`str`, *optional*): column of several summaries.
        least_words (`int`, defaults to 0): words of the shortest document that is taken.
    """

    file: str
    source: int
    target: int
    references: str | None = None
    least_words: int = 0


DATASETS = {
    "scitldr": PairSet("scitldr_a", 192, 48, "references"),
    "dialogsum": PairSet("dialogsum", 192, 64, "references"),
    "aeslc": PairSet("aeslc", 192, 16),
}


class Pairs:
    """
    Pairs of a set as tokens, by a tokenizer that is made once.

    Args:
        name (`str`): of a folder for the tokenizer.
        kind ([`PairSet`]): files, and most tokens.
        args (`argparse.Namespace`): with `data`, `output_dir` and `vocab_size`.
    """

    def __init__(self, name: str, kind: PairSet, args: argparse.Namespace):
        self.kind, self.splits = kind, {}
        for split in ("train", "validation", "test"):
            path = args.data / f"{self.kind.file}-{split}.parquet"
            column = None if split == "train" else self.kind.references
            pairs = load_pairs(str(path), references_column=column)
            self.splits[split] = pairs.filter(lambda row: len(row["document"].split()) >= kind.least_words)
        folder = args.output_dir / name / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            texts = [text for column in ("document", "summary") for text in self.splits["train"][column]]
            seq2seq_tokenizer(texts, args.vocab_size).save_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = PairEncoder(self.tokenizer, self.kind.source, self.kind.target)
        self.pad = DataCollatorForSeq2Seq(self.tokenizer)

    def rows(self, split: str, most: int | None = None) -> list[dict[str, list[int]]]:
        """Tokens of the first pairs of a split, of all by default."""
        pairs = self.splits[split]
        columns = self.encoder.encode(pairs[: most or len(pairs)])
        return [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]

    def batches(self, rows: list[dict[str, list[int]]], size: int) -> list[dict[str, torch.Tensor]]:
        """Cut rows into batches in their order."""
        return [dict(self.pad(rows[start : start + size])) for start in range(0, len(rows), size)]


def build(kind: str, pairs: Pairs) -> TerraformerForConditionalGeneration:
    """Build a model of a kind for the tokens of some pairs."""
    sizes = {"vocab_size": len(pairs.tokenizer), "max_position_embeddings": max(pairs.kind.source, pairs.kind.target)}
    return TerraformerForConditionalGeneration(TerraformerConfig(**COMMON, **KINDS[kind], **sizes))


def held_out_loss(model: Any, batches: list[dict[str, torch.Tensor]], exchanged: bool = False) -> float:
    """Compute the mean loss of the summaries' tokens, in nats; with each document exchanged for another of its batch,
    if so."""
    total, count = 0.0, 0
    for batch in batches:
        given = dict(batch)
        if exchanged:
            given |= {name: batch[name].roll(1, 0) for name in ("input_ids", "attention_mask")}
        targets = int((batch["labels"] != IGNORE_INDEX).sum())
        total += model(**given, use_cache=False).loss.item() * targets
        count += targets
    return total / count


class SummaryTrainer(TimedTrainer):
    """
    [`TimedTrainer`] on pairs, whose batches hold documents of about equal length. Draws depend on the step alone. It
    keeps the weights of the lowest validation loss, since few pairs are soon learned by heart.
    """

    def __init__(self, name: str, model: Any, pairs: Pairs, config: TrainConfig, seed: int, eval_rows: int):
        super().__init__(name, model, config, seed, torch.device("cpu"))
        self.pairs, self.rows = pairs, pairs.rows("train")
        held_out = sorted(pairs.rows("validation", eval_rows), key=lambda row: len(row["input_ids"]))
        self.held_out = pairs.batches(held_out, 2 * config.batch_size)

    def before_step(self) -> None:
        torch.manual_seed((self.seed << 32) + self.progress.steps)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        size, lengths = self.config.batch_size, [len(row["input_ids"]) for row in self.rows]
        per_epoch = len(self.rows) // size
        while True:
            epoch, start = divmod(self.progress.steps, per_epoch)
            generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
            chosen = get_length_grouped_indices(lengths, size, generator=generator)
            # The function puts the longest first, and sorts inside of some dozens of batches.
            for index in torch.randperm(per_epoch, generator=generator)[start:].tolist():
                yield dict(self.pairs.pad([self.rows[i] for i in chosen[index * size : (index + 1) * size]]))

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss

    def evaluate(self) -> float:
        """Loss of the first validation pairs. Weights that give the lowest are kept, and what controllers choose goes
        to `progress.parts`."""
        with observed_units(self.model) as usage:
            value = held_out_loss(self.model, self.held_out)
        if value < min((before for _, _, before in self.progress.curve), default=math.inf):
            self.carried = {"best": {name: weight.clone() for name, weight in self.model.state_dict().items()}}
        layers = [layer.figures() for layer in usage.values()]
        self.progress.parts.append({name: statistics.mean(f[name] for f in layers) for name in (layers or [{}])[0]})
        return value


def make_trainer(name: str, kind: str, rate: float, pairs: Pairs, args: argparse.Namespace) -> SummaryTrainer:
    """Make the trainer of a run, whose model starts as the seed says."""
    torch.manual_seed(args.seed)
    config = TrainConfig(
        budget_s=60 * args.minutes,
        batch_size=args.batch_size,
        learning_rate=rate,
        weight_decay=0.1,
        evaluations=args.evaluations,
        schedule="cosine",
        final_fraction=0.02,
        decay_matrices_only=True,
        bf16=faster_in_bf16(args.output_dir),
    )
    return SummaryTrainer(name, build(kind, pairs), pairs, config, args.seed, args.eval_rows)


def read_or_stop(path: Path, command: str) -> dict[str, Any]:
    """Read what an earlier command has written."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `{command}` first.")
    return json.loads(path.read_text())


def faster_in_bf16(folder: Path) -> bool:
    return read_or_stop(folder / "precision.json", "precision")["bf16"]


def precision(args: argparse.Namespace) -> None:
    """Time train steps of both kinds in fp32 and, where the processor has units for it, in bf16, and choose one."""
    pairs = Pairs(args.datasets[0], DATASETS[args.datasets[0]], args)
    batch = dict(pairs.pad(pairs.rows("train", args.batch_size)))
    models = {kind: build(kind, pairs).train() for kind in KINDS}

    def step(model: Any, bf16: bool, seeds: Iterator[int]) -> None:
        torch.manual_seed(next(seeds))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(**batch, use_cache=False).loss.backward()
        model.zero_grad()

    formats = ("fp32", "bf16") if bf16_support() else ("fp32",)
    runs = {
        f"{kind} {name}": partial(step, model, name == "bf16", itertools.count())
        for kind, model in models.items()
        for name in formats
    }
    seconds = medians(interleave(runs, args.repeats, torch.device("cpu"), "train steps"))
    totals = {name: sum(seconds[f"{kind} {name}"] for kind in KINDS) for name in formats}
    best = min(totals, key=lambda name: totals[name])
    write_result(args.output_dir / "precision.json", {"step_s": seconds, "bf16": best == "bf16", **describe()})
    print("; ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), f"a step: {best} for both", sep=" ")


def screen(args: argparse.Namespace) -> None:
    """Make short runs of both kinds at each rate on one set of pairs, and write which rate served each best."""
    pairs = Pairs(args.datasets[0], DATASETS[args.datasets[0]], args)
    folder = args.output_dir / "screen"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        trainers = [make_trainer(f"{kind}-{rate:g}", kind, rate, pairs, args) for rate in RATES]
        train_interleaved(trainers, folder, args.slice)
        found = {f"{t.config.learning_rate:g}": t.progress.curve[-1][2] for t in trainers}
        best = min(trainers, key=lambda t: t.progress.curve[-1][2]).config.learning_rate
        settings = {"minutes": args.minutes, "dataset": args.datasets[0], "batch_size": args.batch_size}
        write_result(folder / f"{kind}.json", {"loss": found, "best": best, "settings": settings, **describe()})
        print(f"{TITLES[kind]}: {', '.join(f'{loss:.3f} at {rate}' for rate, loss in found.items())}")


@torch.no_grad()
def write_summaries(model: Any, pairs: Pairs, rows: list[dict[str, list[int]]], size: int) -> list[str]:
    """Write a summary of each row, the likeliest token at each step."""
    texts = []
    for batch in pairs.batches(rows, size):
        del batch["labels"]
        ids = model.generate(**batch, max_new_tokens=pairs.kind.target, do_sample=False)
        texts += pairs.encoder.decode(ids)
    return texts


def figures_of(trainer: SummaryTrainer, args: argparse.Namespace) -> dict[str, Any]:
    """Take the figures of a run that has finished, and measure its model on the test pairs."""
    model, pairs, progress = trainer.model.eval(), trainer.pairs, trainer.progress
    model.load_state_dict(trainer.carried["best"])
    rows = pairs.rows("test")
    ordered = pairs.batches(sorted(rows, key=lambda row: len(row["input_ids"])), 2 * args.batch_size)
    with torch.no_grad(), observed_units(model) as usage:
        loss = held_out_loss(model, ordered)
    with torch.no_grad():
        exchanged = held_out_loss(model, ordered, exchanged=True)
    sample = pairs.splits["test"][: args.summaries]
    texts = write_summaries(model, pairs, rows[: args.summaries], args.batch_size)
    return {
        "parameters": model.num_parameters(),
        "learning_rate": trainer.config.learning_rate,
        "steps": progress.steps,
        "epochs": progress.steps * args.batch_size / len(trainer.rows),
        "step_s": progress.seconds / progress.steps,
        "core_s": progress.seconds,
        "best_at": min(progress.curve, key=lambda point: point[2]),
        "bf16": trainer.config.bf16,
        "loss": loss,
        "loss_of_exchanged_documents": exchanged,
        **rouge_of(texts, sample["references"]),
        "summaries": len(texts),
        "distinct_summaries": len(set(texts)),
        "summary_words": statistics.mean(len(text.split()) for text in texts),
        "samples": [
            {"summary": text, "reference": own} for text, own in zip(texts[:3], sample["summary"][:3], strict=True)
        ],
        "unit_usage": {name: layer.figures() for name, layer in usage.items()},
        "curve": progress.curve,
        "unit_usage_curve": progress.parts,
    }


def train(args: argparse.Namespace) -> None:
    """Train kinds on sets of pairs, one after the other, and write the figures of each as soon as it has finished."""
    for name, kind in itertools.product(args.datasets, args.kinds):
        folder = args.output_dir / name
        path, pairs = folder / f"{kind}.json", Pairs(name, DATASETS[name], args)
        rate = args.learning_rate or read_or_stop(args.output_dir / "screen" / f"{kind}.json", "screen")["best"]
        settings = {key: getattr(args, key) for key in ("minutes", "batch_size", "vocab_size", "seed", "summaries")}
        settings |= {"learning_rate": rate, "source": pairs.kind.source, "target": pairs.kind.target}
        if path.exists():
            refuse_changes(path, json.loads(path.read_text())["settings"], settings)
            continue
        trainer = make_trainer(kind, kind, rate, pairs, args)
        train_interleaved([trainer], folder, args.slice, save_every=1)
        sample = pairs.splits["test"][: args.summaries]
        leads = {
            str(count): rouge_of([lead(text, count) for text in sample["document"]], sample["references"])
            for count in LEADS
        }
        found = {"dataset": name, "kind": kind, **figures_of(trainer, args), "leads": leads}
        write_result(path, {**found, "settings": settings, "config": trainer.model.config.to_diff_dict(), **describe()})
        print(f"{name}, {TITLES[kind]}: {found['loss']:.3f} nats a token, ROUGE-1 {found['rouge1']:.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run summarization_race",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "precision": "choose fp32 or bf16 by the time of a step",
        "screen": "find the learning rate of both models",
        "train": "train and measure",
        "report": "merge all that is there into one table",
    }
    made = {name: commands.add_parser(name, help=text) for name, text in helps.items()}
    for name in ("precision", "screen", "train"):
        made[name].add_argument("--data", type=Path, required=True, help="folder of parquet files")
        made[name].add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
        made[name].add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
        made[name].add_argument("--batch_size", type=int, default=16, help="pairs in a step (%(default)s)")
        made[name].add_argument("--vocab_size", type=int, default=4096, help="ids of a tokenizer (%(default)s)")
        made[name].add_argument("--repeats", type=int, default=8, help="timed steps (%(default)s)")
        made[name].add_argument("--seed", type=int, default=0)
        made[name].add_argument("--minutes", type=float, default=20.0 if name == "train" else 0.75, help="core time")
        made[name].add_argument("--evaluations", type=int, default=12 if name == "train" else 1, help="of a curve")
        made[name].add_argument("--eval_rows", type=int, default=128, help="validation pairs of the curve")
        made[name].add_argument("--slice", type=float, default=20.0, help="core seconds between saves (%(default)s)")
    made["train"].add_argument("--learning_rate", type=float, help="by default what `screen` found")
    made["train"].add_argument("--summaries", type=int, default=200, help="test pairs to summarise (%(default)s)")
    for command in made.values():
        command.add_argument("--output_dir", type=Path, default=Path("runs/summarization_race"))
    made["report"].add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    if args.command == "report":
        report(args.output_dir, list(DATASETS), args.result)
        return
    torch.set_num_threads(1)
    {"precision": precision, "screen": screen, "train": train}[args.command](args)


if __name__ == "__main__":
    main()
