"""Checks of a model's inputs, with errors that say what to do.

Values are checked on CPU tensors alone: on an accelerator that would stall the device at every step. Under
`torch.compile`, `torch.export` and the transforms of `torch.func` values do not exist, and only shapes are checked.
"""

import torch


def stands_for_many(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one inside a transform of `torch.func`, such as `vmap`, where neither its values nor
    what depends on them (`if`, `nonzero`) exist."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def values_can_be_read(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values can be read now: not on the meta device, while a call is traced, or under a
    transform. On an accelerator reading them stalls the device."""
    if tensor.device.type == "meta" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not stands_for_many(tensor)


def read_shared_flag(flag: torch.Tensor) -> bool:
    """
    Read a flag of models that `vmap` runs together, as they are stacked.

    Raises:
        ValueError: if the models differ in it, so that they do not run the same operators.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(flag):
        flag = torch._C._functorch.get_unwrapped(flag)
    if flag.any() != flag.all():
        raise ValueError("Models that vmap runs together must be in the same stage of training; some are in another.")
    return bool(flag.any())


def check_one_input(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, width: str = "hidden_size"
) -> torch.Tensor:
    """
    Check that there is exactly one of `input_ids` and `inputs_embeds`, with as many dimensions as it must have.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): token ids.
        inputs_embeds (`torch.Tensor` of shape `(batch, length, width)`, *optional*): embeddings in their place.
        width (`str`, defaults to `"hidden_size"`): the config's name for the width of embeddings.

    Returns:
        `torch.Tensor`: the one that was given.

    Raises:
        ValueError: if both or neither are given, or the number of dimensions is wrong.
    """
    inputs = input_ids if input_ids is not None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give either input_ids or inputs_embeds: exactly one of them.")
    if inputs.dim() != (2 if input_ids is not None else 3):
        raise ValueError(
            f"input_ids must have shape (batch, length), inputs_embeds (batch, length, {width}); got "
            f"{tuple(inputs.shape)}. For one sequence add the batch dimension: x[None]."
        )
    return inputs


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """
    Check that ids lie in the vocabulary, where reading them costs nothing: on a CPU, outside compiled code.

    Raises:
        ValueError: if an id is negative or at least `vocab_size`.
    """
    if input_ids.device.type != "cpu" or not values_can_be_read(input_ids) or input_ids.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(input_ids))
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise ValueError(
            f"input_ids holds {bad}, outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}). Use the "
            "tokenizer that belongs to this model, or model.resize_token_embeddings(len(tokenizer))."
        )


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], meaning: str, name: str = "labels") -> None:
    """
    Check the shape of labels.

    Raises:
        ValueError: if `labels` does not have `shape`; the message gives the `meaning` of the shape.
    """
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} {meaning}; got {tuple(labels.shape)}.")
