"""Training against a clock: its rates, its updates, its evaluations, and runs that are taken up again."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.helpers.comparison import assert_equal
from training.benchmarks import equal_time
from training.benchmarks.equal_time import TimedTrainer, TrainConfig, time_to_reach


STEP_S = 0.5
WARMUP = (0.0, 0.25, 0.5, 0.75)  # of 4 steps


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """A clock on which every step takes half a second."""
    ticks = itertools.count()
    monkeypatch.setattr(equal_time, "core_time", lambda device: STEP_S * next(ticks))


class Regression(TimedTrainer):
    """A linear model with dropout that says what it saw: rates, norms of gradients, and modes."""

    def __init__(self, seed=0, **settings):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        config = TrainConfig(**{"budget_s": 10.0, "evaluations": 4, "bf16": False, **settings})
        super().__init__("regression", model, config, seed, torch.device("cpu"))
        self.rates, self.norms, self.modes = [], [], []

    def batches(self):
        for step in itertools.count(self.progress.steps):
            torch.manual_seed(step)  # of dropout too
            yield {"x": torch.randn(7, 5), "y": 100 * torch.randn(7, 1)}

    def loss(self, batch):
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        self.modes.append(self.model.training)
        return (self.model(batch["x"]) - batch["y"]).square().mean()

    def before_update(self):
        gradients = [parameter.grad.flatten() for parameter in self.model.parameters()]
        self.norms.append(torch.cat(gradients).norm().item())

    def evaluate(self):
        self.modes.append(self.model.training)
        assert not torch.is_grad_enabled()
        return 1.0

    @property
    def weights(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        # 20 steps: half a second each of a budget of 10 seconds, of which 2 are the warm-up.
        ({}, [*WARMUP, *(1 - i / 16 for i in range(16))]),
        ({"warmup": 0.0}, [1 - i / 20 for i in range(20)]),
        ({"final_fraction": 0.5}, [*WARMUP, *(1 - i / 32 for i in range(16))]),
        (
            {"schedule": "cosine", "final_fraction": 0.2},
            [*WARMUP, *(0.2 + 0.8 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16))],
        ),
    ],
    ids=["linear", "no-warm-up", "linear-to-half", "cosine"],
)
def test_the_rate_follows_the_clock(settings, rates):
    trainer = Regression(learning_rate=0.04, **{"warmup": 0.2, **settings})
    trainer.run_slice(100.0)
    found = [rate for (rate,) in trainer.rates]
    assert found == pytest.approx([0.04 * rate for rate in rates])


def test_gradients_are_clipped_before_the_update():
    trainer = Regression(clip=0.25)
    trainer.run_slice(3.0)
    assert trainer.norms == pytest.approx([0.25] * 6, rel=1e-4)
    gentle = Regression(clip=1e9)
    gentle.run_slice(3.0)
    assert min(gentle.norms) > 10


def test_flat_parameters_are_spared_from_decay_where_it_is_asked():
    groups = Regression(decay_matrices_only=True, weight_decay=0.3).optimizer.param_groups
    found = {tuple(p.dim() for p in group["params"]): group["weight_decay"] for group in groups}
    assert found == {(2, 2): 0.3, (1, 1): 0.0}
    (group,) = Regression(weight_decay=0.3).optimizer.param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, 0.3)


def test_evaluations_are_spread_over_the_budget_and_run_without_dropout():
    trainer = Regression()
    trainer.run_slice(100.0)
    assert [(seconds, steps) for seconds, steps, _ in trainer.progress.curve] == [
        (2.5, 5),
        (5, 10),
        (7.5, 15),
        (10, 20),
    ]
    assert trainer.modes == [*[True] * 5, False] * 4


@pytest.mark.parametrize("slices", [1, 4])
def test_a_run_that_is_taken_up_again_is_the_same_run(tmp_path, slices):
    whole = Regression()
    for _ in range(4):
        whole.run_slice(2.5)
    trainer = Regression()
    trainer.run_slice(2.5 * slices)
    trainer.save(tmp_path)
    again = Regression()
    again.model[0].weight.data.fill_(0.5)  # what a new run begins with does not matter
    assert again.load(tmp_path)
    again.run_slice(100.0)
    assert_equal("weights", again.weights, whole.weights)
    assert again.progress == whole.progress
    assert trainer.rates + again.rates == whole.rates
    with pytest.raises(ValueError, match=r"clip was 1\.0 and is 2\.0 now"):
        Regression(clip=2.0).load(tmp_path)


def test_a_run_without_a_saved_state_begins_anew(tmp_path):
    assert not Regression().load(tmp_path)


@pytest.mark.parametrize(
    ("loss", "seconds"), [(5.0, 10.0), (4.0, 10.0), (3.0, 15.0), (2.0, 20.0), (1.75, 25.0), (1.5, 30.0), (1.4, None)]
)
def test_time_to_reach_a_loss_lies_on_the_line_between_two_evaluations(loss, seconds):
    curve = [[10.0, 1, 4.0], [20.0, 2, 2.0], [30.0, 3, 1.5]]
    found = time_to_reach(curve, loss)
    assert found == (None if seconds is None else pytest.approx(seconds))
