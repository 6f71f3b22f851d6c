"""Parts of the GPU agenda that time decoding at batch 1: sparse models and their dense twins, replayed from CUDA graphs
over a static cache.

They have been rehearsed on a CPU, and never yet run on a GPU. Weights are random, and so are the keys and values that
stand for a context. A step whose capture fails is timed launch by launch, and its record says why.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from hf_efficient.utils.cache_naming import cache_kwarg
from training.benchmarks.decoding.counting import bytes_read
from training.benchmarks.decoding.races import FULL, KINDS, TINY, WIDE, Size
from training.benchmarks.decoding.torch_engine import build
from training.benchmarks.gpu.context import MissingPrerequisiteError, PartContext
from training.benchmarks.gpu.speed import Timer, medians


CONTEXTS = (16, 512, 2048)
# 24 x 1024 in its kinds, and a wider one, of 4.8 G weights.
ROWS = (("24x1024", FULL, ("fp32", "bf16"), KINDS), ("24x4096", Size(24, 4096, 32), ("bf16",), ("dense", "all")))
TINY_ROWS = (("tiny", TINY["full"], ("fp32", "bf16"), ("dense", "all")),)
# The presets of 17 G weights: 35 GB each in bfloat16, and something for keys, values and the graph.
DEPTHS = {"dense": 15, "all": 14}
LEAST_GIGABYTES = 40
CALLS = 4


class Step:
    """
    The next token of a model whose cache holds a context; each call writes at the same place.

    Args:
        model (`nn.Module`): a causal language model.
        context (`int`): tokens that the cache holds.
        device (`torch.device`): where the model is.
    """

    def __init__(self, model: nn.Module, context: int, device: torch.device):
        self.model: Any = model
        self.context = context
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.full((1, 1), context, device=device)
        # Attention goes through all of a static cache, filled or not.
        config: Any = model.config
        self.cache: Any = StaticCache(config=config, max_cache_len=context + 1)
        self._read(torch.zeros_like(self.position))
        for keys_or_values in self._kept():
            keys_or_values.normal_()

    def _kept(self) -> list[torch.Tensor]:
        return [getattr(layer, name) for layer in self.cache.layers for name in ("keys", "values")]

    def _read(self, position: torch.Tensor) -> None:
        inputs = {"input_ids": self.token, "position_ids": position, **cache_kwarg(self.cache)}
        self.logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits

    def __call__(self) -> None:
        for layer in self.cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if isinstance(length, torch.Tensor):
                length.fill_(self.context)
        self._read(self.position)

    def bytes(self) -> int:
        """Count the bytes of weights, keys and values that a token reads."""
        return sum(bytes_read(self.model).values()) + sum(tensor.nbytes for tensor in self._kept())


def repeat(step: Step) -> None:
    """Make as many calls as a graph holds."""
    for _ in range(CALLS):
        step()


def captured(timer: Timer, step: Step) -> tuple[Callable[[], object], str | None]:
    """Capture some calls of a step, or say why that failed; then they are made one by one."""
    try:
        return timer.graph_of(step, CALLS), None
    except RuntimeError as error:
        torch.cuda.synchronize()
        return partial(repeat, step), str(error).splitlines()[0]


def make_model(context: PartContext, size: Size, kind: str, form: str) -> nn.Module:
    """Make a model with random weights, on the device from the beginning."""
    preset, settings = size.settings(kind)
    with torch.device(context.device):
        return build(preset, form, settings)


def time_steps(context: PartContext, models: dict[str, nn.Module], length: int, copy_rate: float) -> dict[str, Any]:
    """Time the next token of some models in turn, after a context of `length` tokens."""
    timer = Timer(context)
    steps = {name: Step(model, length, context.device) for name, model in models.items()}
    runs = {name: captured(timer, step) for name, step in steps.items()}
    times = timer.in_turn({name: run for name, (run, _) in runs.items()}, CALLS)
    found: dict[str, Any] = {}
    for name, microseconds in medians(times).items():
        read = steps[name].bytes()
        found[name] = {
            "microseconds": microseconds,
            "tokens_per_second": 1e6 / microseconds,
            "megabytes": read / 1e6,
            # A copy moves each byte twice.
            "share_of_copy_bandwidth": read / microseconds / copy_rate,
            "not_captured": runs[name][1],
            "all": times[name],
        }
    return found


def add_ratios(measured: dict[str, dict[str, Any]], form: str) -> None:
    """Compare the models of a format with their dense twin."""
    dense = measured[f"{form} dense"]["microseconds"]
    for figures in measured.values():
        figures["times_faster_than_dense"] = dense / figures["microseconds"]


@torch.inference_mode()
def measure_decoding(context: PartContext) -> dict[str, Any]:
    """The kinds of the 24 x 1024 model, in float32 and bfloat16, and a model of width 4096, after several contexts."""
    copy_rate = Timer(context).copy_rate(context.device)
    found: dict[str, Any] = {"copy_gigabytes_per_second": copy_rate / 1e3, "cases": []}
    lines = []
    for name, size, forms, kinds in context.choose(ROWS, TINY_ROWS):
        for form in forms:
            models = {f"{form} {kind}": make_model(context, size, kind, form) for kind in kinds}
            for length in context.choose(CONTEXTS, (16,)):
                measured = time_steps(context, models, length, copy_rate)
                add_ratios(measured, form)
                found["cases"].append({"size": name, "format": form, "context": length, "models": measured})
                ratio = measured[f"{form} all"]["times_faster_than_dense"]
                lines.append(f"{name} {form} at {length}: all {ratio:.2g} x dense")
                found["line"] = "; ".join(lines)
                context.save(found)
                context.say(lines[-1])
            del models
            gc.collect()
    context.needs_gpu("CUDA graphs of a step")
    return found


@torch.inference_mode()
def measure_17b(context: PartContext) -> dict[str, Any]:
    """The whole models of 17 G weights in bfloat16, the dense one and then the sparse one, since both do not fit beside
    each other everywhere; each beside the bandwidth of a copy at its time."""
    if not context.rehearsal:
        free, _ = torch.cuda.mem_get_info()
        if free < LEAST_GIGABYTES * 1e9:
            said = f"a model of 17 G weights wants {LEAST_GIGABYTES} GB, and {free / 1e9:.0f} are free"
            raise MissingPrerequisiteError(said)
    found: dict[str, Any] = {"cases": []}
    measured: dict[int, dict[str, dict[str, Any]]] = {}
    for kind in ("dense", "all"):
        copy_rate = Timer(context).copy_rate(context.device)
        size = context.choose(replace(WIDE, layers=DEPTHS[kind]), TINY["wide"])
        models = {f"bf16 {kind}": make_model(context, size, kind, "bf16")}
        weights = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
        for length in context.choose(CONTEXTS, (16,)):
            figures = time_steps(context, models, length, copy_rate)
            measured.setdefault(length, {}).update(figures)
            found["cases"].append({"kind": kind, "context": length, "parameters": weights, "models": figures})
            context.save(found)
        del models
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    for figures in measured.values():
        add_ratios(figures, "bf16")
    found["line"] = "; ".join(
        f"17B bf16 at {length}: sparse {1e-3 * figures['bf16 all']['microseconds']:.2f} ms, "
        f"{figures['bf16 all']['times_faster_than_dense']:.3g} x dense"
        for length, figures in measured.items()
    )
    context.needs_gpu("the sizes of 17 G weights")
    return found
