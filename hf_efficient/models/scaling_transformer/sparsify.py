"""
Sparse feed-forward layers for a dense model that is trained already, without training it anew.

    model = AutoModelForCausalLM.from_pretrained("my-gpt2")
    sparse = hf_efficient.sparsify(model, text, 4, 64, tokenizer=tokenizer)
    sparse.save_pretrained("my-sparse-gpt2")

Layer by layer, from the first on, each feed-forward layer is replaced by a sparse one of the same units, which is
fitted to what the dense model computes on the user's text, given what the layers before it make of that text by now: so
a layer makes up for a part of the error of those before it. `layer_fitting.py` says how a layer is fitted. Attention,
embeddings and output layer stay as they are, dense.

A fitted model can be trained on as any other: see [`~hf_efficient.trainer.DistillationTrainer`].
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from ...modules.sparse_blocks import FeedForwardBlock
from ...modules.sparse_config import SPARSE_ACTIVATIONS
from ...utils.text_batches import read_batches
from .configuration_scaling_transformer import ScalingTransformerConfig
from .convert_gpt2 import from_gpt2
from .layer_fitting import (
    Controller,
    DenseUnits,
    assign_units,
    begin_controller,
    best_units,
    coactivation,
    fit_controller,
    fit_rows,
    squared_error,
)
from .modeling_scaling_transformer import ScalingTransformerForCausalLM


logger = logging.getLogger(__name__)

ASSIGNMENTS = ("coactivation", "random")
# The same functions under other names of transformers.
_SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


class _ReachedLayers(Exception):
    """Ends a call of the model where its first layer begins."""


@dataclass
class _Batch:
    """
    Some rows of text on their way through the layers.

    Args:
        dense, sparse (`Tensor` of shape `(batch, length, width)`): what reaches the next layer in the dense model, and
            in the one that is sparse up to there.
        mask, real, starts, order: what layers take besides.
    """

    dense: Tensor
    sparse: Tensor
    mask: Any
    real: Tensor | None
    starts: Tensor | None
    order: Any

    def tokens(self, values: Tensor) -> Tensor:
        """Values of real tokens, `(tokens, width)`."""
        return values.flatten(0, 1) if self.real is None else values[self.real]


def _attend(layer: Any, hidden_states: Tensor, batch: _Batch) -> Tensor:
    attended = layer.attention(layer.attention_norm(hidden_states), batch.mask, order=batch.order)[0]
    return hidden_states + attended


def _feed(layer: Any, hidden_states: Tensor, batch: _Batch) -> Tensor:
    return hidden_states + layer.feed_forward(hidden_states, None, batch.real, batch.starts)[0]


def _embed(model: ScalingTransformerForCausalLM, inputs: Mapping[str, Tensor]) -> _Batch:
    """Some rows as they reach the first layer."""
    found: list[tuple] = []

    def catch(_module, args, _kwargs):
        found.append(args)
        raise _ReachedLayers

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.model(**inputs, use_cache=False)
    except _ReachedLayers:
        pass
    finally:
        handle.remove()
    hidden_states, mask, real, starts, order = found[0]
    return _Batch(hidden_states, hidden_states, mask, real, starts, order)


def _collect(model: Any, batches: Iterable[Mapping[str, Tensor]], max_tokens: int) -> list[_Batch]:
    """Take batches until there are `max_tokens` real tokens, up to where the first layer begins."""
    device, found, tokens = model.device, list[_Batch](), 0
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(f"A batch of tokens holds input_ids; this one holds {', '.join(batch) or 'nothing'}.")
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
        embedded = _embed(model, inputs)
        found.append(embedded)
        tokens += len(embedded.tokens(embedded.dense))
        if tokens >= max_tokens:
            break
    units = model.config.intermediate_size
    if tokens < units:
        raise ValueError(
            f"The text has {tokens} tokens for layers of {units} units: rows would be fitted to fewer numbers than "
            "they have. Give more text; some 20 tokens a unit are good."
        )
    return found


def _check(config: ScalingTransformerConfig, block_size: int, rank: int, assignment: str) -> str:
    """Refuse what cannot be made sparse; return the activation's name in a sparse layer."""
    if config.ff_sparsity is not None:
        raise ValueError(f"The model is sparse already (ff_sparsity={config.ff_sparsity}): give the dense one.")
    units, activation = config.intermediate_size, _SAME_ACTIVATION.get(config.hidden_act, config.hidden_act)
    if activation not in SPARSE_ACTIVATIONS:
        raise ValueError(
            f"A sparse feed-forward layer has no activation {config.hidden_act!r}, but those that are 0 at 0, as a "
            f"unit that is not chosen must be: {', '.join(SPARSE_ACTIVATIONS)}."
        )
    if block_size < 2 or units % block_size:
        near = [size for size in range(2, units + 1) if units % size == 0]
        close = sorted(sorted(near, key=lambda size: abs(size - block_size))[:4])
        raise ValueError(
            f"block_size must divide the {units} units of a feed-forward layer and be at least 2; {block_size} does "
            f"not. Near it: {', '.join(map(str, close))}."
        )
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}.")
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment must be one of {', '.join(ASSIGNMENTS)}, not {assignment!r}.")
    return activation


