"""Memory over steps, processes and checkpoints."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments
from hf_efficient.trainer.checkpoints import find_damage
from hf_efficient.trainer.segment_memory import takes_memory
from hf_efficient.trainer.segment_trainer import evaluate_segments
from tests.helpers.processes import run_distributed
from tests.trainer import segment_runs
from tests.trainer.segment_runs import gpt2, history, make_trainer, same, srupp, text, weights


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trains_as_the_original_does(tmp_path, accumulation):
    """Against its loop written out: state and memory detached between segments, empty at the start of an epoch."""
    columns = 4
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=2,
        max_steps=-1,
        save_strategy="no",
    )
    model, tokens = srupp(), text()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    length = (len(tokens) - 1) // (columns * 9) * 9
    inputs = tokens[: columns * length].view(columns, length)
    targets = tokens[1 : columns * length + 1].view(columns, length)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for _ in range(2):
        memory, starts = None, list(range(0, length, 9))
        for first in range(0, len(starts), accumulation):
            group, total = starts[first : first + accumulation], 0.0
            for start in group:
                segment = slice(start, start + 9)
                outputs = model(inputs[:, segment], memory=memory, return_memory=True)
                loss = torch.nn.functional.cross_entropy(
                    outputs.logits.transpose(1, 2), targets[:, segment], reduction="sum"
                ) / (len(group) * columns * 9)
                loss.backward()
                total += loss.item()
                memory = outputs.memory.detach()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(total)
    assert losses == pytest.approx(expected, abs=1e-5)
    same(weights(trainer), dict(model.state_dict()), atol=1e-5, rtol=0)


def test_memory_matters_and_can_be_left_out(tmp_path):
    carried = make_trainer(tmp_path, save_strategy="no")
    without = make_trainer(tmp_path, carry_state=False, save_strategy="no")
    for trainer in (carried, without):
        trainer.train()
    first, second = ([entry["loss"] for entry in history(trainer)] for trainer in (carried, without))
    assert first != pytest.approx(second, abs=1e-3)


def run_child(folder, die_at=None):
    """Train in a fork of this process, which is killed after the update of step `die_at`; returns its exit code."""

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def child():
        evaluated = ColumnSegments(text(80, seed=2), 13, columns=2, drop_tail=False)
        trainer = make_trainer(
            folder, srupp(dropout=0.2), evaluated=evaluated, callbacks=[Die()], eval_strategy="steps", eval_steps=4
        )
        trainer.train(resume_from_checkpoint=True)
        torch.save(weights(trainer), folder / "weights.pt")
        (folder / "history.json").write_text(json.dumps(history(trainer)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def test_killed_and_resumed_is_the_same_run(tmp_path):
    """Epochs are of 7 steps (13 segments, two a step), so it is killed in the first, at its end and in the second."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_child(whole) == 0
    checkpoint = whole / "checkpoint-12"
    assert (checkpoint / "segment_memory-00000-of-00001.safetensors").is_file()
    assert find_damage(checkpoint) is None
    for step in (5, 7, 11):
        assert run_child(parts, die_at=step) == -signal.SIGKILL
    assert run_child(parts) == 0
    assert json.loads((parts / "history.json").read_text()) == json.loads((whole / "history.json").read_text())
    first, second = (torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, parts))
    same(first, second, atol=0, rtol=0)


def test_model_without_memory(tmp_path):
    """GPT-2 by the same trainer, with moved labels: in columns, on random segments, and in overlapping windows."""
    assert takes_memory(srupp())
    assert not takes_memory(gpt2())
    tokens = text()
    row = RandomSegments(tokens, 16)[3]
    with torch.no_grad():
        outputs = gpt2().eval()(row["input_ids"][None], labels=row["labels"], shift_labels=row["labels"])
        expected = torch.nn.functional.cross_entropy(outputs.logits[0], row["labels"])
    torch.testing.assert_close(outputs.loss, expected)
    for train in (ColumnSegments(tokens, 16, columns=4), RandomSegments(tokens, 16)):
        windows = OverlappingWindows(text(100, seed=2), 16)
        trainer = make_trainer(tmp_path, gpt2(), train, windows, save_strategy="no")
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        score = evaluate_segments(trainer.model, windows, batch_size=3, progress=False)
        assert score.tokens == 99
        assert trainer.evaluate()["eval_loss"] == pytest.approx(score.loss, abs=1e-6)


def test_labels_that_are_not_moved_are_left_to_the_model(tmp_path):
    """As a collator for language models gives them. Taken for moved ones they would teach to copy."""
    rows = [{"input_ids": text(8, seed), "labels": text(8, seed)} for seed in range(4)]
    trainer, model = make_trainer(tmp_path), srupp().eval()
    batch = default_data_collator(rows)
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def test_mismatches_are_refused(tmp_path):
    columns = ColumnSegments(text(), 9, columns=3)
    with pytest.raises(ValueError, match=r"3 columns, but a step takes 4 rows.*columns=4"):
        make_trainer(tmp_path, train=columns).train()
    with pytest.raises(ValueError, match="3 columns, but a step takes 2 rows"):
        make_trainer(tmp_path, evaluated=columns).evaluate()
    with pytest.raises(ValueError, match="3 columns, but a step takes 2 rows"):
        evaluate_segments(srupp(), columns, batch_size=2)
    with pytest.raises(ValueError, match="already moved"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)


def test_two_processes_do_what_one_does(tmp_path):
    """And one process goes on with the checkpoint that two have written."""
    two = tmp_path / "two"
    run_distributed(segment_runs, two)
    evaluated = ColumnSegments(text(80, seed=2), 13, columns=4, drop_tail=False)
    settings = {"evaluated": evaluated, "per_device_eval_batch_size": 4, "eval_strategy": "epoch"}
    one = make_trainer(tmp_path / "one", **settings, save_strategy="no")
    one.train()
    expected, found = history(one), json.loads((two / "history.json").read_text())
    assert len(expected) == len(found) == 16
    for ours, theirs in zip(expected, found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    same(weights(one), torch.load(two / "weights.pt", weights_only=True), atol=1e-6, rtol=0)

    files = sorted(path.name for path in (two / "checkpoint-12").glob("segment_memory*"))
    assert files == [f"segment_memory-0000{process}-of-00002.safetensors" for process in range(2)]
    resumed = make_trainer(tmp_path / "resumed", **settings, save_strategy="no")
    shutil.rmtree(two / "checkpoint-9")
    resumed.train(resume_from_checkpoint=str(two / "checkpoint-12"))
    same(weights(one), weights(resumed), atol=1e-6, rtol=0)
