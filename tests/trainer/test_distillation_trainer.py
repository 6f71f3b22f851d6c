"""Distillation: its loss written out, accumulated batches, resuming, and what it refuses."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from hf_efficient.data.segments import OverlappingWindows, RandomSegments
from hf_efficient.trainer import DistillationTrainer
from hf_efficient.trainer.distillation_trainer import divergence
from tests.trainer.segment_runs import VOCABULARY, same, text, weights


def make_model(seed=5, rate=0.0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    rates = {"resid_pdrop": rate, "embd_pdrop": rate, "attn_pdrop": rate}
    sizes = {"vocab_size": vocabulary, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, initializer_range=0.3))


def make_trainer(
    folder, model=None, teacher=None, weight=0.25, temperature=2.0, callbacks=(), evaluated=None, **changes
):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillationTrainer(
        model or make_model(),
        TrainingArguments(**{**settings, **changes}),
        teacher=teacher or make_model(seed=7),
        distillation_weight=weight,
        temperature=temperature,
        train_dataset=RandomSegments(text(), 9),
        eval_dataset=evaluated,
        callbacks=list(callbacks),
    )


def losses_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def written_out(model, teacher, batch, weight, temperature):
    """The loss, its cross entropy and its distance, from probabilities."""
    kept = batch["labels"] != -100
    logits, wanted = model(batch["input_ids"]).logits[kept], teacher(batch["input_ids"]).logits[kept]
    entropy = -logits.softmax(-1).gather(1, batch["labels"][kept].unsqueeze(1)).log().mean()
    p, q = ((one / temperature).softmax(-1) for one in (wanted, logits))
    distance = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    return (1 - weight) * entropy + weight * distance, entropy, distance


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("counts", [True, False], ids=["num-items", "no-num-items"])
def test_loss_and_gradients_are_those_of_the_formula(tmp_path, weight, temperature, counts):
    trainer = make_trainer(tmp_path, weight=weight, temperature=temperature)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    batch["labels"][1, 3:] = -100
    count = (batch["labels"] != -100).sum() if counts else None
    found = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
    found.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    expected, _, _ = written_out(trainer.model, trainer.teacher, batch, weight, temperature)
    torch.testing.assert_close(found, expected)
    expected.backward()
    same(gradients, {name: parameter.grad for name, parameter in trainer.model.named_parameters()})
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 5, 0], ids=["no-num-items", "of-others", "none-at-all"])
def test_a_batch_without_targets_weighs_nothing(tmp_path, weight, items):
    trainer = make_trainer(tmp_path, weight=weight)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
    full = {name: tensor.clone() for name, tensor in batch.items()}
    for name in ("labels", "shift_labels"):
        batch[name][:] = -100
    count = None if items is None else torch.tensor(items)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=count)
    assert loss == 0.0
    loss.backward()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    trainer.compute_loss(trainer.model, full)
    taken = trainer._means["train"].take(lambda sums: sums)
    _, entropy, distance = written_out(trainer.model, trainer.teacher, full, weight, 2.0)
    expected = {"cross_entropy": entropy.item(), "divergence": distance.item()}
    assert {name: taken[name] for name in expected if name in taken} == pytest.approx(
        {name: value for name, value in expected.items() if weight or name == "cross_entropy"}, rel=1e-4
    )


def test_without_weight_the_teacher_is_not_asked(tmp_path):
    class Refusing(torch.nn.Module):
        def forward(self, **inputs):
            raise AssertionError("The teacher was asked.")

    trainer = make_trainer(tmp_path, teacher=Refusing(), weight=0.0, max_steps=2, save_strategy="no")
    trainer.train()
    assert losses_of(trainer, "cross_entropy") == pytest.approx(losses_of(trainer), rel=1e-3)
    assert not losses_of(trainer, "divergence")


def test_labels_that_are_not_moved_count_as_the_model_counts_them(tmp_path):
    trainer = make_trainer(tmp_path)
    ids = text()[:20].view(2, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    found = trainer.compute_loss(trainer.model.train(), {"input_ids": ids, "labels": labels})
    moved = {"input_ids": ids[:, :-1], "labels": labels[:, 1:]}
    torch.testing.assert_close(found, written_out(trainer.model, trainer.teacher, moved, 0.25, 2.0)[0])


def test_divergence_is_zero_for_the_same_logits_and_leaves_positions_out():
    logits = torch.randn(2, 5, 11)
    counted = torch.rand(2, 5) < 0.5
    assert divergence(logits, logits + 3.0, counted) == pytest.approx(0.0, abs=1e-4)
    other = torch.where(counted.unsqueeze(-1), logits, math.nan)
    assert divergence(other, logits, counted) == pytest.approx(0.0, abs=1e-4)


def test_parts_are_logged_and_evaluation_is_of_the_text_alone(tmp_path):
    evaluated = OverlappingWindows(text(60, seed=2), 9)
    trainer = make_trainer(tmp_path, save_strategy="no", evaluated=evaluated, eval_strategy="steps", eval_steps=3)
    trainer.train()
    parts = zip(losses_of(trainer, "cross_entropy"), losses_of(trainer, "divergence"), strict=True)
    for loss, (entropy, distance) in zip(losses_of(trainer), parts, strict=True):
        assert loss == pytest.approx(0.75 * entropy + 0.25 * distance, rel=1e-3)
    rows = trainer.data_collator([evaluated[row] for row in range(len(evaluated))])
    _, entropy, _ = written_out(trainer.model, trainer.teacher, rows, 0.25, 2.0)
    assert losses_of(trainer, "eval_loss")[-1] == pytest.approx(entropy.item(), rel=1e-4)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    # Not Adam, which makes rounding of gradients that are 0, as those of keys' biases, as large as all others.
    same_for_both = {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.3}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path / "a", **same_for_both)
    parts = make_trainer(tmp_path / "b", **halves, **same_for_both)
    for trainer in (whole, parts):
        trainer.train()
    assert losses_of(whole) == pytest.approx(losses_of(parts), rel=1e-4)
    same(weights(whole), weights(parts), atol=1e-5, rtol=1e-4)


def test_the_model_comes_nearer_to_its_teacher_which_stays(tmp_path):
    teacher = make_model(seed=7)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, teacher=teacher.train(), weight=1.0, max_steps=40, save_strategy="no")
    trainer.train()
    distances = losses_of(trainer, "divergence")
    assert distances[-1] < 0.5 * distances[0]
    same(teacher.state_dict(), before)
    assert not teacher.training


def test_stopped_and_resumed_is_the_same_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole = make_trainer(tmp_path / "whole", make_model(rate=0.2))
    whole.train()
    stopped = make_trainer(tmp_path / "run", make_model(rate=0.2), callbacks=[Stop()])
    stopped.train()
    resumed = make_trainer(tmp_path / "run", make_model(seed=9, rate=0.2))
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    names = [path.name for path in (tmp_path / "run").rglob("*") if "teacher" in path.name]
    assert not names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 1.5}, "from 0 to 1, not 1.5"),
        ({"temperature": 0.0}, "must be positive, not 0.0"),
        ({"teacher": make_model(vocabulary=29)}, "23 ids, and its teacher one of 29"),
    ],
    ids=["weight", "temperature", "vocabulary"],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)
