"""
A race between byte-level language models of equal size: SRU++ against transformers' GPT-2, the same bytes, seeds and
core time, on one core or one GPU.

    python training/benchmarks/lm_race.py screen --text enwiki.xml.xz
    python training/benchmarks/lm_race.py run --text enwiki.xml.xz --seed 0
    python training/benchmarks/lm_race.py run --text enwiki.xml.xz --seed 1
    python training/benchmarks/lm_race.py run --text enwiki.xml.xz --seed 0 --minutes 40 --output_dir runs/lm_race/long
    python training/benchmarks/lm_race.py report

`screen` gives each model short runs at three learning rates and in both orders of the data (contiguous columns, random
segments); `run` takes each model's best. Runners take turns in slices of a few seconds of core time, schedules run by
time. `run` also gives SRU++ a quarter of the time with a schedule of its own. Killed, the same command goes on from the
last save. `report` writes training/results/lm_race.json and the picture beside it.
"""

import argparse
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import describe, write_result
from lm_race_report import report
from lm_runner import LanguageModelRunner, bits, evaluation_batches
from race_track import Recipe, race
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.data.byte_tokenizer import byte_tokenizer


VALIDATION, TEST = 300_000, 300_000  # the last bytes, as the data's description suggests


def build_srupp(length: int, **overrides) -> nn.Module:
    """2.6 M parameters: 8 layers, 512 wide, d' 128, attention in all layers."""
    sizes = {"hidden_size": 512, "projection_size": 128, "num_hidden_layers": 8}
    return SruppForCausalLM(SruppConfig(**{"vocab_size": 256, **sizes, **overrides}))


def build_srupp_last(length: int) -> nn.Module:
    return build_srupp(length, attention_layers=[-1])


def build_gpt2(length: int) -> nn.Module:
    """2.7 M parameters: 6 layers, 192 wide, tied embeddings."""
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=256, n_embd=192, n_layer=6, n_head=6, n_positions=length, **no_dropout)
    return GPT2LMHeadModel(config)


MODELS = {"srupp": build_srupp, "srupp_last": build_srupp_last, "gpt2": build_gpt2}
RATES = {"srupp": (2e-3, 5e-3, 1e-2), "gpt2": (1e-3, 2e-3, 4e-3)}


class Entry(NamedTuple):
    """What races under a name: a model, its learning rate, the order of its data, its time, the points of its curve."""

    name: str
    model: str
    learning_rate: float
    order: str
    minutes: float
    evaluations: int


def screen_entries(rates: Mapping[str, Sequence[float]], minutes: float) -> list[Entry]:
    """Every model at each of its rates and in both orders of the data."""
    return [
        Entry(f"{model}-{rate:g}-{order}", model, rate, order, minutes, evaluations=1)
        for model, tried in rates.items()
        for rate in tried
        for order in ("columns", "random")
    ]


