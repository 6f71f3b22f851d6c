"""Adafactor against loops over numbers in float64, and each point in which it differs from that of transformers."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import Adafactor

from hf_efficient.trainer.adafactor import RECIPES, TraxAdafactor, constant_then_falling, rising_then_falling
from tests.helpers.comparison import assert_close


def rms(values):
    return math.sqrt(sum(float(value) ** 2 for value in values.flat) / values.size)


class Loop:
    """The update of one weight, number by number: moments along the axes `rows` and `columns` of the last two."""

    def __init__(self, weight, decay_exponent=0.8, eps=1e-16, weight_decay=0.0, weight_decay_steps=None, clip=1.0):
        self.weight = weight.astype(np.float64).copy()
        self.decay_exponent, self.eps, self.clip = decay_exponent, eps, clip
        self.weight_decay, self.weight_decay_steps = weight_decay, weight_decay_steps
        self.step = 0
        self.rows = np.zeros(weight.shape[:-1])
        self.columns = np.zeros(weight.shape[:-2] + weight.shape[-1:])
        self.all = np.zeros(weight.shape)

    def update(self, gradient, rate):
        self.step += 1
        kept = 1.0 - (self.step + 1) ** -self.decay_exponent
        direction = np.zeros_like(self.weight)
        if self.weight.ndim < 2:
            for i in np.ndindex(self.weight.shape):
                self.all[i] = kept * self.all[i] + (1 - kept) * gradient[i] ** 2
                direction[i] = gradient[i] / math.sqrt(self.all[i] + self.eps)
        else:
            height, width = self.weight.shape[-2:]
            for lead in np.ndindex(self.weight.shape[:-2]):
                for r in range(height):
                    mean = sum(gradient[(*lead, r, c)] ** 2 for c in range(width)) / width
                    self.rows[(*lead, r)] = kept * self.rows[(*lead, r)] + (1 - kept) * mean
                for c in range(width):
                    mean = sum(gradient[(*lead, r, c)] ** 2 for r in range(height)) / height
                    self.columns[(*lead, c)] = kept * self.columns[(*lead, c)] + (1 - kept) * mean
                mean_row = sum(self.rows[(*lead, r)] for r in range(height)) / height
                for r, c in itertools.product(range(height), range(width)):
                    factor = math.sqrt(mean_row / (self.rows[(*lead, r)] + self.eps))
                    factor /= math.sqrt(self.columns[(*lead, c)] + self.eps)
                    direction[(*lead, r, c)] = gradient[(*lead, r, c)] * factor
        direction /= max(1.0, rms(direction) / self.clip)
        left = 1.0 if self.weight_decay_steps is None else max(0.0, 1 - self.step / self.weight_decay_steps)
        scale = max(rms(self.weight), 1e-3)
        self.weight = (1 - self.weight_decay * left) * self.weight - rate * scale * direction


SHAPES = [(5,), (), (3, 5), (1, 7), (2, 3, 4), (2, 1, 3, 5)]


def gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-4, 1, steps)
    return [np.asarray(size * rng.standard_normal(shape)) for size in sizes]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)) or "number")
@pytest.mark.parametrize("options", [{}, {"decay_exponent": 0.9, "weight_decay": 0.02, "weight_decay_steps": 4}])
def test_equals_a_loop_over_numbers(shape, options):
    start = np.asarray(0.3 * np.random.default_rng(1).standard_normal(shape))
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer, loop = TraxAdafactor([weight], **options), Loop(start, **options)
    for step, gradient in enumerate(gradients(shape, 6), 1):
        optimizer.param_groups[0]["lr"] = rate = 0.1 / step
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        loop.update(gradient, rate)
        assert_close("weight", weight.detach(), torch.tensor(loop.weight), 1e-12)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3), 2)), ids=str)
def test_axes_are_those_of_the_group(axes):
    """As the weight whose last two axes they are; the order of both does not matter."""
    start = np.random.default_rng(2).standard_normal((2, 3, 4))
    other = ({0, 1, 2} - set(axes)).pop()
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = TraxAdafactor([{"params": [weight], "factored_axes": axes}], lr=0.1)
    loop = Loop(start.transpose(other, *axes))
    for gradient in gradients(start.shape, 3):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        loop.update(gradient.transpose(other, *axes), 0.1)
    assert_close("weight", weight.detach().permute(other, *axes), torch.tensor(loop.weight), 1e-12)
    state = optimizer.state[weight]
    kept = [state[name].numel() for name in ("row_average", "column_average")]
    assert kept == [24 // start.shape[axes[1]], 24 // start.shape[axes[0]]]


def pair(start, **theirs):
    """The same weight under transformers' optimizer and under ours."""
    weights = [torch.nn.Parameter(torch.tensor(start)) for _ in range(2)]
    options = {"lr": 0.1, "relative_step": False, "scale_parameter": True, **theirs}
    ours = {"weight_decay": theirs.get("weight_decay", 0.0)}
    return weights, [Adafactor([weights[0]], **options), TraxAdafactor([weights[1]], lr=0.1, **ours)]


