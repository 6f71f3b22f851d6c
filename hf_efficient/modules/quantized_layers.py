"""Layers whose weights are integers of 8 or 4 bits, made from float ones, for inference; see ops/quantized.py.

What is quantised, its scales and the controller's bias lie in buffers that keep their dtypes in `model.bfloat16()`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decode_layer import (
    quantized_linear,
    quantized_module_conv,
    quantized_multiplicative,
    quantized_sparse_feed_forward,
)
from ..ops.quantized import (
    GROUP,
    dequantize_rows,
    pack_records,
    padded_width,
    quantize_rows,
    record_bytes,
    unpack_records,
)
from .sparse_layers import (
    ModularDense,
    ModuleConv,
    MultiplicativeDense,
    SparseFeedForward,
    UnitDraws,
    observe_units,
)


def refuse_training(source: str | None) -> ValueError:
    """Make the error for training a quantised model, or an adapter of it; `source` is the folder of the float model."""
    folder = "the float model that it was made from" if source is None else f"the float model, {source!r}"
    return ValueError(
        "A model with weights of 8 or 4 bits cannot be trained, and no adapter (LoRA) of it either: rounding has no "
        f"gradient. Train {folder}, without quantization_config, and quantise what comes out."
    )


class QuantizedLayer(nn.Module):
    """
    Base of layers with quantised weights.

    Args:
        bias (`int`, *optional*): numbers of a bias, which stays a float, as the dtype of the model says.
    """

    source: str | None = None  # folder of the float model, for errors
    bias: Tensor | None

    def __init__(self, bias: int | None):
        super().__init__()
        self._add_float("bias", None if bias is None else (bias,))

    def _add_float(self, name: str, shape: tuple[int, ...] | None) -> None:
        self.register_parameter(name, None if shape is None else nn.Parameter(torch.zeros(shape), requires_grad=False))

    def _add_rows(self, name: str, shape: tuple[int, ...], width: int, kind: str = "int8") -> None:
        """Add buffers for codes and scales of rows, as [`quantize_rows`] gives them."""
        groups, in_bytes = padded_width(width) // GROUP, kind == "int8"
        codes = (groups * GROUP,) if in_bytes else (groups, GROUP // 2)
        dtypes = (torch.int8, torch.float32) if in_bytes else (torch.uint8, torch.float16)
        self.register_buffer(name, torch.zeros(*shape, *codes, dtype=dtypes[0]))
        self.register_buffer(f"{name}_scales", torch.zeros(*shape, *codes[: 0 if in_bytes else 1], dtype=dtypes[1]))

    def _set_rows(self, name: str, weight: Tensor, kind: str = "int8") -> None:
        for suffix, tensor in zip(("", "_scales"), quantize_rows(weight, kind), strict=True):
            self.register_buffer(name + suffix, tensor)

    def _rows(self, name: str, width: int) -> Tensor:
        """The floats that a quantised matrix stands for."""
        return dequantize_rows(self.get_buffer(name), self.get_buffer(f"{name}_scales"), width).contiguous()

    @staticmethod
    def like(module: Any, kind: str) -> "QuantizedLayer":
        """Make an empty layer of the sizes of a float one, to load weights into; `kind` is `"int8"` or `"int4"`."""
        raise NotImplementedError

    def _quantize(self, module: Any) -> None:
        """Fill the buffers from a float layer."""
        raise NotImplementedError

    def _float_like(self) -> Any:
        """A float layer of these sizes."""
        raise NotImplementedError

    def _floats(self) -> dict[str, Tensor]:
        """The float matrices that the buffers stand for."""
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def from_float(cls, module: nn.Module, kind: str):
        """Quantise a float layer. What has one format alone has it whatever `kind` says."""
        with torch.device("meta"):
            layer = cls.like(module, kind)
        layer._quantize(module)
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer.register_parameter(name, nn.Parameter(module.get_parameter(name).detach().clone(), False))
        return layer.train(module.training)

    @torch.no_grad()
    def to_float(self) -> Any:
        """Make the float layer that this one stands for, its matrices in float32."""
        with torch.device("meta"):
            layer = self._float_like()
        for name, matrix in self._floats().items():
            layer.register_parameter(name, nn.Parameter(matrix))
        for name, parameter in self._parameters.items():
            if parameter is not None:
                layer.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        return layer.train(self.training)

    def num_weights(self) -> int:
        """Count the numbers of the float layer that this one stands for."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self._float_like().parameters())

    def _apply(self, fn: Any, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None and self.get_buffer(name).dtype != old.dtype:
                self._buffers[name] = old.to(self.get_buffer(name).device)
        return self

    def check_inference(self, x: Tensor) -> None:
        """
        Refuse a call whose output a gradient would have to come back from.

        Raises:
            ValueError: in training mode, and where the input wants a gradient.
        """
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise refuse_training(self.source)


class QuantizedLinear(QuantizedLayer):
    """
    `nn.Linear` with quantised rows.

    Args:
        in_features, out_features (`int`): of input and output.
        bias (`bool`, defaults to `True`): whether there is one.
        kind (`str`, defaults to `"int8"`): `"int8"` or `"int4"`.
    """

    weight: Tensor
    weight_scales: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, kind: str = "int8"):
        super().__init__(out_features if bias else None)
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self._add_rows("weight", (out_features,), in_features, kind)

    @staticmethod
    def like(module: nn.Linear, kind: str) -> "QuantizedLinear":
        """See [`QuantizedLayer.like`]."""
        return QuantizedLinear(module.in_features, module.out_features, module.bias is not None, kind)

    def _quantize(self, module: nn.Linear) -> None:
        self._set_rows("weight", module.weight, self.kind)

    def _float_like(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None)

    def _floats(self) -> dict[str, Tensor]:
        return {"weight": self._rows("weight", self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        return quantized_linear(x, self.weight, self.weight_scales, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


class QuantizedMultiplicativeDense(QuantizedLayer):
    """
    [`MultiplicativeDense`] with gating and projection in `int8`; the projection lies transposed, a row for each output.

    Args:
        inputs, outputs, modules (`int`), bias (`bool`): see [`MultiplicativeDense`].
    """

    gating: Tensor
    gating_scales: Tensor
    projection: Tensor
    projection_scales: Tensor

    def __init__(self, inputs: int, outputs: int, modules: int, bias: bool = True):
        super().__init__(outputs if bias else None)
        self.inputs, self.size = inputs, outputs // modules
        self._add_rows("gating", (modules,), inputs)
        self._add_rows("projection", (self.size,), inputs)

    @staticmethod
    def like(module: MultiplicativeDense, kind: str) -> "QuantizedMultiplicativeDense":
        """See [`QuantizedLayer.like`]."""
        (modules, inputs), size = module.gating.shape, module.projection.shape[1]
        return QuantizedMultiplicativeDense(inputs, modules * size, modules, module.bias is not None)

    def _quantize(self, module: MultiplicativeDense) -> None:
        self._set_rows("gating", module.gating)
        self._set_rows("projection", module.projection.t())

    def _float_like(self) -> MultiplicativeDense:
        modules = len(self.gating)
        return MultiplicativeDense(self.inputs, modules * self.size, modules, self.bias is not None)

    def _floats(self) -> dict[str, Tensor]:
        projection = self._rows("projection", self.inputs).t().contiguous()
        return {"gating": self._rows("gating", self.inputs), "projection": projection}

    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        weights = (self.gating, self.gating_scales, self.projection, self.projection_scales)
        return quantized_multiplicative(x, *weights, self.bias)

    def extra_repr(self) -> str:
        modules = len(self.gating)
        return f"{self.inputs}, {modules * self.size}, {modules} modules, bias={self.bias is not None}, int8"


class QuantizedModularDense(QuantizedMultiplicativeDense):
    """[`ModularDense`] with gating and projection in `int8`; the modules' own small matrices stay floats."""

    kernel: Tensor

    def __init__(self, width: int, modules: int):
        super().__init__(width, width, modules)
        self._add_float("kernel", (modules, self.size, self.size))

    @staticmethod
    def like(module: MultiplicativeDense, kind: str) -> "QuantizedModularDense":
        """See [`QuantizedLayer.like`]."""
        modules, width = module.gating.shape
        return QuantizedModularDense(width, modules)

    def _float_like(self) -> ModularDense:
        return ModularDense(self.inputs, len(self.gating))

    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        weights = (self.gating, self.gating_scales, self.projection, self.projection_scales)
        modules = quantized_multiplicative(x, *weights).unflatten(-1, (-1, self.size))
        output = torch.einsum("...si,sij->...sj", modules, self.kernel.to(x.dtype)).flatten(-2)
        return output if self.bias is None else output + self.bias.to(x.dtype)


class QuantizedModuleConv(QuantizedLayer):
    """
    [`ModuleConv`] with a kernel in `int8`, a row for each output, in the order of what that sees: tokens, modules, and
    the channels of a module next to each other.

    Args:
        channels, size, window, width (`int`): see [`ModuleConv`].
    """

    kernel: Tensor
    kernel_scales: Tensor

    def __init__(self, channels: int, size: int, window: int, width: int):
        super().__init__(size)
        self.channels, self.window, self.width = channels, window, width
        self._add_rows("kernel", (size,), window * width * channels)

    @staticmethod
    def like(module: ModuleConv, kind: str) -> "QuantizedModuleConv":
        """See [`QuantizedLayer.like`]."""
        size, channels, window, width = module.kernel.shape
        return QuantizedModuleConv(channels, size, window, width)

    def _quantize(self, module: ModuleConv) -> None:
        self._set_rows("kernel", module.kernel.permute(0, 2, 3, 1).flatten(1))

    def _float_like(self) -> ModuleConv:
        return ModuleConv(self.channels, len(self.kernel), self.window, self.width)

    def _floats(self) -> dict[str, Tensor]:
        rows = self._rows("kernel", self.window * self.width * self.channels)
        kernel = rows.view(-1, self.window, self.width, self.channels).permute(0, 3, 1, 2)
        return {"kernel": kernel.contiguous()}

    def forward(self, windows: Tensor) -> Tensor:
        self.check_inference(windows)
        modules = windows.unflatten(-1, (-1, self.channels))
        return quantized_module_conv(modules, self.kernel, self.kernel_scales, self.bias, self.window, self.width)

    def extra_repr(self) -> str:
        return f"{self.channels}, {len(self.kernel)}, window={self.window}, width={self.width}, int8"


class QuantizedSparseFeedForward(QuantizedLayer):
    """
    [`SparseFeedForward`] of which each unit is one record of `int8` or `int4`, and whose controller is in `int8`.

    Args:
        width, num_units, block_size, rank (`int`): see [`SparseFeedForward`].
        kind (`str`, defaults to `"int8"`): format of the units.
        inner_bias (`bool`, defaults to `False`): see [`SparseFeedForward`].
        options: other arguments of [`SparseFeedForward`]; those of training are kept for [`QuantizedLayer.to_float`].
    """

    controller_down: Tensor
    controller_down_scales: Tensor
    controller_up: Tensor
    controller_up_scales: Tensor
    controller_bias: Tensor
    units: Tensor
    inner_bias: Tensor | None

    def __init__(
        self,
        width: int,
        num_units: int,
        block_size: int,
        rank: int,
        *,
        kind: str = "int8",
        inner_bias: bool = False,
        **options: Any,
    ):
        super().__init__(width)
        shape = (num_units // block_size, block_size)
        self.width, self.rank, self.block_size, self.kind = width, rank, block_size, kind
        self.activation = options.get("activation", "relu")
        self.multiply_by_controller = options.get("multiply_by_controller", False)
        self.options = options
        self._add_rows("controller_down", (rank,), width)
        self._add_rows("controller_up", shape, rank)
        self.register_buffer("controller_bias", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("units", torch.zeros(*shape, record_bytes(width, kind), dtype=torch.uint8))
        self._add_float("inner_bias", shape if inner_bias else None)
        self.observer: Any = None  # as that of SparseFeedForward

    @staticmethod
    def like(module: SparseFeedForward, kind: str) -> "QuantizedSparseFeedForward":
        """See [`QuantizedLayer.like`]."""
        blocks, size, width = module.up.shape
        sizes = (width, blocks * size, size, len(module.controller_down))
        options = {name: getattr(module, name) for name in _OPTIONS}
        return QuantizedSparseFeedForward(*sizes, kind=kind, inner_bias=module.inner_bias is not None, **options)

    def _quantize(self, module: SparseFeedForward) -> None:
        self._set_rows("controller_down", module.controller_down)
        self._set_rows("controller_up", module.controller_up)
        self.register_buffer("controller_bias", module.controller_bias.detach().float().clone())
        self.register_buffer("units", pack_records(module.up, module.down, self.kind))

    def _float_like(self) -> SparseFeedForward:
        sizes = (self.width, self.controller_bias.numel(), self.block_size, self.rank)
        return SparseFeedForward(*sizes, inner_bias=self.inner_bias is not None, **self.options)

    def _floats(self) -> dict[str, Tensor]:
        up, down = (dequantize_rows(*rows, self.width) for rows in unpack_records(self.units, self.width, self.kind))
        return {
            "controller_down": self._rows("controller_down", self.width),
            "controller_up": self._rows("controller_up", self.rank),
            "controller_bias": self.controller_bias.clone(),
            "up": up.contiguous(),
            "down": down.contiguous(),
        }

    def forward(self, x: Tensor, draws: UnitDraws | None = None, real: Tensor | None = None) -> Tensor:
        """See [`SparseFeedForward`]; nothing is drawn."""
        self.check_inference(x)
        controller = (self.controller_down, self.controller_down_scales, self.controller_up, self.controller_up_scales)
        weights = (*controller, self.controller_bias, self.units, self.bias, self.inner_bias)
        output, winners = quantized_sparse_feed_forward(
            x, *weights, activation=self.activation, multiply_by_controller=self.multiply_by_controller
        )
        if self.observer is not None:
            up, _ = unpack_records(self.units.flatten(0, 1), self.width, self.kind)
            inner_bias = None if self.inner_bias is None else self.inner_bias.flatten()
            units = quantized_linear(x, up[0].contiguous(), up[1].contiguous(), inner_bias)  # rows lie in records
            observe_units(self, winners.flatten(0, -2), units.flatten(0, -2), real)
        return output

    def extra_repr(self) -> str:
        blocks, size = self.controller_bias.shape
        return f"{self.width}, {blocks} blocks of {size} units, rank {self.rank}, {self.activation}, {self.kind}"


# Of SparseFeedForward, what is not in its weights.
_OPTIONS = ("activation", "multiply_by_controller", "temperature", "hard_probability", "scaled_init")

QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    MultiplicativeDense: QuantizedMultiplicativeDense,
    ModularDense: QuantizedModularDense,
    ModuleConv: QuantizedModuleConv,
    SparseFeedForward: QuantizedSparseFeedForward,
}
