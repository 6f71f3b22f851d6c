"""An estimate of the memory that training an encoder-decoder takes, made before it is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


GIB = 2**30
# Numbers of 4 bytes that an optimiser keeps of a parameter; Adafactor's rows and columns of matrices are few.
_OPTIMIZER_NUMBERS = {"sgd": 0, "adafactor": 0, "lion": 1, "adagrad": 1, "rmsprop": 1}
_ADAM_NUMBERS = 2
# Numbers that a layer's parts keep of a token for their backward pass, in widths of the model: inputs and outputs of
# norms, queries, keys, values, heads' outputs and the stream; and in widths of a feed-forward layer: before and after
# the activation and dropout, or what a controller adds to it, logits, probabilities, noise and a mask.
_ATTENTION_WIDTHS, _FEED_FORWARD_WIDTHS = 7, 2
_DENSE_UNITS, _SPARSE_UNITS = 2, 6
# Logits, their logarithms and both gradients, in float32.
_LOGITS_COPIES = 3


@dataclass
class MemoryEstimate:
    """
    Bytes of a training step, by what they are for.

    Args:
        weights, gradients, optimizer (`int`): of all parameters.
        kept (`int`): what a forward pass keeps of all layers for the backward pass.
        layer (`int`): what the backward pass of one layer holds beside that.
        logits (`int`): of the output layer, gone when the layers' backward pass begins.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes at the peak: of a layer's backward pass, or of the output layer."""
        return self.weights + self.gradients + self.optimizer + self.kept + max(self.layer, self.logits)

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and optimizer": self.gradients + self.optimizer,
            "activations": self.kept + max(self.layer, self.logits),
        }
        said = ", ".join(f"{name} {size / GIB:.2g}" for name, size in parts.items())
        return f"about {self.total / GIB:.2g} GiB ({said})"


@dataclass
class _Stack:
    """One stack's layers: their number, the queries and keys that they read, and how often they attend."""

    layers: int
    rows: int
    queries: int
    keys: int
    attentions: int
    long_attention: str


def _field(config: Any, *names: str, default: Any = None) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def _stacks(config: Any, batch: int, source: int, target: int) -> list[_Stack]:
    """Both stacks of an encoder-decoder."""
    joined = getattr(config, "decoder_type", "cross_attention") == "joined"
    read, attentions = (source + target, _field(config, "attentions_per_layer", default=1)) if joined else (target, 2)
    encoder_layers = _field(config, "num_encoder_layers", "encoder_layers", "num_layers")
    decoder_layers = _field(config, "num_decoder_layers", "decoder_layers", "num_layers")
    kinds = [_field(config, f"{side}_long_attention", default="none") for side in ("encoder", "decoder")]
    return [
        _Stack(encoder_layers, batch, source, source, 1, kinds[0]),
        _Stack(decoder_layers, batch, read, read if joined else max(source, target), attentions, kinds[1]),
    ]


def _layer_bytes(config: Any, stack: _Stack, itemsize: int, keeps_scores: bool) -> int:
    """Bytes that one layer keeps of its forward pass in ordinary training."""
    width = _field(config, "hidden_size", "d_model")
    units = _field(config, "intermediate_size", "d_ff", "encoder_ffn_dim", default=4 * width)
    of_unit = _DENSE_UNITS if getattr(config, "ff_sparsity", None) is None else _SPARSE_UNITS
    tokens = stack.rows * stack.queries
    size = itemsize * tokens
    size *= width * (_ATTENTION_WIDTHS * stack.attentions + _FEED_FORWARD_WIDTHS) + of_unit * units
    hashes = stack.long_attention == "lsh" or (
        stack.long_attention == "mixed" and stack.queries > getattr(config, "lsh_full_length", 0)
    )
    if keeps_scores and not hashes:
        heads = _field(config, "num_attention_heads", "num_heads", "encoder_attention_heads")
        size += 2 * 4 * stack.attentions * stack.rows * heads * stack.queries * stack.keys
    return size


def _keeps_scores(config: Any, device: torch.device) -> bool:
    """Tell whether attention keeps all scores: written out, or on a CPU with dropout, which has no other form of it."""
    dropout = _field(config, "attention_dropout", "dropout", "dropout_rate", default=0.0)
    kind = config._attn_implementation
    return kind == "eager" or (kind == "sdpa" and device.type == "cpu" and dropout > 0)


