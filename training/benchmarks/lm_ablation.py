"""
Attention in all, one, none and two of the ten layers of SRU++, and a GPT-2: byte-level language models of 42 M
parameters, the size of the SRU++ paper's ablation, for equal time on one GPU.

    python -m training.benchmarks.lm_ablation run --text enwiki.xml.xz
    python -m training.benchmarks.lm_ablation report

    python -m training.benchmarks.lm_ablation run --text enwiki.xml.xz --size tiny --minutes 0.1 --screen_minutes 0.01

`run` first screens: short runs of SRU++ and of GPT-2 at three learning rates, in both orders of the data. Then one
model after the other is trained, the most telling first: SRU++ with attention everywhere, GPT-2, then one attention
layer (the last), none, and two. Widths grow where attention is left out, so that all have as many parameters, as in the
paper. Schedules run by time: wall time between synchronisations of the GPU, evaluations and saves left out. With the
defaults that is 22.4 minutes in all.

Killed, the same command goes on from the last save. What has finished stands in one small file, `results.json` in
`--output_dir`, which is all that `report` needs: carried to another machine, `run` goes on there with what is missing.
The state of what has not finished is half a gigabyte. Without a GPU only `--size tiny` runs, which shows the whole path
in a minute and measures nothing.

`report` writes the table and the picture of what has finished, the paper's figures beside it: into training/results if
it was the real size on a GPU, else into `--output_dir`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.ops.backend import last_backend
from hf_efficient.ops.sru import OP_NAME

from .environment import describe, write_result
from .equal_time import train_interleaved
from .lm_comparison import (
    LanguageModelRun,
    TimedLanguageModelTrainer,
    add_training_arguments,
    best_of,
    figures_of,
    make_trainer,
    read_bytes,
    screening_outcome,
    screening_runs,
    split,
)
from .lm_report import report_ablation


@dataclass(frozen=True)
class Size:
    """Size of all models. `widths` maps the number of attending layers to the hidden size, in order of priority;
    d' is a quarter of it."""

    layers: int
    widths: dict[int, int]
    gpt2: dict[str, Any]


