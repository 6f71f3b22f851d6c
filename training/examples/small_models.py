"""Small models with random weights, and their tokenizers: what an example begins with where no folder is given.

They learn within seconds what is in front of them and know nothing else, so that an example shows how things are
done, offline and on any machine. For real work give it the folder of a model that `hf-efficient pretrain` or
`train-lm` trained.
"""

import argparse
from pathlib import Path
from typing import Any

import transformers

from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.tokenizers import seq2seq_tokenizer, train_tokenizer
from hf_efficient.trainer.model_setup import build_config
from hf_efficient.utils.process import OneLineErrorParser


TEXTS = (
    "The old dog sleeps by the warm fire.",
    "A small cat sits on the garden wall.",
    "The train leaves the station at noon.",
    "Rain fell on the city all night long.",
    "She paints boats in the quiet harbour.",
    "The judge read the law to the court.",
    "Fresh bread and soup are on the table.",
    "The team won the game in the last minute.",
)
LENGTH = 96  # the most tokens that any of them reads

_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
_SPARSE = {
    **_TRANSFORMER,
    "ff_sparsity": 8,
    "ff_rank": 4,
    "ff_sru_layers": 1,
    "attention_type": "multiplicative_conv",
    "attention_sparsity": 4,
    "lm_head_type": "multiplicative",
    "loss_sparsity": 4,
    "position_init_scale": 0.1,
    "dropout": 0.0,
    "activation_dropout": 0.0,
}
FIELDS: dict[str, dict[str, Any]] = {
    "tupe": {
        **_TRANSFORMER,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    },
    "srupp": {"hidden_size": 32, "projection_size": 16, "num_hidden_layers": 2, "dropout": 0.0},
    "scaling_transformer": {**_SPARSE, "num_hidden_layers": 2},
    "terraformer": {**_SPARSE, "num_encoder_layers": 1, "num_decoder_layers": 1},
}
# Terraformer without its encoder, which is Reformer's language model.
DECODER_ALONE = {"is_encoder_decoder": False, "num_encoder_layers": 0}


def small_tokenizer(family: str) -> Any:
    """Make a tokenizer of the kind that a family is trained with here: word pieces for an encoder, bytes for a language
    model, and byte pairs for an encoder-decoder."""
    if family == "tupe":
        return train_tokenizer(TEXTS, vocab_size=256, model_max_length=LENGTH)
    if family == "terraformer":
        return seq2seq_tokenizer(TEXTS, 320)
    return byte_tokenizer(eos_token="<eos>", pad_token="<pad>", model_max_length=LENGTH)


def small_model(family: str, auto_class: str, tokenizer: Any, **fields: Any) -> Any:
    """Make a model of a family with random weights, of the class that an Auto class of transformers gives."""
    if family == "terraformer" and auto_class == "AutoModelForCausalLM":
        fields = {**DECODER_ALONE, **fields}
    labels = {name: fields.pop(name) for name in ("num_labels", "id2label", "label2id") if name in fields}
    config: Any = build_config(tokenizer, family, overrides={**FIELDS[family], **fields})
    for name, value in labels.items():
        setattr(config, name, value)
    transformers.set_seed(0)
    return getattr(transformers, auto_class).from_config(config)


def load_or_make(folder: str | Path | None, family: str, auto_class: str, **fields: Any) -> tuple[Any, Any]:
    """
    Load a model and its tokenizer, or make small ones.

    Args:
        folder (`str` or `Path`, *optional*): a model that was trained before.
        family (`str`): `model_type` of the model that is made where there is no folder.
        auto_class (`str`): name of a class of transformers, such as `"AutoModelForCausalLM"`.
        fields (`Any`): changes to the config, such as `num_labels`, of either.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: model and tokenizer.
    """
    if folder is None:
        tokenizer = small_tokenizer(family)
        return small_model(family, auto_class, tokenizer, **fields), tokenizer
    model = getattr(transformers, auto_class).from_pretrained(folder, **fields)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def example_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make the command line of an example, whose docstring is its help, with a place for what it writes."""
    parser = OneLineErrorParser(
        prog=f"python -m training.examples.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="folder of a model; without it a small one is made at random")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    return parser
