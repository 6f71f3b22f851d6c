"""
TUPE-R against transformers' BERT of the same sizes: time of a train step and of inference, and peak memory.

    python -m training.benchmarks.encoder_speed
    python -m training.benchmarks.encoder_speed --sizes 4x256 --lengths 128 --repeats 30 --result speed.json

One process, one thread, the models in turn, in an order that is drawn anew each time; medians of core time. A train
step is forward, backward and AdamW with dropout 0.1, through the masked-LM objective that pretraining uses for both.
BERT is measured with its default attention (sdpa) and with its explicit one; TUPE is compared to the better of them.

TUPE-R chooses its form of attention itself. The forms that it chooses from are measured besides, each by itself:
`eager`; `sdpa`, where with padding the bias and the mask become one tensor; on a CPU `rows`, where padded rows attend
to their real keys one by one, here at any length; on a GPU `flex`.

Peak memory comes from a fresh process for each model. On a GPU the models run in bf16, compiled, and the table adds
tokens/s and the share of the measured matrix-product rate.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from hf_efficient.models.tupe import modeling_tupe
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.utils.labels import IGNORE_INDEX

from .environment import RESULTS, describe, write_result
from .pretraining_methods import bert, sizes, tupe
from .timing import core_time, in_fresh_processes, medians, peak_growth


TOKENS_PER_STEP = {256: 2048, 512: 2048, 768: 1024, 1024: 1024}
MODELS = ("bert", "bert_eager", "tupe_r")
# TUPE's forms of attention, by the type of the device.
FORMS = {"cpu": ("tupe_eager", "tupe_sdpa", "tupe_rows"), "cuda": ("tupe_eager", "tupe_sdpa", "tupe_flex")}
ATTENTION = {"bert": "sdpa", "bert_eager": "eager", "tupe_eager": "eager", "tupe_sdpa": "sdpa"}
ATTENTION["tupe_flex"] = "flex_attention"
GOALS = {"train": 1.10, "inference": 1.05, "inference, padded": 1.05, "memory": 1.10}
GPU_GOAL = 1.15
# Of what TUPE chooses by itself over the best of its forms.
CHOICE_GOAL = 1.05
NAMES = {"train": "train step", "memory": "peak memory of training"}


class Vocabulary:
    """Stand-in for a tokenizer: BERT's number of ids, and where the special ones are."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = 0, 101, 102, 103

    def __len__(self) -> int:
        return 30_522


def build(name: str, layers: int, width: int, length: int):
    """Build a model by its name, with the form of attention that the name asks for."""
    vocabulary: Any = Vocabulary()
    make: Callable[..., Any] = tupe if name.startswith("tupe") else bert
    model = make(vocabulary, layers, width, length)
    if name in ATTENTION:
        model.set_attn_implementation(ATTENTION[name])
    return model


