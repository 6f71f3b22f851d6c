"""Settings of the published SRU++ models."""

from typing import Any


_ENWIK8 = {"vocab_size": 205, "highway_bias": -2.0}
_WORDS = {
    "adaptive_embedding_size": 1024,
    "adaptive_divisor": 4,
    "tie_word_embeddings": True,
    "lm_head_bias": True,
}
_WIKITEXT = {
    **_WORDS,
    "vocab_size": 267_735,
    "adaptive_cutoffs": [19_997, 39_997, 199_997],
    "tie_adaptive_projections": True,
}
_BILLION = {
    **_WORDS,
    "vocab_size": 793_471,
    "adaptive_cutoffs": [59_998, 159_998],
    "tie_adaptive_projections": False,
}


def _rates(dropout: float, attention: float, embedding: float = 0.0) -> dict[str, float]:
    return {"dropout": dropout, "attention_dropout": attention, "embedding_dropout": embedding}


# Where the publications give no dropout, none is set. Sizes and rates: arXiv 2102.12459, section 4 and its code.
PRESETS: dict[str, dict[str, Any]] = {
    "enwik8-42m": {**_ENWIK8, **_rates(0.1, 0.1), "hidden_size": 1920, "projection_size": 480},
    "enwik8-base": {**_ENWIK8, **_rates(0.22, 0.22), "hidden_size": 3072, "projection_size": 768},
    "enwik8-base-k5": {
        **_ENWIK8,
        **_rates(0.22, 0.22),
        "hidden_size": 3072,
        "projection_size": 768,
        "attention_every_n_layers": 5,
    },
    "enwik8-large": {**_ENWIK8, **_rates(0.32, 0.32), "hidden_size": 4096, "projection_size": 1024},
    "enwik8-large-ratio8": {**_ENWIK8, "hidden_size": 6016, "projection_size": 752},
    "wikitext103-base": {**_WIKITEXT, **_rates(0.15, 0.15, 0.15), "hidden_size": 3072, "projection_size": 768},
    "wikitext103-large": {**_WIKITEXT, **_rates(0.2, 0.2, 0.2), "hidden_size": 4096, "projection_size": 1024},
    "wikitext103-large-ratio8": {**_WIKITEXT, "hidden_size": 5952, "projection_size": 744},
    "wikitext103-large-ratio8-k5": {
        **_WIKITEXT,
        "hidden_size": 5952,
        "projection_size": 744,
        "attention_every_n_layers": 5,
    },
    "billionword-base": {**_BILLION, **_rates(0.05, 0.0), "hidden_size": 4096, "projection_size": 1024},
    "billionword-large": {
        **_BILLION,
        **_rates(0.1, 0.0),
        "hidden_size": 7616,
        "projection_size": 1024,
        "attention_every_n_layers": 5,
    },
}


__all__ = ["PRESETS"]
