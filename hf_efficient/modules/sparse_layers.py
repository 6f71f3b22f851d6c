"""Sparse layers of the Scaling Transformer and of Terraformer.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 3, and the
authors' code. The mathematics is in ops/sparse_ff.py and ops/multiplicative.py.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..ops.backend import is_transformed
from ..ops.multiplicative import conv_over_modules, modular_dense, multiplicative_dense
from ..ops.sparse_ff import controller_code, draw_levels, draw_winners, gated_units, logits_of_code, sparse_ff


class UnitDraws:
    """
    Draws of one call of [`SparseFeedForward`] in training, to be injected, or remembered for a second run of the same
    call: recomputation must not choose other units, which rounding alone could make it do.

    A second run takes what the first one drew, but draws again and throws that away: dropout behind the layer, whose
    masks it makes anew, must meet the generator in the same state.

    Args:
        select (`Tensor` of shape `()`, *optional*): uniform between 0 and 1; below `hard_probability` the mask is hard.
        uniforms (`Tensor` of shape `(tokens, blocks, block size)`, *optional*): what the noise is made of.
        winners (`Tensor` of shape `(tokens, blocks)`, *optional*): chosen units; nothing is drawn for them then.
    """

    def __init__(self, select: Tensor | None = None, uniforms: Tensor | None = None, winners: Tensor | None = None):
        self.select = select
        self.uniforms = uniforms
        self._winners = winners
        self._drew_select = False
        self._drew_noise = False
        self._ran = False

    @property
    def winners(self) -> Tensor | None:
        """Chosen units, by their index in their block. Those that were drawn are kept in a byte each, since they stay
        until the backward pass where activations do not."""
        return None if self._winners is None else self._winners.long()

    def holds_any(self) -> bool:
        """Return whether something was injected or is remembered."""
        return self.select is not None or self.uniforms is not None or self._winners is not None

    def select_once(self, device: torch.device | None) -> Tensor:
        """`select`, drawn on a device where it was not injected."""
        if self.select is None or self._drew_select:
            drawn = torch.rand((), device=device)
            if self.select is None:
                self.select, self._drew_select = drawn, True
        return self.select

    def winners_once(self, code: Tensor, up: Tensor, bias: Tensor, temperature: float) -> Tensor:
        """`winners`, drawn as [`draw_winners`] does from the logits of a controller where they were not injected."""
        if self._winners is None:
            with torch.no_grad():
                logits = logits_of_code(code, up, bias)
            drawn = draw_winners(logits, temperature, self.uniforms)
            narrow = torch.uint8 if logits.shape[-1] <= 256 else torch.int32
            self._winners, self._drew_noise = drawn.to(narrow), self.uniforms is None
        elif self._drew_noise:
            draw_levels(self._winners.shape, self._winners.device)
        return self._winners.long()

    def is_first_run(self) -> bool:
        """Return `True` once, and `False` from then on."""
        is_first, self._ran = not self._ran, True
        return is_first


def glorot_(weight: Tensor, inputs: int, outputs: int, gain: float = 1.0) -> None:
    """Initialise a weight uniformly as one of so many inputs and outputs, whatever its shape (Glorot and Bengio)."""
    bound = gain * math.sqrt(6 / (inputs + outputs))
    init.uniform_(weight, -bound, bound)


@torch.no_grad()
def observe_units(layer: Any, winners: Tensor, pre_activations: Tensor, real: Tensor | None) -> None:
    """
    Show a sparse feed-forward layer's observer what was chosen.

    Args:
        layer (`nn.Module`): has `observer`, `activation` and `block_size`, as [`SparseFeedForward`].
        winners (`Tensor` of shape `(tokens, blocks)`): chosen units, by their index in their block.
        pre_activations (`Tensor` of shape `(tokens, blocks * block size)`): all units' products with the input.
        real (`Tensor`, *optional*): boolean, one for each token, `False` at padding.
    """
    passes = torch.ones_like(winners, dtype=torch.bool)
    if layer.activation == "relu":
        units = pre_activations.unflatten(-1, (-1, layer.block_size))
        passes = units.gather(-1, winners.unsqueeze(-1).long()).squeeze(-1) > 0
    if real is not None:
        kept = real.flatten()
        winners, passes = winners[kept], passes[kept]
    layer.observer(winners, passes)


class SparseFeedForward(nn.Module):
    """
    Feed-forward layer of which each token uses one unit in each block, chosen by a controller of low rank.

    In training all units are multiplied, by a mask that is soft for most calls and hard for the rest; in evaluation
    each token takes its winners alone. One draw for a whole call, not for a token, decides between the two masks, so
    with accumulated gradients or several devices each batch draws its own, as in the authors' code.

    Weights lie as `(blocks, block size, width)`, one row a unit, in both matrices.

    Args:
        width (`int`): of input and output.
        num_units (`int`): hidden units, a multiple of `block_size`.
        block_size (`int`): N of the paper: one unit in so many is used.
        rank (`int`): inner width of the controller.
        activation (`str`, defaults to `"relu"`): see [`~hf_efficient.ops.sparse_ff.sparse_ff`].
        temperature (`float`, defaults to 0.1): scale of the noise by which training draws winners.
        hard_probability (`float`, defaults to 0.3): share of training calls with a hard mask.
        multiply_by_controller (`bool`, defaults to `False`): scale winners by their probability.
        inner_bias (`bool`, defaults to `False`): a bias before the activation, which the original lacks.
        scaled_init (`bool`, defaults to `False`): initialise the second matrix sqrt(N) times larger, as the original's
            `kernel_scaling`.
    """

    def __init__(
        self,
        width: int,
        num_units: int,
        block_size: int,
        rank: int,
        *,
        activation: str = "relu",
        temperature: float = 0.1,
        hard_probability: float = 0.3,
        multiply_by_controller: bool = False,
        inner_bias: bool = False,
        scaled_init: bool = False,
    ):
        super().__init__()
        blocks = num_units // block_size
        self.block_size = block_size
        self.activation = activation
        self.temperature = temperature
        self.hard_probability = hard_probability
        self.multiply_by_controller = multiply_by_controller
        self.scaled_init = scaled_init
        self.controller_down = nn.Parameter(torch.empty(rank, width))
        self.controller_up = nn.Parameter(torch.empty(blocks, block_size, rank))
        self.controller_bias = nn.Parameter(torch.empty(blocks, block_size))
        self.up = nn.Parameter(torch.empty(blocks, block_size, width))
        self.down = nn.Parameter(torch.empty(blocks, block_size, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.inner_bias = nn.Parameter(torch.empty(blocks, block_size)) if inner_bias else None
        self.observer: Any = None  # called with winners of real tokens, and which of them the activation lets pass

    def _train(self, x: Tensor, draws: UnitDraws, real: Tensor | None) -> Tensor:
        """The training form for `(tokens, width)`."""
        controller = (controller_code(x, self.controller_down), self.controller_up, self.controller_bias)
        inner_bias = None if self.inner_bias is None else self.inner_bias.flatten()
        pre_activations = nn.functional.linear(x, self.up.flatten(0, 1), inner_bias)
        options = (self.activation, self.multiply_by_controller)
        is_traced = torch.compiler.is_compiling() or is_transformed()
        # On the CPU, so that nothing waits for a device; inside a transform or a compiler as one of its tensors.
        is_hard = draws.select_once(x.device if is_traced else None) < self.hard_probability
        winners = draws.winners_once(*controller, self.temperature) if is_traced or is_hard else None
        if self.observer is not None and not is_traced and draws.is_first_run():
            # Of a soft mask the units that evaluation takes: to be watched must not change what is drawn.
            with torch.no_grad():  # nothing is saved that a second run would not save
                shown = logits_of_code(*controller).argmax(-1) if winners is None else winners
            observe_units(self, shown, pre_activations, real)
        if is_traced:  # nobody knows yet which of the two it will be
            hard, soft = (gated_units(pre_activations, *controller, one, *options) for one in (winners, None))
            hidden = torch.where(is_hard, hard, soft)
        else:
            hidden = gated_units(pre_activations, *controller, winners, *options)
        return hidden @ self.down.flatten(0, 1).to(hidden.dtype) + self.bias.to(hidden.dtype)

    def forward(self, x: Tensor, draws: UnitDraws | None = None, real: Tensor | None = None) -> Tensor:
        """
        Args:
            x (`Tensor` of shape `(..., width)`): input.
            draws (`UnitDraws`, *optional*): of this call in training. The first run fills it; given again, it makes a
                second run choose the same.
            real (`Tensor` of the shape of `x` without its last dimension, *optional*): boolean, `False` at padding,
                whose units are computed as others are but not shown to an observer.

        Returns:
            `Tensor` of the shape of `x`.
        """
        if self.training:
            # A compiler decides itself what is run again, and lets nothing be written into what came from outside.
            if draws is None or (torch.compiler.is_compiling() and not draws.holds_any()):
                draws = UnitDraws()
            return self._train(x.reshape(-1, x.shape[-1]), draws, real).reshape(x.shape)
        weights = (self.controller_down, self.controller_up, self.controller_bias, self.up, self.down, self.bias)
        output, winners = sparse_ff(
            x,
            *weights,
            self.inner_bias,
            activation=self.activation,
            multiply_by_controller=self.multiply_by_controller,
        )
        if self.observer is not None:
            inner_bias = None if self.inner_bias is None else self.inner_bias.flatten().to(x.dtype)
            units = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.up.flatten(0, 1).to(x.dtype), inner_bias)
            observe_units(self, winners.reshape(-1, winners.shape[-1]), units, real)
        return output

    def extra_repr(self) -> str:
        blocks, size, width = self.up.shape
        return f"{width}, {blocks} blocks of {size} units, rank {len(self.controller_down)}, {self.activation}"

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialise as the original does: Glorot over whole matrices; all biases normal, of deviation 1e-6."""
        blocks, size, width = self.up.shape
        glorot_(self.controller_down, width, len(self.controller_down))
        glorot_(self.controller_up, len(self.controller_down), blocks * size)
        glorot_(self.up, width, blocks * size)
        glorot_(self.down, width, blocks * size, gain=math.sqrt(size) if self.scaled_init else 1.0)
        for bias in (self.controller_bias, self.bias, self.inner_bias):
            if bias is not None:
                init.normal_(bias, std=1e-6)


