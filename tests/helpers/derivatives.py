"""Derivatives by torch's transforms against central differences in float64, and `vmap` over models against a loop."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from tests.helpers.comparison import assert_close


Point = dict[str, Tensor]
STEP = 1e-5


def _dot(one: Point, other: Point) -> Tensor:
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


def _differences(function: Callable[[Point], Any], point: Point, direction: Point) -> Any:
    """The derivative along `direction` by central differences, of a tensor or of a dict of tensors."""
    ends = [function({name: value + step * direction[name] for name, value in point.items()}) for step in (STEP, -STEP)]
    if isinstance(ends[0], Tensor):
        return (ends[0] - ends[1]).detach() / (2 * STEP)
    return {name: (ends[0][name] - ends[1][name]).detach() / (2 * STEP) for name in point}


def gradients(function: Callable[[Point], Tensor], point: Point, create_graph: bool = False) -> tuple[Point, Point]:
    """Leaves at `point`, and the gradients of a number there by torch's autograd."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in point.items()}
    found = torch.autograd.grad(
        function(leaves), list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return leaves, dict(zip(leaves, found, strict=True))


def check_first_derivatives(function: Callable[[Point], Tensor], point: Point, tolerance: float = 1e-7) -> None:
    """Compare the derivatives of a tensor along a random direction: forward mode of either kind, and reverse mode by
    autograd, `grad` and `vjp`."""
    point = {name: value.detach() for name, value in point.items()}
    direction = {name: torch.randn_like(value) for name, value in point.items()}
    with torch.no_grad():
        expected = _differences(function, point, direction)
    assert expected.abs().max() > 1e-3, "there is no derivative to compare"
    assert_close("jvp", jvp(function, (point,), (direction,))[1], expected, tolerance)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, direction[name]) for name, value in point.items()}
        assert_close("dual numbers", forward_ad.unpack_dual(function(duals)).tangent, expected, tolerance)
    cotangent = torch.randn_like(expected)
    wanted = (expected * cotangent).sum()

    def number(point: Point) -> Tensor:
        return (function(point) * cotangent).sum()

    assert_close("autograd", _dot(gradients(number, point)[1], direction), wanted, tolerance)
    assert_close("grad", _dot(grad(number)(point), direction), wanted, tolerance)
    assert_close("vjp", _dot(vjp(function, point)[1](cotangent)[0], direction), wanted, tolerance)


def check_second_derivatives(
    function: Callable[[Point], Tensor],
    point: Point,
    tolerance: float = 1e-6,
    whole: Iterable[str] = (),
    reverse_of_forward: bool = True,
) -> None:
    """
    Compare the Hessian of a number times a random direction: by a gradient of the gradient, and by `jvp` of `grad`.

    Args:
        whole: names of small tensors whose whole Hessian is computed too, by `hessian` (forward over reverse mode).
        reverse_of_forward: compute it by reverse over forward mode, too; not through a layer norm, whose forward-mode
            derivative torch 2.13 differentiates as if mean and variance were constant.
    """
    point = {name: value.detach() for name, value in point.items()}
    direction = {name: torch.randn_like(value) for name, value in point.items()}
    expected = _differences(lambda moved: gradients(function, moved)[1], point, direction)
    leaves, found = gradients(function, point, create_graph=True)
    double = torch.autograd.grad(
        _dot(found, direction), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    assert_close("double backward", dict(zip(leaves, double, strict=True)), expected, tolerance)
    assert_close("jvp of grad", jvp(grad(function), (point,), (direction,))[1], expected, tolerance)
    part = {name: point[name] for name in whole}
    if not part:
        return
    expected = _differences(lambda moved: gradients(function, {**point, **moved})[1], part, direction)
    transforms: dict[str, Callable] = {"hessian": hessian}
    if reverse_of_forward:
        transforms["jacrev of jacfwd"] = lambda number: jacrev(jacfwd(number))
    for name, transform in transforms.items():
        blocks = transform(lambda moved: function({**point, **moved}))(part)
        product = {
            row: torch.stack(
                [torch.tensordot(blocks[row][name], direction[name], dims=direction[name].dim()) for name in part]
            ).sum(0)
            for row in part
        }
        assert_close(name, product, {row: expected[row] for row in part}, tolerance)


def check_vmap(
    models: list[nn.Module], batch: dict[str, Tensor], read: Callable[[Any], Tensor], own_batch: bool, tolerance: float
) -> None:
    """
    Compare `vmap` over stacked models with a loop: what `read` takes of the output, and the gradients of its sum.

    Args:
        own_batch (`bool`): give each model a batch of its own, the same rows in another order.
    """

    def call(parameters: Point, buffers: Point, batch: dict[str, Tensor]) -> Tensor:
        return read(functional_call(models[0], (parameters, buffers), kwargs=batch))

    batches = [{name: value.roll(index, 0) for name, value in batch.items()} for index in range(len(models))]
    given: Any = {name: torch.stack([one[name] for one in batches]) for name in batch} if own_batch else batch
    axes = (0, 0, 0 if own_batch else None)
    stacked = stack_module_state(models)  # type: ignore[arg-type]
    results = vmap(call, in_dims=axes)(*stacked, given)
    found = vmap(grad(lambda *arguments: call(*arguments).sum()), in_dims=axes)(*stacked, given)
    with torch.no_grad():
        without_grad = vmap(call, in_dims=axes)(*stacked, given)
    for index, model in enumerate(models):
        model.zero_grad()
        expected = read(model(**(batches[index] if own_batch else batch)))
        expected.sum().backward()
        assert_close(f"result of model {index}", results[index].detach(), expected.detach(), tolerance)
        assert_close(f"result of model {index} without grad", without_grad[index], expected.detach(), tolerance)
        wanted = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
        for name, value in wanted.items():
            assert_close(f"gradient of model {index}: {name}", found[name][index], value, tolerance)
