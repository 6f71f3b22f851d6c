"""Tiny models of both families, of the same width and vocabulary."""

import torch

from hf_efficient import SruppConfig, TupeConfig


SRUPP = {"vocab_size": 41, "hidden_size": 18, "projection_size": 10, "num_hidden_layers": 3, "num_attention_heads": 2}
TUPE = {
    **{"vocab_size": 41, "hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 21},
    **{"max_position_embeddings": 70, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def make(cls, attention=None, **fields):
    """A model in eval mode, all of whose weights are large enough to be seen in its output."""
    torch.manual_seed(0)
    config = TupeConfig(**{**TUPE, **fields}) if "Tupe" in cls.__name__ else SruppConfig(**{**SRUPP, **fields})
    model = cls._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name or "alpha" in name else 0.0, 0.35)
    return model
