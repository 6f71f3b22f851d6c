"""The first stage of objectives with a generator, and how the second one begins."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_efficient.objectives.callbacks import ChanceLevelCallback, CollapseCallback, StartDiscriminatorCallback
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.trainer import EfficientTrainer
from tests.objectives import discriminator_runs
from tests.objectives.encoders import make_batch, make_encoder


class Steps(TrainerCallback):
    """The encoder's weights, and whether the discriminator was on, at the end of each step."""

    def __init__(self):
        self.on, self.states = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model.discriminator_active == bool(model.discriminator_on)
        self.on.append(model.discriminator_active)
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    torch.manual_seed(0)
    trainer = discriminator_runs.make_trainer(
        tmp_path_factory.mktemp("one"), discriminator_runs.make_objective(discriminator_start_step=3)
    )
    steps = Steps()
    trainer.add_callback(steps)
    trainer.train()
    return trainer, steps


def test_stage_one_trains_the_generator_and_the_table_only(one_process):
    trainer, steps = one_process
    assert steps.on == [False] * 3 + [True] * 3
    first, last = steps.states[0], steps.states[2]
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert {name for name in moved if not name.startswith("generator.")} == {"encoder.embed_tokens.weight"}
    assert "generator.projection.weight" in moved
    end = steps.states[-1]
    assert not torch.equal(end["discriminator.weight"], last["discriminator.weight"])
    log = discriminator_runs.history(trainer)
    assert all("discriminator_loss" not in entry for entry in log[:3])
    assert all(entry["loss"] == pytest.approx(entry["generator_loss"], abs=1e-5) for entry in log[:3])
    parts = {
        "discriminator_loss",
        "replaced_fraction",
        "recall_replaced",
        "accuracy_original",
        "token_variance_fraction",
    }
    assert all(parts <= set(entry) for entry in log[3:])
    for entry in log[3:]:  # over four batches of other numbers of targets and tokens
        assert entry["loss"] == pytest.approx(entry["generator_loss"] + 50 * entry["discriminator_loss"], rel=1e-5)
    stepped = {id(p): trainer.optimizer.state[p]["step"].item() for p in trainer.optimizer.state}
    model = trainer.model
    assert stepped[id(model.discriminator.weight)] == 3
    assert stepped[id(model.generator.dense.weight)] == 6


def test_stage_one_ends_at_a_loss(tmp_path, caplog):
    objective = ReplacedTokenObjective(
        encoder=make_encoder("tupe"),
        discriminator_start_loss=4.0,
        discriminator_start_step=1000,
        discriminator_weight=1.0,
    )
    trainer = discriminator_runs.make_trainer(tmp_path, objective, max_steps=12, learning_rate=2e-2)
    steps = Steps()
    trainer.add_callback(steps)
    with caplog.at_level(logging.INFO, "hf_efficient"):
        trainer.train()
    losses = [entry["generator_loss"] for entry in discriminator_runs.history(trainer)]
    below = next(step for step, loss in enumerate(losses) if loss < 4.0)
    assert 0 < below < 11
    assert steps.on == [False] * (below + 1) + [True] * (11 - below)
    assert f"from step {below + 2} on: generator_loss is" in caplog.text


def test_the_encoder_begins_slowly(tmp_path):
    """Its first updates are shares of what plain SGD makes of the gradients; the generator's are whole."""

    class Moves(TrainerCallback):
        def __init__(self):
            self.shares, self.whole, self.steps = [], [], []

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            objective = kwargs["model"]
            self.parts = [objective.discriminator.weight, objective.generator.dense.weight]
            grads = [None if part.grad is None else part.grad.clone() for part in self.parts]
            self.start = [(part.detach().clone(), grad) for part, grad in zip(self.parts, grads, strict=True)]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            moved = [
                None if grad is None else ((before - part) * grad).sum().item() / (0.05 * grad.square().sum().item())
                for part, (before, grad) in zip(self.parts, self.start, strict=True)
            ]
            self.shares.append(moved[0])
            self.whole.append(moved[1])
            self.steps.append(int(model.discriminator_steps))

    torch.manual_seed(0)
    objective = ReplacedTokenObjective(
        encoder=make_encoder("tupe"), discriminator_start_step=2, discriminator_warmup_steps=3, discriminator_weight=1.0
    )
    plain = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer = discriminator_runs.make_trainer(tmp_path, objective, max_steps=7, **plain)
    moves = Moves()
    trainer.add_callback(moves)
    trainer.train()
    assert moves.shares[:2] == [None, None]
    assert moves.shares[2:] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], rel=1e-2)
    assert moves.whole == pytest.approx([1.0] * 7, rel=1e-2)
    assert moves.steps == [0, 0, 1, 2, 3, 3, 3]