def batch_of(width: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Draw random ids, 15 % of them targets, no padding."""
    rows = max(1, TOKENS_PER_STEP.get(width, 1024) // length)
    if device.type == "cuda":
        rows *= 32
    ids = torch.randint(1000, len(Vocabulary()), (rows, length), device=device)
    ids[:, 0] = Vocabulary.cls_token_id
    labels = torch.where(torch.rand(rows, length, device=device) < 0.15, ids, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels}


class BenchmarkCase:
    """One model with all that a measurement of it needs."""

    def __init__(self, name: str, layers: int, width: int, length: int, device: torch.device):
        torch.manual_seed(0)
        self.objective: Any = MaskedLMObjective(model=build(name, layers, width, length)).to(device)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4, fused=True)
        self.device = device
        self.by_rows = name == "tupe_rows"
        self.encoder: nn.Module = self.objective.encoder
        self.train_forward: Any = self.objective
        if device.type == "cuda":
            self.train_forward, self.encoder = torch.compile(self.objective), torch.compile(self.encoder)  # type: ignore[assignment]

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def train(self, batch: dict[str, torch.Tensor]) -> None:
        self.objective.train()
        with self._autocast():
            loss = self.train_forward(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def inference(self, batch: dict[str, torch.Tensor], padded: bool = False) -> None:
        if self.objective.training:  # not at every call: eval() also drops the position bias that is kept
            self.objective.eval()
        mask = None
        if padded:
            lengths = torch.linspace(16, batch["input_ids"].shape[1], len(batch["input_ids"]), device=self.device)
            mask = (torch.arange(batch["input_ids"].shape[1], device=self.device) < lengths[:, None]).long()
        at_any_length = mock.patch.object(modeling_tupe, "ROWWISE_MIN_LENGTH", 1) if self.by_rows else nullcontext()
        with torch.no_grad(), self._autocast(), at_any_length:
            self.encoder(input_ids=batch["input_ids"], attention_mask=mask)


MODES: dict[str, Callable[[BenchmarkCase, dict[str, torch.Tensor]], None]] = {
    "train": BenchmarkCase.train,
    "inference": BenchmarkCase.inference,
    "inference, padded": lambda case, batch: case.inference(batch, padded=True),
}


def form_taken(case: BenchmarkCase, mode: str, batch: dict[str, torch.Tensor]) -> str:
    """Name the form of attention that TUPE chooses by itself, by the operators of a run that is not compiled: only rows
    that attend one by one call the fused kernel more than once a layer."""
    plain = copy.copy(case)
    plain.train_forward, plain.encoder = case.objective, case.objective.encoder
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        MODES[mode](plain, batch)
    calls = sum(event.name == "aten::scaled_dot_product_attention" for event in profiler.events() or ())
    if calls == 0:
        return "eager"
    return "rows" if calls > case.objective.encoder.config.num_hidden_layers else "sdpa"


def measure(layers: int, width: int, length: int, repeats: int, device: torch.device) -> dict:
    """Measure the core seconds of each repetition, the models in turn, and tell the form that TUPE chose, by mode."""
    names = [*MODELS, *FORMS[device.type]]
    cases = {name: BenchmarkCase(name, layers, width, length, device) for name in names}
    batch = batch_of(width, length, device)
    seconds: dict[str, dict[str, list[float]]] = {}
    chosen = {}
    for mode, run in MODES.items():
        running = [name for name in names if name != "tupe_rows" or "padded" in mode]
        times: dict[str, list[float]] = {name: [] for name in running}
        for index in tqdm(range(repeats + 2), desc=f"{layers}x{width}, length {length}, {mode}", leave=False):
            for name in random.Random(index).sample(running, len(running)):
                start = core_time(device)
                run(cases[name], batch)
                if index >= 2:  # warm-up
                    times[name].append(core_time(device) - start)
        seconds[mode] = times
        chosen[mode] = form_taken(cases["tupe_r"], mode, batch)
    return {"seconds": seconds, "tokens": batch["input_ids"].numel(), "form_taken": chosen}


def _train_twice(case: BenchmarkCase, batch: dict[str, torch.Tensor]) -> None:
    for _ in range(2):
        case.train(batch)


def peak_of_process(name: str, layers: int, width: int, length: int) -> int:
    """Measure the peak of this process, which should be a fresh one: model, optimiser and two train steps."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    return peak_growth(
        lambda: _train_twice(BenchmarkCase(name, layers, width, length, device), batch_of(width, length, device))
    )


def peak_memory(name: str, layers: int, width: int, length: int, device: torch.device, repeats: int = 3) -> int:
    """Measure the bytes that two train steps take at their peak, model and optimiser included; on a CPU the median of
    `repeats` fresh processes, since what the allocator keeps differs by a tenth from one to the next."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _train_twice(BenchmarkCase(name, layers, width, length, device), batch_of(width, length, device))
        return torch.cuda.max_memory_allocated()
    return statistics.median_low(in_fresh_processes(peak_of_process, (name, layers, width, length), repeats))


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Measure the FLOP/s of a large bf16 (GPU) or fp32 (CPU) matrix product."""
    size = size if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(8):
        start = core_time(device)
        left @ right
        rates.append(2 * size**3 / (core_time(device) - start))
    return statistics.median(rates[2:])


def encoder_flops(layers: int, width: int, length: int, tokens: int) -> float:
    """Count the FLOPs of an encoder's train step (three times forward): projections, feed-forward, attention."""
    return 3 * tokens * layers * (24 * width**2 + 4 * length * width)


