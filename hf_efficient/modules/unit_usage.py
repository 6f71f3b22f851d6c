"""Choices of the controllers of sparse feed-forward layers: dead units, uneven use, and controllers that collapse.

A controller collapses where it sends all tokens to the same units: the layer is then a small dense one, and the weights
of its other units are never read. The loss shows that late; the figures here show it at once.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..utils.atomic_write import write_files
from ..utils.warning_callback import WarningCallback
from .quantized_layers import QuantizedSparseFeedForward
from .sparse_layers import SparseFeedForward


logger = logging.getLogger(__name__)

USAGE_NAME = "unit_usage.json"
# Figures of a layer, by the names of their means over layers in Trainer's log.
LOGGED = {
    "dead_units": "dead_units",
    "unit_entropy": "entropy",
    "top_unit_share": "top_share",
    "killed_winners": "killed_winners",
}


class UnitUsage:
    """
    Counts of the winners of one layer.

    Args:
        blocks (`int`), block_size (`int`): of the layer.
        device (`torch.device`, *optional*): where to count; counts follow the winners to another device.
    """

    def __init__(self, blocks: int, block_size: int, device: torch.device | None = None):
        self.block_size = block_size
        # The last number counts winners that ReLU kills, so that several processes have one tensor to add up.
        self.numbers = torch.zeros(blocks * block_size + 1, dtype=torch.long, device=device)

    @property
    def counts(self) -> Tensor:
        """Number of times that each unit was chosen, `(blocks * block size,)`."""
        return self.numbers[:-1]

    @property
    def killed(self) -> Tensor:
        """Number of winners that ReLU killed, `()`; 0 with another activation."""
        return self.numbers[-1]

    @property
    def tokens(self) -> int:
        """Number of tokens that were counted."""
        return int(self.counts[: self.block_size].sum())

    def __call__(self, winners: Tensor, passes: Tensor) -> None:
        """
        Count.

        Args:
            winners (`Tensor` of shape `(tokens, blocks)`): chosen units, by their index in their block.
            passes (`Tensor` of shape `(tokens, blocks)`): whether ReLU lets the unit pass; with another activation
                all do.
        """
        if self.numbers.device != winners.device:
            self.numbers = self.numbers.to(winners.device)
        blocks = torch.arange(winners.shape[-1], device=winners.device) * self.block_size
        units = (winners + blocks).flatten()
        self.counts.scatter_add_(0, units, torch.ones((), dtype=torch.long, device=units.device).expand_as(units))
        self.numbers[-1] += passes.numel() - passes.sum()

    def figures(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: `dead_units`, the share that nothing chose; `entropy` of the choice, averaged over
            blocks, as a share of its largest value; `top_share` of the most used unit of a block, averaged over blocks;
            `killed_winners`, the share that ReLU kills (0 with another activation).
        """
        numbers = self.numbers.cpu().double()  # GPUs of Apple have no float64
        counts = numbers[:-1].view(-1, self.block_size)
        total = counts.sum(1, keepdim=True).clamp(min=1)
        shares = counts / total
        entropy = -torch.where(shares > 0, shares * shares.clamp(min=1e-30).log(), 0.0).sum(1)
        most = math.log(self.block_size) if self.block_size > 1 else 1.0
        return {
            "dead_units": (counts == 0).double().mean().item(),
            "entropy": (entropy.mean() / most).item() if self.block_size > 1 else 1.0,
            "top_share": shares.amax(1).mean().item(),
            "killed_winners": (numbers[-1] / total.sum()).item(),
        }


def sparse_feed_forwards(model: nn.Module) -> dict[str, Any]:
    """The sparse feed-forward layers of a model, quantised ones too, by the names of their modules, in its order."""
    kinds = (SparseFeedForward, QuantizedSparseFeedForward)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@contextmanager
def observed_units(model: nn.Module) -> Iterator[dict[str, UnitUsage]]:
    """
    Count the winners of all sparse feed-forward layers of a model inside the `with` block, those of padding left out.

    Args:
        model (`nn.Module`): any model; without such layers there is nothing to count.

    Yields:
        `dict[str, UnitUsage]`: by the names of the modules.
    """
    layers = sparse_feed_forwards(model)
    usage = {}
    for name, layer in layers.items():
        blocks, block_size = layer.controller_bias.shape
        usage[name] = UnitUsage(blocks, block_size, layer.controller_bias.device)
        layer.observer = usage[name]
    try:
        yield usage
    finally:
        for layer in layers.values():
            layer.observer = None


