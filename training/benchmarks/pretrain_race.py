"""
A race between pretraining methods: the same text, sizes, seeds and core time for all, on one core or one GPU.

    python training/benchmarks/pretrain_race.py run --corpus 'data/*.parquet'
    python training/benchmarks/pretrain_race.py run --corpus 'data/*.parquet' --contestants --long tupe_rtd tupe_mc
    python training/benchmarks/pretrain_race.py finetune --data_dir glue
    python training/benchmarks/pretrain_race.py report

The runners of a seed take turns in slices of a few seconds, so that whatever else the machine does hits all alike.
Killed at any moment, the same command goes on from the last save. Runs of one seed may be started one after the other,
or on a core each: the results of all are kept. `finetune` tries the encoders of one seed, and one that was never
trained, on GLUE tasks. `report` reads all there is, writes training/results/pretrain_race.json and draws the picture
beside it.
"""

import argparse
import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, Contestant
from environment import COMMIT, ROOT, describe, write_result
from objective_runner import ObjectiveRunner
from race_finetune import EPOCHS, UNTRAINED, finetune_encoders
from race_report import report
from race_track import Recipe, race, refuse_changes
from swap_probe import swap_probe
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_efficient.data.corpus import load_corpus, pack_blocks, split_documents
from hf_efficient.data.rare_words import RareWords, choose_band, count_words, describe_band
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.notes import NoteDictionary, RareWordCollator, attach


sys.path.insert(1, str(ROOT / "training"))
from pretrain_objectives import ALL_MASKED, add_extra_tokens
from train_tokenizer import train_tokenizer


HELD_OUT_SEED = 12345  # of masks that are the same for all


