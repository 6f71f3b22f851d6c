"""
The dense Scaling Transformer that computes what a GPT-2 of transformers computes.

Both families have norm -> attention -> residual, norm -> feed-forward -> residual, a norm at the end, learned positions
and an output layer that may share its matrix with the embeddings. They differ in where things lie: GPT-2 keeps queries,
keys and values in one matrix, and all matrices transposed, which makes its decoding in 16 bits on a CPU slow. In
training they differ a little: the twin has one rate of dropout for embeddings, positions and the output of both halves
of a layer, and draws one mask for all positions.
"""

import copy
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .configuration_scaling_transformer import ScalingTransformerConfig
from .modeling_scaling_transformer import ScalingTransformerForCausalLM


logger = logging.getLogger(__name__)

# Last parts of the names of the second matrix that a gated feed-forward layer multiplies its input by.
_GATES = ("gate_proj", "gate_up_proj", "up_gate_proj", "w3", "wi_1", "linear_v")
_ATTENTIONS = ("eager", "sdpa", "flex_attention")


def _refuse_gated(model: nn.Module) -> None:
    """Raise a `ValueError` for a model whose feed-forward layers multiply two maps of their input, as those of Llama
    do, told by the names of their matrices."""
    if any(name.rpartition(".")[2] in _GATES for name, _ in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} has gated feed-forward layers, down(act(gate(x)) * up(x)): each of their units "
            "reads the input by two rows of weights and is the product of both. A unit of the sparse feed-forward "
            "layer is act(u . x), with one such row, so that it cannot hold them. Take a model with plain feed-forward "
            "layers: a GPT-2, or a dense Scaling Transformer."
        )


def _check(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, GPT2LMHeadModel):
        if isinstance(model, nn.Module):
            _refuse_gated(model)
        if hasattr(model, "merge_and_unload"):
            raise ValueError(f"{name} wraps a model with adapters: give model.merge_and_unload().")
        kind = getattr(getattr(model, "config", None), "model_type", None)
        also = "" if kind in (None, "gpt2") else f", and {kind} is another architecture"
        raise ValueError(
            f"A GPT2LMHeadModel is wanted, not a {name}{also}. Load GPT-2 checkpoints with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if model.config.add_cross_attention:
        raise ValueError("This GPT-2 has cross-attention (add_cross_attention), for which the twin has no place.")
    for layer, block in enumerate(model.transformer.h):
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            part: Any = block.get_submodule(path)
            if type(part) is not Conv1D or not part.weight.is_floating_point():
                raise ValueError(
                    f"transformer.h.{layer}.{path} is a {type(part).__name__}, not a Conv1D of floats: merge adapters "
                    "(merge_and_unload), and load the model without quantisation."
                )


def _config(source: Any, dtype: torch.dtype) -> ScalingTransformerConfig:
    if source.embd_pdrop != source.resid_pdrop:
        logger.warning(
            "GPT-2 drops embeddings at a rate of %g and the output of layers at %g (embd_pdrop, resid_pdrop); the twin "
            "has one rate, that of layers. It matters in training alone.",
            source.embd_pdrop,
            source.resid_pdrop,
        )
    given: Any = {"attn_implementation": source._attn_implementation}
    if source._attn_implementation not in _ATTENTIONS:  # flash attention, which the family does without
        given = {}
    return ScalingTransformerConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.n_embd,
        intermediate_size=4 * source.n_embd if source.n_inner is None else source.n_inner,
        num_hidden_layers=source.n_layer,
        num_attention_heads=source.n_head,
        max_position_embeddings=source.n_positions,
        hidden_act=source.activation_function,
        layer_norm_eps=source.layer_norm_epsilon,
        dropout=source.resid_pdrop,
        attention_dropout=source.attn_pdrop,
        activation_dropout=0.0,
        lm_head_bias=False,
        tie_word_embeddings=source.tie_word_embeddings,
        use_cache=source.use_cache,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        dtype=dtype,
        **given,
    )


def _query_factor(source: Any, layer: int) -> float:
    """The factor of queries where GPT-2 scales its scores otherwise than by the root of a head's width."""
    factor = 1.0 if source.scale_attn_weights else math.sqrt(source.n_embd // source.n_head)
    return factor / (layer + 1) if source.scale_attn_by_inverse_layer_idx else factor


def _linear(found: dict[str, Tensor], name: str, weight: Tensor, bias: Tensor, factor: float = 1.0) -> None:
    """Keep a transposed matrix and its bias as those of an `nn.Linear`."""
    found[f"{name}.weight"] = (weight.T * factor).contiguous()
    found[f"{name}.bias"] = bias * factor


def _weights(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """The weights under the names of the twin."""
    source, found = model.state_dict(), dict[str, Tensor]()
    found["model.embed_tokens.weight"] = source["transformer.wte.weight"]
    found["model.positions.table"] = source["transformer.wpe.weight"]
    for layer in range(model.config.n_layer):
        there, here = f"transformer.h.{layer}", f"model.layers.{layer}"
        for norm, name in (("ln_1", "attention_norm"), ("ln_2", "feed_forward.norm")):
            for part in ("weight", "bias"):
                found[f"{here}.{name}.{part}"] = source[f"{there}.{norm}.{part}"]
        weights = source[f"{there}.attn.c_attn.weight"].chunk(3, dim=1)
        biases = source[f"{there}.attn.c_attn.bias"].chunk(3)
        factors = (_query_factor(model.config, layer), 1.0, 1.0)
        for letter, weight, bias, factor in zip("qkv", weights, biases, factors, strict=True):
            _linear(found, f"{here}.attention.{letter}_proj", weight, bias, factor)
        for part, name in (
            ("attn.c_proj", "attention.o_proj"),
            ("mlp.c_fc", "feed_forward.up_proj"),
            ("mlp.c_proj", "feed_forward.down_proj"),
        ):
            _linear(found, f"{here}.{name}", source[f"{there}.{part}.weight"], source[f"{there}.{part}.bias"])
    for part in ("weight", "bias"):
        found[f"model.norm.{part}"] = source[f"transformer.ln_f.{part}"]
    if not model.config.tie_word_embeddings:
        found["lm_head.weight"] = source["lm_head.weight"]
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def from_gpt2(model: GPT2LMHeadModel) -> ScalingTransformerForCausalLM:
    """
    Build the dense Scaling Transformer that gives the logits of a GPT-2.

    All of GPT-2's options are served but cross-attention: `n_inner`, `activation_function`, an output layer of its own,
    and other scales of the scores (`scale_attn_weights`, `scale_attn_by_inverse_layer_idx`), which queries are
    multiplied by. `reorder_and_upcast_attn` changes rounding alone; here scores always go through a softmax in float32.

    Without `position_ids` the twin counts positions from each row's first real token, as `generate` does for both.
    A bare GPT-2 called with a padding mask and no `position_ids` counts padding too.

    Args:
        model (`GPT2LMHeadModel`): stays as it is, and shares no memory with the result.

    Returns:
        [`ScalingTransformerForCausalLM`]: of the dtype, device and mode of `model`, with its generation config.

    Raises:
        ValueError: for a model that is no GPT-2 with a language model's head, or one with adapters, quantised weights
            or cross-attention. For gated feed-forward layers the message says why the family cannot hold them.
    """
    _check(model)
    config, weights = _config(model.config, model.dtype), _weights(model)
    with torch.device("meta"):  # nothing is drawn
        twin = ScalingTransformerForCausalLM(config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.train(model.training)


__all__ = ["from_gpt2"]