def _check_weights(model: Any) -> None:
    """Raise a `ValueError` where feed-forward matrices are not those of plain linear layers in floats."""
    for index, layer in enumerate(model.model.layers):
        for name in ("up_proj", "down_proj"):
            part = getattr(layer.feed_forward, name)
            if type(part) is not nn.Linear or not part.weight.is_floating_point():
                raise ValueError(
                    f"layers.{index}.feed_forward.{name} is a {type(part).__name__}, not a linear layer of floats: "
                    "merge adapters, and load the model without quantisation."
                )


def _dense_units(block: Any, activation: str) -> DenseUnits:
    up, down = block.up_proj, block.down_proj
    return DenseUnits(up.weight, down.weight.T.contiguous(), up.bias, activation)


@dataclass
class _Settings:
    block_size: int
    rank: int
    assignment: str
    epochs: int
    generator: torch.Generator


def _fit(
    units: DenseUnits, x: Tensor, target: Tensor, settings: _Settings
) -> tuple[DenseUnits, Tensor, Controller, dict[str, float]]:
    """Units in the order of blocks with fitted rows, bias, controller and figures of a layer."""
    size = settings.block_size
    if settings.assignment == "random":
        order = torch.randperm(len(units.up), generator=settings.generator)
    else:
        order = assign_units(coactivation(units, x), size)
    units = units.ordered(order.to(x.device))
    begun = begin_controller(units, x, settings.rank)
    best, gains = best_units(units, x, size)
    controller = fit_controller(begun, x, best, gains, settings.rank, settings.epochs, settings.generator)
    del gains  # a number for each block and token
    chosen = controller.winners(x, size)
    rows, bias = fit_rows(units, x, chosen, target, size)
    fitted = DenseUnits(units.up, rows, units.inner_bias, units.activation)
    figures = {
        "active_units": units.active_share(x),
        "accuracy": (chosen == best).sum().item() / best.numel(),
        "error": squared_error(fitted, bias, x, chosen, target, size),
    }
    return fitted, bias, controller, figures


def _sparse_block(config: Any, dense: Any, units: DenseUnits, bias: Tensor, controller: Controller) -> FeedForwardBlock:
    """The block that takes the place of a dense one."""
    with torch.device("meta"):
        block = FeedForwardBlock(config)
    layer: Any = block.sparse
    blocks, size = layer.controller_bias.shape
    weights = {
        "controller_down": controller.down,
        "controller_up": controller.up.unflatten(0, (blocks, size)),
        "controller_bias": controller.bias.view(blocks, size),
        "up": units.up.unflatten(0, (blocks, size)),
        "down": units.down.unflatten(0, (blocks, size)),
        "bias": bias,
        "inner_bias": units.inner_bias.view(blocks, size),
    }
    layer.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    block.norm, block.sru = dense.norm, dense.sru
    return block.train(dense.training)


def _target(layer: Any, batch: _Batch, attended: Tensor) -> Tensor:
    """The output by which the sparse layer would make all as it is in the dense model."""
    target = batch.dense - attended
    if layer.feed_forward.sru is not None:
        branch, _ = layer.feed_forward.sru(attended, None, batch.real, batch.starts, False)
        target = target - branch
    return target


def _sparsify_layer(
    model: Any, index: int, batches: list[_Batch], settings: _Settings, activation: str
) -> dict[str, float]:
    """Move all batches through a layer, and make it sparse on the way."""
    layer = model.model.layers[index]
    attended = []
    for batch in batches:
        batch.dense = _feed(layer, _attend(layer, batch.dense, batch), batch)
        attended.append(_attend(layer, batch.sparse, batch))
    norm, pairs = layer.feed_forward.norm, list(zip(batches, attended, strict=True))
    x = torch.cat([norm(batch.tokens(one)) for batch, one in pairs])
    target = torch.cat([batch.tokens(_target(layer, batch, one)) for batch, one in pairs])
    units, bias, controller, figures = _fit(_dense_units(layer.feed_forward, activation), x, target, settings)
    layer.feed_forward = _sparse_block(model.config, layer.feed_forward, units, bias, controller)
    for batch, one in pairs:
        batch.sparse = _feed(layer, one, batch)
    return figures


