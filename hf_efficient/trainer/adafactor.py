"""Adafactor and learning rates of the recipe of the Scaling Transformer and Terraformer, as in the authors' code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def constant_then_falling(step: int, warmup: int) -> float:
    """Rate 1 / sqrt(max(step, warmup)) at an update, counted from 1."""
    return max(step, warmup) ** -0.5


def rising_then_falling(step: int, warmup: int) -> float:
    """Rate that rises linearly to 1 / sqrt(warmup) and falls as 1 / sqrt(step) from there, at an update counted from
    1."""
    return min(1.0, step / warmup) * max(step, warmup) ** -0.5


@dataclass(frozen=True)
class Recipe:
    """
    Settings by which the authors trained.

    Args:
        rate (`Callable`): learning rate, of the number of the update and the warm-up.
        decay_exponent (`float`), weight_decay (`float`), weight_decay_steps (`int`, *optional*): of
            [`TraxAdafactor`].
        warmup (`int`, defaults to 10000): updates before the rate falls.
    """

    rate: Callable[[int, int], float]
    decay_exponent: float = 0.8
    weight_decay: float = 0.0
    weight_decay_steps: int | None = None
    warmup: int = 10_000


RECIPES = {
    "c4": Recipe(constant_then_falling, weight_decay=1e-5, weight_decay_steps=100_000),
    "c4-dense": Recipe(constant_then_falling),
    "arxiv": Recipe(rising_then_falling, decay_exponent=0.9),
}


class TraxAdafactor(Optimizer):
    r"""
    Adafactor (Shazeer and Stern, arXiv 1804.04235) as in trax, by which the Scaling Transformer and Terraformer were
    trained. Of update t, counted from 1, of a weight w with gradient g:

        b = 1 - (t + 1) ** -decay_exponent
        v = b v + (1 - b) g ** 2, or its means along two axes, whose product stands for it
        u = g / sqrt(v + eps), divided by max(1, RMS(u) / clip_threshold)
        w = (1 - weight_decay * max(0, 1 - t / weight_decay_steps)) w - lr * max(RMS(w), least_scale) u

    It differs from [`~transformers.Adafactor`] in four points:

    - weight decay is not multiplied by the learning rate, and may fall to 0 in a number of steps;
    - `eps` is added to v, and not to each squared gradient, so that a weight without gradients stays where it is;
    - averages remember a little of their start at 0: b is 0.43 at the first update, where it is 0 there;
    - a group says along which two axes the averages go (`factored_axes`), since layers of the authors' code have theirs
      in another order.

    Its options `relative_step` and `warmup_init` are missing, since rates come from a schedule, and so is `beta1`.

    Args:
        params (`Iterable`): parameters, or dictionaries of them and of the options below.
        lr (`float`, defaults to 1.0): relative to the size of each weight.
        decay_exponent (`float`, defaults to 0.8)
        clip_threshold (`float`, defaults to 1.0)
        weight_decay (`float`, defaults to 0.0)
        weight_decay_steps (`int`, *optional*): never falls by default.
        eps (`float`, defaults to 1e-16)
        least_scale (`float`, defaults to 1e-3)
        factored_axes (`tuple[int, int]`, defaults to `(-2, -1)`): of weights of two dimensions or more; others have one
            average for each number.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        decay_exponent: float = 0.8,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        weight_decay_steps: int | None = None,
        eps: float = 1e-16,
        least_scale: float = 1e-3,
        factored_axes: tuple[int, int] = (-2, -1),
    ):
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "least_scale": least_scale}
        for name, value in options.items():
            if not value >= 0:
                raise ValueError(f"`{name}` must not be negative, as {value} is.")
        for name, value in (("decay_exponent", decay_exponent), ("clip_threshold", clip_threshold)):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, not {value}.")
        if weight_decay_steps is not None and weight_decay_steps < 1:
            raise ValueError(f"`weight_decay_steps` must be at least 1, not {weight_decay_steps}.")
        options |= {"decay_exponent": decay_exponent, "clip_threshold": clip_threshold}
        options |= {"weight_decay_steps": weight_decay_steps, "factored_axes": tuple(factored_axes)}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """
        Update all weights that have a gradient.

        Args:
            closure (`Callable`, *optional*): computes the loss and its gradients.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group, self.state[weight])
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        given: Any = weight.grad
        if given.is_sparse:
            raise RuntimeError("TraxAdafactor does not take sparse gradients: build the embedding with sparse=False.")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        gradient, value = given.to(dtype), weight.to(dtype)
        step = state["step"] = state.get("step", 0) + 1
        update = self._direction(gradient, group, state, 1.0 - (step + 1.0) ** -group["decay_exponent"])
        update /= (_rms(update) / group["clip_threshold"]).clamp(min=1.0)
        update *= group["lr"] * _rms(value).clamp(min=group["least_scale"])
        steps = group["weight_decay_steps"]
        left = 1.0 if steps is None else max(0.0, 1.0 - step / steps)
        weight.copy_(value * (1.0 - group["weight_decay"] * left) - update)

    @staticmethod
    def _direction(gradient: Tensor, group: dict[str, Any], state: dict[str, Any], remembered: float) -> Tensor:
        """The gradient over the root of the average of its square, which is updated."""
        squared, new, eps = gradient.square(), 1.0 - remembered, group["eps"]
        if gradient.dim() < 2:
            average = state.setdefault("average", torch.zeros_like(squared))
            average.mul_(remembered).add_(squared, alpha=new)
            return gradient * (average + eps).rsqrt()
        first, second = group["factored_axes"]
        rows, columns = squared.mean(second, keepdim=True), squared.mean(first, keepdim=True)
        row_average = state.setdefault("row_average", torch.zeros_like(rows)).mul_(remembered).add_(rows, alpha=new)
        column_average = state.setdefault("column_average", torch.zeros_like(columns))
        column_average.mul_(remembered).add_(columns, alpha=new)
        row_factor = (row_average.mean(first, keepdim=True) / (row_average + eps)).sqrt()
        return gradient * row_factor * (column_average + eps).rsqrt()


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
