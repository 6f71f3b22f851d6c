"""Methods compared at equal time: models that take turns, each trained against a clock of its own core time.

Schedules run by time, so that a slower step costs what it costs, or by steps, where the same tokens are what is to be
compared. On a CPU the clock is the process's CPU
time (one thread), which stands still while other programs have the core; on a GPU it is wall time between
synchronisations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_efficient.utils.process import bf16_support

from .environment import write_whole
from .timing import core_time


@dataclass
class TrainConfig:
    """Hyperparameters of a run that is limited by time, or by steps where `budget_steps` is given."""

    budget_s: float = math.inf
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.06
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip: float = 1.0
    evaluations: int = 40
    schedule: str = "linear"  # to 0; or "cosine", to `final_fraction` of the highest rate
    final_fraction: float = 0.0
    decay_matrices_only: bool = False
    bf16: bool = True  # autocast, where the processor or GPU is fast at it
    budget_steps: int | None = None


@dataclass
class Progress:
    """
    Progress of a run. `curve` holds (core seconds, steps, validation loss in nats), and `parts` the components of the
    loss at each of its points; `probes` holds (core seconds, accuracy in percent, its standard error).
    """

    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    train_loss: list[tuple[float, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    probes: list[tuple[float, float, float]] = field(default_factory=list)


def refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Compare the settings that a file was made with to those that are wanted now.

    Raises:
        ValueError: if one of them has changed.
    """
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        said = "; ".join(f"{name} was {before.get(name)} and is {now[name]} now" for name in changed)
        raise ValueError(f"{path} was made otherwise: {said}. Use that, or another --output_dir.")