@torch.no_grad()
def sparsify(
    model: ScalingTransformerForCausalLM | GPT2LMHeadModel,
    text: Any,
    block_size: int,
    rank: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int | None = None,
    max_tokens: int = 65_536,
    batch_size: int = 8,
    assignment: str = "coactivation",
    epochs: int = 4,
    seed: int = 0,
    progress: bool = True,
    figures: list[dict[str, float]] | None = None,
) -> ScalingTransformerForCausalLM:
    """
    Make the feed-forward layers of a trained dense model sparse, fitted to what they do on some text.

    Of each layer one unit in `block_size` is computed for a token, whichever a controller of rank `rank` chooses.
    Attention, embeddings and output layer stay dense, and are the same numbers. It takes a few forward passes over
    `max_tokens` tokens, the fit of each layer, and memory for the hidden states of those tokens about six times, beside
    a copy of the model. What that is at which size, docs/sparsify.md says.

    Args:
        model ([`ScalingTransformerForCausalLM`] or `GPT2LMHeadModel`): dense; stays as it is. Its activation must be
            ReLU, GELU in one of its two forms, or SiLU. On a GPU of Apple a copy of it is fitted on the CPU.
        text: what to fit to, best of the kind that the model is for: a string or a list of them, with a `tokenizer`; a
            tensor or array of token ids, `(tokens,)` or `(rows, length)`; or batches, each a tensor `(rows, length)` or
            a mapping with `input_ids` and, if there is padding, `attention_mask`. Of strings and of one row of ids,
            windows that are spread over all of it; rows and batches from the first on.
        block_size (`int`): N: one unit in so many is used. It divides the units of a layer.
        rank (`int`): inner width of the controllers.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): reads strings.
        length (`int`, *optional*): tokens of a window that a long row of ids is cut into; by default as many as the
            model takes, up to 512.
        max_tokens (`int`, defaults to 65,536): tokens to fit to at most.
        batch_size (`int`, defaults to 8): windows that run together.
        assignment (`str`, defaults to `"coactivation"`): which units share a block: those that are seldom active
            together, or `"random"` ones, to compare with.
        epochs (`int`, defaults to 4): passes of each controller over the tokens.
        seed (`int`, defaults to 0): decides what is drawn: the order of the controllers' tokens.
        progress (`bool`, defaults to `True`): show a progress bar.
        figures (`list`, *optional*): filled with a dictionary for each layer: `active_units`, the mean share of units
            above 0; `accuracy`, how often the controller chooses the best unit of a block; `error`, the squared error
            of what the layer adds to the hidden state, as a share of its variance, with what is left of the errors of
            layers before it.

    Returns:
        [`ScalingTransformerForCausalLM`]: of the dtype, device, mode and generation config of `model`. Further training
        draws units as evaluation takes them, with some noise (`ff_hard_probability=1`).

    Raises:
        ValueError: for a model that is no GPT-2 and no dense Scaling Transformer, or has another activation, for a
            `block_size` that does not divide the units, or a text that is too short.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_efficient import sparsify

    >>> model = AutoModelForCausalLM.from_pretrained("my-gpt2")
    >>> tokenizer = AutoTokenizer.from_pretrained("my-gpt2")
    >>> sparse = sparsify(model, open("my.txt").read(), 4, 64, tokenizer=tokenizer)
    ```
    """
    result = copy.deepcopy(model) if isinstance(model, ScalingTransformerForCausalLM) else from_gpt2(model)
    activation = _check(result.config, block_size, rank, assignment)
    _check_weights(result)
    was_training, dtype, device = result.training, result.dtype, result.device
    # Layers are fitted in float64, which GPUs of Apple do not have.
    result.eval().to("cpu" if device.type == "mps" else device, torch.promote_types(dtype, torch.float32))
    rows = read_batches(text, result.config.max_position_embeddings, tokenizer, length, max_tokens, batch_size)
    batches = _collect(result, rows, max_tokens)
    settings = _Settings(block_size, rank, assignment, epochs, torch.Generator().manual_seed(seed))
    config = result.config  # which all layers share
    config.hidden_act, config.ff_sparsity, config.ff_rank = activation, block_size, rank
    config.ff_inner_bias, config.ff_hard_probability = True, 1.0
    config.validate()
    from tqdm.auto import tqdm

    for index in tqdm(
        range(config.num_hidden_layers), desc="Making layers sparse", unit=" layers", disable=not progress
    ):
        found = _sparsify_layer(result, index, batches, settings, activation)
        logger.info("Layer %d: %s.", index, ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        if figures is not None:
            figures.append(found)
    return result.to(device, dtype).train(was_training)


__all__ = ["sparsify"]
