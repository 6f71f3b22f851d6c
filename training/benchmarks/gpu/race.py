"""Parts of the GPU agenda that train on the same bytes: SRU++ and a GPT-2 of 42 M parameters for equal time, and
Scaling Transformers of 100 M, dense and sparse, for equal steps.

The minutes of the race are what the agenda has left; the race has not run on a GPU yet.
"""

import bz2
import gzip
import lzma
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_efficient.ops.backend import use_backend
from training.benchmarks import sparse_quality
from training.benchmarks.environment import write_whole
from training.benchmarks.gpu.context import TEXT, PartContext
from training.benchmarks.gpu.models import build_lm, recurrence_ran
from training.benchmarks.gpu.speed import compiled_backend


MEGABYTES = 8
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
# Those of the race of small models, times its width over this one.
RATES = {"srupp": (5e-4, 1.2e-3, 2.5e-3), "gpt2": (3e-4, 6e-4, 1.2e-3)}
# Below so many seconds no learning rate is chosen by short runs: the middle one is taken.
SCREEN_FROM = 150
VALIDATION_BYTES = 1 << 17


def write_pack(source: Path, folder: Path, size: int = MEGABYTES << 20) -> str:
    """
    Write the first bytes of a text, to be carried to another machine.

    Args:
        source (`Path`): a file (`.xz`, `.gz` and `.bz2` are unpacked), or a folder, whose files are read in the order
            of their names.
        folder (`Path`): where `text.safetensors` is written.
        size (`int`, defaults to 8 MiB): the number of bytes.

    Returns:
        `str`: what was written.

    Raises:
        SystemExit: if there is no text.
    """
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    data = bytearray()
    for path in paths:
        if len(data) >= size:
            break
        try:
            with OPENERS.get(path.suffix, open)(path, "rb") as file:
                data += file.read(size - len(data))
        except OSError as error:
            raise SystemExit(f"{path} cannot be read: {error}") from error
    if not data:
        raise SystemExit(f"{source} holds no text.")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"text": torch.frombuffer(data, dtype=torch.uint8)}
    write_whole(folder / TEXT, lambda path: save_file(content, path, metadata={"source": source.name}))
    return f"{folder / TEXT}: {len(data):,} bytes of {source.name}"


@dataclass
class Race:
    """
    The text and how to train on it.

    Args:
        train, validation (`Tensor` of shape `(bytes,)`): on the device; a short one is repeated.
        rows, length (`int`): of a batch of random segments.
    """

    context: PartContext
    train: Tensor
    validation: Tensor
    rows: int
    length: int

    def batches(self) -> Iterator[dict[str, Any]]:
        """Random segments, the same ones for each model."""
        generator = torch.Generator().manual_seed(0)
        places = torch.arange(self.length + 1, device=self.train.device)
        while True:
            starts = torch.randint(len(self.train) - self.length - 1, (self.rows,), generator=generator)
            segments = self.train[starts.to(places.device)[:, None] + places].long()
            labels = segments[:, 1:].contiguous()
            yield {"input_ids": segments[:, :-1], "labels": labels, "shift_labels": labels}

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module) -> float:
        """On the validation text, by windows that share half of their length: each byte has half a window before it."""
        model.eval()
        half, total, count = self.length // 2, 0.0, 0
        windows = self.validation.long().unfold(0, self.length + 1, half)
        for rows in windows.split(2 * self.rows):
            labels = rows[:, 1:].clone()
            labels[:, :half] = -100
            output = forward(model, {"input_ids": rows[:, :-1], "labels": labels, "shift_labels": labels})
            total, count = total + output.loss.item() * len(rows), count + len(rows)
        model.train()
        return total / count / math.log(2)


def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
    """A forward pass in bfloat16; on a GPU, GPT-2 may use flash attention alone, as in the timed train steps."""
    device = batch["input_ids"].device.type
    flash = device == "cuda" and type(model).__name__.startswith("GPT2")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext(), torch.autocast(device, torch.bfloat16):
        return model(use_cache=False, **batch)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with decay of matrices alone."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    free = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, fused=True)


def build_racer(race: Race, name: str) -> nn.Module:
    """One of the two models that race, with dropout."""
    return build_lm(name, race.context, race.length, dropout=race.context.choose(0.1, 0.0))