def step_both(weights, optimizers, gradient):
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.tensor(gradient)
        optimizer.step()


def test_difference_in_weight_decay():
    """Without a gradient's direction: of ours 1e-2 of the weight goes at each step, of theirs a tenth of its scale of
    that, since their decay is times the learning rate and the weight's size."""
    start = np.full((3, 5), 2.0)
    weights, optimizers = pair(start, weight_decay=1e-2)
    step_both(weights, optimizers, np.zeros((3, 5)))
    assert_close("weight", weights[0].detach(), torch.tensor(start * (1 - 1e-2 * 0.1 * 2.0)), 1e-12)
    assert_close("weight", weights[1].detach(), torch.tensor(start * (1 - 1e-2)), 1e-12)


def test_difference_in_epsilon():
    """Theirs, 1e-30 of a squared gradient, lets gradients of 1e-12 make whole steps; ours stops them."""
    start, gradient = np.full((3, 5), 1.0), np.full((3, 5), 1e-12)
    weights, optimizers = pair(start)
    step_both(weights, optimizers, gradient)
    assert_close("weight", weights[0].detach(), torch.tensor(start - 0.1), 1e-6)
    assert (weights[1].detach() - 1).abs().max() < 2e-5


def test_difference_in_the_first_average():
    """Theirs is the first squared gradient; ours 2 ** -0.8 of it, so that only the clipping makes both alike."""
    start = np.full((4,), 1.0)
    weights, optimizers = pair(start, clip_threshold=10.0)
    optimizers[1].param_groups[0]["clip_threshold"] = 10.0
    step_both(weights, optimizers, np.full((4,), 0.5))
    assert_close("weight", weights[0].detach(), torch.tensor(start - 0.1), 1e-9)
    assert_close("weight", weights[1].detach(), torch.tensor(start - 0.1 * 2**0.4), 1e-9)


def test_saved_and_loaded_it_goes_on_the_same():
    start = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    runs = [torch.nn.Parameter(torch.tensor(start)) for _ in range(2)]
    optimizers = [TraxAdafactor([weight], lr=0.1, weight_decay=0.1, weight_decay_steps=5) for weight in runs]
    for step, gradient in enumerate(gradients((3, 5), 4)):
        for weight, optimizer in zip(runs, optimizers, strict=True):
            weight.grad = torch.tensor(gradient).float()
            optimizer.step()
        if step == 1:
            optimizers[1] = TraxAdafactor([runs[1]])
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert torch.equal(*runs)


def test_weights_of_16_bits_are_updated_in_float32():
    start = torch.linspace(-1, 1, 12).view(3, 4).bfloat16()
    half, whole = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    for weight in (half, whole):
        weight.grad = torch.linspace(0, 3, 12, dtype=weight.dtype).view(3, 4)
        TraxAdafactor([weight], lr=0.1).step()
    assert torch.equal(half, whole.bfloat16())


def test_rates_of_the_recipes():
    """Updates count from 1, as in trax's loop."""
    assert [constant_then_falling(step, 10_000) for step in (1, 10_000, 40_000)] == pytest.approx([0.01, 0.01, 0.005])
    assert rising_then_falling(1, 10_000) == pytest.approx(1 / 10_000 / 100)
    assert [rising_then_falling(step, 10_000) for step in (5_000, 10_000, 40_000)] == pytest.approx([5e-3, 0.01, 5e-3])
    found = {name: (r.decay_exponent, r.weight_decay, r.weight_decay_steps, r.warmup) for name, r in RECIPES.items()}
    assert found == {
        "c4": (0.8, 1e-5, 100_000, 10_000),
        "c4-dense": (0.8, 0.0, None, 10_000),
        "arxiv": (0.9, 0.0, None, 10_000),
    }
    assert RECIPES["c4"].rate(1, 10_000) == 0.01
    assert RECIPES["arxiv"].rate(1, 10_000) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must not be negative"),
        ({"weight_decay": float("nan")}, "`weight_decay` must not be negative"),
        ({"clip_threshold": 0.0}, "`clip_threshold` must be positive"),
        ({"weight_decay_steps": 0}, "`weight_decay_steps` must be at least 1"),
    ],
    ids=["lr", "nan", "clip", "steps"],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        TraxAdafactor([torch.nn.Parameter(torch.ones(2))], **options)


def test_a_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        TraxAdafactor(embedding.parameters()).step()
