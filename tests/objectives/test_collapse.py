"""What encoders are measured against that learn nothing, and the warnings about them."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from hf_efficient.objectives.collapse import BlindnessWatch, CollapseWatch, blind_loss, token_variance_share


def log(watch, step, logs):
    args = SimpleNamespace(learning_rate=1e-3, max_grad_norm=0.0)
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    watch.on_log(args, state, None, logs=logs)


def test_one_share_is_one_entropy():
    assert blind_loss(0.5) == pytest.approx(math.log(2))
    assert blind_loss(0.0, 10) == blind_loss(1.0) == 0.0
    assert blind_loss(0.1475) == pytest.approx(0.4183, abs=1e-4)


@pytest.mark.parametrize("choices", [2, 7])
def test_a_blind_choice_by_the_best_constant(choices):
    """No constant distribution over the candidates does better, and one reaches it."""
    share = 0.13

    def loss(rejected):
        return -(1 - share) * math.log(rejected) - share * math.log((1 - rejected) / (choices - 1))

    blind = blind_loss(share, choices)
    assert loss(1 - share) == pytest.approx(blind, abs=1e-12)
    assert all(loss(1 - share + change) > blind for change in (-0.05, 0.05))


def test_variance_share_by_hand():
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Mean (2/3, 1/3); squared distances 2/9 + 8/9 + 2/9, over a second moment of 3.
    assert token_variance_share(states, mask).item() == pytest.approx(12 / 27)
    assert token_variance_share(torch.ones(2, 5, 8)).item() == pytest.approx(0.0, abs=1e-6)
    assert token_variance_share(torch.randn(8, 64, 32)).item() == pytest.approx(1.0, abs=0.01)


def test_collapse_watch_warns_once_with_advice(caplog):
    watch = CollapseWatch(patience=20)
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        for step, share in [(10, 0.01), (20, 0.02), (30, 0.3), (40, 0.01), (50, None), (50, 0.0)]:
            log(watch, step, {"eval_loss": 1} if share is None else {"token_variance_share": share})
        assert not caplog.messages  # a dip that passes
        log(watch, 60, {"token_variance_share": 0.01})
        log(watch, 90, {"token_variance_share": 0.0})
    assert len(caplog.messages) == 1
    assert "lower learning rate (now 0.001" in caplog.messages[0]
    assert "--max_grad_norm, now 0)" in caplog.messages[0]


def test_a_blind_detector_is_told_once_over_an_interruption(caplog):
    seen = [{"step": 40, "recall_replaced": 0.3}, {"step": 50, "recall_replaced": 0.0}, {"step": 55, "eval_loss": 1.0}]
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        watch = BlindnessWatch(patience=20)
        watch.on_train_begin(None, SimpleNamespace(log_history=seen), None)
        log(watch, 60, {"recall_replaced": 0.01})
        log(watch, 65, {"loss": 1.0})  # without a detector
        log(watch, 70, {"eval_loss": 1.0})  # says nothing of it, though the time is up
        assert not caplog.messages
        log(watch, 70, {"recall_replaced": 0.0123})
        log(watch, 80, {"recall_replaced": 0.0})
        for step in (10, 30, 50):
            log(BlindnessWatch(patience=20), step, {"recall_replaced": 0.5})
    assert len(caplog.messages) == 1
    assert "for 20 steps up to step 70" in caplog.messages[0]
    assert "(1.2 %)" in caplog.messages[0]
    assert "first_phase=masked_lm" in caplog.messages[0]
