"""Decoders of torch with random weights, made where they are asked for: Scaling Transformers in floating point and
quantised, their dense twins, and GPT-2 of transformers."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.modules.quantization import SparseQuantizationConfig
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.utils.cache_naming import cache_kwarg
from training.benchmarks.decoding.counting import bytes_read
from training.benchmarks.decoding.worker import resident_bytes, serve, timed
from training.benchmarks.environment import describe
from training.benchmarks.sparse_growth import read_bandwidth


FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = ("int8", "int4")
FORMATS = (*FLOATS, *QUANTISED)
# Positions of all models: of GPT-2's shape in llama.cpp too.
POSITIONS = 4096
OPS = ("decode_layer", "sparse_ff")


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """Turn a float model into one whose weights have 8 or 4 bits."""
    sparse: Any = model
    sparse.quantize_layers(SparseQuantizationConfig(kind))
    return model


def build(kind: str, form: str, settings: dict[str, Any]) -> nn.Module:
    """
    Make a decoder with random weights, of which no copy in another dtype ever lives.

    Args:
        kind (`str`): a preset of the Scaling Transformer, or `"gpt2"`.
        form (`str`): one of `FORMATS`.
        settings (`dict[str, Any]`): fields of the config in the place of the preset's.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(FLOATS.get(form, torch.float32))
    try:
        model: nn.Module
        if kind == "gpt2":
            fixed: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
            model = GPT2LMHeadModel(GPT2Config(n_positions=POSITIONS, **fixed, **settings))
        else:
            chosen = {"max_position_embeddings": POSITIONS, **settings}
            model = ScalingTransformerForCausalLM(ScalingTransformerConfig.preset(kind, **chosen))
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    return quantized(model, form) if form in QUANTISED else model


def first_layer(model: nn.Module) -> nn.Module:
    """Cut a Scaling Transformer to its first layer; the copy shares its weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1  # type: ignore[union-attr]
    cut: Any = copy.copy(model)
    cut._modules, cut.config = dict(model._modules), config
    inner = copy.copy(cut.model)
    inner._modules, inner.config = dict(cut.model._modules), config
    inner.layers, inner.layer_types = inner.layers[:1], inner.layer_types[:1]
    cut.model = inner
    return cut


class Decoder:
    """
    A model at batch 1 whose cache is given any length, instead of reading a text of that length.

    Args:
        model (`nn.Module`): a causal language model.
        seed (`int`, defaults to 0): of its tokens, of which each call takes the next.
    """

    def __init__(self, model: nn.Module, seed: int = 0):
        self.model: Any = model
        config: Any = model.config
        self.vocabulary: int = config.vocab_size
        self.generator = torch.Generator().manual_seed(seed)
        self.cache: Any = None
        self.context = 0

    def tokens(self, count: int) -> Tensor:
        return torch.randint(0, self.vocabulary, (1, count), generator=self.generator)

    def _read(self, ids: Tensor) -> None:
        self.model(input_ids=ids, **cache_kwarg(self.cache), use_cache=True, logits_to_keep=1)

    def reset(self, context: int) -> None:
        """Let the cache hold so many tokens: random keys and values, and the states that two tokens leave."""
        if self.cache is None or context != self.context:
            self.cache, self.context = DynamicCache(config=self.model.config), context
            self._read(self.tokens(2))
            for layer in self.cache.layers:
                batch, heads, _, size = layer.keys.shape
                for name in ("keys", "values"):
                    setattr(layer, name, torch.randn(batch, heads, context, size).to(layer.keys.dtype))
            return
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]

    def bytes_of_a_position(self) -> int:
        """Count the bytes of keys and values that the cache holds of one token."""
        first = self.cache.layers[0].keys
        return 2 * len(self.cache.layers) * first.shape[1] * first.shape[3] * first.element_size()

    def decode(self, context: int, count: int) -> dict[str, list[float]]:
        """The seconds of each of so many tokens, after a context."""
        with torch.inference_mode():
            self.reset(context)
            ids = iter(self.tokens(count).split(1, dim=1))
            return timed(lambda: self._read(next(ids)), count)

    def prompt(self, length: int) -> dict[str, list[float]]:
        """The seconds until the logits after a prompt of so many tokens are there."""
        with torch.inference_mode():
            self.cache, self.context = DynamicCache(config=self.model.config), -1
            return timed(lambda: self._read(self.tokens(length)), 1)


class TorchEngine:
    """Methods of a worker process, as [`~training.benchmarks.decoding.worker.Worker.ask`] calls them."""

    def __init__(self) -> None:
        self.decoders: dict[str, Decoder] = {}
        self.backends: dict[str, str] = {}

    def start(self, threads: int) -> dict[str, Any]:
        """Set the number of threads, and describe machine and versions."""
        torch.set_num_threads(threads)
        return describe()

    def read_bandwidth(self, quick: bool) -> float:
        """Measure the bytes a core second that this process reads from memory."""
        return read_bandwidth(1 if quick else 7)

    def load(self, name: str, kind: str, form: str, settings: dict[str, Any], backend: str = "auto") -> dict[str, Any]:
        """Make a model, and say what it takes and reads."""
        before = resident_bytes()
        decoder = Decoder(build(kind, form, settings))
        gc.collect()
        return self._keep(name, decoder, backend, resident_bytes() - before)

    def load_first_layer(self, name: str, of: str) -> dict[str, Any]:
        """Make a model of the first layer of another one, with all its weights but those of the other layers."""
        return self._keep(name, Decoder(first_layer(self.decoders[of].model)), self.backends[of], 0)

    def load_in_torch(self, name: str, of: str) -> dict[str, Any]:
        """Give a model another name, under which its layers run as they are written: its maps by torch's own code."""
        return self._keep(name, Decoder(self.decoders[of].model), "reference", 0)

    def _keep(self, name: str, decoder: Decoder, backend: str, taken: int) -> dict[str, Any]:
        self.decoders[name], self.backends[name] = decoder, backend
        self.decode(name, 2, 1)
        read = bytes_read(decoder.model)
        return {
            "resident_bytes": taken,
            "bytes_read": sum(read.values()),
            "bytes_read_by_part": read,
            "bytes_of_a_position": decoder.bytes_of_a_position(),
            "parameters": sum(parameter.numel() for parameter in decoder.model.parameters()),
            "ran": {op: last_backend(op) for op in OPS},
        }

    def _run(self, name: str, run: Callable[[Decoder], dict[str, list[float]]]) -> dict[str, list[float]]:
        with use_backend(self.backends[name]):
            return run(self.decoders[name])

    def decode(self, name: str, context: int, count: int) -> dict[str, list[float]]:
        """See [`Decoder.decode`]."""
        return self._run(name, lambda decoder: decoder.decode(context, count))

    def prompt(self, name: str, length: int) -> dict[str, list[float]]:
        """See [`Decoder.prompt`]."""
        return self._run(name, lambda decoder: decoder.prompt(length))

    def free(self) -> None:
        """Let go of all models."""
        self.decoders.clear()
        gc.collect()


if __name__ == "__main__":
    serve(TorchEngine())
