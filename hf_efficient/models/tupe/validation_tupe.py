"""Checks of what users hand to a TUPE model, and the errors that say what to do.

Values are looked at on CPU tensors. On an accelerator that would stall the device at every step: on CUDA the checks
run on the device, and an error surfaces as a device assertion; other accelerators go unchecked. Under `torch.compile`
and `torch.export` values do not exist, and only shapes are checked.
"""

import torch

from .configuration_tupe import TupeConfig


def check_inputs(
    config: TupeConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> None:
    """
    Raises:
        ValueError: neither or both inputs, a mask of another shape, an id outside the vocabulary, left padding, or a
            row that does not start with [CLS] (the last two only where `config.cls_token_id` is set).
    """
    inputs = input_ids if input_ids is not None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give either input_ids or inputs_embeds: exactly one of them.")
    if inputs.dim() != (2 if input_ids is not None else 3):
        raise ValueError(
            "input_ids must have shape (batch, length), inputs_embeds (batch, length, hidden_size); got "
            f"{tuple(inputs.shape)}. For one sequence add the batch dimension: x[None]."
        )
    _check_mask_shape(attention_mask, *inputs.shape[:2])
    mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    if torch.compiler.is_compiling() or inputs.is_meta or inputs.numel() == 0:
        return
    if inputs.device.type == "cpu":
        _check_values(config, input_ids, mask)
    elif inputs.device.type == "cuda":  # other accelerators have no asynchronous assertion
        _assert_on_device(config, input_ids, mask)


def _check_mask_shape(mask: torch.Tensor | None, batch: int, length: int) -> None:
    if mask is None:
        return
    fits = mask.shape == (batch, length) if mask.dim() == 2 else mask.dim() == 4 and mask.shape[-1] == length
    if not fits:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the input is {(batch, length)} (batch, length). A mask "
            "has that shape, or (batch, 1, length, length) to say for each pair of tokens who may attend to whom."
        )


def check_length(config: TupeConfig, length: int) -> None:
    """
    Raises:
        ValueError: if `length` is 0 or exceeds the position table.
    """
    if length == 0:
        raise ValueError("The input has length 0; TUPE needs at least the [CLS] token.")
    limit = config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"The input has {length} tokens, but the position table ends at {limit}. Truncate it "
            f"(tokenizer(..., truncation=True, max_length={limit})), or raise the limit with "
            f"model.resize_position_embeddings({length}) and train the new positions."
        )


def _layout_faults(config: TupeConfig, input_ids: torch.Tensor | None, mask: torch.Tensor | None):
    """Boolean tensors over rows: padded on the left, and not starting with [CLS]. All-padding rows are neither."""
    real = mask.bool() if mask is not None else None
    left_padded = missing_cls = None
    if config.cls_token_id is not None:
        if real is not None:
            left_padded = ~real[:, 0] & real.any(1)
        if input_ids is not None:
            missing_cls = input_ids[:, 0] != config.cls_token_id
            if real is not None:
                missing_cls = missing_cls & real.any(1)
    return left_padded, missing_cls


def _check_values(config: TupeConfig, input_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    if input_ids is not None:
        lowest, highest = (int(bound) for bound in torch.aminmax(input_ids))
        if lowest < 0 or highest >= config.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(
                f"input_ids holds {bad}, outside the vocabulary of {config.vocab_size} ids (0 to "
                f"{config.vocab_size - 1}). Use the tokenizer that belongs to this model, or "
                "model.resize_token_embeddings(len(tokenizer))."
            )
    left_padded, missing_cls = _layout_faults(config, input_ids, mask)
    if left_padded is not None and left_padded.any():
        raise ValueError(
            f"Row {int(left_padded.nonzero()[0])} is padded on the left. TUPE's positions are columns and the first "
            "one belongs to [CLS]: pad on the right (tokenizer.padding_side = 'right')."
        )
    if input_ids is not None and missing_cls is not None and missing_cls.any():
        row = int(missing_cls.nonzero()[0])
        raise ValueError(
            f"Row {row} starts with id {int(input_ids[row, 0])}, not with [CLS] (id {config.cls_token_id}), "
            "which TUPE expects at index 0. Tokenise with add_special_tokens=True, or set config.cls_token_id to your "
            "tokenizer's id (None switches this check off)."
        )


def _assert_on_device(config: TupeConfig, input_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    if input_ids is not None:
        inside = ((input_ids >= 0) & (input_ids < config.vocab_size)).all()
        torch._assert_async(inside, f"input_ids holds an id outside the vocabulary of {config.vocab_size}")
    left_padded, missing_cls = _layout_faults(config, input_ids, mask)
    if left_padded is not None:
        torch._assert_async(~left_padded.any(), "TUPE takes right padding only: positions are columns")
    if missing_cls is not None:
        torch._assert_async(~missing_cls.any(), f"a row does not start with [CLS] (id {config.cls_token_id})")


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], meaning: str, name: str = "labels") -> None:
    """
    Raises:
        ValueError: if `labels` does not have `shape`; the message gives the `meaning` of the shape.
    """
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} {meaning}; got {tuple(labels.shape)}.")
