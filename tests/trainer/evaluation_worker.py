"""Evaluations of toy models. Run as a script, it is one process of several that share the rows."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_efficient.trainer import EfficientTrainer
from hf_efficient.utils.process import settle_process_group
from tests.trainer.toy_trainer import Rows, Toy, ToyOutput


# Of the 22 rows two processes fill up last batches of 1 + 1, 3 + 1 (of 3), 4 + 2 (of 4) and 2 + 0 (of 5).
BATCH_SIZES = (1, 3, 4, 5)


class CountingToy(Toy):
    """Says that its loss is a mean over all targets."""

    accepts_loss_kwargs = True


@dataclass
class OutputWithRows(ToyOutput):
    first_column: torch.Tensor | None = None


class CountingRowsToy(CountingToy):
    """Has a part that is a mean over rows, targets or not."""

    def forward(self, x, labels, num_items_in_batch=None, **kwargs):
        output = super().forward(x, labels, num_items_in_batch, **kwargs)
        return OutputWithRows(**output, first_column=x[:, 0].mean())

    def part_counts(self, outputs, batch):
        return {"first_column": torch.tensor(float(len(batch["x"])))}


MODELS = {"targets": CountingToy, "targets-and-rows": CountingRowsToy}


def evaluate(folder, model, batch_size):
    """The means of an evaluation by all processes."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=batch_size,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = EfficientTrainer(MODELS[model](), args, eval_dataset=Rows())
    metrics = trainer.evaluate()
    return {name: metrics[name] for name in ("eval_loss", "eval_first_id", "eval_first_column") if name in metrics}


def main():
    folder = Path(sys.argv[1])
    found = {f"{model} {size}": evaluate(folder, model, size) for model in MODELS for size in BATCH_SIZES}
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    settle_process_group()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