def best_of(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each model the short run that ended lowest."""
    best: dict[str, dict[str, Any]] = {}
    for outcome in sorted(found, key=lambda outcome: outcome["bits_per_byte"]):
        best.setdefault(outcome["model"], outcome)
    return best


def read_bytes(path: Path) -> np.ndarray:
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return np.frombuffer(data, dtype=np.uint8)


def split(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes; the test bytes at the end are left alone."""
    edge = len(data) - TEST - VALIDATION
    return data[:edge], data[edge : edge + VALIDATION]


def make_runner(entry: Entry, build: Callable[[int], nn.Module], args: argparse.Namespace) -> LanguageModelRunner:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    train, validation = split(read_bytes(args.text))
    recipe = Recipe(
        budget_s=60 * entry.minutes,
        batch_size=args.batch_size,
        learning_rate=entry.learning_rate,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        evaluations=entry.evaluations,
        schedule="cosine",
        final_share=0.02,
        decay_matrices_only=True,
        bf16=args.bf16,
    )
    held_out = validation[: args.held_out_bytes + 1]
    network = build(args.length)
    return LanguageModelRunner(
        entry.name, network, entry.order, train, held_out, args.length, recipe, args.seed, device
    )


def screen_outcome(entry: Entry, runner: LanguageModelRunner) -> dict[str, Any]:
    return {
        "model": entry.model,
        "learning_rate": entry.learning_rate,
        "order": entry.order,
        "bits_per_byte": bits(runner.progress.curve[-1][2]),
    }


def figures_of(runner: LanguageModelRunner, args: argparse.Namespace) -> dict[str, Any]:
    """What a report needs of a runner that has finished; scores it on all validation bytes."""
    _, validation = split(read_bytes(args.text))
    batches = evaluation_batches(validation, args.length, 16, runner.has_memory)
    runner.model.eval()
    with torch.no_grad():
        final = runner.score(batches)
    progress = runner.progress
    tokens = progress.steps * args.batch_size * args.length
    named = runner.model.named_parameters()
    return {
        "budget_s": runner.recipe.budget_s,
        "learning_rate": runner.recipe.learning_rate,
        "parameters": runner.model.num_parameters(),
        "steps": progress.steps,
        "tokens": tokens,
        "step_s": progress.seconds / progress.steps,
        "tokens_per_s": tokens / progress.seconds,
        "curve": [(seconds, steps, bits(nats)) for seconds, steps, nats in progress.curve],
        "bits_per_byte_of_all_validation": bits(final),
        "alpha": {name: parameter.item() for name, parameter in named if name.endswith(".alpha")},
    }


def screen(args: argparse.Namespace) -> None:
    """Short runs of every model, rate and order; writes which served each model best."""
    folder = args.output_dir / "screen"
    folder.mkdir(parents=True, exist_ok=True)
    entries = screen_entries(RATES, args.minutes)
    runners = [make_runner(entry, MODELS[entry.model], args) for entry in entries]
    race(runners, folder, args.slice)
    found = [screen_outcome(entry, runner) for entry, runner in zip(entries, runners, strict=True)]
    result = {"minutes": args.minutes, "runs": found, "best": best_of(found), **describe()}
    write_result(folder / "result.json", result)
    print(json.dumps(found, indent=1))


def run(args: argparse.Namespace) -> None:
    screened = args.screen_dir / "screen" / "result.json"
    if not screened.exists():
        raise SystemExit(f"{screened} is missing: run `lm_race.py screen` first.")
    best = json.loads(screened.read_text())["best"]
    folder = args.output_dir / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    times = [("srupp", "srupp", args.minutes), ("gpt2", "gpt2", args.minutes)]
    times += [(f"srupp_{share:g}", "srupp", share * args.minutes) for share in args.shares]
    runners = []
    for name, model, minutes in times:
        entry = Entry(name, model, best[model]["learning_rate"], best[model]["order"], minutes, args.evaluations)
        runners.append(make_runner(entry, MODELS[model], args))
    race(runners, folder, args.slice)
    finish(args, runners, folder)


def finish(args: argparse.Namespace, runners: list[LanguageModelRunner], folder: Path) -> None:
    """Save every model with its tokenizer, and write what the report needs."""
    settings = {**vars(args), "text": args.text.name, "output_dir": str(args.output_dir)}
    settings.pop("screen_dir")
    result: dict[str, Any] = {"seed": args.seed, "settings": settings, **describe(), "runs": {}}
    for runner in runners:
        result["runs"][runner.name] = figures_of(runner, args)
        runner.model.save_pretrained(folder / runner.name)
        byte_tokenizer().save_pretrained(folder / runner.name)
    write_result(folder / "result.json", result)
    print(json.dumps({name: entry["curve"][-1] for name, entry in result["runs"].items()}, indent=1))


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """What every command that trains can be told; `defaults` replace those of the small race."""
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
    parser.add_argument(
        "--held_out_bytes", type=int, default=32_768, help="validation bytes of the curve (%(default)s)"
    )
    parser.add_argument("--slice", type=float, default=4.0, help="core seconds of a turn (%(default)s)")
    parser.set_defaults(**defaults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    screens = commands.add_parser("screen", help="find each model's learning rate and order of the data")
    runs = commands.add_parser("run", help="run the race of one seed")
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
    args = parser.parse_args()
    if args.command == "report":
        report(args.output_dir, args.result)
        return
    torch.set_num_threads(1)
    {"screen": screen, "run": run}[args.command](args)


if __name__ == "__main__":
    main()