def rows_of(entry: dict[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Make the summary rows of one size and length."""
    where = f"{entry['size']}, length {entry['length']}"
    train = medians(entry["seconds"]["train"])
    notes = {
        "train": f"times (of BERT's default, sdpa: {train['tupe_r'] / train['bert']:.3f})",
        "memory": f"times ({entry['peak_bytes']['tupe_r'] / 2**20:.0f} MiB)",
    }
    goals = dict.fromkeys(GOALS, GPU_GOAL) if on_gpu else GOALS
    rows = [
        {
            "name": f"{NAMES.get(mode, mode)}, TUPE-R / BERT, {where}",
            "value": round(ratio, 4),
            "unit": notes.get(mode, "times"),
            "goal": f"at most {goals[mode]:.2f}",
        }
        for mode, ratio in ratios(entry).items()
    ]
    choices = [
        {
            "name": f"{NAMES.get(mode, mode)}, what TUPE-R chooses ({entry['form_taken'][mode]}) / its best form "
            f"({best}), {where}",
            "value": round(ratio, 4),
            "unit": "times",
            "goal": f"at most {CHOICE_GOAL:.2f}",
        }
        for mode, (best, ratio) in choice_ratios(entry).items()
    ]
    return rows + choices


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """Divide TUPE-R by the better of BERT's two forms of attention: times by mode, and memory."""
    measured = {mode: medians(seconds) for mode, seconds in entry["seconds"].items()}
    measured["memory"] = entry["peak_bytes"]
    return {mode: values["tupe_r"] / min(values["bert"], values["bert_eager"]) for mode, values in measured.items()}


def choice_ratios(entry: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """Find by mode the fastest of TUPE's forms of attention, and the time of the form it chooses over that form's."""
    found = {}
    for mode, seconds in entry["seconds"].items():
        times = medians(seconds)
        forms = {name: value for name, value in times.items() if name.startswith("tupe_") and name != "tupe_r"}
        best = min(forms, key=lambda name: forms[name])
        found[mode] = (best.removeprefix("tupe_"), times["tupe_r"] / forms[best])
    return found


def table_of(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Take the worst ratio of each size over the lengths, as the README shows it."""
    table: dict[str, dict[str, float]] = {}
    for entry in entries:
        worst = table.setdefault(entry["size"], {})
        for key, value in ratios(entry).items():
            worst[key] = round(max(worst.get(key, 0.0), value), 3)
    return table


def headline_of(entries: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    measured: dict[str, list[str]] = {}
    for entry in entries:
        measured.setdefault(entry["size"], []).append(str(entry["length"]))
    lengths = "; ".join(f"{size.replace('x', ' x ')}: {' and '.join(values)}" for size, values in measured.items())
    machine = environment["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread"
    versions = environment["versions"]
    return (
        "Ratios are medians of interleaved runs in one process against transformers' BERT of equal size in the better "
        f"of its two forms of attention, the worst over the lengths measured ({lengths}), without padding. "
        f"Machine: {where}; torch {versions['torch']}, transformers {versions['transformers']}."
    )


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Add headline, table and summary to a result, made from its entries."""
    on_gpu = result["machine"]["gpu"] is not None
    summary = [row for entry in result["entries"] for row in rows_of(entry, on_gpu)]
    if not on_gpu:
        goal = f"at most {GPU_GOAL:.2f}"
        row = {
            "name": "train step on a GPU, bf16, compiled: not run on a GPU yet",
            "value": None,
            "unit": "",
            "goal": goal,
        }
        summary.append(row)
    entries = result["entries"]
    return {
        "headline": headline_of(entries, result),
        "table": table_of(entries),
        "summary": summary,
        **{key: value for key, value in result.items() if key not in ("headline", "table", "summary")},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.encoder_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", default=["4x256", "12x768"], help="layers x width")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each mode and model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "encoder_speed_gpu.json" if device.type == "cuda" else "encoder_speed.json"
    parser.add_argument("--result", type=Path, default=RESULTS / default)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rate = matmul_rate(device)
    entries: list[dict[str, Any]] = []
    started = time.perf_counter()
    for size in args.sizes:
        layers, width = map(int, size.split("x"))
        for length in args.lengths:
            entry = measure(layers, width, length, args.repeats, device)
            entry |= {"size": size, "length": length, "heads": sizes(layers, width)["num_attention_heads"]}
            entry["peak_bytes"] = {name: peak_memory(name, layers, width, length, device) for name in MODELS}
            step = {name: statistics.median(values) for name, values in entry["seconds"]["train"].items()}
            flops = encoder_flops(layers, width, length, entry["tokens"])
            entry["tokens_per_second"] = {name: entry["tokens"] / seconds for name, seconds in step.items()}
            entry["matmul_rate_fraction"] = {name: flops / seconds / rate for name, seconds in step.items()}
            entries.append(entry)
            for row in rows_of(entry, device.type == "cuda"):
                print(f"{row['name']}: {row['value']} {row['unit']}, {row['goal']}", flush=True)
            # After every size, so that an interrupted run leaves what it has.
            measured = {"matmul_flops": rate, "wall_seconds": time.perf_counter() - started, "entries": entries}
            write_result(args.result, summarise({**describe(), **measured}))


if __name__ == "__main__":
    main()
