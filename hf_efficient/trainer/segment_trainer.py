"""Training and evaluation of language models on long texts cut into segments, with memory between them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from ..utils.cache_naming import CACHE_NAME
from ..utils.labels import IGNORE_INDEX
from .segment_memory import detach, load_memory, save_memory, takes, takes_memory
from .trainer import EfficientTrainer


def collate_segments(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch rows of `input_ids` and shifted `labels`, under the argument names of transformers' models."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**batch, "shift_labels": batch["labels"]}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """
    The loss of each token, as `preprocess_logits_for_metrics` of a Trainer: the logits of a whole text would not fit
    into memory.

    Args:
        logits (`Tensor` of shape `(batch, length, vocabulary)`): or `(batch, length)`, taken for losses already.
        labels (`Tensor` of shape `(batch, length)`): the target of each position; -100 where there is none.

    Returns:
        `Tensor` of shape `(batch, length)`: float32, in nats; 0 where there is nothing to predict.
    """
    if logits.dim() == labels.dim():
        return logits
    losses = nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
    return losses.view_as(labels)


class SegmentScore(NamedTuple):
    """Negative log-likelihood of a text under a model.

    Args:
        nats (`float`): total negative log-likelihood.
        tokens (`int`): number of tokens predicted.
    """

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token; its exponential is the perplexity, and over log 2 it is bits per token."""
        return self.nats / self.tokens


@torch.no_grad()
def evaluate_segments(
    model: nn.Module,
    segments: Any,
    batch_size: int | None = None,
    attention_window: int | None = None,
    progress: bool = True,
) -> SegmentScore:
    """
    Predict a text of any length, by one process.

    A text in columns is gone through with memory from segment to segment if the model has one: the columns' lengths of
    segment and memory may be larger than in training, as in the paper (3,072 for enwik8, and one column for the final
    number). Each position attends to itself and `attention_window` positions before it.

    Args:
        model (`nn.Module`): a causal language model that takes `shift_labels`; left in evaluation mode.
        segments (`Dataset`): rows of `input_ids` and `labels` that are already moved, such as those of
            `hf_efficient.data.segments`; with an attribute `columns` it is a text in columns.
        batch_size (`int`, *optional*): rows a step: `segments.columns`, else 1.
        attention_window (`int`, *optional*): the length of a segment by default.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        [`SegmentScore`]

    Raises:
        ValueError: if the text is in columns of another number than the rows of a step, and the model has a memory.
    """
    from tqdm.auto import tqdm

    columns: Any = getattr(segments, "columns", None)
    batch_size = batch_size or columns or 1
    carries = columns is not None and takes_memory(model)
    if carries:
        _check_columns(columns, batch_size)
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {"return_memory": True} if carries else {}
    if carries and takes(model, "attention_window"):
        arguments["attention_window"] = attention_window or len(segments[0]["input_ids"])
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    loader = DataLoader(segments, batch_size, collate_fn=collate_segments)
    for batch in tqdm(loader, desc="Evaluating", unit=" steps", disable=not progress):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        outputs = model(**batch, **arguments)
        losses = getattr(outputs, "token_losses", None)
        losses = token_losses(outputs.logits if losses is None else losses, batch["labels"])
        nats += losses.cpu().double().sum()  # GPUs of Apple have no float64
        tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        if carries:
            arguments["memory"] = outputs.memory
    return SegmentScore(nats.item(), tokens)


def _check_columns(columns: int, rows: int) -> None:
    if columns != rows:
        raise ValueError(
            f"The text is cut into {columns} columns, but a step takes {rows} rows (batch size times number of "
            f"processes), so memory would pass from one column to another. Cut it with columns={rows}."
        )