def train(
    race: Race,
    name: str,
    build: Callable[[Race, str], nn.Module],
    rate: float,
    evaluations: int,
    seconds: float = math.inf,
    budget_steps: float = math.inf,
) -> dict[str, Any]:
    """
    Train a model for so many seconds, evaluations left out, or for so many steps, with a warm-up and a cosine over what
    is given of the two.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    torch.manual_seed(0)
    model = build(race, name).train()
    optimizer, batches = optimizer_of(model), race.batches()
    forward(model, next(batches)).loss.backward()  # the first pass of a process loads libraries
    spent, steps, curve = 0.0, 0, list[tuple[float, int, float]]()
    while (done := max(spent / seconds, steps / budget_steps)) < 1 or not steps:
        started = time.perf_counter()
        cosine = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(done / 0.06 + 1e-3, 1.0) * cosine
        optimizer.zero_grad(set_to_none=True)
        loss = forward(model, next(batches)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not math.isfinite(loss.item()):  # waits for the GPU
            raise FloatingPointError(f"{name}: the loss is {loss.item()} after {steps} steps at a rate of {rate}")
        spent, steps = spent + time.perf_counter() - started, steps + 1
        if max(spent / seconds, steps / budget_steps) >= (len(curve) + 1) / evaluations:
            curve.append((spent, steps, race.bits_per_byte(model)))
    curve = curve if curve and curve[-1][1] == steps else [*curve, (spent, steps, race.bits_per_byte(model))]
    figures = {"learning_rate": rate, "seconds": spent, "steps": steps, "curve": curve, "bits_per_byte": curve[-1][2]}
    return {**figures, "parameters": sum(p.numel() for p in model.parameters())}


def read_text(context: PartContext, rows: int, length: int) -> tuple[Race, str]:
    """The packed text, split for training and validation, and its name."""
    with safe_open(context.pack / TEXT, framework="pt") as file:
        text, source = file.get_tensor("text"), file.metadata()["source"]
    size = min(context.choose(VALIDATION_BYTES, 256), len(text) // 10)
    wanted = 2 * (length + 1)
    parts = [
        part.repeat(-(-wanted // len(part))) if len(part) < wanted else part for part in text.split(len(text) - size)
    ]
    on_device = [part.to(context.device) for part in parts[:2]]
    return Race(context, on_device[0], on_device[1], rows, length), source


def choose_rates(race: Race, seconds: float, found: dict[str, Any]) -> dict[str, float]:
    """The best of three learning rates of each model by short runs, or the middle one."""
    chosen = {name: rates[1] for name, rates in RATES.items()}
    if seconds <= 0:
        return chosen
    for name, rates in RATES.items():
        tried = {}
        for rate in rates:
            try:
                tried[rate] = train(race, name, build_racer, rate, 1, seconds=seconds / 6)["bits_per_byte"]
            except FloatingPointError as error:
                race.context.say(str(error))
        found["screened"][name] = {str(rate): bits for rate, bits in tried.items()}
        chosen[name] = min(tried, key=tried.__getitem__) if tried else chosen[name]
        words = ", ".join(f"{rate}: {bits:.3f}" for rate, bits in tried.items())
        race.context.say(f"{name}: a learning rate of {chosen[name]} is the best of {words}")
    return chosen


def race(context: PartContext) -> dict[str, Any]:
    """Bits per byte of SRU++ and of GPT-2 after equal time, in what is left of the part's."""
    left = context.choose(context.seconds_left() - 20, 2.0)
    screening = context.choose(0.25 * left if left >= SCREEN_FROM else 0.0, 0.6)
    # Models, evaluations and what compiles at first take a part of each run.
    each = 0.8 * (left - screening) / len(RATES)
    rows, length = context.choose((24, 512), (2, 16))
    run, source = read_text(context, rows, length)
    backend = compiled_backend(context.device)
    found: dict[str, Any] = {"text": source, "bytes": len(run.train), "screened": {}, "runs": {}}
    with use_backend(backend):
        rates = choose_rates(run, 0.8 * screening, found)
        for name, rate in rates.items():
            found["runs"][name] = train(run, name, build_racer, rate, context.choose(10, 2), seconds=each)
            if name == "srupp":
                found["recurrence"] = recurrence_ran(backend)
            bits = (f"{name} {figures['bits_per_byte']:.3f}" for name, figures in found["runs"].items())
            found["line"] = f"bits per byte after {each:.0f} s each: {', '.join(bits)}"
            context.save(found)
            context.say(found["line"])
    return found


def build_scaling(race: Race, kind: str) -> nn.Module:
    """A dense or a sparse Scaling Transformer of 100 M parameters; of 5 M in a rehearsal."""
    return sparse_quality.build(kind, race.length, large=race.context.choose(True, False)).to(race.context.device)


def train_scaling(context: PartContext) -> dict[str, Any]:
    """Bits per byte of a dense Scaling Transformer and of one that is sparse everywhere, after the same batches."""
    rows, length, steps = context.choose((32, 512, 500), (2, 16, 2))
    run, source = read_text(context, rows, length)
    found: dict[str, Any] = {"text": source, "bytes": len(run.train), "rows": rows, "length": length, "runs": []}
    longest = 0.0
    for rate, kind in product(context.choose((1.2e-3, 6e-4), (1e-3,)), ("dense", "all")):
        if context.seconds_left() < 1.3 * longest + 5:
            context.say(f"{kind} at a rate of {rate} is left out: {context.seconds_left():.0f} seconds are left")
            break
        started = time.monotonic()
        figures = train(run, kind, build_scaling, rate, context.choose(5, 2), budget_steps=steps)
        longest = max(longest, time.monotonic() - started)
        found["runs"].append({"kind": kind, **figures})
        found["line"] = "; ".join(
            f"{ran['kind']} at {ran['learning_rate']:g}: {ran['bits_per_byte']:.3f} bits per byte"
            for ran in found["runs"]
        )
        context.save(found)
        context.say(f"{kind}: {figures['bits_per_byte']:.3f} bits per byte after {figures['seconds']:.0f} s")
    return found
