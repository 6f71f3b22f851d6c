"""Fields of a config that the named weights of a model of trax tell, and models that are made of those weights."""

from typing import Any

from torch import Tensor, nn

from .trax_layout import DEFAULT_BASES, DIGITS, START


def demand(overrides: dict[str, Any], field: str, why: str, choices: tuple[str, ...]) -> dict[str, Any]:
    """The override of a field that the checkpoint does not tell."""
    if field not in overrides:
        said = " or ".join(f"--set {field}={choice}" for choice in choices)
        raise ValueError(f"{why}; the checkpoint does not tell {field}: say {said}.")
    return {field: overrides[field]}


def attention_fields(
    original: dict[str, Tensor], overrides: dict[str, Any], part: str = "blocks.0.attn."
) -> dict[str, Any]:
    """Fields of the attention whose weights begin with `part`."""
    names = {name.removeprefix(part): tensor for name, tensor in original.items() if name.startswith(part)}
    if "q.kernel" in names:
        return {"attention_type": "dense"}
    if "shared_mult.gating" not in names:
        kind = "multiplicative_modular" if "q.module_kernel" in names else "multiplicative"
        return {"attention_type": kind, "attention_sparsity": len(names["q.gating"])}
    shares = "conv_qk.kernel" in names
    window, width, size, _ = names["conv_qk.kernel" if shares else "conv_q.kernel"].shape
    outputs = [
        part for part, leaf in (("multiplicative", "out_mult.gating"), ("conv", "out_conv.kernel")) if leaf in names
    ]
    values: dict[str, Any] = {"attention_value_input": "shared"}
    if names["conv_v.kernel"].shape[2] != size:
        why = "Values are computed from the multiplicative layer and the layer's input"
        values = demand(overrides, "attention_value_input", why, ("concatenated", "by_module"))
    return {
        "attention_type": "multiplicative_conv",
        "attention_sparsity": len(names["shared_mult.gating"]),
        "attention_window": window,
        "attention_kernel_width": width,
        "attention_share_qk": shares,
        "attention_output": "_".join(outputs) or "none",
        **values,
    }


def head_fields(original: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of the output layer."""
    if "lm_head.in.kernel" in original:
        return {"lm_head_type": "low_rank", "lm_head_rank": original["lm_head.in.kernel"].shape[1]}
    if "lm_head.sparse.gating" in original:
        modules = len(original["lm_head.sparse.gating"])
        return {"lm_head_type": "multiplicative", "loss_sparsity": modules, "lm_head_sparse_probability": 0.5}
    if "lm_head.gating" in original:
        fields = {"lm_head_type": "multiplicative", "loss_sparsity": len(original["lm_head.gating"])}
        return {**fields, "lm_head_bias": "lm_head.bias" in original}
    inputs, outputs = original["lm_head.kernel"].shape
    kind = {"lm_head_type": "dense" if outputs == len(original["embedding"]) else "einsum"}
    if inputs == outputs:
        why = f"The output layer's matrix is square, {inputs} x {outputs}, and may be transposed"
        kind = demand(overrides, "lm_head_type", why, ("dense", "einsum"))
    return {**kind, "lm_head_bias": "lm_head.bias" in original}


def position_fields(original: dict[str, Tensor], overrides: dict[str, Any], side: str = "") -> dict[str, Any]:
    """Fields of positions, those of one side of an encoder-decoder."""
    original = {name.removeprefix(side): tensor for name, tensor in original.items() if name.startswith(side)}
    if START in original:
        fields = {"position_embedding_type": "fixed_base"}
        bases = sum(name.startswith("position.base.") for name in original) // DIGITS
        if bases == DEFAULT_BASES:
            return fields
        why = f"There are positions in {bases} bases, not in the usual {DEFAULT_BASES}"
        return {**fields, **demand(overrides, "position_bases", why, ("[11,13,...]",))}
    if "position_table" not in original:
        return {"position_embedding_type": "none"}
    length, rank = original["position_table"].shape
    if "position_projection" in original:
        return {"position_embedding_type": "low_rank", "position_rank": rank, "max_position_embeddings": length}
    return {"position_embedding_type": "learned", "max_position_embeddings": length}


def feed_forward_fields(original: dict[str, Tensor], part: str = "blocks.0.ff") -> dict[str, Any]:
    """Fields of the feed-forward block whose weights begin with `part`."""
    branch = f"{part}.sru_branch."
    recurrences = sum(name.startswith(f"{branch}sru.") and name.endswith(".kernel") for name in original)
    fields: dict[str, Any] = {"ff_sru_layers": recurrences}
    if recurrences:
        fields["ff_sru_units"] = original[f"{branch}in_proj.kernel"].shape[1]
    if f"{part}.in.kernel" in original:
        return {**fields, "intermediate_size": original[f"{part}.in.kernel"].shape[1]}
    rank, blocks, size = original[f"{part}.sparse_ff.controller.m2"].shape
    return {**fields, "intermediate_size": blocks * size, "ff_sparsity": size, "ff_rank": rank}


def load_checked(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """
    Load weights in float32, all of which a model must have, in its shapes, and no others.

    Raises:
        ValueError: if the checkpoint does not fit the config.
    """
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state_dict]
    faults += [f"{name} is unexpected" for name in state_dict if name not in own]
    faults += [
        f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
        for name, tensor in state_dict.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if faults:
        raise ValueError(f"The checkpoint does not fit the config: {', '.join(faults[:6])}.")
    model.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
