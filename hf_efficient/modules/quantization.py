"""Quantisation of models to 8 and 4 bits as transformers knows it: a config, a quantiser, and what a model does for it.

Importing this module registers both under `quant_method="hf_efficient"`. What is done to a model stands in
[`QuantizableMixin`], which comes with the model's own code, so that models out of this package and out of the code that
an exported folder carries live in one process, whichever of them registered first.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..ops.quantized import ALIGNMENT, FORMATS
from .quantized_layers import QUANTIZED, QuantizedLayer, refuse_training
from .stack_decoding import forget_weights


QUANT_METHOD = "hf_efficient"


class SparseQuantizationConfig(QuantizationConfigMixin):
    """
    Settings of quantisation, given to `from_pretrained` of a float model and kept in the config of what comes out.

    Args:
        weights (`str`, defaults to `"int8"`): `"int8"`, or `"int4"` for the units of sparse feed-forward layers and for
            linear layers. Controllers, multiplicative layers, convolutions and output layers are in 8 bits either way.
        modules_to_not_convert (`list[str]`, *optional*): names of modules that stay floats, with all that they hold;
            ends of names and regular expressions too.
        source (`str`, *optional*): folder or repository of the float model, which errors name. Filled in for the model
            that is quantised, never in this object; of an absolute path only the last name is saved.

    Example:

    ```python
    >>> from hf_efficient import ScalingTransformerForCausalLM, SparseQuantizationConfig

    >>> config = SparseQuantizationConfig("int8")
    >>> model = ScalingTransformerForCausalLM.from_pretrained("my-model", quantization_config=config)
    >>> model.save_pretrained("my-model-int8")
    ```
    """

    def __init__(
        self,
        weights: str = "int8",
        modules_to_not_convert: list[str] | None = None,
        source: str | None = None,
        **kwargs: Any,
    ):
        if kwargs.pop("quant_method", QUANT_METHOD) != QUANT_METHOD or kwargs:
            raise ValueError(
                f"{type(self).__name__} takes weights, modules_to_not_convert and source, and quant_method is "
                f"{QUANT_METHOD!r}; got other values for {', '.join(kwargs) or 'quant_method'}."
            )
        if weights not in FORMATS:
            raise ValueError(f"weights must be one of {', '.join(map(repr, FORMATS))}, not {weights!r}.")
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert must be a list of names; give [{modules_to_not_convert!r}].")
        self.quant_method: Any = QUANT_METHOD
        self.weights = weights
        self.modules_to_not_convert = modules_to_not_convert
        self.source = source

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved, without the place of a folder: configs are published with the model."""
        settings = super().to_dict()
        if self.source is not None and Path(self.source).is_absolute():
            settings["source"] = Path(self.source).name
        return settings

    def __getattr__(self, name: str) -> Any:
        # Refusal of adapters: PEFT asks for this before it puts LoRA on a layer, and for nothing earlier. A property
        # would also refuse those who look at all attributes, as `inspect.getmembers` does.
        if name == "get_apply_tensor_subclass":
            raise refuse_training(self.__dict__.get("source"))
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")


class TrainingRefusedError(ValueError, AttributeError):
    """A model that cannot be trained. An `AttributeError` too, which `hasattr`, `getattr` with a default and
    `inspect.getmembers` pass over."""


