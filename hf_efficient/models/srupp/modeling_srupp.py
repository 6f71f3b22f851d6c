"""
SRU++: language models and encoders that mix a fast elementwise recurrence with a little attention.

Source: Lei, "When Attention Meets Fast Recurrence: Training Language Models with Reduced Compute", EMNLP 2021, arXiv
2102.12459, section 2, and the author's code, from which the released checkpoints come. One layer, with x its input:

    z = W_1 x                                             d' wide
    y = LayerNorm(z + alpha Attention(z, W_k z, W_v z))   alpha starts at 0; without attention y = LayerNorm(z)
    u = W_3 y                                             what the recurrence takes (ops/sru.py), highway x

Deviations from the code: a softmax over nothing but padding is finite; pre-activations are planar (all candidates, then
all forget gates, ...) where the original interleaves them; the state is float32 under every mixed precision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...modules.adaptive_softmax import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    TransposedLinear,
    resize_adaptive,
    tied_names,
)
from ...modules.attention import eager_attention_forward
from ...modules.causal_generation import StatefulGenerationMixin
from ...modules.causal_inputs import check_continuation, cover_cache, first_and_last_tokens
from ...modules.few_rows import apply_to_few
from ...modules.input_checks import check_flag
from ...modules.keyword_checks import TRANSFORMERS_KEYWORDS, check_keywords
from ...modules.losses import (
    divide_by_targets,
    kept_positions,
    next_token_targets,
    question_answering_loss,
    sequence_classification_loss,
    token_classification_loss,
)
from ...modules.packing import Packing
from ...modules.quantization import QuantizableMixin
from ...ops.backend import attention_context, is_transformed
from ...ops.sru import sru_recurrence
from ...utils.cache_naming import (
    CACHE_NAME,
    CACHE_NAMES,
    CacheOutputMixin,
    accepts_cache_by_either_name,
    cache_kwarg,
)
from ...utils.labels import IGNORE_INDEX
from .configuration_srupp import SruppConfig
from .masking_srupp import SegmentMemory, check_inputs, check_memory_dtype, key_place, scores_mask


_KEYWORDS = TRANSFORMERS_KEYWORDS | {"token_type_ids"}
# What heads hand on to the encoder.
_HANDED_ON = _KEYWORDS.union(CACHE_NAMES, ("inputs_embeds", "memory", "return_memory", "attention_window"))


class SruppAttention(nn.Module):
    """Attention among projected vectors z, which are the queries themselves. Heads share d'.

    With one head, as all published models have, (W_k z_j) . z_i = z_j . (W_k^T z_i) and the sum of W_v z_j is W_v of
    the sum. So z itself serves as key and value: half the cache, and nothing to compute anew for memory. `q_proj` then
    holds W_k transposed. With more heads there are keys and values as usual.
    """

    num_key_value_groups = 1

    def __init__(self, config: SruppConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        size = config.projection_sizes[layer_idx]
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.single_head = config.num_attention_heads == 1
        if self.single_head:
            self.q_proj = nn.Linear(size, size, bias=False)
        else:
            self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(*tensor.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _keys_and_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for the cache. A single head's values are its keys, so its value tensor has no width."""
        if self.single_head:
            key = self._heads(hidden_states)
            return key, key[..., :0]
        return self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))

    def _through_cache(self, key, value, unnormalized_input, cache: Cache):
        """Keys and values of the cache, with this call's own. `unnormalized_input`, where it is given, makes what the
        cache keeps of this call: under an outer pre-norm a token's key changes once its call is over."""
        if unnormalized_input is None:
            return cache.update(key, value, self.layer_idx)
        # Before the update: a static cache's length is a tensor that the update changes.
        places = torch.arange(key.shape[2], device=key.device) + cache.get_seq_length(self.layer_idx)
        keys, values = cache.update(*self._keys_and_values(unnormalized_input), self.layer_idx)
        return keys.index_copy(2, places, key), values.index_copy(2, places, value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        unnormalized_input: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, d')`): projected vectors.
            memory (`torch.Tensor` of shape `(batch, past, d')`, *optional*): those of the segment before.
            attention_mask (`torch.Tensor`, *optional*): of the scores, in the form that the attention in use takes.
            cache (`Cache`, *optional*): keys and values of earlier calls.
            unnormalized_input (`torch.Tensor` of the shape of `hidden_states`, *optional*): what the cache keeps.

        Returns:
            `tuple`: output of the shape of `hidden_states`, and the weights where the attention gives them.
        """
        query = self._heads(self.q_proj(hidden_states) if self.single_head else hidden_states)
        everything = hidden_states if memory is None else torch.cat([memory, hidden_states], dim=1)
        key, value = self._keys_and_values(everything)
        if cache is not None:
            key, value = self._through_cache(key, value, unnormalized_input, cache)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        with attention_context(query, key, value):
            output, weights = attend(
                self,
                query,
                key,
                key if self.single_head else value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        output = output.reshape(hidden_states.shape)
        return self.v_proj(output) if self.single_head else output, weights


class SruppProjection(nn.Module):
    """From a layer's input to the pre-activations of its recurrence: one linear map, or two with attention or nothing
    between them."""

    def __init__(self, config: SruppConfig, layer_idx: int):
        super().__init__()
        self.num_directions = config.num_directions
        inputs, size = config.input_sizes[layer_idx], config.projection_sizes[layer_idx]
        # The highway needs a matrix of its own where input and output differ in width.
        self.num_parts = 4 if config.has_skip_term and inputs != config.hidden_size else 3
        self.normalize_after = config.attention_normalize_after
        attends = layer_idx in config.attention_layer_indices
        self.down_proj = nn.Linear(inputs, size, bias=False) if size else None
        self.attention = SruppAttention(config, layer_idx) if attends else None
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps) if size and config.attention_layer_norm else None
        rate = config.dropout if config.projection_dropout is None else config.projection_dropout
        self.dropout = nn.Dropout(rate if size else 0.0)
        self.out_proj = nn.Linear(size or inputs, self.num_parts * config.hidden_size, bias=False)

    def _project(self, hidden_states: torch.Tensor | None) -> torch.Tensor | None:
        """Projected input of the attention, from a tensor that nothing else reads."""
        if hidden_states is None or self.down_proj is None:
            return None
        projected = self.down_proj(hidden_states)
        return projected if self.norm is None or self.normalize_after else self.norm(projected)

    def forward(
        self, hidden_states, memory=None, attention_mask=None, cache=None, unnormalized_input=None, **kwargs
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, input size)`): the layer's input.
            memory, attention_mask, cache, unnormalized_input: see [`SruppAttention`].

        Returns:
            `torch.Tensor` of shape `(batch, length, directions, 3 or 4, width of a direction)`.
        """
        if self.down_proj is not None:
            hidden_states = apply_to_few(self.down_proj, hidden_states)
            before = self.norm is not None and not self.normalize_after and self.attention is not None
            if self.attention is not None:
                seen = self.norm(hidden_states) if before and self.norm is not None else hidden_states
                attended, _ = self.attention(
                    seen, self._project(memory), attention_mask, cache, self._project(unnormalized_input), **kwargs
                )
                hidden_states = torch.addcmul(hidden_states, attended, self.attention.alpha.to(attended.dtype))
            if self.norm is not None and not before:
                hidden_states = self.norm(hidden_states)
            hidden_states = self.dropout(hidden_states)
        return apply_to_few(self.out_proj, hidden_states).unflatten(-1, (self.num_directions, self.num_parts, -1))


class SruRecurrence(nn.Module):
    """[`sru_recurrence`] as a module without parameters, which `kernels.kernelize` can replace.

    Returns the output and c of all steps, `(B, L, d)`, or of the last one alone, `(B, 1, d)`. The names below are what
    `kernels.use_kernel_forward_from_hub("SruRecurrence")` would set, without that library.
    """

    kernel_layer_name = "SruRecurrence"
    kernel_condition = staticmethod(lambda module: True)

    def forward(
        self,
        u,
        x=None,
        weight_c=None,
        bias=None,
        c0=None,
        mask=None,
        document_start=None,
        dropout_mask=None,
        scale_x=1.0,
        activation="identity",
        reverse=False,
        all_states=True,
    ):
        tensors = (u, x, weight_c, bias, c0, mask, document_start, dropout_mask)
        options = {"scale_x": scale_x, "activation": activation, "reverse": reverse}
        output, states = sru_recurrence(*tensors, **options, return_all_states=all_states)
        return output, states if all_states else states.unsqueeze(1)


class SruppLayer(GradientCheckpointingLayer):
    """Projection and recurrence. Returns the output and c after the last step, `(B, L, d)` and `(B, d)`."""

    def __init__(self, config: SruppConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.counts_tokens = layer_idx == 0 and not config.attention_layer_indices  # see `SruppConfig.layer_types`
        self.width = config.hidden_size // config.num_directions
        self.num_directions = config.num_directions
        self.activation = config.recurrence_activation
        self.normalize_before = config.layer_norm and not config.normalize_after
        self.input_dropout = config.input_dropout
        self.cell_dropout = config.dropout if layer_idx < config.num_hidden_layers - 1 else 0.0
        inputs = config.input_sizes[layer_idx]
        self.projection = SruppProjection(config, layer_idx)
        self.recurrence = SruRecurrence()
        self.takes_highway = config.has_skip_term and self.projection.num_parts == 3
        self.scale = math.sqrt(1.0 + 2.0 * math.exp(config.highway_bias)) if config.rescale else 1.0
        self.weight_c = nn.Parameter(torch.empty(2, config.hidden_size), requires_grad=config.use_peephole)
        self.bias = nn.Parameter(torch.empty(2, config.hidden_size))
        self.use_peephole = config.use_peephole
        self.norm = None
        if config.layer_norm:
            width = inputs if self.normalize_before else config.hidden_size
            self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def _shared_mask(self, like: torch.Tensor, width: int, rate: float) -> torch.Tensor | None:
        """One dropout mask for all time steps, `(B, width)`."""
        if not self.training or rate == 0.0:
            return None
        return nn.functional.dropout(like.new_ones(like.shape[0], width), rate)

    def _run_recurrence(
        self,
        u: torch.Tensor,
        x: torch.Tensor,
        state: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        document_start: torch.Tensor | None,
        all_states: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all directions: the output, `(B, L, d)`, and c of all steps, or of each direction's last step alone."""
        dropout_mask = self._shared_mask(x, self.num_directions * self.width, self.cell_dropout)
        highway = x if self.takes_highway else None
        weight_c = self.weight_c if self.use_peephole else None
        options = {"scale_x": self.scale, "activation": self.activation, "all_states": all_states}
        if self.num_directions == 1:
            # No slices: the gradient of one is a tensor of zeros with the slice in it.
            u = u.squeeze(2)
            return self.recurrence(
                u, highway, weight_c, self.bias, state, padding_mask, document_start, dropout_mask, **options
            )
        # Backwards in time a document begins with its last token.
        ends = None if document_start is None else nn.functional.pad(document_start[:, 1:], (0, 1))
        halves = [
            (None, None) if tensor is None else tensor.chunk(2, dim=-1)
            for tensor in (highway, weight_c, self.bias, state, dropout_mask)
        ]
        outputs = []
        for direction, (part, starts) in enumerate(zip(u.unbind(2), (document_start, ends), strict=True)):
            x_half, weight_half, bias_half, state_half, dropout_half = (half[direction] for half in halves)
            outputs.append(
                self.recurrence(
                    part,
                    x_half,
                    weight_half,
                    bias_half,
                    state_half,
                    padding_mask,
                    starts,
                    dropout_half,
                    reverse=direction == 1,
                    **options,
                )
            )
        hidden_states, states = zip(*outputs, strict=True)
        return torch.cat(hidden_states, -1), torch.cat(states, -1)

    @accepts_cache_by_either_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        branch = hidden_states
        if self.norm is not None and self.normalize_before:
            branch = self.norm(branch)
        shared = self._shared_mask(branch, branch.shape[-1], self.input_dropout)
        branch = branch if shared is None else branch * shared.unsqueeze(1)
        unnormalized_input = hidden_states if cache is not None and self.normalize_before else None
        u = self.projection(branch, memory, attention_mask, cache, unnormalized_input, **kwargs)
        if cache is not None and self.counts_tokens:
            marks = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1, dtype=torch.bool)
            cache.update(marks, marks[..., :0], self.layer_idx)
        if cache is not None and cache.has_previous_state(self.layer_idx):
            # `[..., -1]`: after assisted decoding recorded several, the last is the current one. Read from the cache's
            # layer: `Cache.get_conv_state` is not in transformers 5.17.
            layer_cache: Any = cache.layers[self.layer_idx]
            state = layer_cache.conv_states[0][..., -1]
            if torch.is_grad_enabled():
                state = state.clone()  # the cache is updated in place, and a backward pass reads what it held
        # A cache may be asked to go back by some steps, and a backward pass reads them all. Not by grad mode alone in
        # training: reentrant checkpointing has no grad the first time, and both runs have to take the same kernel.
        all_states = cache is not None or self.training or torch.is_grad_enabled()
        output, states = self._run_recurrence(u, hidden_states, state, padding_mask, document_start, all_states)
        if cache is not None:
            # A kernel of size 1 keeps the last state, and all of them while a rollback may be asked for.
            cache.update_conv_state(states.transpose(1, 2), self.layer_idx, conv_kernel_size=1)
        if self.norm is not None and not self.normalize_before:
            output = self.norm(output)
        # A copy: what is carried to the next segment or call must not keep the states of all steps.
        last = states[:, -1].clone()
        if self.num_directions == 2:
            last = torch.cat([last[:, : self.width], states[:, 0, self.width :]], -1)
        return output, last


@dataclass
class SruppModelOutput(CacheOutputMixin, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and `memory`, for the next segment."""

    memory: SegmentMemory | None = None


@dataclass
class SruppCausalLMOutput(CacheOutputMixin, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, `memory` for the next segment and, from an adaptive softmax, `token_losses`: the loss
    of each position in nats, in the order of positions."""

    memory: SegmentMemory | None = None
    token_losses: torch.FloatTensor | None = None


@dataclass
class SruppSequenceClassifierOutput(CacheOutputMixin, SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast`, whose cache is called `cache` under every release of transformers."""


class SruppPreTrainedModel(QuantizableMixin, PreTrainedModel):
    float_modules = ("embed_tokens", "lm_head", "score", "qa_outputs")
    config: SruppConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SruppLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_flex_attn = True
    # Its kernels know no rows of several documents, and heads of 256 at most; the published models have 480 to 1,024.
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = True  # all losses are sums divided by `num_items_in_batch`
    _can_record_outputs = {"hidden_states": SruppLayer, "attentions": SruppAttention}

    def __init__(self, config: SruppConfig, *inputs: Any, **kwargs: Any):
        config.validate()  # its fields may have been set since, as `from_pretrained(..., field=value)` does
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        Initialise as the original does: Xavier over whole stacked matrices, and a uniform distribution of variance
        1 / d for embeddings and output.

        transformers asks for no module of a third party that has no parameters of its own, such as `SruppProjection`;
        what is in those is seen to where it is itself the module, or by `SruppLayer`.
        """
        bound = (3.0 / self.config.hidden_size) ** 0.5
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, TransposedLinear)):
            if module is getattr(self, "lm_head", None):
                init.uniform_(module.weight, -bound, bound)
            else:
                init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, SruppLayer):
            reach = self.config.weight_c_init if self.config.use_peephole else 0.0
            init.uniform_(module.weight_c, -reach, reach)
            forget_bias = torch.zeros_like(module.bias[0])
            # Whole, not by halves: only then is a bias that was loaded left alone.
            init.copy_(module.bias, torch.stack([forget_bias, forget_bias + self.config.highway_bias]))
            projection = module.projection
            if projection.down_proj is not None:
                init.xavier_uniform_(projection.out_proj.weight, gain=(1.0 - projection.dropout.p) ** 0.5)
        elif isinstance(module, SruppAttention):
            init.zeros_(module.alpha)
            keys = module.q_proj if module.single_head else module.k_proj
            for half in (keys, module.v_proj):  # of one matrix, twice as high
                init.xavier_uniform_(half.weight, gain=(2 / 3) ** 0.5)
        elif isinstance(module, AdaptiveSoftmax):
            init.uniform_(module.cluster_weight, -bound, bound)
            for bias in (module.cluster_bias, *module.biases):
                init.zeros_(bias)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.PreTrainedModel.resize_token_embeddings`]; of an adaptive embedding the last cluster
        grows or shrinks, see `resize_adaptive`."""
        if self.config.adaptive_cutoffs is None:
            return super().resize_token_embeddings(*args, **kwargs)
        return resize_adaptive(self, *args, **kwargs)


class SruppModel(SruppPreTrainedModel):
    """
    The stack of layers. There is no norm at the end and there are no positional encodings.

    Gradients of gradients (`backward(create_graph=True)`) want `attn_implementation="eager"`: the backward pass of
    torch's fused attention, which the default "sdpa" calls, has no derivative and says so in a `RuntimeError`.
    """

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        if config.adaptive_cutoffs is None:
            self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        else:
            self.embed_tokens = AdaptiveEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_layer_indices = frozenset(config.attention_layer_indices)
        self.key_place = key_place(config)
        projects = config.project_input and config.embedding_size != config.hidden_size
        self.input_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False) if projects else None
        self.layers = nn.ModuleList(SruppLayer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def _take_options(self, position_ids: torch.Tensor | None, options: dict[str, Any], segments: bool) -> Packing:
        """Take out of the other keyword arguments what the layers are not to see, and refuse those that nothing
        reads."""
        if len(self.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"The model has {len(self.layers)} layers, but config.num_hidden_layers is "
                f"{self.config.num_hidden_layers}; a cache is made for the latter. Change both."
            )
        packing = Packing.taken_from(position_ids, options)
        if segments and any(value is not None for value in packing):
            raise ValueError(
                "Memory continues every row's document; position_ids, seq_idx and cu_seq_lens_q, which begin new ones, "
                "do not fit."
            )
        check_keywords(options, _KEYWORDS, self)
        return packing

    def get_post_embedding_module(self) -> nn.Module:
        """Return the module that the embeddings go through first, for hooks that mix something into its input."""
        return self.dropout

    @accepts_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        memory: SegmentMemory | None = None,
        return_memory: bool = False,
        attention_window: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SruppModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*)
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 for tokens and 0 for padding, which may
                stand anywhere, with any id, and leaves no trace. With a cache or a memory it may cover what these hold
                too; otherwise nothing in a cache is padding, and a memory knows its own. With four dimensions, `(batch
                or 1, heads or 1, length, keys)`, it stands in the place of causality in the attention: 1 lets a query
                attend to a key, and floats are added to the scores. It says nothing of padding: the recurrence reads
                every token, in their order, and only documents (see `position_ids`) keep it from going on.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): where they restart in a row
                without a past, a new document begins: nothing before it is seen. They have no other effect. `seq_idx`,
                the number of each token's document, and `cu_seq_lens_q`, where documents begin and end in a batch of
                one row, say the same; see [`Packing`].
            cache (`Cache`, *optional*): for generation; per layer c, and keys and values where it attends.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, embedding_size)`, *optional*)
            use_cache (`bool`, *optional*): build a cache where none is given; never in a training step, which would pay
                for it, or under a transform of `torch.func`, since a cache is written in place.
            memory (`SegmentMemory`, *optional*): of the previous segment, for training and evaluation by segments.
            return_memory (`bool`, defaults to `False`): give `output.memory` for the next segment; not detached.
            attention_window (`int`, *optional*): attend to at most so many positions back.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that nothing reads.
            ValueError: for input that does not fit; see `check_inputs` and `check_memory_dtype`.
        """
        check_flag("use_cache", use_cache)
        check_flag("return_memory", return_memory)
        segments = memory is not None or return_memory
        packing = self._take_options(position_ids, kwargs, segments)
        given = (input_ids, inputs_embeds, attention_mask, packing, memory, cache, attention_window)
        token_type_ids = kwargs.pop("token_type_ids", None)  # BERT's tokenizers give them
        ids, attention_mask, real = check_inputs(self.config, self.embed_tokens, *given, token_type_ids)
        hidden_states = self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds
        if memory is not None:
            check_memory_dtype(memory, hidden_states)
        trains = self.training and torch.is_grad_enabled()
        builds_cache = use_cache and cache is None and self.config.is_causal
        if builds_cache and not (segments or trains or is_transformed()):
            cache = DynamicCache(config=self.config)
        batch, length = hidden_states.shape[:2]
        if real is not None:
            hidden_states = hidden_states.masked_fill(~real.unsqueeze(-1), 0.0)
        starts = packing.starts(real, batch, length)
        if cache is not None and cache.has_previous_state(0):
            check_continuation(cache, self.key_place, starts, hidden_states)
            starts, attention_mask = None, cover_cache(attention_mask, cache, length)
        mask = scores_mask(self.config, hidden_states, attention_mask, cache, starts, memory, attention_window)
        hidden_states = self.dropout(hidden_states)
        if self.input_proj is not None:
            hidden_states = self.input_proj(hidden_states)
        inputs, states = [], []
        for index, layer in enumerate(self.layers):
            inputs.append(hidden_states if index in self.attention_layer_indices else None)
            carried = (None, None) if memory is None else (memory.cell_states[index], memory.layer_inputs[index])
            hidden_states, state = layer(hidden_states, *carried, mask, real, starts, **cache_kwarg(cache), **kwargs)
            states.append(state)
        return SruppModelOutput(
            last_hidden_state=hidden_states,
            **cache_kwarg(cache),
            memory=SegmentMemory(tuple(states), tuple(inputs), real) if return_memory else None,
        )


class SruppForCausalLM(StatefulGenerationMixin, SruppPreTrainedModel, GenerationMixin):
    """Language model; with `config.adaptive_cutoffs` through an adaptive embedding and softmax."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError("A causal LM must not see what it predicts: set bidirectional=False and is_causal=True.")
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.adaptive_cutoffs is None:
            self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
            self.post_init()
            return
        self.lm_head = AdaptiveSoftmax(config)
        self._tied_weights_keys = tied_names(config, "lm_head", "model.embed_tokens")
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if self.config.adaptive_cutoffs is None else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """See [`~transformers.PreTrainedModel.tie_weights`]; what is called for both sides is the embedding's."""
        super().tie_weights(*args, **kwargs)
        embedding = self.get_input_embeddings()
        if isinstance(self.lm_head, AdaptiveSoftmax) and isinstance(embedding, AdaptiveEmbedding):
            self.lm_head.share(embedding, self.config.tie_adaptive_projections)

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SruppCausalLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the input, -100 where there is
                nothing to learn; moved by one inside. `shift_labels` in their place are taken as they are, so that a
                segment's last position can be asked for the next segment's first token.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): number of last positions to compute logits for, or
                which; 0 for all.

        The other arguments, `memory` among them, are those of [`SruppModel`]. An adaptive softmax gives
        log-probabilities as logits, and none beside a loss: all words of all positions would not fit.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = self.dropout(kept_positions(outputs.last_hidden_state, logits_to_keep))
        targets = next_token_targets(labels, shift_labels)
        loss = logits = token_losses = None
        count = kwargs.get("num_items_in_batch")
        # By the config: anything may stand in the place of the head, such as an adapter around it.
        if targets is not None and self.config.adaptive_cutoffs is not None:
            token_losses = -self.lm_head(hidden_states, targets)
            loss = divide_by_targets(token_losses.sum(), (targets != IGNORE_INDEX).sum() if count is None else count)
        else:
            logits = self.lm_head(hidden_states)
            if targets is not None:
                loss = token_classification_loss(logits, targets, count)
        return SruppCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=outputs.memory,
            token_losses=token_losses,
        )


class SruppForMaskedLM(SruppPreTrainedModel):
    """Masked language model over an encoder: bidirectional, or with attention that is not causal."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        if config.is_causal or config.adaptive_cutoffs is not None:
            raise ValueError("A masked LM sees both sides: set bidirectional=True. It has no adaptive softmax.")
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the targets, -100 elsewhere.
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.

        The other arguments are those of [`SruppModel`].
        """
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids, attention_mask, **kwargs)
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = token_classification_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SruppForSequenceClassification(SruppPreTrainedModel):
    """Classification or regression from where each direction has read the whole row: its last real token and, running
    backwards, its first."""

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SruppSequenceClassifierOutput:
        """
        Args:
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.
            labels (`torch.Tensor`, *optional*): `(batch,)` class indices, or numbers for regression (`num_labels=1`);
                `(batch, num_labels)` floats for several labels at once. See `config.problem_type`.

        The other arguments are those of [`SruppModel`].
        """
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        first, last = first_and_last_tokens(self.config, input_ids, attention_mask, hidden_states)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        pooled = hidden_states[rows, last]
        if self.config.bidirectional:
            half = self.config.hidden_size // 2
            pooled = torch.cat([pooled[:, :half], hidden_states[rows, first, half:]], -1)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(self.config, logits, labels, kwargs.get("num_items_in_batch"))
        return SruppSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SruppForTokenClassification(SruppPreTrainedModel):
    """Classification of every token, from its last hidden state."""

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): class ids, -100 where a token has none.
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.

        The other arguments are those of [`SruppModel`].
        """
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids, attention_mask, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = token_classification_loss(logits, labels, kwargs.get("num_items_in_batch"))
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return TokenClassifierOutput(loss=loss, logits=logits, **states)


class SruppForQuestionAnswering(SruppPreTrainedModel):
    """Extractive question answering: logits of an answer's start and end."""

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        self.model = SruppModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(batch,)`, *optional*): index of the answer's
                first and last token; an index outside the input is ignored.
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.

        The other arguments are those of [`SruppModel`]. Returns two sets of logits of shape `(batch, length)`.
        """
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids, attention_mask, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        start_logits, end_logits = (part.contiguous() for part in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            count = kwargs.get("num_items_in_batch")
            loss = question_answering_loss(start_logits, end_logits, start_positions, end_positions, count)
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits, **states)


__all__ = [
    "SruppForCausalLM",
    "SruppForMaskedLM",
    "SruppForQuestionAnswering",
    "SruppForSequenceClassification",
    "SruppForTokenClassification",
    "SruppModel",
    "SruppPreTrainedModel",
]
