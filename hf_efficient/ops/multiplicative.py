"""Multiplicative dense layers and convolutions over time and modules, which a model reads few weights for.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 3.2, and
the authors' code. A vector of width d is seen as S modules of d / S. With D the gating and E the projection,

    y[s, j] = sum over i of x[i] D[s, i] E[i, j]                        the multiplicative layer
    y[s, j] = sum over i of (multiplicative layer)[s, i] K[s, i, j]     its modular form, a matrix for each module
    y[t, s] = sum over a, b of u[t - a, s + b] W[a, b]                  the convolution, the same for all modules

The layers take d d / S multiplications for each module, d^2 in all, whatever S is; what they save are weights to read.
"""

import math

import torch
from torch import Tensor, nn

from .backend import is_at_most


def _rounds_to_16_bits(x: Tensor) -> bool:
    device = x.device.type
    return x.element_size() == 2 or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


def multiplicative_dense(
    x: Tensor, gating: Tensor, projection: Tensor, bias: Tensor | None = None, training: bool = False
) -> Tensor:
    """
    Multiply by a matrix that is the product of a gating for each module and one projection.

    Args:
        x (`Tensor` of shape `(..., inputs)`): input.
        gating (`Tensor` of shape `(modules, inputs)`): D.
        projection (`Tensor` of shape `(inputs, size)`): E, `size` outputs of each module.
        bias (`Tensor` of shape `(modules * size,)`, *optional*): added to the output.
        training (`bool`, defaults to `False`): take the quickest form for many tokens in 16 bits and under autocast
            too. It rounds in another place than that for a few tokens, and a controller behind it might choose other
            units in decoding than for the whole text.

    Returns:
        `Tensor` of shape `(..., modules * size)`.

    Raises:
        ValueError: if shapes do not fit together.
    """
    inputs, size = gating.shape[1], projection.shape[1]
    if x.shape[-1] != inputs or projection.shape[0] != inputs:
        raise ValueError(
            f"x is {x.shape[-1]} wide, gating has shape {tuple(gating.shape)} and projection {tuple(projection.shape)}:"
            " (..., inputs), (modules, inputs) and (inputs, size) must agree."
        )
    # Scaling the input for each module makes as many numbers for each token as the gating holds; writing the whole
    # matrix down makes `size` times as many once.
    if is_at_most(math.prod(x.shape[:-1]), size):
        output = ((x.unsqueeze(-2) * gating) @ projection).flatten(-2)
        return output if bias is None else output + bias
    if _rounds_to_16_bits(x) and not training:  # as above, module by module for want of memory
        output = torch.cat([(x * scales) @ projection for scales in gating.unbind()], dim=-1)
        return output if bias is None else output + bias
    matrix = gating.unsqueeze(-1) * projection  # (modules, inputs, size)
    return nn.functional.linear(x, matrix.transpose(1, 2).flatten(0, 1), bias)


def modular_dense(
    x: Tensor,
    gating: Tensor,
    projection: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """
    Apply [`multiplicative_dense`], and then to each module a matrix of its own.

    Args:
        x, gating, projection: see [`multiplicative_dense`].
        kernel (`Tensor` of shape `(modules, size, size)`): K, by module, input and output.
        bias (`Tensor` of shape `(modules * size,)`, *optional*): added to the output.
        training (`bool`, defaults to `False`): see [`multiplicative_dense`].

    Returns:
        `Tensor` of shape `(..., modules * size)`.
    """
    modules = multiplicative_dense(x, gating, projection, training=training).unflatten(-1, (len(gating), -1))
    output = torch.einsum("...si,sij->...sj", modules, kernel).flatten(-2)
    return output if bias is None else output + bias


def conv_over_modules(windows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Convolve each token with the tokens before it and each module with its neighbours.

    Modules beyond the first and the last are zero. What stands before a text's first token is for the caller to say.

    Args:
        windows (`Tensor` of shape `(batch, length + window - 1, modules, channels)` or `(batch, length, window,
            modules, channels)`): the text with the `window - 1` tokens that came before it, or for each token its own
            window, itself the last, where that is not a piece of the text.
        kernel (`Tensor` of shape `(size, channels, window, width)`): W in the layout of `nn.functional.conv2d`; `width`
            is odd.
        bias (`Tensor` of shape `(size,)`, *optional*): added to each module.

    Returns:
        `Tensor` of shape `(batch, length, modules * size)`.
    """
    size, _, window, width = kernel.shape
    batch, length, modules = windows.shape[0], windows.shape[1], windows.shape[-2]
    step = 1
    if windows.dim() == 5:  # one behind the other, and the convolution goes from one to the next
        windows, step = windows.flatten(1, 2), window
    else:
        length -= window - 1
    if is_at_most(length, 1):  # one token of each row: a product of matrices, without what a convolution sets up
        images = nn.functional.pad(windows, (0, 0, width // 2, width // 2)).unfold(2, width, 1)
        output = torch.einsum("nlsck,oclk->nso", images, kernel)
        output = output if bias is None else output + bias
        return output.reshape(batch, -1, modules * size)
    # A view of channels that lie last, as the convolution likes them.
    output = nn.functional.conv2d(windows.permute(0, 3, 1, 2), kernel, bias, (step, 1), (0, width // 2))
    return output.permute(0, 2, 3, 1).flatten(-2)