def test_stage_one_under_plain_trainer(tmp_path):
    """Its log has the parts too, which end the stage."""
    logs = []
    for trainer_class in (Trainer, EfficientTrainer):
        torch.manual_seed(0)
        objective = ReplacedTokenObjective(encoder=make_encoder("tupe"), discriminator_start_loss=100.0)
        batch = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "logging_steps": 2}
        trainer = discriminator_runs.make_trainer(tmp_path, objective, trainer_class, max_steps=4, **batch)
        trainer.train()
        assert objective.discriminator_active
        logs.append(discriminator_runs.history(trainer))
    for plain, ours in zip(*logs, strict=True):
        assert plain.keys() == ours.keys()
        for name in plain.keys() - {
            "loss",
            "grad_norm",
        }:  # which weigh the discriminator by the expected share of targets
            assert plain[name] == pytest.approx(ours[name], rel=0.05), name
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-5)
    assert logs[0][1]["discriminator_loss"] > 0


def test_without_a_stage_one_nothing_waits_for_its_end():
    objective = ReplacedTokenObjective(encoder=make_encoder("tupe"))
    assert objective.discriminator_active
    assert not any(isinstance(callback, StartDiscriminatorCallback) for callback in objective.callbacks())
    output = objective(**make_batch())
    assert output.discriminator_loss is not None


def test_stage_one_leaves_no_gradient_on_one_process():
    objective = ReplacedTokenObjective(encoder=make_encoder("bert"), discriminator_start_step=5)
    output = objective(**make_batch())
    output.loss.backward()
    idle = {id(parameter) for parameter in objective.frozen_parameters()}
    assert output.discriminator_loss is None
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name
    assert objective.get_input_embeddings().weight.grad.any()


def log(callback, step, logs):
    args = SimpleNamespace(learning_rate=1e-3, max_grad_norm=0.0)
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    callback.on_log(args, state, None, logs=logs)


def test_collapse_callback_warns_once_with_advice(caplog):
    callback = CollapseCallback(patience=20)
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        for step, share in [(10, 0.01), (20, 0.02), (30, 0.3), (40, 0.01), (50, None), (50, 0.0)]:
            log(callback, step, {"eval_loss": 1} if share is None else {"token_variance_fraction": share})
        assert not caplog.messages  # a dip that passes
        log(callback, 60, {"token_variance_fraction": 0.01})
        log(callback, 90, {"token_variance_fraction": 0.0})
    assert len(caplog.messages) == 1
    assert "lower learning rate (now 0.001" in caplog.messages[0]
    assert "--max_grad_norm, now 0)" in caplog.messages[0]


def test_a_blind_discriminator_is_told_once_over_an_interruption(caplog):
    seen = [{"step": 40, "recall_replaced": 0.3}, {"step": 50, "recall_replaced": 0.0}, {"step": 55, "eval_loss": 1.0}]
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        callback = ChanceLevelCallback(patience=20)
        callback.on_train_begin(None, SimpleNamespace(log_history=seen), None)
        log(callback, 60, {"recall_replaced": 0.01})
        log(callback, 65, {"loss": 1.0})  # without a discriminator
        log(callback, 70, {"eval_loss": 1.0})  # says nothing of it, though the time is up
        assert not caplog.messages
        log(callback, 70, {"recall_replaced": 0.0123})
        log(callback, 80, {"recall_replaced": 0.0})
        for step in (10, 30, 50):
            log(ChanceLevelCallback(patience=20), step, {"recall_replaced": 0.5})
    assert len(caplog.messages) == 1
    assert "for 20 steps up to step 70" in caplog.messages[0]
    assert "(1.2 %)" in caplog.messages[0]
    assert "stage_one=masked_lm" in caplog.messages[0]
