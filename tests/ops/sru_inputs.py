"""Random inputs of the recurrence, and gradients of its results by the names of the inputs."""

import pytest
import torch


TENSORS = ("x", "weight_c", "bias", "c0", "mask", "document_start", "dropout_mask")


def sizes(*shapes):
    """Parameters (batch, length, width) with ids such as `B1-T63-D500`."""
    return [pytest.param(*shape, id="B{}-T{}-D{}".format(*shape)) for shape in shapes]


def make_inputs(*names, batch=3, length=7, width=5, parts=3, dtype=torch.float64, requires_grad=True):
    """`u` and those of the optional arguments that are named."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    makers = {
        "x": lambda: random(batch, length, width),
        "weight_c": lambda: random(2, width),
        "bias": lambda: random(2, width),
        "c0": lambda: random(batch, width),
        "mask": lambda: torch.rand(batch, length) < 0.7,
        "document_start": lambda: torch.rand(batch, length) < 0.3,
        "dropout_mask": lambda: (torch.rand(batch, width) < 0.7).to(dtype) / 0.7,
    }
    return {"u": random(batch, length, parts, width), **{name: makers[name]() for name in names}}


def leaves_of(inputs):
    """The inputs that take a gradient, by name."""
    return {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}


def gradients(outputs, cotangents, leaves):
    """The gradients of `outputs`, given theirs, by the names of `leaves`; zero where an input has no effect."""
    found = torch.autograd.grad(
        outputs, list(leaves.values()), cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))