# Widths are the multiples of 32 that come closest to the parameters of the published model, which is the first.
SIZES = {
    "42m": Size(10, {10: 1920, 1: 2016, 0: 2048, 2: 2016}, {"n_embd": 592, "n_layer": 10, "n_head": 8}),
    "tiny": Size(4, {4: 32, 1: 32, 0: 32, 2: 32}, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
}
# Learning rates of `lm_comparison`, times its width over this one.
RATES = {"attention": (5e-4, 1.2e-3, 2.5e-3), "gpt2": (3e-4, 6e-4, 1.2e-3)}


def build_model(size: Size, model: str, length: int) -> nn.Module:
    """Build GPT-2, or SRU++ whose attending layers `attention_N` counts; dropout is the published 0.1 in both, since
    minutes on a GPU read a text of a few megabytes many times."""
    if model == "gpt2":
        fixed: dict[str, Any] = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
        return GPT2LMHeadModel(GPT2Config(n_positions=length, **fixed, **size.gpt2))
    attending = int(model.removeprefix("attention_"))
    width = size.widths[attending]
    # As in the paper every n-th layer attends, and so the last one in any case.
    places: dict[str, Any] = (
        {"attention_every_n_layers": size.layers // attending} if attending else {"attention_layers": []}
    )
    shape = {"hidden_size": width, "projection_size": width // 4, "num_hidden_layers": size.layers}
    return SruppForCausalLM(SruppConfig.preset("enwik8-42m", vocab_size=256, **shape, **places))


class Results:
    """
    Figures of the runs that have finished, in one small file that is written anew after each run.

    Args:
        folder (`Path`): where it stands, beside the states of what has not finished.
        settings (`dict`): arguments of this ablation.

    Raises:
        SystemExit: if the folder holds an ablation with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {"settings": settings, "screen": {}, "runs": {}}
        if not self.path.exists():
            return
        self.content = json.loads(self.path.read_text())
        found = self.content["settings"]
        changed = [name for name in settings if found.get(name) != settings[name]]
        if changed:
            told = ", ".join(f"{name} {found.get(name)} (now {settings[name]})" for name in changed)
            raise SystemExit(f"{self.path} was made with {told}: go on with its settings, or name another folder.")

    def add(self, section: str, name: str, figures: dict[str, Any]) -> None:
        self.content[section][name] = figures
        write_result(self.path, self.content)
        # Half a gigabyte that nothing needs any more.
        (self.path.parent / f"{name}.pt").unlink(missing_ok=True)


def warm_up(trainer: TimedLanguageModelTrainer) -> None:
    """Take a step that is thrown away: the first of a process loads the GPU's libraries and compiles kernels, on no
    model's account."""
    with trainer.autocast():
        loss = trainer.loss(next(trainer.batches()))
    loss.backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.carried = {}


def train(
    run: LanguageModelRun, build: Callable[[int], nn.Module], args: argparse.Namespace
) -> TimedLanguageModelTrainer:
    """Train a model to the end, from its last save on if there is one."""
    trainer = make_trainer(run, build, args)
    warm_up(trainer)
    train_interleaved([trainer], args.output_dir, args.slice, args.save_every)
    return trainer


def screen(args: argparse.Namespace, size: Size, results: Results) -> dict[str, dict[str, Any]]:
    """Find the best learning rate and order of SRU++ and of GPT-2 by short runs."""
    full = f"attention_{size.layers}"
    for one in screening_runs({full: RATES["attention"], "gpt2": RATES["gpt2"]}, args.screen_minutes):
        if one.name in results.content["screen"]:
            continue
        try:
            trainer = train(one, partial(build_model, size, one.model), args)
            outcome = screening_outcome(one, trainer)
        except RuntimeError as error:
            if "the loss is" not in str(error):
                raise
            print(f"{error} It is out.")
            outcome = {**one._asdict(), "bits_per_byte": None}
        results.add("screen", one.name, outcome)
    best = best_of([found for found in results.content["screen"].values() if found["bits_per_byte"] is not None])
    lost = {full, "gpt2"} - set(best)
    if lost:
        raise SystemExit(f"{' and '.join(sorted(lost))} learned at none of the learning rates tried.")
    return best


def run(args: argparse.Namespace) -> None:
    """Find the learning rates, then train one model after the other."""
    size = SIZES[args.size]
    if args.size != "tiny" and not torch.cuda.is_available():
        raise SystemExit(f"--size {args.size} wants a GPU and there is none; --size tiny shows the path without one.")
    data = read_bytes(args.text)
    placed = {"command", "text", "output_dir", "slice", "save_every"}
    chosen = {name: value for name, value in vars(args).items() if name not in placed}
    settings = {**chosen, "text": args.text.name, "bytes": len(data), "layers": size.layers}
    results = Results(args.output_dir, settings)
    best = screen(args, size, results)
    full, *others = (f"attention_{attending}" for attending in size.widths)
    for model in (full, "gpt2", *others):
        if model in results.content["runs"]:
            continue
        chosen_for = best.get(model, best[full])
        rate, order = chosen_for["learning_rate"], chosen_for["order"]
        one = LanguageModelRun(model, model, rate, order, args.minutes, args.evaluations)
        figures = figures_of(train(one, partial(build_model, size, model), args), args)
        figures |= {"order": order, "passes": figures["tokens"] / len(split(data)[0]), **describe()}
        if model != "gpt2":
            figures["recurrence"] = last_backend(OP_NAME)
        results.add("runs", model, figures)
        print(f"{model}: {figures['bits_per_byte_of_all_validation']:.3f} bits per byte of all validation")
    print("All have finished; `report` makes the table.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.lm_ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="screen, then train one model after the other; goes on where it was killed")
    reports = commands.add_parser("report", help="one table and one picture of all that has finished")
    # The paper's batch and segments: 24 x 512.
    add_training_arguments(runs, length=512, batch_size=24, bf16=True, slice=10.0)
    runs.add_argument("--size", choices=SIZES, default="42m", help="of the models (%(default)s); tiny is for a trial")
    runs.add_argument("--minutes", type=float, default=4.0, help="of each model (%(default)s)")
    runs.add_argument("--screen_minutes", type=float, default=0.2, help="of each of 12 short runs (%(default)s)")
    runs.add_argument("--evaluations", type=int, default=20, help="points of a curve (%(default)s)")
    runs.add_argument("--save_every", type=int, default=2, help="slices between saves (%(default)s)")
    for command in (runs, reports):
        command.add_argument("--output_dir", type=Path, default=Path("runs/lm_race_gpu"), help="(%(default)s)")
    reports.add_argument(
        "--result", type=Path, help="JSON to write in place of the default; the picture goes beside it"
    )
    args = parser.parse_args(argv)
    if args.command == "report":
        report_ablation(args.output_dir / "results.json", args.result)
        return
    torch.set_num_threads(1)
    run(args)


if __name__ == "__main__":
    main()
