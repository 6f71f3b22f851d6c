"""A model, data and a trainer that take no time."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import ModelOutput

from hf_efficient.trainer import EfficientTrainer


@dataclass
class ToyOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    first_id: torch.Tensor | None = None
    sometimes: torch.Tensor | None = None


class Toy(nn.Module):
    """A linear model with dropout; `first_id` is the mean label, `sometimes` is defined for odd batches only."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(5, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, labels, num_items_in_batch=None, **kwargs):
        logits = self.linear(self.dropout(x)).squeeze(-1)
        kept = labels != -100
        squares = ((logits - labels) ** 2 * kept).sum()
        loss = squares / (num_items_in_batch if num_items_in_batch is not None else kept.sum())
        mean = (labels * kept).sum() / kept.sum()
        return ToyOutput(loss, logits, mean, torch.where(labels[0] % 2 == 1, mean, torch.nan))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        return {"x": torch.tensor(rng.random(5), dtype=torch.float32), "labels": float(i) if i % 3 else -100.0}


def make_trainer(folder, callbacks=(), dropout=0.1, **kwargs):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "logging_steps": 3,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
    }
    args = TrainingArguments(**{**settings, **kwargs})
    return EfficientTrainer(Toy(dropout), args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks))


def losses(trainer):
    """Every log but the last, which holds run times."""
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history[:-1]
    ]
