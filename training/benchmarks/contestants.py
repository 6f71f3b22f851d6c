"""The models that race: equal sizes, each with its objective. Another objective is one more entry of `CONTESTANTS`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from hf_efficient import TupeConfig, TupeForMaskedLM
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.ops.position_bias import relative_position_bucket


class RelativeBertModel(BertModel):
    """BERT whose self-attention also gets T5's relative bias, one table for all layers: the control that tells untying
    from relative positions. BERT adds a 4D mask to its logits, which is where the bias goes in."""

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
    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = RelativeBertModel(config, add_pooling_layer=False)
        self.post_init()


def sizes(layers: int, width: int) -> dict[str, Any]:
    """A BERT-shaped encoder: heads of 64, feed-forward four times as wide."""
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
    """transformers' BERT, by its fastest form of attention in training: on a CPU in bf16 that is the explicit one."""
    config = BertConfig(
        **_special_ids(tokenizer),
        **sizes(layers, width),
        max_position_embeddings=length,
        layer_norm_eps=1e-5,
        **overrides,
    )
    explicit = model_class is RelativeBertForMaskedLM or not torch.cuda.is_available()
    return model_class._from_config(config, attn_implementation="eager" if explicit else "sdpa")


def tupe(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, length: int, **overrides) -> TupeForMaskedLM:
    """TUPE-R, by the form of attention that it chooses itself."""
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


def _masked_lm(build: Callable[..., PreTrainedModel], **fixed) -> Callable[..., MaskedLMObjective]:
    def make(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, length: int) -> MaskedLMObjective:
        return MaskedLMObjective(model=build(tokenizer, layers, width, length, **NO_DROPOUT, **fixed))

    return make


# Name -> maker of the objective to train, from (tokenizer, layers, width, length).
CONTESTANTS: dict[str, Callable[..., MaskedLMObjective]] = {
    "bert": _masked_lm(bert),
    "bert_relative": _masked_lm(bert, model_class=RelativeBertForMaskedLM),
    "tupe_r": _masked_lm(tupe),
}
