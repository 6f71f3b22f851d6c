"""Layers of token-by-token decoding on a CPU, with weights of 8 and 4 bits, 16 bits, or float32.

Quantised weights are codes with scales, each row by itself:

    int8    w[o, i] = codes[o, i] scales[o]                     int8 (outputs, padded inputs), float32 (outputs,)
    int4    w[o, i] = (codes[o, i] - 8) scales[o, i // 32]      uint8 (outputs, groups, 16), float16 (outputs, groups)

Inputs are rounded to 8 bits for them, one scale for a vector or for each group of 32, and products are summed as
integers: every instruction set finds the same. All else is computed in float32. There is no gradient.
"""

from ._ops import ops as ops
from .layers import attention, feed_forward, layers
from .products import linear, module_conv, multiplicative, sparse_feed_forward


__all__ = ["attention", "feed_forward", "layers", "linear", "module_conv", "multiplicative", "sparse_feed_forward"]
