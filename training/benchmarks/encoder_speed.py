"""
TUPE-R against transformers' BERT of the same sizes: time of a train step and of inference, and peak memory.

    python training/benchmarks/encoder_speed.py
    python training/benchmarks/encoder_speed.py --sizes 4x256 --lengths 128 --repeats 30 --result speed.json

One process, one thread, the two models in turn; medians and quartiles of core time. A train step is forward, backward
and AdamW with dropout 0.1, through the masked-LM objective that pretraining uses for both. BERT is measured with its
default attention (sdpa) and with its explicit one. Peak memory comes from a fresh process for each model. On a GPU the
models run in bf16, compiled, and the table adds tokens/s and the share of the measured matrix-product rate.
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from contestants import bert, sizes, tupe
from environment import RESULTS, describe, write_result
from race_track import core_time
from torch import nn
from tqdm.auto import tqdm

from hf_efficient.objectives.mlm import MaskedLMObjective


TOKENS_PER_STEP = {256: 2048, 512: 2048, 768: 1024, 1024: 1024}
GOALS = {"train": 1.10, "inference": 1.05, "inference, padded": 1.05, "memory": 1.10}
GPU_GOAL = 1.15


class Vocabulary:
    """What the models want of a tokenizer: BERT's number of ids, and where the special ones are."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = 0, 101, 102, 103

    def __len__(self) -> int:
        return 30_522


def build(name: str, layers: int, width: int, length: int):
    vocabulary: Any = Vocabulary()
    if name == "tupe_r":
        return tupe(vocabulary, layers, width, length)
    model = bert(vocabulary, layers, width, length)
    model.set_attn_implementation("sdpa" if name == "bert" else "eager")
    return model


