"""Memory over steps, processes, checkpoints and evaluation. Run as a script, this file is one process of several."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments, default_data_collator

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.checkpoints import find_damage
from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments
from hf_efficient.models.srupp.convert_srupp import convert_state_dict
from hf_efficient.segment_memory import load_memory, save_memory, takes_memory
from hf_efficient.segment_trainer import SegmentTrainer, evaluate_segments, token_losses


VOCABULARY = 23
TIMES = ("runtime", "per_second")


def text(length=500, seed=1):
    """Noisy counting, which a model can learn something of."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (length,), generator=generator)
    return steps.cumsum(0) % VOCABULARY


def srupp(dropout=0.0, alpha=0.7, **changes):
    """Attention counts from the start: alpha begins at 0 otherwise."""
    torch.manual_seed(5)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "projection_size": 6, "num_hidden_layers": 3}
    config = SruppConfig(**{**sizes, "attention_every_n_layers": 2, "dropout": dropout, **changes})
    model = SruppForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.fill_(alpha)
    return model


def gpt2():
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config)


def make_trainer(
    folder, model=None, train=None, evaluated=None, callbacks=(), carry_state=True, metrics=None, **changes
):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 14,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SegmentTrainer(
        model or srupp(),
        TrainingArguments(**{**settings, **changes}),
        train_dataset=train if train is not None else ColumnSegments(text(), 9, columns=4),
        eval_dataset=evaluated,
        callbacks=list(callbacks),
        carry_state=carry_state,
        compute_metrics=metrics,
    )


def history(trainer):
    kept = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not any(t in key for t in TIMES)} for entry in kept]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second, **tolerance):
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


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


def test_evaluation_has_a_memory_of_its_own(tmp_path):
    evaluated = ColumnSegments(text(80, seed=2), 13, columns=2, drop_tail=False)
    quiet = make_trainer(tmp_path, save_strategy="no")
    trainer = make_trainer(tmp_path, evaluated=evaluated, eval_strategy="steps", eval_steps=1, save_strategy="no")
    for each in (quiet, trainer):
        each.train()
    same(weights(quiet), weights(trainer), atol=0, rtol=0)
    values = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert values[0] == values[1] == trainer.state.log_history[-2]["eval_loss"]
    score = evaluate_segments(trainer.model, evaluated, progress=False)
    assert score.tokens == 79
    assert values[0] == pytest.approx(score.loss, abs=1e-6)


@pytest.mark.parametrize("unroll", [5, 13, 40])
def test_long_unroll_equals_one_forward_with_a_window(unroll):
    """State without limit, and each position attends to itself and `unroll` before it, wherever segments are cut."""
    model, tokens = srupp().eval(), text(67)
    score = evaluate_segments(model, ColumnSegments(tokens, unroll, drop_tail=False), progress=False)
    with torch.no_grad():
        whole = model(tokens[None, :-1], attention_window=unroll).logits
    expected = token_losses(whole, tokens[None, 1:]).sum().item()
    assert score.tokens == 66
    assert score.nats == pytest.approx(expected, abs=1e-4)