class SparseQuantizer(HfQuantizer):
    """The quantiser of [`SparseQuantizationConfig`], made by `from_pretrained`."""

    quantization_config: SparseQuantizationConfig

    def __init__(self, quantization_config: SparseQuantizationConfig, **kwargs: Any):
        # A copy, to name the float model in: the user may quantise others by the same config.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: where a float model would lie on a disk while it is quantised.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "A model cannot be quantised while parts of it stay on a disk: quantise it in memory, save it, and "
                "load what was saved with this device_map."
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not hasattr(model, "empty_quantized_layers"):
            raise ValueError(
                f"{type(model).__name__} cannot be quantised by SparseQuantizationConfig, which knows the layers of "
                "Scaling Transformer, of Terraformer and of SRU++."
            )
        if self.pre_quantized:
            model.empty_quantized_layers(self.quantization_config, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config, place = self.quantization_config, Path(model.name_or_path)
        if not self.pre_quantized:
            if config.source is None and model.name_or_path:
                config.source = str(place.absolute()) if place.is_dir() else model.name_or_path
            model.quantize_layers(config)
        elif config.source is not None and (place.parent / config.source).is_dir():  # the float folder lies beside
            config.source = str((place.parent / config.source).absolute())
        model.finish_quantized_layers(config.source)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # as a saved config has it
            dtype = getattr(torch, dtype)
        model.dequantize_layers(dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return `True`: integers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """
        Raises:
            TrainingRefusedError: always. Trainer asks before it says by itself, of any quantised model, that adapters
                could be trained.
        """
        raise TrainingRefusedError(str(refuse_training(self.quantization_config.source)))


class QuantizableMixin:
    """Mixin of models whose layers [`SparseQuantizationConfig`] quantises; [`SparseQuantizer`] calls its methods."""

    # Names of modules that stay floats: heads of a few rows, and what reads the weights of its modules itself.
    float_modules: ClassVar[tuple[str, ...]] = ()
    output_layer: ClassVar[str] = "lm_head"

    def _quantizable(self: Any, config: SparseQuantizationConfig) -> list[tuple[str, str]]:
        """Names of the modules to quantise, and their formats."""
        kept = [*self.float_modules, *(config.modules_to_not_convert or ())]
        tied = {name for pair in self.all_tied_weights_keys.items() for name in pair}
        prefix = f"{self.base_model_prefix}."
        found = []
        for name, module in self.named_modules():
            if type(module) not in QUANTIZED or any(f"{name}.{key}" in tied for key in module._parameters):
                continue
            # By the name that it has in the model with a head and in the one without.
            names = (name, prefix + name, name.removeprefix(prefix))
            if all(should_convert_module(each, kept) for each in names):
                is_output = name.partition(".")[0] == self.output_layer
                found.append((name, "int8" if is_output else config.weights))
        return found

    def empty_quantized_layers(self: Any, config: SparseQuantizationConfig, files: Iterable[str] | None = None) -> None:
        """
        Put empty quantised layers in the place of float ones, to load weights into.

        Args:
            config (`SparseQuantizationConfig`): how to quantise.
            files (`Iterable[str]`, *optional*): safetensors that hold the weights: that they do is checked.

        Raises:
            ValueError: if a file is damaged, or a tensor is missing or of another shape or dtype than the config says.
        """
        for name, kind in self._quantizable(config):
            module = self.get_submodule(name)
            self.set_submodule(name, QUANTIZED[type(module)].like(module, kind).train(module.training))
        files = [file for file in files or () if str(file).endswith(".safetensors")]
        if files:
            _check_files(self, files)

    @torch.no_grad()
    def quantize_layers(self: Any, config: SparseQuantizationConfig) -> None:
        """Quantise the layers one after the other, each of which gives its floats back before the next one."""
        forget_weights(self)
        for name, kind in self._quantizable(config):
            module = self.get_submodule(name)
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is not in memory, but offloaded: quantise the model where it fits into memory, save it, "
                    "and load what was saved."
                )
            try:
                self.set_submodule(name, QUANTIZED[type(module)].from_float(module, kind))
            except ValueError as error:
                raise ValueError(f"{name} cannot be quantised: {error}") from error

    def finish_quantized_layers(self: Any, source: str | None) -> None:
        """Freeze the model, tell its layers where it came from, and lay their tensors as kernels read them best."""
        self.requires_grad_(False)
        for layer in quantized_layers(self):
            layer.source = source
            # A file that is mapped into memory puts them anywhere.
            for tensor in (*layer.buffers(recurse=False), *layer.parameters(recurse=False)):
                if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
                    tensor.data = tensor.data.clone()

    @torch.no_grad()
    def dequantize_layers(self: Any, dtype: torch.dtype | None) -> None:
        """Put float layers in the place of quantised ones, and let the model be trained again."""
        forget_weights(self)
        names = [name for name, module in self.named_modules() if isinstance(module, QuantizedLayer)]
        for name in names:
            layer = self.get_submodule(name).to_float()
            self.set_submodule(name, layer if dtype is None else layer.to(dtype))
        self.requires_grad_(True)

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """See [`~transformers.PreTrainedModel.num_parameters`]; a weight in 8 or 4 bits counts as one."""
        total = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        if only_trainable:
            return total
        floats = sum(p.numel() for layer in quantized_layers(self) for p in layer.parameters())
        return total - floats + sum(layer.num_weights() for layer in quantized_layers(self))

    def add_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """
        See [`~transformers.PreTrainedModel.add_adapter`].

        Raises:
            ValueError: if the model is quantised.
        """
        layer = next(quantized_layers(self), None)
        if layer is not None:
            raise refuse_training(layer.source)
        super().add_adapter(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """
        See [`~transformers.PreTrainedModel.resize_token_embeddings`].

        Raises:
            ValueError: if the output layer is quantised and would change.
        """
        if isinstance(self.get_output_embeddings(), QuantizedLayer):
            embeddings, layer = self.get_input_embeddings(), next(quantized_layers(self))
            size = len(embeddings.weight) if new_num_tokens is None else new_num_tokens
            if pad_to_multiple_of is not None:
                size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
            if size == len(embeddings.weight):
                return embeddings
            folder = "the float model" if layer.source is None else f"the float model, {layer.source!r}"
            raise ValueError(
                f"A quantised output layer cannot be resized: resize {folder}, and quantise what comes out; or leave "
                f"the output layer in floats (modules_to_not_convert=[{self.output_layer!r}])."
            )
        return super().resize_token_embeddings(  # type: ignore[misc]
            new_num_tokens, pad_to_multiple_of, *args, **kwargs
        )


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """The quantised layers of a model, in its order."""
    return (module for module in model.modules() if isinstance(module, QuantizedLayer))


_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


def _check_files(model: Any, files: list[str]) -> None:
    """Compare what headers of files say with the buffers of quantised layers, before anything is read."""
    found: dict[str, tuple[str, list[int], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118  # not a dict
                    part = content.get_slice(name)
                    found[name] = (file, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut off ({error}): copy or download it anew.") from error
    prefix = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers() if isinstance(module, QuantizedLayer) else ():
            _check_tensor(f"{name}.{key}", buffer, found, prefix, Path(files[0]))


def _check_tensor(name: str, buffer: Tensor, found: dict[str, Any], prefix: str, first: Path) -> None:
    place = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in found), None)
    if place is None:
        raise ValueError(
            f"{first if first.name == 'model.safetensors' else first.parent} has no tensor {name!r}, which its config "
            "(quantization_config) promises: the folder is not whole, or the weights are another model's."
        )
    file, shape, dtype = found[place]
    if tuple(shape) != tuple(buffer.shape) or dtype != _DTYPES[buffer.dtype]:
        raise ValueError(
            f"{file} holds {place!r} as {dtype} of shape {tuple(shape)}, but its config (quantization_config) promises "
            f"{_DTYPES[buffer.dtype]} of shape {tuple(buffer.shape)}: the weights are another model's."
        )


# An exported folder's code may come beside the package, in either order.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, SparseQuantizationConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, SparseQuantizer)
