"""`Trainer` with checkpoints that are whole or absent, the parts of a loss in the log, and exact resuming."""

import contextlib
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, rotate_checkpoints

from ..data.row_streams import RowStream
from ..utils.atomic_write import STAGING_NAME, full_disk_named
from ..utils.labels import IGNORE_INDEX
from ..utils.loss_averages import Means, part_counts, scalar_parts
from .checkpoints import (
    MANIFEST_NAME,
    TRAINER_STATE_NAME,
    check_trainer_state,
    find_damage,
    find_last_checkpoint,
    put_in_place,
    restoring,
)
from .numbered_rows import NumberedRows
from .progress import in_lines


logger = logging.getLogger(__name__)

_TARGETS = ("labels", "shift_labels", "start_positions", "end_positions")


class LogOnSaveCallback(TrainerCallback):
    """A checkpoint does not hold the sums of an unfinished logging window, so the window ends where one is
    saved."""

    def _log_if_saving(self, args, state, control, **kwargs):
        may_save = control.should_save or (args.save_strategy == SaveStrategy.BEST and control.should_evaluate)
        if may_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        return control

    on_step_end = _log_if_saving
    on_epoch_end = _log_if_saving


class SetEpochCallback(TrainerCallback):
    """Passes the epoch to a collator that has `set_epoch`, before the epoch's data loader starts."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


class EfficientTrainer(Trainer):
    """
    [`~transformers.Trainer`] with eight additions.

    - A checkpoint is whole or absent: it is written to a staging folder in the output directory, gets a
      manifest of sizes and checksums, and is then renamed; older ones are deleted after that.
      `train(resume_from_checkpoint=True)` takes the newest that agrees with its manifest, and starts from the
      beginning if there is none.
    - Resuming gives the same loss history as a run that was not interrupted, to the last bit on a CPU: a
      logging window always ends where a checkpoint is saved.
    - Scalar fields of the model's output other than the loss are logged: in training as means over the
      logging window, in evaluation as `eval_<name>`. A field should be a mean over the targets of its own
      batch; batches are weighted by their number of labels, so that accumulated batches count as one large
      batch. For fields that are means over something else, a model has `part_counts(outputs, inputs)`, which gives
      their numbers by name. Values that are not finite are left out. Name the fields in
      `config.keys_to_ignore_at_inference`, or `predict` returns them.
    - The evaluation loss of a model that declares `accepts_loss_kwargs = True` is the mean over all targets, whatever
      the batches and processes; Trainer's own is a mean over batches. A batch without targets weighs nothing in either.
      A model whose loss has means over different things says by `loss_of_parts(parts)` what it is, given the means over
      the whole evaluation.
    - A model whose forward pass takes `num_tokens_in_batch` gets it in training: the number of tokens, padding not
      counted, wherever Trainer's `num_items_in_batch` counts targets.
    - What a callback's method `values_to_log()` returns is logged with the training loss, so that other callbacks see
      it.
    - A collator with a method `set_epoch` is told the epoch; evaluation may have a collator of its own, and drops no
      rows.
    - What is logged is printed as rows of a table, not as dictionaries.
    - A training set that is a [`~hf_efficient.data.row_streams.RowStream`] is read by each process for itself, and
      checkpoints hold its place, so that nothing is read again. It takes `max_steps`.

    Args:
        eval_data_collator (`Callable`, *optional*):
            Collator for evaluation and prediction, `data_collator` by default.
        kwargs:
            See [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, eval_data_collator: Callable | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Pinning does nothing but warn where there is no accelerator to copy to.
        self.args.dataloader_pin_memory = self.args.dataloader_pin_memory and torch.accelerator.is_available()
        self.eval_data_collator = eval_data_collator
        self._means = {"train": Means(), "eval": Means()}
        self._staging = False
        # Said by the model itself; Trainer also assumes it of any model that takes `**kwargs`.
        self._counts_targets = getattr(self.model, "accepts_loss_kwargs", None) is True
        self._counts_tokens = "num_tokens_in_batch" in inspect.signature(self._own_model.forward).parameters
        self._numbered_rows: NumberedRows | None = None  # of a training set that is a stream
        self._only_repeats = False  # whether a batch holds none but rows that fill up the last one
        self.callback_handler.callbacks = [
            in_lines(callback)
            for callback in self.callback_handler.callbacks
            if not getattr(callback, "for_plain_trainer", False)
        ]
        self.add_callback(LogOnSaveCallback())
        if hasattr(self.data_collator, "set_epoch"):
            self.add_callback(SetEpochCallback(self.data_collator))

    @property
    def _own_model(self) -> Any:
        """The model as it was written, without what is wrapped around it."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @contextlib.contextmanager
    def _evaluation_data(self) -> Iterator[None]:
        collator, drop_last = self.data_collator, self.args.dataloader_drop_last
        self.data_collator = self.eval_data_collator or collator
        self.args.dataloader_drop_last = False  # a matter of training: every row is evaluated
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, RowStream):
            return super().get_train_dataloader()
        self._numbered_rows = NumberedRows(self.train_dataset, self.args, self._train_batch_size)
        return self._numbered_rows.loader(self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        with self._evaluation_data():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._evaluation_data():
            return super().get_test_dataloader(test_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._counts_tokens and self.args.n_gpu <= 1:  # nn.DataParallel has no way to hand on a number
            masks = [b["attention_mask"] if "attention_mask" in b else torch.ones_like(b["input_ids"]) for b in batches]
            # As Trainer counts targets: over processes, if it is so set, and each token once.
            tokens = [{"labels": torch.where(mask.bool(), 0, IGNORE_INDEX)} for mask in masks]
            num_tokens = self._get_num_items_in_batch(tokens, device)
            batches = [{**batch, "num_tokens_in_batch": num_tokens} for batch in batches]
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if isinstance(outputs, Mapping) and not self._only_repeats:
            parts = scalar_parts(outputs)
            weight, counts = part_counts(self._own_model, outputs, batch, self._loss_shifts_labels)
            if not model.training:
                self._add_evaluation_loss(parts, counts, loss, batch, weight, num_items_in_batch)
            self._means["train" if model.training else "eval"].add(parts, weight, counts)
        return (loss, outputs) if return_outputs else loss

    def _add_evaluation_loss(self, parts, counts, loss, batch, num_targets, num_items_in_batch) -> None:
        """Add the mean loss of a batch in evaluation to its `parts`, and to `counts` the number that it is a mean over,
        so that a batch without targets weighs nothing."""
        if self._counts_targets:
            if num_items_in_batch is not None:
                processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                loss = loss * num_items_in_batch / (processes * num_targets)
            parts["loss"] = loss
        elif self.accelerator.num_processes == 1:  # Trainer's own, a mean over rows
            parts["loss"], counts["loss"] = loss, find_batch_size(batch) * (num_targets > 0)

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._means["train"].take(self._sum_over_processes)}
            for callback in self.callback_handler.callbacks:
                logs = {**logs, **getattr(callback, "values_to_log", dict)()}
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._means["eval"] = Means()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        parts = self._means["eval"].take(self._sum_over_processes)
        loss_of_parts = getattr(self._own_model, "loss_of_parts", None)
        if loss_of_parts is not None:
            parts["loss"] = loss_of_parts(parts)
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in parts.items()}
        exact = {name: metrics.pop(name) for name in [f"{metric_key_prefix}_loss"] if name in metrics}
        return output._replace(metrics={**metrics, **(output.metrics or {}), **exact})

    def prediction_step(self, model, inputs, *args, **kwargs):
        loader = self.accelerator.gradient_state
        if self._counts_targets and loader.end_of_dataloader and loader.remainder > 0:
            # Processes get equally large last batches, filled up with rows that were already counted.
            targets = {name: inputs[name].clone() for name in _TARGETS if isinstance(inputs.get(name), Tensor)}
            kept = max(loader.remainder - self.args.process_index * find_batch_size(inputs), 0)
            for tensor in targets.values():
                tensor[kept:] = IGNORE_INDEX
            inputs = {**inputs, **targets}
            if hasattr(self._own_model, "part_counts"):  # which counts more than targets
                self._only_repeats = kept == 0
                inputs = {name: value[: max(kept, 1)] for name, value in inputs.items()}
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._only_repeats = False

    # The methods below that start with an underscore are Trainer's own and private, but the same from
    # transformers 5.17 to 5.24.

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_NAME) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder):
        # Uploads run in the background, so they must read from the folder's final place.
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / STAGING_NAME / name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            with full_disk_named(staged):
                super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self._name_best_checkpoint(run_dir)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()

        if self.args.should_save:
            put_in_place(staged, run_dir / name)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and staged.is_dir():  # a node with a disk of its own
            put_in_place(staged, run_dir / name)
        self.accelerator.wait_for_everyone()

        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with restoring(resume_from_checkpoint, "*.safetensors", "*.index.json", "pytorch_model*.bin"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with restoring(checkpoint, "optimizer*", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with restoring(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with restoring(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._numbered_rows is not None:
            self._numbered_rows.save(output_dir)

    def _run_epoch(self, *args, **kwargs):
        # A finished run that is resumed has nothing left to do; Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._numbered_rows is not None and kwargs["steps_trained_in_current_epoch"] > 0:
            with restoring(kwargs["resume_from_checkpoint"], self._numbered_rows.file_name):
                self._numbered_rows.load(kwargs["resume_from_checkpoint"])
        super()._run_epoch(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result):
        # A tied weight is saved once, under its source's name, and comes back with it: it is not missing.
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
        loaded = [key for key in load_result.missing_keys if key in tied and tied[key] not in load_result.missing_keys]
        missing = [key for key in load_result.missing_keys if key not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _name_best_checkpoint(self, run_dir: Path) -> None:
        """Trainer looked for the best checkpoint in the staging folder: name it by its final place."""
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.state.best_global_step == self.state.global_step or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _choose_checkpoint(self, requested: str | bool | None) -> str | None:
        output_dir = str(self.args.output_dir)
        if not requested:
            return None
        if requested is True:
            found = find_last_checkpoint(output_dir)
            if found is None:
                logger.warning("There is no complete checkpoint in %s: training starts from the beginning.", output_dir)
            return found
        if not (Path(requested) / MANIFEST_NAME).is_file():
            logger.warning("The checkpoint %s has no %s and is used unchecked.", requested, MANIFEST_NAME)
            return requested
        damage = find_damage(requested)
        if damage is not None:
            raise ValueError(
                f"The checkpoint {requested} can't be used: {damage}. Resume from another one, or pass "
                "`resume_from_checkpoint=True` to take the newest complete one."
            )
        return requested

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        See [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or True for the newest complete one in `args.output_dir`. With True
                and no complete checkpoint, training starts from the beginning and says so.

        Raises:
            ValueError: if the given folder does not agree with its manifest, or a file of it cannot be used.
        """
        from accelerate.utils import broadcast_object_list

        # One process reads and checks, and all follow it.
        choice: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                choice[0] = self._choose_checkpoint(resume_from_checkpoint)
                if choice[0] is not None:
                    check_trainer_state(choice[0])
            except ValueError as error:
                choice[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(choice)
        if choice[1] is not None:
            raise ValueError(choice[1])
        self._means["train"] = Means()
        return super().train(choice[0], *args, **kwargs)
