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
from pathlib import Path
from typing import Any

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
BATCH = 4


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
SCREENED = [(model, rate, order) for model in RATES for rate in RATES[model] for order in ("columns", "random")]


def read_bytes(path: Path) -> np.ndarray:
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return np.frombuffer(data, dtype=np.uint8)


def split(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes; the test bytes at the end are left alone."""
    edge = len(data) - TEST - VALIDATION
    return data[:edge], data[edge : edge + VALIDATION]


def make_runner(name: str, model: str, rate: float, order: str, minutes: float, args) -> LanguageModelRunner:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    train, validation = split(read_bytes(args.text))
    recipe = Recipe(
        budget_s=60 * minutes,
        batch_size=BATCH,
        learning_rate=rate,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        evaluations=args.evaluations,
        schedule="cosine",
        final_share=0.02,
        decay_matrices_only=True,
        bf16=False,
    )
    held_out = validation[: args.held_out_bytes + 1]
    network = MODELS[model](args.length)
    return LanguageModelRunner(name, network, order, train, held_out, args.length, recipe, args.seed, device)


def screen(args) -> None:
    """Short runs of every model, rate and order; writes which served each model best."""
    folder = args.output_dir / "screen"
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{model}-{rate:g}-{order}": (model, rate, order) for model, rate, order in SCREENED}
    runners = [make_runner(name, *choice, args.minutes, args) for name, choice in names.items()]
    race(runners, folder, args.slice)
    found: list[dict[str, Any]] = [
        {"model": model, "learning_rate": rate, "order": order, "bits_per_byte": bits(runner.progress.curve[-1][2])}
        for (model, rate, order), runner in zip(names.values(), runners, strict=True)
    ]
    best = {name: min((e for e in found if e["model"] == name), key=lambda e: e["bits_per_byte"]) for name in RATES}
    write_result(folder / "result.json", {"minutes": args.minutes, "runs": found, "best": best, **describe()})
    print(json.dumps(found, indent=1))


def run(args) -> None:
    screened = args.screen_dir / "screen" / "result.json"
    if not screened.exists():
        raise SystemExit(f"{screened} is missing: run `lm_race.py screen` first.")
    best = json.loads(screened.read_text())["best"]
    folder = args.output_dir / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [("srupp", "srupp", args.minutes), ("gpt2", "gpt2", args.minutes)]
    entries += [(f"srupp_{share:g}", "srupp", share * args.minutes) for share in args.shares]
    runners = [
        make_runner(name, model, best[model]["learning_rate"], best[model]["order"], minutes, args)
        for name, model, minutes in entries
    ]
    race(runners, folder, args.slice)
    finish(args, runners, folder)


def finish(args, runners: list[LanguageModelRunner], folder: Path) -> None:
    """Score all validation bytes, save every model with its tokenizer, and write what the report needs."""
    _, validation = split(read_bytes(args.text))
    settings = {**vars(args), "text": args.text.name, "output_dir": str(args.output_dir), "batch_size": BATCH}
    settings.pop("screen_dir")
    result: dict[str, Any] = {"seed": args.seed, "settings": settings, **describe(), "runs": {}}
    for runner in runners:
        batches = evaluation_batches(validation, args.length, 16, runner.has_memory)
        runner.model.eval()
        with torch.no_grad():
            final = runner.score(batches)
        runner.model.save_pretrained(folder / runner.name)
        byte_tokenizer().save_pretrained(folder / runner.name)
        alphas = {
            name: parameter.item() for name, parameter in runner.model.named_parameters() if name.endswith(".alpha")
        }
        result["runs"][runner.name] = {
            "budget_s": runner.recipe.budget_s,
            "learning_rate": runner.recipe.learning_rate,
            "parameters": runner.model.num_parameters(),
            "steps": runner.progress.steps,
            "tokens": runner.progress.steps * BATCH * args.length,
            "curve": [(seconds, steps, bits(nats)) for seconds, steps, nats in runner.progress.curve],
            "bits_per_byte_of_all_validation": bits(final),
            "alpha": alphas,
        }
    write_result(folder / "result.json", result)
    print(json.dumps({name: entry["curve"][-1] for name, entry in result["runs"].items()}, indent=1))


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
        command.add_argument("--text", type=Path, required=True, help="the bytes: a file, or an .xz of one")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--length", type=int, default=128, help="bytes in a segment")
        command.add_argument("--held_out_bytes", type=int, default=32_768, help="validation bytes of the curve")
        command.add_argument("--slice", type=float, default=4.0, help="core seconds of a turn")
    screens.add_argument("--evaluations", type=int, default=1, help="points of a curve")
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
