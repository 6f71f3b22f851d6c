"""A kernel for the tests of the builder: `scale_(x)` multiplies a float32 tensor in place."""

from ._ops import ops


def scale_(x):
    ops.scale_(x)
    return x


__all__ = ["scale_"]
