"""Parts of a loss in the log, epochs and batches, exact resuming."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_efficient.trainer import EfficientTrainer
from tests.trainer.toy_trainer import Rows, Toy, losses, make_trainer


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stops", "saving"), [((1, 7, 9), {"save_steps": 2}), ((6, 11), {"save_strategy": "epoch"})])
def test_interrupted_run_has_the_same_history(tmp_path, stops, saving):
    evaluation = {"eval_strategy": "steps", "eval_steps": 5, **saving}
    whole = make_trainer(tmp_path / "whole", **evaluation)
    whole.train()
    for stop in stops:
        torch.manual_seed(stop)  # what the process did before must not matter
        trainer = make_trainer(tmp_path / "parts", [Interrupt(stop)], **evaluation)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path / "parts", **evaluation)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole)
    assert torch.equal(trainer.model.linear.weight, whole.model.linear.weight)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = make_trainer(tmp_path, max_steps=6)
    whole.train()
    again = make_trainer(tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert losses(again) == losses(whole)
    assert torch.equal(again.model.linear.weight, whole.model.linear.weight)


def test_parts_are_weighted_means_over_the_logging_window(tmp_path):
    parts = []

    class Spy(EfficientTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if model.training:
                parts.append(inputs["labels"][inputs["labels"] != -100].tolist())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    args = make_trainer(tmp_path, max_steps=3, save_strategy="no").args
    trainer = Spy(Toy(), args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    logged = trainer.state.log_history[0]
    seen = [label for batch in parts for label in batch]
    assert len(parts) == 6
    assert logged["first_id"] == pytest.approx(np.mean(seen), rel=1e-6)
    assert "sometimes" in logged  # undefined for some batches, yet finite
    assert np.isfinite(logged["sometimes"])
    assert trainer.evaluate()["eval_first_id"] == pytest.approx(np.mean([i for i in range(22) if i % 3]), rel=1e-6)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    small = make_trainer(tmp_path / "a", dropout=0.0, save_strategy="no", logging_steps=1)
    large = make_trainer(
        tmp_path / "b",
        dropout=0.0,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
    )
    small.train()
    large.train()
    for a, b in zip(losses(small), losses(large), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["first_id"] == pytest.approx(b["first_id"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


class EpochCollator:
    """Writes its epoch into every batch."""

    def __init__(self):
        self.value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.value.fill_(epoch)

    def __call__(self, features):
        batch = torch.utils.data.default_collate(features)
        return {**batch, "labels": batch["labels"].float(), "x": batch["x"] * 0 + self.value}


@pytest.mark.parametrize("workers", [0, 2])
def test_collator_is_told_the_epoch(tmp_path, workers):
    class Spy(EfficientTrainer):
        seen = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen.append((self.state.global_step, model.training, inputs["x"].unique().tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def train(steps, resume):
        args = make_trainer(
            tmp_path,
            max_steps=steps,
            eval_strategy="epoch",
            dataloader_num_workers=workers,
            dataloader_persistent_workers=bool(workers),
        ).args
        trainer = Spy(
            Toy(),
            args,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            data_collator=EpochCollator(),
            eval_data_collator=EpochCollator(),
        )
        trainer.train(resume_from_checkpoint=resume)

    train(6, False)
    train(11, True)
    assert len(Spy.seen) > 22
    for step, training, epochs in Spy.seen:
        assert epochs == [step // 4 if training else 0]


def test_evaluation_drops_no_rows(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8)
    assert len(trainer.get_train_dataloader()) == 7
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 22
