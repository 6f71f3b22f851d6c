"""Checks of a model's inputs, with errors that say what to do.

Values are checked on CPU tensors alone: on an accelerator that would stall the device at every step. Where values do
not exist, under `torch.compile`, `torch.export` and transforms of `torch.func`, only types, shapes and dtypes are.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from ..utils.labels import IGNORE_INDEX


def stands_for_many(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one inside a transform of `torch.func`, such as `vmap`, where neither its values nor
    what depends on them (`if`, `nonzero`) exist."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def values_exist(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has values now: not on the meta device, and outside compiled and traced code and the
    transforms of `torch.func`. To read them stalls an accelerator."""
    if type(tensor) is not torch.Tensor or tensor.device.type == "meta":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not stands_for_many(tensor)


def values_can_be_read(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values exist and cost nothing to read, which they do on a CPU."""
    return tensor.device.type == "cpu" and values_exist(tensor)


def under_autocast(device_type: str) -> bool:
    """Return whether autocast makes dtypes agree on this kind of device; the meta device has none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that matrix products of a tensor have: its own, or that of autocast."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if under_autocast(device_type) else tensor.dtype


def check_tensor(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if it is a sparse or a nested one.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}: give torch.as_tensor({name}).")
    if value.is_nested:
        raise ValueError(f"{name} must not be a nested tensor: give {name}.to_padded_tensor(0), and an attention_mask.")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, not of {value.layout}: give {name}.to_dense().")


def check_has_values(name: str, value: torch.Tensor, device: torch.device) -> None:
    """
    Raises:
        ValueError: if an argument is on the meta device, whose tensors hold no values, and the model is not.
    """
    if value.device.type == "meta" != device.type:
        raise ValueError(f"{name} is on the meta device and holds no values, but the model computes on {device}.")


def check_flag(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: if an argument is neither `True`, `False` nor `None`, such as a word that would count as true.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}.")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """
    Raises:
        ValueError: if an argument is no whole number, or less than `least`.
    """
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, not {value!r}.")


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
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    embeddings: nn.Module | None = None,
    width: str = "hidden_size",
    size: int | None = None,
    prefix: str = "",
) -> torch.Tensor:
    """
    Check that there is exactly one of `input_ids` and `inputs_embeds`, of the shape and dtype that it must have.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): token ids.
        inputs_embeds (`torch.Tensor` of shape `(batch, length, width)`, *optional*): embeddings in their place.
        embeddings (`nn.Module`, *optional*): the model's own, whose dtype `inputs_embeds` must have.
        width (`str`, defaults to `"hidden_size"`): the config's name for the width of embeddings.
        size (`int`, *optional*): that width.
        prefix (`str`, defaults to `""`): of the arguments' names, `"decoder_"` for those of a target.

    Returns:
        `torch.Tensor`: the one that was given.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if both or neither are given, or the number of dimensions, the width or the dtype is wrong.
    """
    inputs = input_ids if input_ids is not None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError(f"Give either {prefix}input_ids or {prefix}inputs_embeds: exactly one of them.")
    name = prefix + ("inputs_embeds" if input_ids is None else "input_ids")
    check_tensor(name, inputs)
    weight = None if embeddings is None else next(embeddings.parameters(), None)
    if weight is not None:
        check_has_values(name, inputs, weight.device)
    if inputs.dim() != (2 if input_ids is not None else 3):
        raise ValueError(
            f"{prefix}input_ids must have shape (batch, length), {prefix}inputs_embeds (batch, length, {width}); got "
            f"{tuple(inputs.shape)}. For one sequence add the batch dimension: x[None]."
        )
    if inputs.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(inputs.shape)}: a batch without rows. Leave it out.")
    if input_ids is not None:
        if inputs.dtype not in (torch.long, torch.int):  # what an embedding takes
            raise ValueError(f"{name} must be of torch.int64 or torch.int32, not {inputs.dtype}: {name}.long().")
        return inputs
    if size is not None and inputs.shape[2] != size:
        raise ValueError(
            f"{name} is {inputs.shape[2]} wide, but {width} is {size}; its shape {tuple(inputs.shape)} must be "
            f"(batch, length, {size})."
        )
    _check_embeds_dtype(name, inputs, weight)
    return inputs


def _check_embeds_dtype(name: str, inputs_embeds: torch.Tensor, weight: torch.Tensor | None) -> None:
    """Compare with the table of embeddings, where it is there in whole: not sharded, quantised or taken out."""
    if not inputs_embeds.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, not {inputs_embeds.dtype}.")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.numel() == 0:
        return
    if weight.dtype != inputs_embeds.dtype and not under_autocast(inputs_embeds.device.type):
        raise ValueError(
            f"{name} is of {inputs_embeds.dtype}, but the model is of {weight.dtype}: "
            f"{name}.to({weight.dtype}), or model.to({inputs_embeds.dtype})."
        )


def check_per_token(name: str, value: torch.Tensor | None, batch: int, length: int, broadcasts: bool = False) -> None:
    """
    Check an integer for each token, such as `position_ids`.

    Args:
        name (`str`): name of the argument.
        value (`torch.Tensor` of shape `(batch, length)`, *optional*)
        batch, length (`int`): sizes of the input.
        broadcasts (`bool`, defaults to `False`): whether `(1, length)` will do for all rows.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if the shape or the dtype is wrong.
    """
    if value is None:
        return
    check_tensor(name, value)
    if tuple(value.shape) != (batch, length) and not (broadcasts and tuple(value.shape) == (1, length)):
        or_one = f" or {(1, length)}" if broadcasts and batch != 1 else ""
        raise ValueError(f"{name} must have shape {(batch, length)}{or_one} (batch, length); got {tuple(value.shape)}.")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be of an integer dtype, not {value.dtype}.")


def known_ids(
    input_ids: torch.Tensor, vocab_size: int, real: torch.Tensor | None = None, name: str = "input_ids"
) -> torch.Tensor:
    """
    Check that ids lie in the vocabulary, where reading them costs nothing, and leave out those that nobody sees.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`): token ids.
        vocab_size (`int`): number of ids.
        real (`torch.Tensor` of shape `(batch, length)`, *optional*): `False` at padding, whose ids may be anything.
        name (`str`, defaults to `"input_ids"`): of the argument.

    Returns:
        `torch.Tensor`: the ids, with 0 at padding.

    Raises:
        ValueError: if an id outside the padding is negative or at least `vocab_size`.
    """
    if real is not None:
        check_has_values("attention_mask", real, input_ids.device)
        input_ids = input_ids.masked_fill(~real, 0)
    if input_ids.numel() == 0 or not values_can_be_read(input_ids):
        return input_ids
    lowest, highest = (int(bound) for bound in torch.aminmax(input_ids))
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise ValueError(
            f"{name} holds {bad}, outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}). Use the "
            "tokenizer that belongs to this model, or model.resize_token_embeddings(len(tokenizer))."
        )
    return input_ids


def read_attention_mask(
    mask: Any,
    batch: int,
    length: int,
    heads: int,
    held: int = 0,
    key_length: int | None = None,
    name: str = "attention_mask",
) -> Any:
    """
    Check an attention mask, and bring it to booleans where it is not of floats.

    A mask of two dimensions says which tokens are there: booleans, or 0 and 1 of any dtype. One of four dimensions says
    which key each query may attend to, and stands in the place of the model's own rule (causality, say): booleans or
    integers 0 and 1, where 1 lets attend, or floats, which are added to the scores; see [`additive_mask`].

    Args:
        mask (`torch.Tensor`, `BlockMask` or `dict`, *optional*): of shape `(batch, length)`, `(batch, held + length)`
            or `(batch or 1, heads or 1, length or 1, key_length)`. A `BlockMask` of flex attention and the `dict` of
            compiled generation are ready, and are returned as they are.
        batch, length (`int`): sizes of the input that it belongs to.
        heads (`int`): number of attention heads.
        held (`int`, defaults to 0): number of tokens that a cache or a memory holds.
        key_length (`int`, *optional*): number of keys; `held + length` by default. A static cache has more.
        name (`str`, defaults to `"attention_mask"`): of the argument.

    Returns:
        Of two dimensions booleans, of four booleans or floats, expanded to `batch` and `length`; `None` for `None`, and
        for a mask of two dimensions on the meta device.

    Raises:
        TypeError: if it is no mask at all.
        ValueError: for any other shape, dtype or value.
    """
    if mask is None or isinstance(mask, (dict, BlockMask)):
        return mask
    check_tensor(name, mask)
    keys = held + length if key_length is None else key_length
    if mask.dim() == 2:
        fits = mask.shape[0] == batch and mask.shape[1] in (length, held + length)
    else:
        fits = mask.dim() == 4 and mask.shape[3] == keys
        fits = fits and all(size in (1, full) for size, full in zip(mask.shape, (batch, heads, length), strict=False))
    if not fits:
        wanted = " or ".join(str((batch, size)) for size in sorted({length, held + length}))
        alone = ", the length of the input alone or with what the cache or the memory holds" if held else ""
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, but must have shape {wanted}: (batch, length){alone}, 1 "
            f"for tokens and 0 for padding. With four dimensions, ({batch} or 1, {heads} or 1, {length} or 1, {keys}): "
            "(batch, heads, length, keys), it says which keys each query may attend to."
        )
    if mask.is_meta and mask.dim() == 2:
        return None  # nobody knows what it hides, and no shape depends on it
    if mask.is_complex():
        raise ValueError(f"{name} must be of booleans, integers or floats, not of {mask.dtype}.")
    if mask.dim() == 4:
        mask = mask.expand(batch, -1, length, -1)
        if mask.is_floating_point():
            if values_can_be_read(mask) and mask.numel() and not mask.amax() < torch.inf:
                raise ValueError(f"{name} holds NaN or +inf; -inf is what hides a key from a query.")
            return mask
    real = mask.bool()
    if mask.dtype != torch.bool and values_can_be_read(mask) and not torch.equal(real.to(mask.dtype), mask):
        wrong = mask[real.to(mask.dtype) != mask][0].item()  # NaN differs from everything
        hint = ". Floats to be added to the scores have four dimensions" if mask.is_floating_point() else ""
        raise ValueError(
            f"{name} of {mask.dtype} and shape {tuple(mask.shape)} holds {wrong}, but must hold nothing but 0 "
            f"and 1{hint}."
        )
    return real


def additive_mask(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    Write a mask of the scores as finite floats to be added to them.

    So a query that may attend to nothing attends to all evenly, in every form of attention. Some forms make zeros of
    it where the mask is of booleans, and some NaN.

    Args:
        mask (`torch.Tensor`): booleans, `True` where a query may attend, or floats.
        like (`torch.Tensor`): states that the scores are computed from, which give their dtype.
    """
    dtype = compute_dtype(like)
    lowest = torch.finfo(dtype).min / 2  # so that the sum with a score does not overflow
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], meaning: str, name: str = "labels") -> None:
    """
    Check the shape of labels.

    Raises:
        TypeError: if `labels` is no tensor.
        ValueError: if it does not have `shape`; the message gives the `meaning` of the shape.
    """
    check_tensor(name, labels)
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} {meaning}; got {tuple(labels.shape)}.")


def check_class_ids(
    labels: torch.Tensor, classes: int, device: torch.device, name: str = "labels", kind: str = "classes"
) -> None:
    """
    Check labels that are class ids, or ids of a vocabulary; -100 stands where there is no target.

    Args:
        labels (`torch.Tensor`): ids of any integer dtype.
        classes (`int`): number of classes.
        device (`torch.device`): where the loss is computed.
        name (`str`, defaults to `"labels"`): name of the argument.
        kind (`str`, defaults to `"classes"`): what the error calls the ids that there are.

    Raises:
        ValueError: if they are not integers, hold no values, or lie outside the classes. Values are looked at where
            that costs nothing.
    """
    check_has_values(name, labels, device)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be class ids, of an integer dtype, not {labels.dtype}: {name}.long().")
    if labels.numel() == 0 or not values_can_be_read(labels):
        return
    ids = labels.long()
    outside = (ids != IGNORE_INDEX) & ((ids < 0) | (ids >= classes))
    if outside.any():
        raise ValueError(
            f"{name} hold {int(ids[outside][0])}, outside the {kind} (0 to {classes - 1}); what is not to "
            f"be learned is {IGNORE_INDEX}."
        )


def check_target_count(count: Any) -> None:
    """
    Check `num_items_in_batch`, the number that a sum of losses is divided by. Trainer's may be a fraction, where
    processes share it.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not one number, negative, NaN or infinite; tensors are read where that costs nothing.
    """
    if isinstance(count, torch.Tensor):
        if count.numel() != 1 or count.is_complex():
            raise ValueError(
                f"num_items_in_batch must be one number, not a tensor of shape {tuple(count.shape)} and {count.dtype}."
            )
        if not values_can_be_read(count):
            return
        count = count.item()
    elif not isinstance(count, (Real, torch.SymInt)):
        raise TypeError(f"num_items_in_batch must be the number of targets, not of type {type(count).__name__}.")
    if not 0 <= count < math.inf:
        raise ValueError(f"num_items_in_batch must be a number of targets, from 0; got {count}.")
