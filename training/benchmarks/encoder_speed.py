"""
TUPE-R against transformers' BERT of the same sizes: time of a train step and of inference, and peak memory.

    python training/benchmarks/encoder_speed.py
    python training/benchmarks/encoder_speed.py --sizes 4x256 --lengths 128 --repeats 30 --result speed.json

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
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contestants import bert, sizes, tupe
from environment import RESULTS, describe, write_result
from race_track import core_time
from speed_report import rows_of, summarise
from torch import nn
from tqdm.auto import tqdm

from hf_efficient.models.tupe import modeling_tupe
from hf_efficient.objectives.mlm import MaskedLMObjective


TOKENS_PER_STEP = {256: 2048, 512: 2048, 768: 1024, 1024: 1024}
MODELS = ("bert", "bert_eager", "tupe_r")
# TUPE's forms of attention, by the type of the device.
FORMS = {"cpu": ("tupe_eager", "tupe_sdpa", "tupe_rows"), "cuda": ("tupe_eager", "tupe_sdpa", "tupe_flex")}
ATTENTION = {"bert": "sdpa", "bert_eager": "eager", "tupe_eager": "eager", "tupe_sdpa": "sdpa"}
ATTENTION["tupe_flex"] = "flex_attention"


class Vocabulary:
    """What the models want of a tokenizer: BERT's number of ids, and where the special ones are."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = 0, 101, 102, 103

    def __len__(self) -> int:
        return 30_522


def build(name: str, layers: int, width: int, length: int):
    vocabulary: Any = Vocabulary()
    make: Callable[..., Any] = tupe if name.startswith("tupe") else bert
    model = make(vocabulary, layers, width, length)
    if name in ATTENTION:
        model.set_attn_implementation(ATTENTION[name])
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


MODES: dict[str, Callable[[Subject, dict[str, torch.Tensor]], None]] = {
    "train": Subject.train,
    "inference": Subject.inference,
    "inference, padded": lambda subject, batch: subject.inference(batch, padded=True),
}


def form_taken(subject: Subject, mode: str, batch: dict[str, torch.Tensor]) -> str:
    """The form of attention that TUPE chooses by itself, seen in a run that is not compiled."""
    plain = copy.copy(subject)
    plain.train_forward, plain.encoder = subject.objective, subject.objective.encoder
    eager, rows = modeling_tupe.eager_attention_forward, modeling_tupe._attend_by_rows
    with (
        mock.patch.object(modeling_tupe, "eager_attention_forward", wraps=eager) as explicit,
        mock.patch.object(modeling_tupe, "_attend_by_rows", wraps=rows) as one_by_one,
    ):
        MODES[mode](plain, batch)
    return "rows" if one_by_one.called else "eager" if explicit.called else "sdpa"


def measure(layers: int, width: int, length: int, repeats: int, device: torch.device) -> dict:
    """Core seconds of each repetition, by mode and model, the models in turn; and the form that TUPE chose by mode."""
    names = [*MODELS, *FORMS[device.type]]
    subjects = {name: Subject(name, layers, width, length, device) for name in names}
    batch = batch_of(width, length, device)
    seconds: dict[str, dict[str, list[float]]] = {}
    chosen = {}
    for mode, run in MODES.items():
        running = [name for name in names if name != "tupe_rows" or "padded" in mode]
        times: dict[str, list[float]] = {name: [] for name in running}
        for index in tqdm(range(repeats + 2), desc=f"{layers}x{width}, length {length}, {mode}", leave=False):
            for name in random.Random(index).sample(running, len(running)):
                start = core_time(device)
                run(subjects[name], batch)
                if index >= 2:  # warm-up
                    times[name].append(core_time(device) - start)
        seconds[mode] = times
        chosen[mode] = form_taken(subjects["tupe_r"], mode, batch)
    return {"seconds": seconds, "tokens": batch["input_ids"].numel(), "form_taken": chosen}


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
            entry["share_of_matmul_rate"] = {name: flops / seconds / rate for name, seconds in step.items()}
            entries.append(entry)
            for row in rows_of(entry, device.type == "cuda"):
                print(f"{row['name']}: {row['value']} {row['unit']}, {row['goal']}", flush=True)
            # After every size, so that an interrupted run leaves what it has.
            measured = {"matmul_flops": rate, "wall_seconds": time.perf_counter() - started, "entries": entries}
            write_result(args.result, summarise({**describe(), **measured}))


if __name__ == "__main__":
    main()
