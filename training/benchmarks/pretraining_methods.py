"""Pretraining methods to compare: encoders of equal size, each with an objective. `METHODS` is the list."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_efficient import TupeConfig, TupeForMaskedLM
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteSettings
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.ops.position_bias import relative_position_bucket
from training.pretrain import NOTA_TOKEN


class RelativeBertConfig(BertConfig):
    """Config with a type of its own, so that a saved model is not taken for BERT."""

    model_type = "relative_bert"


class RelativeBertModel(BertModel):
    """BERT whose self-attention also gets T5's relative bias, one table for all layers: the control that tells untying
    from relative positions. BERT adds a 4D mask to its logits, which is where the bias goes in."""

    config_class = RelativeBertConfig
    num_buckets, max_distance = 32, 128

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_attention_heads)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        buckets = relative_position_bucket(places[None, :] - places[:, None], self.num_buckets, self.max_distance)
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)  # (1, H, T, T)
        if attention_mask is not None:
            padded = attention_mask[:, None, None, :] == 0
            bias = bias.masked_fill(padded, torch.finfo(bias.dtype).min)
        return super().forward(input_ids, attention_mask=bias, **kwargs)


class RelativeBertForMaskedLM(BertForMaskedLM):
    config_class = RelativeBertConfig

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = RelativeBertModel(config, add_pooling_layer=False)
        self.post_init()


class RelativeBertForSequenceClassification(BertForSequenceClassification):
    config_class = RelativeBertConfig

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = RelativeBertModel(config)
        self.post_init()


AutoConfig.register(RelativeBertConfig.model_type, RelativeBertConfig)
AutoModel.register(RelativeBertConfig, RelativeBertModel)
AutoModelForSequenceClassification.register(RelativeBertConfig, RelativeBertForSequenceClassification)


def sizes(layers: int, width: int) -> dict[str, Any]:
    """Sizes of a BERT-shaped encoder: heads of 64, feed-forward four times as wide."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}


def bert(
    tokenizer: PreTrainedTokenizerBase,
    layers: int,
    width: int,
    length: int,
    model_class: type[BertForMaskedLM] = BertForMaskedLM,
    **overrides,
) -> BertForMaskedLM:
    """Build transformers' BERT with its fastest form of attention in training, on a CPU in bf16 the explicit one."""
    config_class = RelativeBertConfig if model_class is RelativeBertForMaskedLM else BertConfig
    config = config_class(
        **_special_ids(tokenizer),
        **sizes(layers, width),
        max_position_embeddings=length,
        layer_norm_eps=1e-5,
        **overrides,
    )
    explicit = model_class is RelativeBertForMaskedLM or not torch.cuda.is_available()
    return model_class._from_config(config, attn_implementation="eager" if explicit else "sdpa")


def tupe(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, length: int, **overrides) -> TupeForMaskedLM:
    """Build TUPE-R with the form of attention that it chooses itself."""
    config = TupeConfig(
        **_special_ids(tokenizer),
        **sizes(layers, width),
        max_position_embeddings=length,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        mask_token_id=tokenizer.mask_token_id,
        **overrides,
    )
    return TupeForMaskedLM(config)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _masked_lm(encoder: Callable[..., PreTrainedModel], **fixed) -> Callable[..., PreTrainedModel]:
    def make(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, length: int) -> PreTrainedModel:
        return MaskedLMObjective(model=encoder(tokenizer, layers, width, length, **NO_DROPOUT, **fixed))

    return make


def _replaced_token(**options) -> Callable[..., PreTrainedModel]:
    def make(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, length: int) -> PreTrainedModel:
        model = tupe(tokenizer, layers, width, length, **NO_DROPOUT)
        return ReplacedTokenObjective(encoder=model.base_model, **options)

    return make


def _meta_controller(**options) -> Callable[..., PreTrainedModel]:
    def make(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, length: int) -> PreTrainedModel:
        model = tupe(tokenizer, layers, width, length, **NO_DROPOUT)
        nota = tokenizer.convert_tokens_to_ids(NOTA_TOKEN)
        return MetaControllerObjective(encoder=model.base_model, nota_token_id=nota, **options)

    return make


@dataclass(frozen=True)
class Method:
    """
    A way to pretrain an encoder.

    Args:
        title (`str`): for tables and pictures.
        make (`Callable`): the objective to train, from (tokenizer, layers, width, length).
        notes (`NoteSettings`): how it keeps notes on rare words, if it does.
        extra_tokens (`tuple`): special tokens that its objective needs besides.
        all_masked (`bool`): all targets are hidden, for a generator to fill in; else 80 % of them are.
        train_config (`dict`): hyperparameters that differ from those of the comparison.
    """

    title: str
    make: Callable[..., PreTrainedModel]
    notes: NoteSettings | None = None
    extra_tokens: tuple[str, ...] = ()
    all_masked: bool = False
    train_config: dict[str, Any] = field(default_factory=dict)


# Notes are read once the plateau of the first steps is behind, at the norm of what they are mixed with.
_NOTES = NoteSettings(start_step=1_000, scale_to_tokens=True)
# Learning rates at which nothing collapses. A discriminator stays blind for very long if its encoder starts from random
# weights, so that one starts as a masked LM; see training/LOG.md.
_REPLACED = Method(
    "TUPE-R, masked LM, then replaced tokens",
    _replaced_token(stage_one="masked_lm", discriminator_start_loss=5.95, initial_replaced_fraction=0.14),
    all_masked=True,
    train_config={"learning_rate": 6e-4, "warmup": 0.02},
)
_CONTROLLED = Method(
    "TUPE-R, meta-controller",
    _meta_controller(loss_weight=20.0),
    extra_tokens=(NOTA_TOKEN,),
    all_masked=True,
    train_config={"learning_rate": 4e-4},
)

METHODS = {
    "bert": Method("BERT", _masked_lm(bert)),
    "bert_relative": Method("BERT with T5's relative bias", _masked_lm(bert, model_class=RelativeBertForMaskedLM)),
    "tupe_r": Method("TUPE-R", _masked_lm(tupe)),
    "tupe_notes": Method("TUPE-R, notes", _masked_lm(tupe), notes=_NOTES),
    "tupe_rtd": _REPLACED,
    "tupe_mc": _CONTROLLED,
    "tupe_mc_notes": replace(_CONTROLLED, title="TUPE-R, meta-controller, notes", notes=_NOTES),
}