def _mean_figures(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over layers, by their names in the log, and the entropy of the layer where it is lowest."""
    means = {name: sum(layer[of] for layer in layers.values()) / len(layers) for name, of in LOGGED.items()}
    return {**means, "lowest_unit_entropy": min(layer["entropy"] for layer in layers.values())}


class UnitUsageCallback(WarningCallback):
    """
    Logs what the controllers of sparse feed-forward layers choose in training, keeps it with each checkpoint, and warns
    once, with advice, when one has collapsed.

    - Into Trainer's log go the means over layers, `dead_units`, `unit_entropy`, `top_unit_share` and `killed_winners`
      (see [`UnitUsage.figures`]), and `lowest_unit_entropy`, that of the worst layer. `state.log_history` holds the
      figures of each layer beside them, as `unit_usage`. They are of what was counted since the log before.
    - Each checkpoint gets a file `unit_usage.json`: the figures of each layer and their means, of all that was counted
      since the checkpoint before, and the number of tokens. A share of dead units depends on it: few tokens choose
      few units.

    One step in `every` is counted, and those that end in a checkpoint as far as that is known when they begin: the last
    one, and those of `save_strategy="steps"`. Nothing that the model computes or draws depends on it. Soft steps have
    no winners: the controller's first choices are counted then. What a mask of two dimensions says is padding is left
    out. A model that is compiled is not counted, since its graph would have to be another one in those steps.

    Args:
        model (`nn.Module`): the model that is trained.
        every (`int`, *optional*, defaults to 10): steps of which one is counted.
        threshold (`float`, *optional*, defaults to 0.05): entropy of a layer, as a share of its largest value, below
            which its controller counts as collapsed: of 64 units one then gets about 97 % of the tokens.
        patience (`int`, *optional*, defaults to 500): steps for which the entropy must have stayed below. A dip is
            normal while a model has learned no more than how frequent each token is, and in its first steps.
    """

    logged_value = "lowest_unit_entropy"

    def __init__(self, model: nn.Module, every: int = 10, threshold: float = 0.05, patience: int = 500):
        super().__init__(threshold, patience)
        self.layers = sparse_feed_forwards(model)
        self.every = every
        self.usage = {name: UnitUsage(*layer.controller_bias.shape) for name, layer in self.layers.items()}
        self.steps = 0  # that were counted
        # Of the last log and the last checkpoint: the steps and the counts up to there.
        self.marks: dict[str, tuple[int, dict[str, Tensor]]] = {"log": (0, {}), "save": (0, {})}
        self.details: dict[str, dict[str, float]] = {}  # of the means that were logged last, until the history has them
        self.counts_steps = False

    def _observe(self, on: bool) -> None:
        self.steps += on
        for name, layer in self.layers.items():
            layer.observer = self.usage[name] if on else None

    def _take_since(self, mark: str) -> dict[str, UnitUsage]:
        """Take the counts since a mark, over all processes, none where no step was counted, and move the mark."""
        from accelerate.utils import reduce

        steps, before = self.marks[mark]
        if steps == self.steps:
            return {}
        found, now = {}, {}
        for name, usage in self.usage.items():
            now[name] = usage.numbers.clone()
            found[name] = UnitUsage(*self.layers[name].controller_bias.shape)
            new = now[name] - before[name].to(now[name].device) if name in before else now[name].clone()
            found[name].numbers = reduce(new, reduction="sum")
        self.marks[mark] = (self.steps, now)
        return found

    def values_to_log(self) -> dict[str, float]:
        """Take the means since the last log, for a Trainer that asks before it logs, so that all callbacks see them."""
        found = self._take_since("log")
        if not found:
            return {}
        self.details = {name: usage.figures() for name, usage in found.items()}
        return _mean_figures(self.details)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._observe(False)
        self.counts_steps = bool(self.layers) and not args.torch_compile
        if self.layers and args.torch_compile and state.is_world_process_zero:
            logger.info("What controllers choose is not counted: the model is compiled.")

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        saves = args.save_strategy == SaveStrategy.STEPS and step % state.save_steps == 0
        self._observe(self.counts_steps and (step % self.every == 0 or saves or step == state.max_steps))

    def on_step_end(self, args, state, control, **kwargs):
        self._observe(False)

    def on_train_end(self, args, state, control, **kwargs):
        self._observe(False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {} if logs is None else logs
        if "loss" in logs and self.counts_steps:
            means = self.values_to_log()  # nothing where Trainer has asked already
            logs.update(means)
            state.log_history[-1].update(means)
            if self.details:
                details = {name: _rounded(figures) for name, figures in self.details.items()}
                state.log_history[-1]["unit_usage"] = details
                self.details = {}
        super().on_log(args, state, control, logs=logs, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        """Write the file of a checkpoint, whole, after the rest of it."""
        found = self._take_since("save")
        if not found:
            return
        if not args.should_save:
            return
        layers = {name: usage.figures() for name, usage in found.items()}
        content = {
            "step": state.global_step,
            "tokens": next(iter(found.values())).tokens,
            "mean": _rounded(_mean_figures(layers)),
            "layers": {name: _rounded(figures) for name, figures in layers.items()},
        }
        text = json.dumps(content, indent=1) + "\n"
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        write_files(folder, lambda staged: Path(staged, USAGE_NAME).write_text(text, encoding="utf-8"))

    def warn(self, steps: int, state: Any, args: Any, value: float) -> None:
        history = next(entry["unit_usage"] for entry in reversed(state.log_history) if "unit_usage" in entry)
        name, figures = min(history.items(), key=lambda item: item[1]["entropy"])
        collapsed = sum(layer["entropy"] < self.threshold for layer in history.values())
        logger.warning(
            "A controller has collapsed: for %d steps up to step %d, a layer has sent nearly all tokens to the same "
            "units (%d of %d layers now; worst is %s with entropy %.3f of 1, where its most used units get %.0f %% and "
            "%.0f %% of its units nothing). Its probabilities are then 0 or 1, and have no gradient that would lead it "
            "back. Stop, and start again with a lower learning rate (now %g; try a third of it) or a longer warm-up, "
            "gradients clipped at 1.0 (--max_grad_norm, now %g), and, if that is not enough, more noise in its choice "
            "(ff_temperature, now %g; try 3 times as much) and fewer steps with a hard mask (ff_hard_probability, now "
            "%g), since soft ones train all units.",
            steps,
            state.global_step,
            collapsed,
            len(history),
            name,
            value,
            100 * figures["top_share"],
            100 * figures["dead_units"],
            args.learning_rate,
            args.max_grad_norm,
            self.layers[name].temperature,
            self.layers[name].hard_probability,
        )


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
