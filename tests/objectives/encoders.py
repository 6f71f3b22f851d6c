"""Tiny encoders of every architecture that the objectives are for, and a batch for them."""

import torch
from transformers import AutoModel, BertConfig, ElectraConfig, ModernBertConfig, RobertaConfig

import hf_efficient


VOCAB = 57
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
SRUPP = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, **BERT_DROPOUT, pad_token_id=1),
    "roberta": lambda: RobertaConfig(**SIZES, **BERT_DROPOUT),
    "electra": lambda: ElectraConfig(**SIZES, **BERT_DROPOUT, embedding_size=10, pad_token_id=1),
    "modernbert": lambda: ModernBertConfig(**SIZES, **MODERN),
    "tupe": lambda: hf_efficient.TupeConfig(**SIZES, **BERT_DROPOUT),
    "srupp": lambda: hf_efficient.SruppConfig(**SRUPP, projection_size=12, bidirectional=True, pad_token_id=1),
}


def perturb(module, size=0.1):
    """Move every weight, so that none is an uninformative 0 or 1."""
    for parameter in module.parameters():
        parameter.data.add_(size * torch.randn_like(parameter))
    return module


def make_encoder(name, **overrides):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.update(overrides)
    return perturb(AutoModel.from_config(config))


def make_batch(batch=3, length=11, padding=4):
    """Masked rows of which the second ends in padding, with targets that were masked, replaced and kept."""
    torch.manual_seed(1)
    original = torch.randint(5, VOCAB, (batch, length))
    original[:, 0] = 0
    mask = torch.ones_like(original)
    if batch > 1 and length > padding:
        mask[1, length - padding :] = 0
    original = torch.where(mask.bool(), original, 1)
    target = (torch.rand(original.shape) < 0.4) & mask.bool()
    target[:, 0] = length == 1
    action = torch.rand(original.shape)
    hidden = torch.where(action < 0.8, 4, torch.where(action < 0.9, torch.randint(5, VOCAB, original.shape), original))
    return {
        "input_ids": torch.where(target, hidden, original) if length > 1 else original,
        "attention_mask": mask,
        "labels": torch.where(target, original, -100),
        "sample_seeds": torch.arange(100, 100 + batch),
    }
