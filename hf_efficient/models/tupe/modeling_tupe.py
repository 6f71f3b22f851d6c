"""
TUPE-BERT: BERT with untied positional encoding.

Source: Ke, He, Liu, "Rethinking Positional Encoding in Language Pre-training", ICLR 2021, arXiv 2006.15595, and the
authors' code, which the released checkpoints were trained with. Where the two differ, this file follows the code:

- U^Q and U^K have biases (the paper writes none), and the d of 1 / sqrt(2 d) is the width of one head;
- [CLS]'s logits theta_1 and theta_2 come from the first two rows of the position table, not from vectors of their own;
- the reset of [CLS]'s row and column precedes the sum with the relative bias, which has a bucket for each of them.

Deviations from the code: under mixed precision the position term is computed in float32 and rounded once (the code
keeps all of it in half precision), ids are checked, and a row that is all padding attends evenly, without NaN.

A position is the column of a token. So the input must start with [CLS] and be padded on the right; left padding raises.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_tupe import (
    AUTO_ATTENTION,
    TupePositionBias,
    auto_attention_forward,
    eager_attention_forward,
    mask_scores,
    real_key_lengths,
    wants_weights,
)
from .configuration_tupe import TupeConfig
from .validation_tupe import check_inputs, check_labels, check_length


class TupeAttention(nn.Module):
    """Multi-head self-attention whose logits take a positional part that is computed elsewhere."""

    is_causal = False

    def __init__(self, config: TupeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = (config.attention_scale_factor * self.head_dim) ** -0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        implementation, attend = self.config._attn_implementation, cast(Callable, auto_attention_forward)
        # The registry belongs to the process: remote code of another revision puts its own function under our name.
        if implementation != AUTO_ATTENTION:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            position_bias=position_bias,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class TupeMLP(nn.Module):
    def __init__(self, config: TupeConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(hidden_states))))


class TupeLayer(GradientCheckpointingLayer):
    def __init__(self, config: TupeConfig, layer_idx: int):
        super().__init__()
        self.normalize_before = config.normalize_before
        self.self_attn = TupeAttention(config, layer_idx)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TupeMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        branch = self.self_attn_norm(hidden_states) if self.normalize_before else hidden_states
        branch, _ = self.self_attn(branch, position_bias, attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(branch)
        if not self.normalize_before:
            hidden_states = self.self_attn_norm(hidden_states)
        branch = self.mlp_norm(hidden_states) if self.normalize_before else hidden_states
        hidden_states = hidden_states + self.dropout(self.mlp(branch))
        return hidden_states if self.normalize_before else self.mlp_norm(hidden_states)


class TupePreTrainedModel(PreTrainedModel):
    config: TupeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TupeLayer", "TupePositionBias"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash attention has no input for an additive bias
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TupeLayer, "attentions": TupeAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Nothing requested means the fastest form for the device and mode; anything requested is taken as it is."""
        return super().get_correct_attn_implementation(requested_attention or AUTO_ATTENTION, is_init_check)

    @property
    def _encoder(self) -> "TupeModel":
        return cast("TupeModel", self.base_model)

    def get_position_embeddings(self) -> nn.Embedding:
        """The position table: `max_position_embeddings + 1` rows."""
        return self._encoder.position_bias.position_embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int):
        """
        Change the longest input. Rows that stay keep their weights; new ones are drawn like at initialisation and
        want training.

        Args:
            new_num_position_embeddings (`int`): new `max_position_embeddings`, at least 1.
        """
        if new_num_position_embeddings < 1:
            raise ValueError(f"An encoder needs at least 1 position, not {new_num_position_embeddings}.")
        old = self.get_position_embeddings()
        rows = new_num_position_embeddings + 1
        new = nn.Embedding(rows, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            new.weight.normal_(mean=0.0, std=self.config.initializer_range)
            kept = min(rows, old.num_embeddings)
            new.weight[:kept] = old.weight[:kept]
        new.weight.requires_grad_(old.weight.requires_grad)
        self._encoder.position_bias.position_embeddings = new
        self.config.max_position_embeddings = new_num_position_embeddings


class TupeModel(TupePreTrainedModel):
    """The encoder. It has no pooler; the hidden state at index 0 stands for the sequence."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_bias = TupePositionBias(config)
        self.layers = nn.ModuleList(TupeLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.normalize_before else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): starts with [CLS].
            attention_mask (`torch.Tensor` of shape `(batch, length)` or `(batch, 1, length, length)`, *optional*):
                1 for tokens, 0 for padding, which stands on the right. With four dimensions 1 lets a query attend to a
                key; floats are added to the logits.
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored: TUPE has no segment
                embedding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): token embeddings
                before the embedding norm, instead of `input_ids`.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, an id outside the vocabulary, an input
                longer than the position table, left padding, a row that does not start with [CLS], or `position_ids`.
        """
        if kwargs.get("position_ids") is not None:
            raise ValueError("TUPE takes no position_ids: a position is a column. Give packed sequences a row each.")
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_length(self.config, hidden_states.shape[1])
        hidden_states = self.dropout(self.embed_norm(hidden_states))
        if attention_mask is not None and attention_mask.dim() == 2:
            hidden_states = hidden_states * attention_mask.to(hidden_states.dtype).unsqueeze(-1)
        if attention_mask is not None and attention_mask.dim() == 4 and not attention_mask.is_floating_point():
            attention_mask = attention_mask.bool()
        device = hidden_states.device
        position_bias = self.position_bias(hidden_states.shape[1], device).to(device).unsqueeze(0)
        position_bias, mask, by_rows = self._combine(position_bias, attention_mask, hidden_states, kwargs)
        for layer in self.layers:
            # Positional, so that gradient checkpointing of either kind sees the tensors that need a gradient.
            hidden_states = layer(hidden_states, position_bias, mask, **by_rows, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))

    def _combine(self, position_bias: torch.Tensor, attention_mask, hidden_states: torch.Tensor, options):
        """(1, H, T, T) bias and what the user gave as mask, as the layers want them. They become one tensor, once
        for all layers, when there is padding and nothing is to be differentiated; in training a (B, H, T, T) bias would
        cost a gradient of that size. Where rows had better attend one by one there is no mask, but their lengths."""
        device_type = hidden_states.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            position_bias = position_bias.to(torch.get_autocast_dtype(device_type))
        differentiable = torch.is_grad_enabled() and position_bias.requires_grad
        implementation = self.config._attn_implementation
        padded = attention_mask is not None and attention_mask.dim() == 2
        if padded and implementation == AUTO_ATTENTION and not (differentiable or self.training):
            lengths = None if wants_weights(self.config, options) else real_key_lengths(attention_mask)
            if lengths is not None:
                return position_bias, None, {"key_lengths": lengths}
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        if implementation == "flex_attention":
            # flex_attention indexes the bias by batch row; an expanded view takes no memory.
            return position_bias.expand(hidden_states.shape[0], -1, -1, -1), mask, {}
        if differentiable or mask is None:
            return position_bias, mask, {}
        return mask_scores(position_bias, mask), None, {}


