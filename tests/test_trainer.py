"""Checkpoints that are whole or absent, parts of a loss in the log, exact resuming."""

import json
import logging
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from hf_efficient.checkpoints import MANIFEST_NAME, STAGING_NAME, find_damage, write_files
from hf_efficient.trainer import EfficientTrainer, find_last_checkpoint


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


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_checkpoint_is_complete_and_named(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, save_total_limit=2)
    trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-5"]
    for name in os.listdir(tmp_path):
        assert find_damage(tmp_path / name) is None
        files = json.loads((tmp_path / name / MANIFEST_NAME).read_text())["files"]
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
            files
        )
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "its file optimizer.pt is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20), "its file model.safetensors has 20 bytes"),
        (
            lambda folder: (folder / "scheduler.pt").write_bytes(
                bytes(b ^ 1 for b in (folder / "scheduler.pt").read_bytes())
            ),
            "the content of its file scheduler.pt was altered",
        ),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), f"it has no {MANIFEST_NAME}"),
        (lambda folder: os.truncate(folder / MANIFEST_NAME, 30), f"its {MANIFEST_NAME} is damaged"),
    ],
)
def test_damaged_checkpoint_is_passed_over_by_name(tmp_path, caplog, damage, reason):
    make_trainer(tmp_path, max_steps=4).train()
    damage(tmp_path / "checkpoint-4")
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    message = caplog.messages[0]
    assert str(tmp_path / "checkpoint-4") in message
    assert reason in message


def test_resuming_from_a_named_checkpoint_checks_it(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 can't be used: its file optimizer\.pt is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-2" / MANIFEST_NAME).unlink()
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "is used unchecked" in caplog.text
    assert trainer.state.global_step == 3


def test_resuming_without_any_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "new", max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert f"no complete checkpoint in {tmp_path / 'new'}" in caplog.text


def test_failure_while_saving_leaves_no_checkpoint_of_that_name(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4)
    save = torch.save

    def fail_at_step_4(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and str(path).endswith("scheduler.pt"):
            raise OSError("disk full")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_at_step_4)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert sorted(os.listdir(tmp_path)) == [STAGING_NAME, "checkpoint-2"]
    monkeypatch.undo()

    resumed = make_trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]
    whole = make_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    assert losses(resumed) == losses(whole)


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


def test_best_checkpoint_is_named_by_its_final_place_and_kept(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.5,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert best.is_dir()
    assert find_damage(best) is None
    assert STAGING_NAME not in os.listdir(tmp_path)
    written = json.loads((best / "trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == str(best)


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


def test_write_files_replaces_whole_files_only(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")

    def broken(folder):
        with open(os.path.join(folder, "config.json"), "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, broken)
    assert (tmp_path / "config.json").read_text() == "old"

    def write(folder):
        for name in ("config.json", "weights.bin"):
            with open(os.path.join(folder, name), "w") as file:
                file.write("new")

    write_files(tmp_path, write)
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents == {"config.json": "new", "weights.bin": "new", "mine.txt": "kept"}
