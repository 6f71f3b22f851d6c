"""A runner of the pretraining race: any objective, with or without notes, and the callbacks that Trainer calls."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from race_track import Recipe, Runner
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.utils.loss_averages import Means, part_counts


PROBES = 10  # of a run, besides that of its start; they cost nothing of its budget


def held_out_batches(rows: Dataset, collator: Any, count: int, batch_size: int, device: torch.device) -> list[dict]:
    """The first `count` held-out rows with masks, and samples, that never change."""
    batches = []
    for start in range(0, min(count, len(rows)), batch_size):
        batch = collator([rows[place] for place in range(start, min(start + batch_size, count, len(rows)))])
        batches.append({key: tensor.to(device) for key, tensor in batch.items() if key != "attention_mask"})
    return batches


class ObjectiveRunner(Runner):
    """
    Args:
        model (`PreTrainedModel`): an objective, with an `encoder`.
        rows, held_out_rows (`Dataset`): of `input_ids`, all of one length.
        collators (`tuple`): make batches of either; the masks of the first depend on the epoch that it is told.
        callbacks (`list[TrainerCallback]`): those of the objective and of its notes.
        probe (`Callable`): `accuracy` of an encoder in percent and its `standard_error`.
        held_out (`int`): rows to evaluate on.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        data: tuple[Dataset, Dataset],
        collators: tuple[Any, Any],
        callbacks: list[TrainerCallback],
        probe: Callable[[PreTrainedModel], dict[str, float]],
        recipe: Recipe,
        seed: int,
        device: torch.device,
        held_out: int = 320,
    ):
        super().__init__(name, model, recipe, seed, device)
        self.rows, self.collator = data[0], collators[0]
        self.held_out = held_out_batches(data[1], collators[1], held_out, recipe.batch_size, device)
        self.callbacks, self.probe = callbacks, probe
        self._arguments: Any = SimpleNamespace(
            device=device, learning_rate=recipe.learning_rate, max_grad_norm=recipe.clip
        )
        self._latest: dict[str, torch.Tensor] = {}

    @property
    def encoder(self) -> PreTrainedModel:
        return self.model.encoder

    @property
    def product(self) -> PreTrainedModel:
        """What is saved when the race is over."""
        return self.model.model if isinstance(self.model, MaskedLMObjective) else self.model.encoder

    def decisive(self) -> dict[str, Any]:
        config = self.model.config.to_diff_dict()
        sizes = ("encoder_config", "model_config", "transformers_version")  # which weights show, or do not matter
        settings = {f"objective.{name}": value for name, value in config.items() if name not in sizes}
        notes = getattr(self.model, "notes", None)
        return settings if notes is None else {**settings, "notes": dataclasses.asdict(notes.settings)}

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Order and masks depend on seed and epoch alone."""
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

    def _tell(self, event: str, **kwargs: Any) -> None:
        state = TrainerState(global_step=self.progress.steps, is_world_process_zero=True)
        for callback in self.callbacks:
            getattr(callback, event)(self._arguments, state, TrainerControl(), **kwargs)

    def run_slice(self, seconds: float) -> None:
        if not self.progress.probes:  # here, where no clock runs
            self._probe()
        super().run_slice(seconds)

    def before_step(self) -> None:
        self._tell("on_step_begin")

    def before_update(self) -> None:
        self._tell("on_pre_optimizer_step")

    def after_update(self) -> None:
        self._tell("on_optimizer_step")

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.model(**batch)
        self._latest = {name: value.detach() for name, value in output.items()}
        return output.loss

    def evaluate(self) -> float:
        """
        Held-out loss in nats, the mean over all targets of fixed masks: of masked LM, or of the generator beside a
        discriminator. The other parts of the objective go into `progress.parts`; of notes, which have parts in training
        only, those of the last step.
        """
        means = Means()
        for batch in self.held_out:
            with self.autocast():
                output = self.model(**batch)
            means.add(output, *part_counts(self.model, output, batch))
        parts = means.take(lambda totals: totals)
        notes = {name: value.item() for name, value in self._latest.items() if name not in parts}
        parts |= {name: value for name, value in notes.items() if math.isfinite(value)}
        self.progress.parts.append(parts)
        self._tell("on_log", logs=parts)
        self._probe_when_due()
        return parts.get("generator_loss", parts["loss"])

    def _probe_when_due(self) -> None:
        if self.finished or self.progress.seconds >= self.recipe.budget_s / PROBES * len(self.progress.probes):
            self._probe()

    def _probe(self) -> None:
        self.model.eval()
        with self.autocast():
            found = self.probe(self.encoder)
        self.model.train()
        self.progress.probes.append((self.progress.seconds, found["accuracy"], found["standard_error"]))