class TupeLMHead(nn.Module):
    """dense, activation, LayerNorm, then the token table (tied) and a bias of its own."""

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.act(self.dense(hidden_states))))


class TupeForMaskedLM(TupePreTrainedModel):
    """Masked language model. Labels are ids where there is a target and -100 elsewhere."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.model = TupeModel(config)
        self.lm_head = TupeLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the targets, -100 elsewhere.

        The other arguments are those of [`TupeModel`]. Returns logits of shape `(batch, length, vocab_size)`.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            check_labels(labels, tuple(logits.shape[:2]), "(batch, length)")
            loss = _cross_entropy(logits.flatten(0, 1), labels.flatten(), kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TupeForPreTraining(TupeForMaskedLM):
    """
    The paper's pretraining task: masked LM whose head runs at the target positions only, which at 15 % targets saves
    most of the output layer. (BERT's next-sentence task is not part of it: section 4.1 of the paper.)
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the targets, -100 elsewhere.

        The other arguments are those of [`TupeModel`]. With labels the logits have shape `(targets, vocab_size)`, in
        row-major order over `(batch, length)`; without, `(batch, length, vocab_size)`.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        loss = None
        if labels is None:
            logits = self.lm_head(hidden_states)
        else:
            check_labels(labels, tuple(hidden_states.shape[:2]), "(batch, length)")
            is_target = labels != -100
            logits = self.lm_head(hidden_states[is_target])
            loss = _cross_entropy(logits, labels[is_target], kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Summed cross-entropy in float32 over `num_items_in_batch`, so that accumulated micro-batches add up to the
    gradient of one large batch; over the number of targets where it is not given. No target gives 0, not NaN."""
    total = nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
    if num_items_in_batch is None:
        return total / (labels != -100).sum().clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        return total / num_items_in_batch.to(total.device).clamp(min=1)
    return total / max(num_items_in_batch, 1)


class TupeClassificationHead(nn.Module):
    """Hidden state of [CLS]: dense, tanh, dropout, output layer; no dropout before the dense layer, as in the
    original."""

    def __init__(self, config: TupeConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.pooler_activation]
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.act(self.dense(hidden_states[:, 0]))))


class TupeForSequenceClassification(TupePreTrainedModel):
    """Classification of a sequence or a pair; regression and multi-label by `config.problem_type`."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TupeModel(config)
        self.classifier = TupeClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels (`torch.Tensor`, *optional*): class ids of shape `(batch,)`; floats of shape `(batch,)` for
                regression on one value; floats of shape `(batch, num_labels)` for several values or multi-label.

        The other arguments are those of [`TupeModel`]. Returns logits of shape `(batch, num_labels)`.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """The library's three problem types; unlike its own loss, every type honours `num_items_in_batch`."""
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.is_floating_point():
                self.config.problem_type = "multi_label_classification"
            else:
                self.config.problem_type = "single_label_classification"
        labels = labels.to(logits.device)
        if self.config.problem_type == "single_label_classification":
            check_labels(labels, (logits.shape[0],), "(batch,): one class id a row")
            return _cross_entropy(logits, labels, num_items_in_batch)
        if self.num_labels == 1 and labels.dim() == 1:
            logits = logits.squeeze(-1)
        meaning = "(batch, num_labels), or (batch,) for one value" if self.num_labels == 1 else "(batch, num_labels)"
        check_labels(labels, tuple(logits.shape), meaning)
        criterion = nn.MSELoss if self.config.problem_type == "regression" else nn.BCEWithLogitsLoss
        total = criterion(reduction="sum")(logits.float(), labels.float())
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


class TupeForTokenClassification(TupePreTrainedModel):
    """Classification of every token; -100 marks tokens that have no label."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TupeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): class ids, -100 where there is none.

        The other arguments are those of [`TupeModel`]. Returns logits of shape `(batch, length, num_labels)`.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, tuple(logits.shape[:2]), "(batch, length)")
            loss = _cross_entropy(logits.flatten(0, 1), labels.flatten(), kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TupeForQuestionAnswering(TupePreTrainedModel):
    """Extractive question answering: logits of an answer's first and last token."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.model = TupeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(batch,)`, *optional*): index of the answer's
                first and last token; an index outside the input is ignored.

        The other arguments are those of [`TupeModel`]. Returns two sets of logits of shape `(batch, length)`.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))
        start_logits, end_logits = (part.contiguous() for part in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            check_labels(start_positions, (logits.shape[0],), "(batch,)", "start_positions")
            check_labels(end_positions, (logits.shape[0],), "(batch,)", "end_positions")
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TupeForMultipleChoice(TupePreTrainedModel):
    """Choice of one among several sequences, scored one by one."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.model = TupeModel(config)
        self.classifier = TupeClassificationHead(config, num_labels=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, choices, length)`, *optional*), and likewise the others.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): index of the right choice.

        Returns logits of shape `(batch, choices)`.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None or inputs.dim() != (3 if input_ids is not None else 4):
            raise ValueError("Multiple choice takes input_ids of shape (batch, choices, length).")
        num_choices = inputs.shape[1]
        flat = [
            x.flatten(0, 1) if x is not None else None
            for x in (input_ids, attention_mask, token_type_ids, inputs_embeds)
        ]
        outputs = self.model(*flat, **kwargs)
        logits = self.classifier(outputs.last_hidden_state).view(-1, num_choices)
        loss = None
        if labels is not None:
            check_labels(labels, (logits.shape[0],), "(batch,): the right choice of each row")
            loss = _cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "TupeForMaskedLM",
    "TupeForMultipleChoice",
    "TupeForPreTraining",
    "TupeForQuestionAnswering",
    "TupeForSequenceClassification",
    "TupeForTokenClassification",
    "TupeModel",
    "TupePreTrainedModel",
]
