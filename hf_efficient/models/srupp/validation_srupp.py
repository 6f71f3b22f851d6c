"""Checks of what users hand to an SRU++ model, and the errors that say what to do."""

import torch
from transformers.cache_utils import Cache

from .configuration_srupp import SruppConfig
from .memory_srupp import SegmentMemory


def check_inputs(
    config: SruppConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask,
    memory: SegmentMemory | None,
    cache: Cache | None = None,
    position_ids: torch.Tensor | None = None,
    return_memory: bool = False,
) -> None:
    """
    Raises:
        ValueError: neither or both inputs, an input without tokens or of the wrong width, an id outside the vocabulary
            (looked at on a CPU only: it would stall an accelerator), or a mask or memory that does not fit.
    """
    inputs = input_ids if input_ids is not None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give either input_ids or inputs_embeds: exactly one of them.")
    if inputs.dim() != (2 if input_ids is not None else 3):
        raise ValueError(
            "input_ids must have shape (batch, length), inputs_embeds (batch, length, embedding_size); got "
            f"{tuple(inputs.shape)}. For one sequence add the batch dimension: x[None]."
        )
    batch, length = inputs.shape[:2]
    if length == 0:
        raise ValueError("The input has length 0; give at least one token.")
    if inputs_embeds is not None and inputs_embeds.shape[2] != config.embedding_size:
        raise ValueError(
            f"inputs_embeds is {inputs_embeds.shape[2]} wide, but embedding_size is {config.embedding_size}."
        )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        _check_mask(attention_mask, batch, length, memory, cache)
    if (memory is not None or return_memory) and position_ids is not None:
        raise ValueError("Memory continues every row's document; position_ids, which begin new ones, do not fit.")
    if memory is not None:
        check_memory(config, memory, batch, cache is not None)
    if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(config, input_ids)


def _check_ids(config: SruppConfig, input_ids: torch.Tensor) -> None:
    if input_ids.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(input_ids))
    if lowest < 0 or highest >= config.vocab_size:
        bad = lowest if lowest < 0 else highest
        raise ValueError(
            f"input_ids holds {bad}, outside the vocabulary of {config.vocab_size} ids (0 to {config.vocab_size - 1}). "
            "Use the tokenizer that belongs to this model, or model.resize_token_embeddings(len(tokenizer))."
        )


def _check_mask(mask: torch.Tensor, batch: int, length: int, memory: SegmentMemory | None, cache: Cache | None) -> None:
    before = 0 if memory is None else memory.length
    if cache is not None:
        before = cache.get_seq_length()
        if isinstance(before, torch.Tensor):  # of a static cache; not to be read while compiling
            before = max(mask.shape[1] - length, 0) if torch.compiler.is_compiling() else int(before)
    if mask.shape[0] != batch or mask.shape[1] not in (length, before + length):
        wanted = " or ".join(f"{(batch, size)}" for size in sorted({length, before + length}))
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but must have shape {wanted}: (batch, length), the length "
            "of the input alone or with what the cache or the memory holds."
        )


def check_memory(config: SruppConfig, memory: SegmentMemory, batch: int, has_past: bool) -> None:
    """
    Raises:
        ValueError: memory beside a cache, of another depth, batch or width, or of layers that differ in length.
    """
    if has_past:
        raise ValueError("Give memory (training by segments) or cache (generation), not both.")
    depth = config.num_hidden_layers
    if len(memory.cell_states) != depth or len(memory.layer_inputs) != depth:
        raise ValueError(
            f"memory is of {len(memory.cell_states)} states and {len(memory.layer_inputs)} inputs, but the model has "
            f"{depth} layers. Hand on output.memory as it came."
        )
    for layer, state in enumerate(memory.cell_states):
        if tuple(state.shape) != (batch, config.hidden_size):
            raise ValueError(
                f"memory.cell_states[{layer}] must have shape {(batch, config.hidden_size)}; got {tuple(state.shape)}."
            )
    for layer in config.attending:
        inputs, width = memory.layer_inputs[layer], config.input_sizes[layer]
        if inputs is None and memory.length == 0:
            continue
        if inputs is None or tuple(inputs.shape) != (batch, memory.length, width):
            got = None if inputs is None else tuple(inputs.shape)
            raise ValueError(
                f"memory.layer_inputs[{layer}] must have shape {(batch, memory.length, width)}; got {got}."
            )


def check_memory_dtype(memory: SegmentMemory, hidden_states: torch.Tensor) -> None:
    """
    Raises:
        ValueError: layer inputs of another dtype than the embeddings, where no autocast makes them agree.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        return
    for layer, inputs in enumerate(memory.layer_inputs):
        if inputs is not None and inputs.dtype != hidden_states.dtype:
            raise ValueError(
                f"memory.layer_inputs[{layer}] is of {inputs.dtype}, but the model computes in {hidden_states.dtype}. "
                "Convert layer_inputs (cell_states stay as they are), or begin without memory."
            )


__all__ = ["check_inputs", "check_memory", "check_memory_dtype"]
