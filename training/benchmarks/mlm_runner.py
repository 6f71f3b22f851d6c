"""A runner of the masked-LM race."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from race_track import Recipe, Runner

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.mlm import MaskedLMObjective


class MaskedLMRunner(Runner):
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
        super().__init__(name, objective, recipe, seed, device)
        self.rows, self.collator, self.held_out = rows, collator, held_out

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

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).loss

    def evaluate(self) -> float:
        """Held-out masked-LM loss in nats: the mean over all targets of fixed masks."""
        total, count = 0.0, 0
        for batch in self.held_out:
            targets = int((batch["labels"] != -100).sum())
            with self.autocast():
                total += self.model(**batch).loss.item() * targets
            count += targets
        return total / count
