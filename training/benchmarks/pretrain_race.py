"""
A race between pretraining methods: the same text, sizes, seeds and core time for all, on one core or one GPU.

    python training/benchmarks/pretrain_race.py run --corpus 'data/*.parquet' --seed 0
    python training/benchmarks/pretrain_race.py run --corpus 'data/*.parquet' --seed 1
    python training/benchmarks/pretrain_race.py finetune --data_dir glue
    python training/benchmarks/pretrain_race.py report

The runners of a seed take turns in slices of a few seconds, so that whatever else the machine does hits all alike.
Killed at any moment, the same command goes on from the last save. `finetune` tries the encoders of one seed, and one
that was never trained, on GLUE tasks. `report` reads all there is, writes training/results/pretrain_race.json and draws
the picture beside it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from contestants import CONTESTANTS
from environment import ROOT, describe, write_result
from mlm_runner import MaskedLMRunner
from race_finetune import EPOCHS, UNTRAINED, finetune_encoders
from race_report import report
from race_track import Recipe, race
from swap_probe import swap_probe
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_efficient.data.corpus import load_corpus, pack_blocks, split_documents
from hf_efficient.objectives.masking import MaskingCollator


sys.path.insert(1, str(ROOT / "training"))
from train_tokenizer import train_tokenizer


def prepare_tokenizer(documents, text_column: str, folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The race's own WordPiece vocabulary, trained once on the training documents."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(documents[text_column], vocab_size=vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def held_out_batches(rows, tokenizer, count: int, batch_size: int, device: torch.device) -> list[dict]:
    """The first `count` held-out rows with masks that never change."""
    collator = MaskingCollator(tokenizer, seed=12345)
    batches = []
    for start in range(0, min(count, len(rows)), batch_size):
        batch = collator([rows[place] for place in range(start, min(start + batch_size, count, len(rows)))])
        batches.append({key: tensor.to(device) for key, tensor in batch.items() if key != "attention_mask"})
    return batches


def make_runners(args, tokenizer, rows, held_out, device: torch.device) -> list[MaskedLMRunner]:
    """One runner a contestant, and one of half the budget with its own decay for each of `--half`."""
    entries = [(name, name, args.minutes) for name in args.contestants]
    entries += [(f"{name}_half", name, args.minutes / 2) for name in args.half]
    runners = []
    for label, name, minutes in entries:
        torch.manual_seed(args.seed)
        objective = CONTESTANTS[name](tokenizer, args.layers, args.width, args.length)
        recipe = Recipe(budget_s=60 * minutes, batch_size=args.batch_size, learning_rate=args.learning_rate)
        collator = MaskingCollator(tokenizer, seed=args.seed)
        runners.append(MaskedLMRunner(label, objective, rows, collator, held_out, recipe, args.seed, device))
    return runners


def finish(args, runners: list[MaskedLMRunner], tokenizer, held_out_documents, text_column: str, folder: Path) -> None:
    """Save every encoder, probe it, and write what the report needs."""
    result = {"seed": args.seed, "settings": vars(args), **describe(), "runs": {}}
    for runner in runners:
        model = runner.model.model
        model.save_pretrained(folder / runner.name)
        tokenizer.save_pretrained(folder / runner.name)
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            untrained = CONTESTANTS[runner.name.removesuffix("_half")](tokenizer, args.layers, args.width, args.length)
        encoders = {runner.name: model.base_model}
        if not runner.name.endswith("_half"):
            encoders[f"{runner.name}_untrained"] = untrained.encoder.to(runner.device)
        for name, encoder in encoders.items():
            probe = swap_probe(encoder, tokenizer, held_out_documents, text_column, *args.probe)
            result["runs"].setdefault(name, {})["swap_probe"] = probe
        result["runs"][runner.name] |= {
            "budget_s": runner.recipe.budget_s,
            "steps": runner.progress.steps,
            "tokens": runner.progress.steps * args.batch_size * args.length,
            "curve": runner.progress.curve,
        }
    write_result(folder / "result.json", result)


def run(args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.output_dir) / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    documents = load_corpus(args.corpus)
    train_documents, held_out_documents = split_documents(documents, holdout=0.02)
    tokenizer = prepare_tokenizer(train_documents, "text", Path(args.output_dir) / "tokenizer", args.vocab_size)
    rows, held_out_rows = (
        pack_blocks(part, tokenizer, args.length).filter(lambda row: len(row["input_ids"]) == args.length)
        for part in (train_documents, held_out_documents)
    )
    held_out = held_out_batches(held_out_rows, tokenizer, args.held_out_rows, args.batch_size, device)
    print(f"{len(rows):,} rows of {args.length} tokens, {len(held_out_rows):,} held out")
    runners = make_runners(args, tokenizer, rows, held_out, device)
    race(runners, folder, args.slice)
    finish(args, runners, tokenizer, held_out_documents, "text", folder)
    print(json.dumps({r.name: r.progress.curve[-1] for r in runners}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the race of one seed")
    runs.add_argument("--corpus", required=True, help="text files (glob), a Hub data set, or 'builtin'")
    runs.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    runs.add_argument("--half", nargs="*", default=["tupe_r"], help="also run these with half the budget")
    runs.add_argument("--minutes", type=float, default=15.0, help="core time of each contestant")
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--batch_size", type=int, default=16)
    runs.add_argument("--learning_rate", type=float, default=1e-3)
    runs.add_argument("--vocab_size", type=int, default=8192)
    runs.add_argument("--held_out_rows", type=int, default=320)
    runs.add_argument("--probe", type=int, nargs=2, default=(10_000, 4_000), help="windows to train and test on")
    runs.add_argument("--slice", type=float, default=4.0, help="core seconds of a turn")
    tunes = commands.add_parser("finetune", help="fine-tune the encoders of one seed on GLUE tasks")
    tunes.add_argument("--data_dir", help="folder with a folder for each task; from the Hub without it")
    tunes.add_argument("--tasks", nargs="+", default=list(EPOCHS))
    tunes.add_argument("--encoders", nargs="+", default=[UNTRAINED, "bert", "tupe_r"])
    tunes.add_argument("--seed", type=int, default=0, help="seed of the race whose encoders are taken")
    tunes.add_argument("--seeds", type=int, default=3, help="fine-tuning runs of each encoder and task")
    tunes.add_argument("--learning_rate", type=float, default=3e-4)
    for command in (runs, tunes):
        command.add_argument("--layers", type=int, default=4)
        command.add_argument("--width", type=int, default=256, help="a multiple of 64, the width of a head")
        command.add_argument("--length", type=int, default=128, help="tokens in a row, [CLS] included")
    reports = commands.add_parser("report", help="merge the seeds into one table and one picture")
    for command in (runs, tunes, reports):
        command.add_argument("--output_dir", default="runs/pretrain_race")
    reports.add_argument("--result", type=Path, help="JSON to write; by default one in training/results")
    args = parser.parse_args()
    if args.command == "report":
        report(Path(args.output_dir), args.result)
    else:
        torch.set_num_threads(1)
        run(args) if args.command == "run" else finetune_encoders(args)


if __name__ == "__main__":
    main()