def pack_units(up: Tensor, down: Tensor) -> Tensor:
    """
    Lay both rows of each unit side by side, so that a unit is one stream to read.

    Args:
        up, down (`Tensor` of shape `(blocks, block size, width)`): the matrices of [`SparseFeedForward`].

    Returns:
        `Tensor` of shape `(blocks, block size, 2 * width)`: contiguous; `record[..., :width]` and `record[..., width:]`
        are what [`~hf_efficient.ops.sparse_ff.sparse_ff`] takes in the place of `up` and `down`.
    """
    return torch.cat([up, down], dim=-1).contiguous()


def unpack_units(records: Tensor) -> tuple[Tensor, Tensor]:
    """Return `up` and `down` as views of what [`pack_units`] made."""
    up, down = records.chunk(2, dim=-1)
    return up, down


class MultiplicativeDense(nn.Module):
    """
    Linear map whose matrix is a gating for each module times one projection; see [`multiplicative_dense`].

    Args:
        inputs (`int`): width of the input; it need not divide by `modules`.
        outputs (`int`): width of the output, a multiple of `modules`.
        modules (`int`): S of the paper.
        bias (`bool`, defaults to `True`): whether to add one.
    """

    def __init__(self, inputs: int, outputs: int, modules: int, bias: bool = True):
        super().__init__()
        self.gating = nn.Parameter(torch.empty(modules, inputs))
        self.projection = nn.Parameter(torch.empty(inputs, outputs // modules))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return multiplicative_dense(x, self.gating, self.projection, self.bias, self.training)

    def extra_repr(self) -> str:
        (modules, inputs), size = self.gating.shape, self.projection.shape[1]
        return f"{inputs}, {modules * size}, {modules} modules, bias={self.bias is not None}"

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialise as the original does: gating normal of deviation 0.5, projection Glorot, bias of 1e-6."""
        init.normal_(self.gating, std=0.5)
        glorot_(self.projection, *self.projection.shape)
        if self.bias is not None:
            init.normal_(self.bias, std=1e-6)


class ModularDense(MultiplicativeDense):
    """[`MultiplicativeDense`] of equal width, with a matrix of its own for each module behind it; see
    [`modular_dense`]."""

    def __init__(self, width: int, modules: int):
        super().__init__(width, width, modules)
        size = width // modules
        self.kernel = nn.Parameter(torch.empty(modules, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return modular_dense(x, self.gating, self.projection, self.kernel, self.bias)

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialise as [`MultiplicativeDense`], the modules' matrices Glorot."""
        super().init_own_weights()
        size = self.kernel.shape[1]
        glorot_(self.kernel, size, size)


class ModuleConv(nn.Module):
    """
    Convolution over time and modules; see [`conv_over_modules`].

    Args:
        channels (`int`): width of a module of the input.
        size (`int`): width of a module of the output.
        window (`int`): tokens that it sees, the current one and those before it.
        width (`int`): modules that it sees, an odd number.
    """

    def __init__(self, channels: int, size: int, window: int, width: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(size, channels, window, width))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, windows: Tensor) -> Tensor:
        channels = self.kernel.shape[1]
        return conv_over_modules(windows.unflatten(-1, (-1, channels)), self.kernel, self.bias)

    def extra_repr(self) -> str:
        size, channels, window, width = self.kernel.shape
        return f"{channels}, {size}, window={window}, width={width}"

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialise as the original does: normal, Glorot of the channels alone; bias of 1e-6."""
        size, channels = self.kernel.shape[:2]
        init.normal_(self.kernel, std=math.sqrt(2 / (channels + size)))
        init.normal_(self.bias, std=1e-6)
