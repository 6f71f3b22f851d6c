"""
Cost of the pretraining objectives: time of a train step and peak memory, against masked LM with the same encoder.

    python -m training.benchmarks.objective_speed
    python -m training.benchmarks.objective_speed --sizes 4x256 --encoder bert --repeats 30 --result speed.json

One thread, the objectives in turn in one process; medians of core time. Where its tensors come to lie makes an
objective some percent faster or slower in one process, so there are several, one after the other, and the median of
their ratios counts. As in the training scripts, malloc keeps what is freed; if it does not, steps of 12 x 768 take a
tenth longer, those of replaced tokens a quarter, by luck. A train step is forward, backward, clipping and
AdamW on rows of 128 tokens, 15 % of them targets, without dropout, in bf16 where the machine is fast at it. The batch
is at hand; its masking is not measured, since it is the same for all. Of the notes, 2 words in a row have one.

Peak memory is that of a fresh process for each objective, at a vocabulary of 32,768.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, attach
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.utils.labels import IGNORE_INDEX
from hf_efficient.utils.process import bf16_support, disable_malloc_trim

from .encoder_speed import TOKENS_PER_STEP
from .environment import RESULTS, describe, write_result
from .pretraining_methods import NO_DROPOUT, bert, tupe
from .timing import in_fresh_processes, interleave, medians, peak_growth


MASKED_LM = "masked_lm"
LENGTH = 128
VOCABULARY, MEMORY_VOCABULARY = 8_192, 32_768
NOTE_KEYS, NOTES_PER_ROW = 1_000, 2
ENCODERS: dict[str, Callable[..., PreTrainedModel]] = {"tupe": tupe, "bert": bert}
# Over masked LM, by size.
GOALS = {
    "masked_lm + notes": {"4x256": 1.05, "12x768": 1.05},
    "replaced_token": {"4x256": 1.35, "12x768": 1.25},
    "meta_controller": {"4x256": 1.5, "12x768": 1.3},
}
MEMORY_GOALS = {"meta_controller": 1.3}


class Vocabulary:
    """Stand-in for a tokenizer; the last id is the meta-controller's reject option."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = 0, 1, 2, 3

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def build(name: str, encoder: str, layers: int, width: int, vocab_size: int) -> Any:
    """Build an objective by its name in `GOALS`, with notes if the name says so."""
    vocabulary: Any = Vocabulary(vocab_size)
    model: Any = ENCODERS[encoder](vocabulary, layers, width, LENGTH, **NO_DROPOUT)
    kind = name.removesuffix(" + notes")
    objective: Any
    if kind == MASKED_LM:
        objective = MaskedLMObjective(model=model)
    elif kind == "replaced_token":
        objective = ReplacedTokenObjective(encoder=model.base_model)
    elif kind == "meta_controller":
        objective = MetaControllerObjective(encoder=model.base_model, nota_token_id=vocab_size - 1)
    else:
        raise ValueError(f"There is no objective {kind!r}; there are {MASKED_LM}, {', '.join(GOALS)}.")
    if kind != name:
        attach(objective, NoteDictionary([(key, key + 1) for key in range(10, 10 + NOTE_KEYS)], width))
    return objective


def tokens_of(width: int, device: torch.device) -> int:
    """Count the tokens of a step."""
    return TOKENS_PER_STEP.get(width, 1024) * (32 if device.type == "cuda" else 1)