@pytest.mark.golden
def test_evaluation_recorded_from_the_original():
    """The case lm_char_eval_samelength: segments of 8, 8 and 5, each position seeing 8 before it."""
    folder = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent / "golden"))
    case = folder / "srupp" / "cases" / "lm_char_eval_samelength"
    recorded, tensors = json.loads(case.with_suffix(".json").read_text()), load_file(case.with_suffix(".safetensors"))
    sizes = recorded["args"]
    config = SruppConfig(
        vocab_size=recorded["vocab"],
        hidden_size=sizes["n_d"],
        projection_size=sizes["n_proj"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["attn_heads"],
    )
    model = SruppForCausalLM(config)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    model.load_state_dict(convert_state_dict(weights, config))
    inputs, targets, expected = (tensors[name].T for name in ("input.x", "input.y", "output.nll"))
    for column in range(2):
        assert torch.equal(inputs[column, 1:], targets[column, :-1])
        tokens = torch.cat([inputs[column], targets[column, -1:]])
        score = evaluate_segments(model, ColumnSegments(tokens, 8, drop_tail=False), progress=False)
        assert score.tokens == sum(recorded["segments"]) == 21
        assert score.nats == pytest.approx(expected[column].sum().item(), abs=2e-5)


def test_columns_are_evaluated_like_texts_of_their_own():
    model, tokens = srupp().eval(), text(67)
    score = evaluate_segments(model, ColumnSegments(tokens, 8, columns=3, drop_tail=False), progress=False)
    pieces = [tokens[start : start + 23] for start in (0, 22, 44)]
    single = [evaluate_segments(model, ColumnSegments(piece, 8, drop_tail=False), progress=False) for piece in pieces]
    assert score.tokens == sum(part.tokens for part in single) == 66
    assert score.nats == pytest.approx(sum(part.nats for part in single), abs=1e-4)


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


@pytest.mark.parametrize("model", ["plain", "adaptive", "gpt2"])
def test_metrics_get_token_losses(tmp_path, model):
    adaptive = {"adaptive_cutoffs": [7, 15], "tie_word_embeddings": True}
    model = {"plain": srupp, "adaptive": lambda: srupp(**adaptive), "gpt2": gpt2}[model]()
    found = {}

    def metrics(prediction):
        found.update(losses=prediction.predictions, labels=prediction.label_ids)
        return {"mean": prediction.predictions[prediction.label_ids != -100].mean()}

    evaluated = ColumnSegments(text(80, seed=2), 13, columns=2, drop_tail=False)
    values = make_trainer(tmp_path, model, evaluated=evaluated, metrics=metrics).evaluate()
    assert found["losses"].shape == found["labels"].shape == (8, 13)
    assert sorted(found["labels"][found["labels"] != -100]) == sorted(text(80, seed=2)[1:].tolist())
    assert values["eval_mean"] == pytest.approx(values["eval_loss"], abs=1e-6)


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


def test_memory_files(tmp_path, caplog):
    model, tokens = srupp(), text()
    padding = torch.ones(6, 9, dtype=torch.long)
    padding[2, 5:] = 0
    memory = model(tokens[: 6 * 9].view(6, 9), attention_mask=padding, return_memory=True).memory
    template = model(tokens[:2].view(2, 1), return_memory=True).memory
    for process in range(3):
        save_memory(rows_of(memory, 2 * process, 2 * process + 2), tmp_path, process, 3)
    halves = [load_memory(template, tmp_path, 3, process, 2) for process in range(2)]
    for loaded, first in zip(halves, (0, 3), strict=True):
        assert type(loaded) is type(memory)
        expected = rows_of(memory, first, first + 3)
        assert torch.equal(loaded.mask, expected.mask)
        for ours, theirs in zip(loaded.cell_states + loaded.layer_inputs, expected[0] + expected[1], strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="memory of 6 columns of text, but here are 8"):
        load_memory(template, tmp_path, 4, 0, 2)
    with pytest.raises(ValueError, match="memory of 2 columns of text, but here are 4"):
        load_memory(template, tmp_path, 4, 0, 3)
    (tmp_path / "segment_memory-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="memory of 2 of 3 processes"):
        load_memory(template, tmp_path, 3, 0, 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    with caplog.at_level(logging.WARNING):
        assert load_memory(template, empty, 3, 0, 2) is None
    assert "holds no memory" in caplog.text


def rows_of(memory, first, last):
    inputs = tuple(None if tensor is None else tensor[first:last] for tensor in memory.layer_inputs)
    return type(memory)(tuple(state[first:last] for state in memory.cell_states), inputs, memory.mask[first:last])


def main():
    """What each of two processes does: two of the four columns."""
    folder = Path(sys.argv[1])
    evaluated = ColumnSegments(text(80, seed=2), 13, columns=4, drop_tail=False)
    trainer = make_trainer(folder, evaluated=evaluated, per_device_train_batch_size=2, eval_strategy="epoch")
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder / "weights.pt")
        (folder / "history.json").write_text(json.dumps(history(trainer)))
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path):
    """And one process goes on with the checkpoint that two have written."""
    two = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, str(two)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
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


if __name__ == "__main__":
    main()