def batch_of(width: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random ids, 15 % of them targets, no padding."""
    rows = max(1, TOKENS_PER_STEP.get(width, 1024) // length)
    if device.type == "cuda":
        rows *= 32
    ids = torch.randint(1000, len(Vocabulary()), (rows, length), device=device)
    ids[:, 0] = Vocabulary.cls_token_id
    labels = torch.where(torch.rand(rows, length, device=device) < 0.15, ids, -100)
    return {"input_ids": ids, "labels": labels}


class Subject:
    """One model with all that a measurement of it needs."""

    def __init__(self, name: str, layers: int, width: int, length: int, device: torch.device):
        torch.manual_seed(0)
        self.objective: Any = MaskedLMObjective(model=build(name, layers, width, length)).to(device)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4, fused=True)
        self.device = device
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
        with torch.no_grad(), self._autocast():
            self.encoder(input_ids=batch["input_ids"], attention_mask=mask)


def measure(names: list[str], layers: int, width: int, length: int, repeats: int, device: torch.device) -> dict:
    """Core seconds of each repetition, by mode and model, the models in turn."""
    subjects = {name: Subject(name, layers, width, length, device) for name in names}
    batch = batch_of(width, length, device)
    modes = {
        "train": lambda subject: subject.train(batch),
        "inference": lambda subject: subject.inference(batch),
        "inference, padded": lambda subject: subject.inference(batch, padded=True),
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for mode, run in modes.items():
        times: dict[str, list[float]] = {name: [] for name in names}
        for index in tqdm(range(repeats + 2), desc=f"{layers}x{width}, length {length}, {mode}", leave=False):
            for name, subject in subjects.items():
                start = core_time(device)
                run(subject)
                if index >= 2:  # warm-up
                    times[name].append(core_time(device) - start)
        seconds[mode] = times
    return {"seconds": seconds, "tokens": batch["input_ids"].numel()}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_of_process(name: str, layers: int, width: int, length: int) -> int:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    before = _resident("VmRSS")
    subject, batch = Subject(name, layers, width, length, device), batch_of(width, length, device)
    for _ in range(2):
        subject.train(batch)
    return _resident("VmHWM") - before


def peak_memory(name: str, layers: int, width: int, length: int, device: torch.device, repeats: int = 3) -> int:
    """Bytes that two train steps take at their peak, model and optimiser included; on a CPU the median of `repeats`
    fresh processes, since what the allocator keeps differs by a tenth from one to the next."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        subject, batch = Subject(name, layers, width, length, device), batch_of(width, length, device)
        for _ in range(2):
            subject.train(batch)
        return torch.cuda.max_memory_allocated()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return statistics.median_low(
            pool.apply(_peak_of_process, (name, layers, width, length)) for _ in range(repeats)
        )


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Measured FLOP/s of a large bf16 (GPU) or fp32 (CPU) matrix product."""
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
    """FLOPs of a train step's encoder (three times forward): projections, feed-forward and attention products."""
    return 3 * tokens * layers * (24 * width**2 + 4 * length * width)


def rows_of(entry: dict[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Summary rows of one size and length."""
    where = f"{entry['size']}, length {entry['length']}"
    train = {name: statistics.median(seconds) for name, seconds in entry["seconds"]["train"].items()}
    notes = {
        "train": f"times (of BERT's default, sdpa: {train['tupe_r'] / train['bert']:.3f})",
        "memory": f"times ({entry['peak_bytes']['tupe_r'] / 2**20:.0f} MiB)",
    }
    goals = dict.fromkeys(GOALS, GPU_GOAL) if on_gpu else GOALS
    names = {"train": "train step", "memory": "peak memory of training"}
    return [
        {
            "name": f"{names.get(mode, mode)}, TUPE-R / BERT, {where}",
            "value": round(ratio, 4),
            "unit": notes.get(mode, "times"),
            "goal": f"at most {goals[mode]:.2f}",
        }
        for mode, ratio in ratios(entry).items()
    ]


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """TUPE-R over the faster of BERT's two forms of attention: times by mode, and memory."""
    times = {}
    for mode, seconds in entry["seconds"].items():
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        times[mode] = medians["tupe_r"] / min(medians["bert"], medians["bert_eager"])
    return {**times, "memory": entry["peak_bytes"]["tupe_r"] / entry["peak_bytes"]["bert"]}


def table_of(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The worst ratio of each size over the lengths, as the README shows it."""
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
        "Ratios are medians of interleaved runs in one process against transformers' BERT of equal size by its faster "
        f"form of attention, the worst over the lengths measured ({lengths}), without padding. Machine: {where}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4x256", "12x768"], help="layers x width")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each mode and model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "encoder_speed_gpu.json" if device.type == "cuda" else "encoder_speed.json"
    parser.add_argument("--result", type=Path, default=RESULTS / default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ["bert", "bert_eager", "tupe_r"]
    rate = matmul_rate(device)
    entries: list[dict[str, Any]] = []
    started = time.perf_counter()
    for size in args.sizes:
        layers, width = map(int, size.split("x"))
        for length in args.lengths:
            entry = measure(names, layers, width, length, args.repeats, device)
            entry |= {"size": size, "length": length, "heads": sizes(layers, width)["num_attention_heads"]}
            entry["peak_bytes"] = {
                name: peak_memory(name, layers, width, length, device) for name in ("bert", "tupe_r")
            }
            step = {name: statistics.median(values) for name, values in entry["seconds"]["train"].items()}
            flops = encoder_flops(layers, width, length, entry["tokens"])
            entry["tokens_per_second"] = {name: entry["tokens"] / seconds for name, seconds in step.items()}
            entry["share_of_matmul_rate"] = {name: flops / seconds / rate for name, seconds in step.items()}
            entries.append(entry)
            for row in rows_of(entry, device.type == "cuda"):
                print(f"{row['name']}: {row['value']} {row['unit']}, {row['goal']}", flush=True)
            # After every size, so that an interrupted run leaves what it has.
            measured = {"matmul_flops": rate, "wall_seconds": time.perf_counter() - started, "entries": entries}
            write_result(args.result, summarise({**describe(), **measured}))


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """A result with headline, table and summary made from its entries."""
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


if __name__ == "__main__":
    main()