class TimedTrainer(ABC):
    """
    Trainer of one model for a given time: slices, schedule, evaluations when they are due, and a state that survives
    a kill.

    A subclass says what is learned: `batches` that follow the steps already done, the loss of one, the validation loss.

    Args:
        name (`str`): of the run, and of its saved state.
        model (`nn.Module`): the model to train.
        config (`TrainConfig`): hyperparameters.
        seed (`int`): decides the order of the data.
        device (`torch.device`): where to train.
    """

    def __init__(self, name: str, model: nn.Module, config: TrainConfig, seed: int, device: torch.device):
        self.name, self.config, self.seed, self.device = name, config, seed, device
        self.model: Any = model.to(device).train()
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
        self.progress = Progress()
        # Tensors in lists and dicts that go from step to step, besides model and optimiser.
        self.carried: dict[str, Any] = {}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            flat = parameter.dim() < 2 and self.config.decay_matrices_only
            (free if flat else decayed).append(parameter)
        groups = ((decayed, self.config.weight_decay), (free, 0.0))
        return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]

    @abstractmethod
    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches on the device from step `progress.steps` on, without end."""

    @abstractmethod
    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor: ...

    @abstractmethod
    def evaluate(self) -> float:
        """Validation loss in nats."""

    def before_step(self) -> None:  # noqa: B027  (a subclass may need nothing here)
        """Called before each forward pass."""

    def before_update(self) -> None:  # noqa: B027  (a subclass may need nothing here)
        """Called when gradients are clipped, before the optimiser's step."""

    def after_update(self) -> None:  # noqa: B027  (a subclass may need nothing here)
        """Called after the optimiser's step, while gradients are still there."""

    def resume_critical_args(self) -> dict[str, Any]:
        """Plain values, besides the hyperparameters, that must be the same when a run is taken up again."""
        return {}

    @property
    def share_done(self) -> float:
        """Share of the budget that is used."""
        if self.config.budget_steps is not None:
            return self.progress.steps / self.config.budget_steps
        return self.progress.seconds / self.config.budget_s

    @property
    def finished(self) -> bool:
        return self.share_done >= 1.0

    def _learning_rate(self) -> float:
        config = self.config
        done = min(self.share_done, 1.0)
        if done < config.warmup:
            return config.learning_rate * done / config.warmup
        left = 1.0 - (done - config.warmup) / (1.0 - config.warmup)
        if config.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * left)

    def autocast(self):
        enabled = self.config.bf16 and bf16_support() is not None
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def run_slice(self, seconds: float) -> None:
        """Train for `seconds` of core time, or to the end of the budget; evaluations do not count."""
        stop = min(self.progress.seconds + seconds, self.config.budget_s)
        batches = self.batches()
        while self.progress.seconds < stop and not self.finished:
            started = core_time(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            self.before_step()
            with self.autocast():
                loss = self.loss(next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
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
        if self.finished or self.share_done * self.config.evaluations >= 1 + len(self.progress.curve):
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
            "config": {**asdict(self.config), **self.resume_critical_args()},
            "carried": self.carried,
        }
        write_whole(folder / f"{self.name}.pt", lambda path: torch.save(state, path))

    def load(self, folder: Path) -> bool:
        """
        Take up a saved state; False if there is none.

        Raises:
            ValueError: if it was trained by another config.
        """
        path = folder / f"{self.name}.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        refuse_changes(path, state.get("config", {}), {**asdict(self.config), **self.resume_critical_args()})
        self.model.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.carried = state.get("carried", {})
        return True


def _percents(trainers: Sequence[TimedTrainer]) -> int:
    return round(sum(100 * min(trainer.share_done, 1.0) for trainer in trainers))


def train_interleaved(trainers: Sequence[TimedTrainer], folder: Path, slice_s: float, save_every: int = 10) -> None:
    """
    Train several models in turn, until each has used its budget.

    Args:
        trainers (`Sequence[TimedTrainer]`): those that take turns; saved states are taken up.
        folder (`Path`): keeps their states.
        slice_s (`float`): core seconds of a turn.
        save_every (`int`, defaults to 10): rounds after which all states are saved.
    """
    resumed = [trainer.load(folder) for trainer in trainers]
    if any(resumed):
        print(f"Going on from {folder}: {', '.join(f'{t.name} {t.progress.seconds:.0f} s' for t in trainers)}")
    with tqdm(total=100 * len(trainers), unit="%", initial=_percents(trainers)) as bar:
        turn = 0
        while not all(trainer.finished for trainer in trainers):
            for trainer in trainers:
                if not trainer.finished:
                    trainer.run_slice(slice_s)
            turn += 1
            bar.n = _percents(trainers)
            bar.set_postfix({t.name: f"{t.progress.curve[-1][2]:.3f}" for t in trainers if t.progress.curve})
            if turn % save_every == 0:
                for trainer in trainers:
                    trainer.save(folder)
    for trainer in trainers:
        trainer.save(folder)


def time_to_reach(curve: list[list[float]], loss: float) -> float | None:
    """Find the core seconds at which a validation curve first passes `loss`, between two evaluations by a straight
    line; `None` if it never does."""
    before: tuple[float, float] | None = None
    for seconds, _, value in curve:
        if value <= loss:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (seconds, value)
    return None


def draw_curves(comparisons: list[dict[str, Any]], names: dict[str, str], path: Path, panels: dict[str, str]) -> None:
    """
    Draw the runs of several comparisons over core time: one colour a method, one line a run, one panel a quantity.

    Args:
        comparisons (`list[dict]`): runs by name; a run holds lists of (core seconds, steps, value), with a standard
            error behind where a band of two of them on each side is to be drawn.
        names (`dict[str, str]`): what to call them.
        path (`Path`): the picture.
        panels (`dict[str, str]`): for each panel the list of a run to draw, and the label of its axis. Runs that have
            no such list are not in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(7.2 * len(panels) ** 0.6, 4.2), layout="constrained", squeeze=False
    )
    colours: dict[str, str] = {}
    lines: dict[str, Any] = {}
    for axes, (key, label) in zip(grid[0], panels.items(), strict=True):
        for name, run in [item for runs in comparisons for item in runs.items() if item[1].get(key)]:
            colour = colours.setdefault(name, f"C{len(colours)}")
            minutes = [point[0] / 60 for point in run[key]]
            values = [point[2] for point in run[key]]
            (line,) = axes.plot(minutes, values, color=colour, linewidth=1.6)
            if len(run[key][0]) > 3:
                errors = [2 * point[3] for point in run[key]]
                low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
                axes.fill_between(minutes, low, high, color=colour, alpha=0.12, linewidth=0)
            lines.setdefault(names.get(name, name), line)
        axes.set_xlabel("core time, minutes")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if len(panels) == 1:
        grid[0][0].legend(list(lines.values()), list(lines))
    else:
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
