"""One runner of a race: an objective with its optimiser, trained against a clock of its own core time.

Schedules run by time, not by steps, so that a slower step costs what it costs. On a CPU the clock is the process's CPU
time (one thread), which stands still while other programs have the core; on a GPU it is wall time between
synchronisations.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from environment import ROOT, write_whole
from torch import nn

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.mlm import MaskedLMObjective


sys.path.insert(1, str(ROOT / "training"))
from pretrain_args import bf16_support


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


@dataclass
class Progress:
    """What a runner has done. `curve` holds (core seconds, steps, held-out loss in nats)."""

    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    train_loss: list[tuple[float, float]] = field(default_factory=list)


def core_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Runner:
    def __init__(
        self,
        name: str,
        objective: MaskedLMObjective,
        rows: Dataset,
        collator: MaskingCollator,
        held_out: list[dict[str, torch.Tensor]],
        recipe: Recipe,
        seed: int,
        device: torch.device,
    ):
        self.name, self.recipe, self.seed, self.device = name, recipe, seed, device
        self.objective: MaskedLMObjective = objective.to(device).train()  # type: ignore[arg-type]
        self.rows, self.collator, self.held_out = rows, collator, held_out
        self.optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.progress = Progress()

    @property
    def finished(self) -> bool:
        return self.progress.seconds >= self.recipe.budget_s

    def _learning_rate(self) -> float:
        done = min(self.progress.seconds / self.recipe.budget_s, 1.0)
        if done < self.recipe.warmup:
            return self.recipe.learning_rate * done / self.recipe.warmup
        return self.recipe.learning_rate * (1.0 - done) / (1.0 - self.recipe.warmup)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches that follow the steps already done: order and masks depend on seed and epoch alone."""
        batch_size = self.recipe.batch_size
        per_epoch = len(self.rows) // batch_size
        while True:
            epoch, start = divmod(self.progress.steps, per_epoch)
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + 7919 * epoch))
            self.collator.set_epoch(epoch)
            for index in range(start, per_epoch):
                chosen = order[index * batch_size : (index + 1) * batch_size].tolist()
                batch = self.collator([self.rows[place] for place in chosen])
                # All rows are full, and no mask is the fast path of every contestant.
                yield {key: tensor.to(self.device) for key, tensor in batch.items() if key != "attention_mask"}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16_support() is not None)

    def run_slice(self, seconds: float) -> None:
        """Train for `seconds` of core time, or to the end of the budget; evaluations do not count."""
        stop = min(self.progress.seconds + seconds, self.recipe.budget_s)
        batches = self._batches()
        while self.progress.seconds < stop:
            started = core_time(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            with self._autocast():
                loss = self.objective(**next(batches)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.recipe.clip)
            self.optimizer.step()
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
            self.progress.curve.append((self.progress.seconds, self.progress.steps, self.evaluate()))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out masked-LM loss in nats: the mean over all targets of fixed masks."""
        self.objective.eval()
        total, count = 0.0, 0
        for batch in self.held_out:
            targets = int((batch["labels"] != -100).sum())
            with self._autocast():
                total += self.objective(**batch).loss.item() * targets
            count += targets
        self.objective.train()
        return total / count

    def save(self, folder: Path) -> None:
        state = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        write_whole(folder / f"{self.name}.pt", lambda path: torch.save(state, path))

    def load(self, folder: Path) -> bool:
        """Take up a saved state; False if there is none."""
        path = folder / f"{self.name}.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True
