"""One runner of a race: a model with its optimiser, trained against a clock of its own core time.

Schedules run by time, not by steps, so that a slower step costs what it costs. On a CPU the clock is the process's CPU
time (one thread), which stands still while other programs have the core; on a GPU it is wall time between
synchronisations.
"""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, write_whole
from torch import nn
from tqdm.auto import tqdm


sys.path.insert(1, str(ROOT / "training"))
from hf_efficient.utils.process import bf16_support


@dataclass
class Recipe:
    """How a runner trains; the same for all of a race."""

    budget_s: float
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.06
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip: float = 1.0
    evaluations: int = 40
    schedule: str = "linear"  # to 0; or "cosine", to `final_share` of the highest rate
    final_share: float = 0.0
    decay_matrices_only: bool = False
    bf16: bool = True  # autocast, where the processor or GPU is fast at it


@dataclass
class Progress:
    """
    What a runner has done. `curve` holds (core seconds, steps, held-out loss in nats), and `parts` what else was found
    at each of its points; `probes` holds (core seconds, accuracy in percent, its standard error).
    """

    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    train_loss: list[tuple[float, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    probes: list[tuple[float, float, float]] = field(default_factory=list)


def core_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if what `path` was made with is not what is wanted now.
    """
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        said = "; ".join(f"{name} was {before.get(name)} and is {now[name]} now" for name in changed)
        raise ValueError(f"{path} was made otherwise: {said}. Use that, or another --output_dir.")


class Runner(ABC):
    """
    What all races share: turns, schedule, evaluations when they are due, and a state that survives a kill.

    A race says what is learned: `batches` that follow the steps already done, the loss of one, the held-out loss.
    """

    def __init__(self, name: str, model: nn.Module, recipe: Recipe, seed: int, device: torch.device):
        self.name, self.recipe, self.seed, self.device = name, recipe, seed, device
        self.model: Any = model.to(device).train()
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True
        )
        self.progress = Progress()
        # What is carried from step to step besides model and optimiser: tensors in lists and dicts.
        self.carried: dict[str, Any] = {}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            flat = parameter.dim() < 2 and self.recipe.decay_matrices_only
            (free if flat else decayed).append(parameter)
        groups = ((decayed, self.recipe.weight_decay), (free, 0.0))
        return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]

    @abstractmethod
    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches on the device from step `progress.steps` on, without end."""

    @abstractmethod
    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor: ...

    @abstractmethod
    def evaluate(self) -> float:
        """Held-out loss in nats."""

    def before_step(self) -> None:  # noqa: B027  (a race may need nothing here)
        """Called before each forward pass."""

    def before_update(self) -> None:  # noqa: B027  (a race may need nothing here)
        """Called when gradients are clipped, before the optimiser's step."""

    def after_update(self) -> None:  # noqa: B027  (a race may need nothing here)
        """Called after the optimiser's step, while gradients are still there."""

    def resume_critical_args(self) -> dict[str, Any]:
        """What a run can't be taken up with otherwise, besides its recipe: plain values."""
        return {}

    @property
    def finished(self) -> bool:
        return self.progress.seconds >= self.recipe.budget_s

    def _learning_rate(self) -> float:
        recipe = self.recipe
        done = min(self.progress.seconds / recipe.budget_s, 1.0)
        if done < recipe.warmup:
            return recipe.learning_rate * done / recipe.warmup
        left = 1.0 - (done - recipe.warmup) / (1.0 - recipe.warmup)
        if recipe.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return recipe.learning_rate * (recipe.final_share + (1.0 - recipe.final_share) * left)

    def autocast(self):
        enabled = self.recipe.bf16 and bf16_support() is not None
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def run_slice(self, seconds: float) -> None:
        """Train for `seconds` of core time, or to the end of the budget; evaluations do not count."""
        stop = min(self.progress.seconds + seconds, self.recipe.budget_s)
        batches = self.batches()
        while self.progress.seconds < stop:
            started = core_time(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            self.before_step()
            with self.autocast():
                loss = self.loss(next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.before_update()
            self.optimizer.step()
            self.after_update()
            self.optimizer.zero_grad(set_to_none=True)
            self.progress.steps += 1
            self.progress.seconds += core_time(self.device) - started
            if self.progress.steps % 20 == 0:
                self.progress.train_loss.append((self.progress.seconds, loss.item()))
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"{self.name}: the loss is {loss.item()} after {self.progress.steps} steps.")
            self._evaluate_when_due()

    def _evaluate_when_due(self) -> None:
        interval = self.recipe.budget_s / self.recipe.evaluations
        if self.finished or self.progress.seconds >= interval * (1 + len(self.progress.curve)):
            self.model.eval()
            with torch.no_grad():
                value = self.evaluate()
            self.model.train()
            self.progress.curve.append((self.progress.seconds, self.progress.steps, value))

    def save(self, folder: Path) -> None:
        state = {
            "objective": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "recipe": {**asdict(self.recipe), **self.resume_critical_args()},
            "carried": self.carried,
        }
        write_whole(folder / f"{self.name}.pt", lambda path: torch.save(state, path))

    def load(self, folder: Path) -> bool:
        """
        Take up a saved state; False if there is none.

        Raises:
            ValueError: if it was trained by another recipe.
        """
        path = folder / f"{self.name}.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        refuse_changes(path, state.get("recipe", {}), {**asdict(self.recipe), **self.resume_critical_args()})
        self.model.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.carried = state.get("carried", {})
        return True


def race(runners: Sequence[Runner], folder: Path, slice_s: float, save_every: int = 10) -> None:
    """Slices in turn until all have used their budget; all states are saved every `save_every` rounds."""
    resumed = [runner.load(folder) for runner in runners]
    if any(resumed):
        print(f"Going on from {folder}: {', '.join(f'{r.name} {r.progress.seconds:.0f} s' for r in runners)}")
    total = sum(runner.recipe.budget_s for runner in runners)
    with tqdm(total=round(total), unit="core-s", initial=round(sum(r.progress.seconds for r in runners))) as bar:
        turn = 0
        while not all(runner.finished for runner in runners):
            for runner in runners:
                if not runner.finished:
                    runner.run_slice(slice_s)
            turn += 1
            bar.n = round(sum(runner.progress.seconds for runner in runners))
            bar.set_postfix({r.name: f"{r.progress.curve[-1][2]:.3f}" for r in runners if r.progress.curve})
            if turn % save_every == 0:
                for runner in runners:
                    runner.save(folder)
    for runner in runners:
        runner.save(folder)