def batch_of(width: int, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Draw random ids, 15 % of them masked, no padding, and two words of two tokens with notes in each row."""
    rows = tokens_of(width, device) // LENGTH
    original = torch.randint(10, vocab_size - 1, (rows, LENGTH))
    original[:, 0] = Vocabulary.cls_token_id
    target = torch.rand(rows, LENGTH) < 0.15
    target[:, 0] = False
    starts = torch.tensor([LENGTH // 4, LENGTH // 2]).expand(rows, -1)
    keys = torch.randint(NOTE_KEYS, starts.shape)
    batch = {
        "input_ids": original.masked_fill(target, Vocabulary.mask_token_id),
        "attention_mask": torch.ones_like(original),
        "labels": original.masked_fill(~target, IGNORE_INDEX),
        "sample_seeds": torch.arange(rows),
        "note_spans": torch.stack([starts, starts + 2, keys], dim=-1),
    }
    return {name: value.to(device) for name, value in batch.items()}


class BenchmarkCase:
    """One objective with all that a measurement of it needs."""

    def __init__(self, name: str, encoder: str, layers: int, width: int, vocab_size: int, device: torch.device):
        torch.manual_seed(0)
        self.objective = build(name, encoder, layers, width, vocab_size).to(device).train()
        self.notes: NoteDictionary | None = getattr(self.objective, "notes", None)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4, fused=True)
        wanted = ["input_ids", "attention_mask", "labels"]
        wanted += ["sample_seeds"] if not name.startswith(MASKED_LM) else []
        wanted += ["note_spans"] if self.notes is not None else []
        batch = batch_of(width, vocab_size, device)
        self.batch = {key: batch[key] for key in wanted}

    def train(self) -> None:
        kind = self.batch["input_ids"].device.type
        with torch.autocast(kind, torch.bfloat16, enabled=bf16_support() is not None):
            loss = self.objective(**self.batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.notes is not None:
            self.notes.apply_updates()


def _train_twice(case: BenchmarkCase) -> None:
    for _ in range(2):
        case.train()


def peak_of_process(name: str, encoder: str, layers: int, width: int) -> int:
    """Measure the peak of this process, which should be a fresh one: objective, optimiser and two train steps."""
    torch.set_num_threads(1)
    disable_malloc_trim()
    device = torch.device("cpu")
    return peak_growth(lambda: _train_twice(BenchmarkCase(name, encoder, layers, width, MEMORY_VOCABULARY, device)))


def peak_memory(name: str, encoder: str, layers: int, width: int, device: torch.device, repeats: int = 3) -> int:
    """Measure the bytes that two train steps take at their peak, model and optimiser included; on a CPU the median of
    `repeats` fresh processes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train_twice(BenchmarkCase(name, encoder, layers, width, MEMORY_VOCABULARY, device))
        return torch.cuda.max_memory_allocated() - before
    return statistics.median_low(in_fresh_processes(peak_of_process, (name, encoder, layers, width), repeats))


def measure_process(encoder: str, size: str, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Measure the core seconds of each repetition in this process, by objective."""
    torch.set_num_threads(1)
    disable_malloc_trim()
    layers, width = map(int, size.split("x"))
    names = [MASKED_LM, *GOALS]
    cases = {name: BenchmarkCase(name, encoder, layers, width, VOCABULARY, device) for name in names}
    return interleave({name: cases[name].train for name in names}, repeats, device, f"{encoder}, {size}")


def measure(encoder: str, size: str, repeats: int, processes: int, device: torch.device) -> dict[str, Any]:
    """Measure the core seconds of each repetition in each process, and peak memory, by objective."""
    layers, width = map(int, size.split("x"))
    seconds = in_fresh_processes(measure_process, (encoder, size, repeats, device), processes)
    peaks = {name: peak_memory(name, encoder, layers, width, device) for name in (MASKED_LM, *MEMORY_GOALS)}
    return {
        "encoder": encoder,
        "size": size,
        "tokens": tokens_of(width, device),
        "seconds": seconds,
        "peak_bytes": peaks,
    }


def rows_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the summary rows of one size."""
    steps, peaks, size = [medians(process) for process in entry["seconds"]], entry["peak_bytes"], entry["size"]
    where = f"{entry['encoder']}, {size}"
    measured = []
    for name in [name for name in steps[0] if name != MASKED_LM]:
        ratios = [step[name] / step[MASKED_LM] for step in steps]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} processes"
        seconds = f"times ({statistics.median(step[name] for step in steps):.3f} s; {spread})"
        measured.append(("train step", name, statistics.median(ratios), seconds, GOALS[name].get(size)))
    measured += [
        ("peak memory", name, peaks[name] / peaks[MASKED_LM], f"times ({peaks[name] / 2**20:.0f} MiB)", goal)
        for name, goal in MEMORY_GOALS.items()
    ]
    return [
        {
            "name": f"{what}, {name} / {MASKED_LM}, {where}",
            "value": round(ratio, 4),
            "unit": unit,
            "goal": f"at most {goal:.2f}" if goal is not None else "",
        }
        for what, name, ratio, unit, goal in measured
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.objective_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", default=["4x256", "12x768"], help="layers x width")
    parser.add_argument("--encoder", choices=ENCODERS, default="tupe")
    parser.add_argument("--repeats", type=int, default=6, help="timed steps of each objective in each process")
    parser.add_argument("--processes", type=int, default=5, help="processes, one after the other")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "objective_speed_gpu.json" if device.type == "cuda" else "objective_speed.json"
    parser.add_argument("--result", type=Path, default=RESULTS / default)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    environment = describe()
    machine = environment["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread"
    headline = (
        f"Train steps at vocabulary {VOCABULARY:,}, rows of {LENGTH} tokens; peak memory at vocabulary "
        f"{MEMORY_VOCABULARY:,}. Ratios are to masked LM with the same encoder, in turn in one process, medians over "
        f"{args.processes} processes. Machine: {where}; torch {environment['versions']['torch']}."
    )
    entries: list[dict[str, Any]] = []
    started = time.perf_counter()
    for size in args.sizes:
        entries.append(measure(args.encoder, size, args.repeats, args.processes, device))
        for row in rows_of(entries[-1]):
            print(f"{row['name']}: {row['value']} {row['unit']}, {row['goal']}", flush=True)
        # After every size, so that an interrupted run leaves what it has.
        summary = [row for entry in entries for row in rows_of(entry)]
        measured = {"wall_seconds": time.perf_counter() - started, "entries": entries}
        write_result(args.result, {"headline": headline, "summary": summary, **environment, **measured})


if __name__ == "__main__":
    main()