def estimate_step(
    model: PreTrainedModel,
    batch_size: int,
    source_length: int,
    target_length: int,
    *,
    optimizer: str = "adamw_torch",
    gradient_checkpointing: bool = False,
    half_precision: bool = False,
    device: torch.device | None = None,
) -> MemoryEstimate:
    """
    Estimate the memory of a training step of an encoder-decoder, within a factor of about two.

    With P parameters of w bytes, L layers, batch B, width D, F units of a feed-forward layer, a attentions of a layer
    and numbers of s bytes (2 under autocast to 16 bits, else 4), a layer that reads N tokens of each row keeps

        A = B N s ((7 a + 2) D + c F),    c = 2, or 6 where the feed-forward layer is sparse,

    and where attention to M keys keeps its scores, as eager attention does and on a CPU any with dropout, also
    8 a B H N M, of H heads; hashing keeps none. A joined decoder reads N = source + target tokens, others N = target.
    A step takes

        P w (1 + 1 + optimiser) + kept + max(2 A of one layer, 3 B target V 4),

    with 2 numbers of 4 bytes a parameter for Adam and none for Adafactor, V ids, and kept = L A summed over both
    stacks; with gradient checkpointing or without it in a reversible model, only streams: 2 B N D 4 a layer
    (checkpointing), or 4 B N D 4 a stack (reversible).

    Args:
        model (`PreTrainedModel`): any encoder-decoder whose config has the usual fields.
        batch_size (`int`): rows of a step.
        source_length, target_length (`int`): tokens of each row.
        optimizer (`str`, defaults to `"adamw_torch"`): a name of `TrainingArguments.optim`.
        gradient_checkpointing (`bool`, defaults to `False`): whether layers are run twice instead of being kept.
        half_precision (`bool`, defaults to `False`): whether autocast computes in 16 bits.
        device (`torch.device`, *optional*): where it is trained; by default where it is.

    Raises:
        ValueError: for a model without both stacks.
    """
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is no encoder-decoder: this estimate knows their steps alone.")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    numbers = next((n for name, n in _OPTIMIZER_NUMBERS.items() if name in optimizer), _ADAM_NUMBERS)
    itemsize, width = 2 if half_precision else 4, _field(config, "hidden_size", "d_model")
    stacks = _stacks(config, batch_size, source_length, target_length)
    keeps_scores = _keeps_scores(config, device or model.device)
    layers = [_layer_bytes(config, stack, itemsize, keeps_scores) for stack in stacks]
    stream = [4 * width * stack.rows * stack.queries for stack in stacks]
    joined = getattr(config, "decoder_type", "") == "joined"
    if gradient_checkpointing:
        kept = sum(2 * size * stack.layers for size, stack in zip(stream, stacks, strict=True))
    elif joined and getattr(config, "reversible", False):
        kept = sum(4 * size for size in stream)
    else:
        kept = sum(size * stack.layers for size, stack in zip(layers, stacks, strict=True))
    return MemoryEstimate(
        weights=weights,
        gradients=4 * count,
        optimizer=4 * count * numbers,
        kept=kept,
        layer=2 * max(layers),
        logits=_LOGITS_COPIES * 4 * batch_size * target_length * config.vocab_size,
    )


def cache_bytes(model: PreTrainedModel, batch_size: int, source_length: int, target_length: int) -> int:
    """
    Estimate the bytes of keys and values that `generate` holds: 2 D numbers for each token, attention and row.

    Args:
        model (`PreTrainedModel`): an encoder-decoder.
        batch_size (`int`): rows, beams counted each.
        source_length, target_length (`int`): tokens of each.
    """
    config = model.config
    layers = _field(config, "num_decoder_layers", "decoder_layers", "num_layers")
    attentions = _field(config, "attentions_per_layer", default=1)
    width = _field(config, "hidden_size", "d_model")
    itemsize = next(model.parameters()).element_size()
    return 2 * width * itemsize * layers * attentions * batch_size * (source_length + target_length)


def _group_limit() -> int | None:
    """Bytes that a control group of Linux leaves to this process, if it sets a limit."""
    try:
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - int(used))


def free_memory(device: torch.device) -> int | None:
    """
    Read how many bytes a device has left; `None` where that is not known.

    Args:
        device (`torch.device`): a GPU, or the CPU of a system that has /proc/meminfo.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limits = [size for size in (*found, _group_limit()) if size is not None]
    return min(limits) if device.type == "cpu" and limits else None


def shortage(estimate: MemoryEstimate, free: int | None, held: int = 0) -> str | None:
    """
    Say by how much a step would exceed what is free, and what to do about it; `None` where it fits, or nobody knows.

    Args:
        estimate ([`MemoryEstimate`]): of the step.
        free (`int`, *optional*): bytes that the device has left.
        held (`int`, defaults to 0): bytes of the estimate that it holds already, such as the weights.
    """
    wanted = estimate.total - held
    if free is None or wanted <= free:
        return None
    return (
        f"A training step would take {estimate}, and only {free / GIB:.2g} GiB are free. Lower "
        "--per_device_train_batch_size (with --gradient_accumulation_steps) or --max_source_length, or make the model "
        "smaller; reversible layers, hashing and --optim adafactor need less."
    )