def prepare_tokenizer(documents, text_column: str, folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The race's own WordPiece vocabulary, trained once on the training documents."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(documents[text_column], vocab_size=vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def prepare_rare_words(documents, tokenizer, text_column: str, path: Path, band: tuple[int, int]) -> RareWords:
    """The words to keep notes on, counted once in the training documents."""
    if not path.exists():
        counts = count_words(documents, tokenizer, text_column)
        words = choose_band(counts, tokenizer, min_count=band[0], max_count=band[1])
        words.report.update(describe_band(counts, words))
        words.save(path)
    return RareWords.load(path, tokenizer)


def contestant_of(label: str) -> Contestant:
    """Of a run's name, which may say that it has another budget."""
    return CONTESTANTS[label.removesuffix("_half").removesuffix("_long")]


def make_runner(args, label: str, minutes: float, shared: dict, device: torch.device) -> ObjectiveRunner:
    """The runner of one contestant, with a start of its own that depends on the seed alone."""
    contestant = contestant_of(label)
    tokenizer = copy.deepcopy(shared["tokenizer"])
    add_extra_tokens(tokenizer, contestant.extra_tokens)
    torch.manual_seed(args.seed)
    objective: Any = contestant.make(tokenizer, args.layers, args.width, args.length)
    callbacks = objective.callbacks()
    masking: dict[str, Any] = ALL_MASKED if contestant.all_masked else {}
    collators: list[Any] = [MaskingCollator(tokenizer, seed=seed, **masking) for seed in (args.seed, HELD_OUT_SEED)]
    if contestant.notes is not None:
        keys = shared["rare_words"].keys
        callbacks.append(attach(objective, NoteDictionary(keys, args.width, contestant.notes)))
        collators = [RareWordCollator(collator, keys) for collator in collators]
    recipe = {"batch_size": args.batch_size, "learning_rate": args.learning_rate, **contestant.recipe}
    return ObjectiveRunner(
        label,
        objective,
        shared["rows"],
        (collators[0], collators[1]),
        callbacks,
        shared["probe"],
        Recipe(budget_s=60 * minutes, **recipe),
        args.seed,
        device,
        args.held_out_rows,
    )


def finish(args, runners: list[ObjectiveRunner], shared: dict, folder: Path) -> None:
    """Save every encoder, and write what the report needs, besides what other runs of this seed have written."""
    path = folder / "result.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    own = ("command", "contestants", "half", "long", "output_dir")
    settings = {name: value for name, value in vars(args).items() if name not in own}
    result = {**earlier, "seed": args.seed, "settings": settings, **describe(), "runs": earlier.get("runs", {})}
    for runner in runners:
        runner.product.save_pretrained(folder / runner.name)
        shared["tokenizer"].save_pretrained(folder / runner.name)
        progress = runner.progress
        _, accuracy, error = progress.probes[-1]
        result["runs"][runner.name] = {
            "swap_probe": {"accuracy": accuracy, "standard_error": error},  # the last of `probes`
            "budget_s": runner.recipe.budget_s,
            "learning_rate": runner.recipe.learning_rate,
            "steps": progress.steps,
            "tokens": progress.steps * args.batch_size * args.length,
            "curve": progress.curve,
            "parts": progress.parts,
            "probes": progress.probes,
            "choices": getattr(runner.model.config, "num_candidates", None),
            "commit": COMMIT,
        }
    if "rare_words" in shared:
        result["rare_words"] = shared["rare_words"].report
    write_result(path, result)


def same_settings(args, path: Path) -> None:
    """All runs of a seed have the same text and sizes, whenever they are started."""
    named = ("corpus", "layers", "width", "length", "vocab_size", "batch_size", "held_out_rows", "probe", "band")
    settings = {name: getattr(args, name) for name in named}
    settings["probe"], settings["band"] = list(args.probe), list(args.band)
    if path.exists():
        refuse_changes(path, json.loads(path.read_text()), settings)
    else:
        write_result(path, settings)


def run(args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home = Path(args.output_dir)
    folder = home / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    same_settings(args, folder / "settings.json")
    train_documents, held_out_documents = split_documents(load_corpus(args.corpus), holdout=0.02)
    tokenizer = prepare_tokenizer(train_documents, "text", home / "tokenizer", args.vocab_size)
    entries = [(name, args.minutes) for name in args.contestants]
    entries += [(f"{name}_half", args.minutes / 2) for name in args.half]
    entries += [(f"{name}_long", args.long_minutes) for name in args.long]
    with_notes = any(contestant_of(label).notes is not None for label, _ in entries)
    rows, held_out_rows = (
        pack_blocks(part, tokenizer, args.length, word_ids=with_notes).filter(
            lambda row: len(row["input_ids"]) == args.length
        )
        for part in (train_documents, held_out_documents)
    )
    print(f"{len(rows):,} rows of {args.length} tokens, {len(held_out_rows):,} held out")
    probe = functools.partial(
        swap_probe,
        tokenizer=tokenizer,
        documents=held_out_documents,
        text_column="text",
        train=args.probe[0],
        test=args.probe[1],
    )
    shared = {"tokenizer": tokenizer, "rows": (rows, held_out_rows), "probe": probe}
    if with_notes:
        shared["rare_words"] = prepare_rare_words(
            train_documents, tokenizer, "text", home / "rare_words.json", args.band
        )
    runners = [make_runner(args, label, minutes, shared, device) for label, minutes in entries]
    race(runners, folder, args.slice)
    finish(args, runners, shared, folder)
    print(json.dumps({r.name: r.progress.curve[-1] for r in runners}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the race of one seed")
    runs.add_argument("--corpus", required=True, help="text files (glob), a Hub data set, or 'builtin'")
    runs.add_argument("--contestants", nargs="*", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    runs.add_argument("--half", nargs="*", default=[], help="also run these with half the budget")
    runs.add_argument("--long", nargs="*", default=[], help="also run these with --long_minutes")
    runs.add_argument("--long_minutes", type=float, default=80.0, help="core time of those that need more")
    runs.add_argument("--minutes", type=float, default=20.0, help="core time of each contestant")
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--batch_size", type=int, default=16)
    runs.add_argument("--learning_rate", type=float, default=1e-3)
    runs.add_argument("--vocab_size", type=int, default=8192)
    runs.add_argument("--held_out_rows", type=int, default=320)
    runs.add_argument("--probe", type=int, nargs=2, default=(10_000, 4_000), help="windows to train and test on")
    runs.add_argument("--band", type=int, nargs=2, default=(200, 400), help="words to keep notes on occur so often")
    runs.add_argument("--slice", type=float, default=4.0, help="core seconds of a turn")
    tunes = commands.add_parser("finetune", help="fine-tune the encoders of one seed on GLUE tasks")
    tunes.add_argument("--data_dir", help="folder with a folder for each task; from the Hub without it")
    tunes.add_argument("--tasks", nargs="+", default=list(EPOCHS))
    tunes.add_argument("--encoders", nargs="+", default=[UNTRAINED, *CONTESTANTS])
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