class SegmentTrainer(EfficientTrainer):
    """
    [`EfficientTrainer`] for causal language models on segments of a long text.

    Where the text is in columns (the dataset has an attribute `columns`, see `hf_efficient.data.segments`) and the
    model has a memory (it takes `memory` and `return_memory`, as SRU++ does), memory is handed on from each batch to
    the next, detached:

    - over training steps and the batches that a step accumulates; it is empty at the start of each epoch;
    - each process has a memory of its own, for its own columns;
    - checkpoints hold it, and training that is resumed from one goes on with it, also where the same columns are now
      dealt out to another number of processes;
    - evaluation has a memory of its own, which starts empty, and attends to as many positions back as its segments are
      long. These may be longer than in training.

    Other models and datasets are trained as by any Trainer.

    Source: Lei, arXiv 2102.12459, and its training code, whose rules these are.

    Args:
        carry_state (`bool`, *optional*, defaults to `True`):
            Whether to hand memory on, where there is one.
        kwargs:
            See [`EfficientTrainer`]. Rows are `input_ids` and `labels` that are already moved. The default collator is
            [`collate_segments`], and metrics get token losses in place of logits, by [`token_losses`].

    Raises:
        ValueError: for label smoothing, which would move the labels again, and, when a text in columns is loaded,
            if their number is not that of the rows of a step.
    """

    def __init__(self, *args: Any, carry_state: bool = True, **kwargs: Any):
        kwargs.setdefault("data_collator", collate_segments)
        kwargs.setdefault("preprocess_logits_for_metrics", token_losses)
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError("Labels of segments are already moved, and label smoothing would move them again: use 0.")
        trained: Any = self.model
        self._has_memory = carry_state and takes_memory(trained)
        self._has_window = takes(trained, "attention_window")
        self._carries = {"train": False, "eval": False}
        self._memory: dict[str, Any] = {"train": None, "eval": None}
        self._restore_from: str | None = None
        # Rows are padded, and the loss is a mean over targets however the batches are cut.
        self._counts_targets = self.model_accepts_loss_kwargs

    def _carries_over(self, loader: DataLoader) -> bool:
        """Tell whether memory is handed on between the batches of a loader."""
        columns = getattr(loader.dataset, "columns", None)
        if columns is None or not self._has_memory:
            return False
        _check_columns(columns, loader.total_batch_size)  # type: ignore[attr-defined]  # accelerate's loaders have it
        return True

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        self._carries["train"] = self._carries_over(loader)
        return loader

    def evaluation_loop(self, dataloader, *args: Any, **kwargs: Any):
        self._carries["eval"] = self._carries_over(dataloader)
        self._memory["eval"] = None
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._memory["eval"] = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        if "shift_labels" in inputs:  # only then are labels moved already; other collators leave that to the model
            inputs = {**inputs, "shift_labels": inputs["labels"]}
        if self._carries[mode]:
            if self._restore_from is not None and model.training:
                self._memory[mode] = self._restored_memory(model, inputs["input_ids"])
            inputs |= {"memory": self._memory[mode], "return_memory": True}
            if mode == "eval" and self._has_window:
                inputs["attention_window"] = inputs["input_ids"].shape[1]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self._carries[mode]:
            self._memory[mode] = detach(outputs.memory)
        return (loss, outputs) if return_outputs else loss

    def _restored_memory(self, model: nn.Module, input_ids: Tensor) -> Any:
        """Load the memory of a checkpoint, in the structure that the model itself returns."""
        folder, self._restore_from = self._restore_from, None
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            template = model(input_ids=input_ids[:, :1], return_memory=True).memory
        model.train()
        return load_memory(template, str(folder), len(input_ids), self.args.process_index, self.args.world_size)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None:
            # Models with an adaptive softmax give these in place of logits.
            ignored = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [CACHE_NAME])
            ignore_keys = [key for key in ignored if key != "token_losses"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # The methods below are Trainer's own and private, but the same from transformers 5.17 to 5.24.

    def _get_train_sampler(self, train_dataset=None):
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if hasattr(dataset, "columns") else super()._get_train_sampler(train_dataset)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        dataset: Any = self.train_dataset
        if hasattr(dataset, "set_epoch"):  # accelerate tells it to datasets in some cases only
            dataset.set_epoch(kwargs["epoch"])
        resumed = kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["steps_trained_in_current_epoch"] > 0
        self._restore_from = kwargs["resume_from_checkpoint"] if resumed and not self.args.ignore_data_skip else None
        self._memory["train"] = None
        super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._memory["train"] is not None:
            save_memory(self._memory["train"], output_dir, self.args.process_index, self.args.world_size)
