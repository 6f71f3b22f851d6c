"""Tiny models of every head of every family in the registry's table, each with a float64 copy that is never fuzzed."""

import functools
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient.auto import FAMILIES
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective


MAX_LENGTH = 9
VOCABULARY = 23
FIRST_WORD = 3  # ids below are special: [CLS] 0, padding 1, [SEP] 2

_SRUPP = {"vocab_size": VOCABULARY, "hidden_size": 8, "projection_size": 6, "num_hidden_layers": 2}
_TUPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}
_SCALING = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "activation_dropout": 0.0,
}
_TERRAFORMER = {
    **{name: value for name, value in _SCALING.items() if name != "num_hidden_layers"},
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
_ALONE = {"is_encoder_decoder": False, "num_encoder_layers": 0, "num_decoder_layers": 2}
# Soft masks in training: what a hard one chooses is drawn.
_SPARSE = {
    "ff_sparsity": 3,
    "ff_rank": 2,
    "ff_hard_probability": 0.0,
    "attention_type": "multiplicative_conv",
    "attention_sparsity": 4,
}
# Config fields of the variants of each family. A family of the table that is missing here fails the test.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "srupp": {
        "two-heads": {**_SRUPP, "num_attention_heads": 2, "pad_token_id": 1},
        "one-head": {**_SRUPP, "attention_layers": [1], "tie_word_embeddings": True},
        "pre-norm": {**_SRUPP, "layer_norm": True, "embedding_size": 5, "attention_normalize_after": False},
        "plain-sru": {**_SRUPP, "projection_size": 0, "attention_layers": []},
        "adaptive": {**_SRUPP, "adaptive_cutoffs": [7, 15], "adaptive_embedding_size": 8, "adaptive_divisor": 2},
        "bidirectional": {**_SRUPP, "num_attention_heads": 2, "bidirectional": True, "pad_token_id": 1},
        "bidirectional-post-norm": {**_SRUPP, "bidirectional": True, "layer_norm": True, "normalize_after": True},
        "not-causal": {**_SRUPP, "is_causal": False, "recurrence_activation": "tanh"},
    },
    "tupe": {
        "relative": {**_TUPE},
        "absolute-pre-norm": {**_TUPE, "relative_attention": False, "normalize_before": True},
        "tied-cls": {**_TUPE, "untie_cls": False, "embedding_norm": False},
        "no-cls": {**_TUPE, "cls_token_id": None},
    },
    "scaling_transformer": {
        "dense": {**_SCALING, "pad_token_id": 1},
        "sparse-sru": {
            **_SCALING,
            **_SPARSE,
            "ff_sru_layers": 1,
            "ff_sru_units": 3,
            "lm_head_type": "multiplicative",
            "loss_sparsity": VOCABULARY,
        },
        "by-module-conv-fixed-base": {
            **_SCALING,
            **_SPARSE,
            "attention_value_input": "by_module",
            "attention_output": "conv",
            "position_embedding_type": "fixed_base",
        },
        "low-rank-head": {
            **_SCALING,
            "attention_type": "multiplicative_modular",
            "attention_sparsity": 2,
            "position_embedding_type": "none",
            "lm_head_type": "low_rank",
            "lm_head_rank": 4,
            "ff_sru_layers": 1,
        },
    },
}
VARIANTS["terraformer"] = {
    "dense": {**_TERRAFORMER, "pad_token_id": 1},
    "sparse-sru": {
        **_TERRAFORMER,
        **_SPARSE,
        "ff_sru_layers": 1,
        "ff_sru_units": 3,
        "lm_head_type": "multiplicative",
        "loss_sparsity": VOCABULARY,
    },
    "average-forgetting": {
        **_TERRAFORMER,
        "encoder_keeps_streams": False,
        "encoder_swaps": 1,
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "attentions_per_layer": 1,
        "forget_every": 1,
    },
    "cross-sparse": {
        **_TERRAFORMER,
        **_SPARSE,
        "decoder_type": "cross_attention",
        "attentions_per_layer": 1,
        "cross_query_type": "multiplicative_conv",
        "cross_query_sparsity": 4,
        "cross_output_type": "none",
    },
    "reformer": {**_TERRAFORMER, **_ALONE, "attentions_per_layer": 1, "stream_output": "concatenate"},
    "alone-sparse-sru": {**_TERRAFORMER, **_ALONE, **_SPARSE, "ff_sru_layers": 1, "ff_sru_units": 3},
}
# Read in front of every target that is drawn; sources themselves are drawn for heads that have no target.
SOURCE = (5, 7, 4, 9)
# `problem_type` and `num_labels` of heads that classify rows.
PROBLEMS: dict[str, tuple[str | None, int]] = {
    "classes": ("single_label_classification", 3),
    "number": ("regression", 1),
    "numbers": ("regression", 2),
    "several": ("multi_label_classification", 3),
    "inferred-classes": (None, 3),
    "inferred-number": (None, 1),
    "inferred-several": (None, 3),
}
ATTENTIONS = (None, "eager", "sdpa")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Pretraining objectives, which every family with a masked LM can be the encoder of.
OBJECTIVES = {
    "MaskedLMObjective": "objective",
    "ReplacedTokenObjective": "sampling objective",
    "MetaControllerObjective": "sampling objective",
}
# What heads call their task, by the ending of the class's name.
TASKS = {
    "Model": None,
    "ForCausalLM": "causal",
    "ForConditionalGeneration": "target",
    "ForMaskedLM": "masked",
    "ForPreTraining": "pretraining",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "answer",
    "ForMultipleChoice": "choice",
    **OBJECTIVES,
}


_OF_TARGETS = ("input_ids", "inputs_embeds", "attention_mask")


@dataclass(frozen=True)
class Key:
    """What a subject is built from."""

    family: str
    head: str
    variant: str
    problem: str | None
    attention: str | None
    dtype: torch.dtype

    @property
    def task(self) -> str | None:
        return next(task for ending, task in TASKS.items() if self.head.endswith(ending))

    @property
    def is_objective(self) -> bool:
        return self.head in OBJECTIVES

    @property
    def has_target(self) -> bool:
        """Whether the head reads a target behind a source."""
        return self.family == "terraformer" and self.task in (None, "target")


@dataclass
class Subject:
    """A model that is fuzzed, and a float64 one of the same weights that is not."""

    key: Key
    model: Any
    reference: Any
    canonical: dict[int, Tensor] = field(default_factory=dict)  # what the reference says of a plain call, by length

    @property
    def config(self) -> Any:
        """The config of the model or, of an objective, that of its encoder."""
        return (self.model.encoder if self.key.is_objective else self.model).config

    @property
    def embedding_width(self) -> int:
        return getattr(self.config, "embedding_size", None) or self.config.hidden_size

    def call(self, model: Any, **given: Any) -> Any:
        """Call a model with what was drawn, which of an encoder-decoder is a target, behind a source of its own."""
        if not self.key.has_target:
            return model(**given)
        renamed = {f"decoder_{name}" if name in _OF_TARGETS else name: value for name, value in given.items()}
        shapes = (
            value.shape[0] for name in _OF_TARGETS if isinstance(value := given.get(name), Tensor) and value.dim()
        )
        device = next(model.parameters()).device
        source = torch.tensor([SOURCE], device=device).expand(next(shapes, 1), -1)
        return model(input_ids=source, **renamed)

    def new_cache(self, config: Any, max_length: int | None = None) -> Any:
        """A cache for a model, static with a `max_length`."""

        def make(length: int) -> Any:
            if max_length is None:
                return DynamicCache(config=config)
            return StaticCache(config=config, max_cache_len=length)

        own = make(max_length or 0)
        return EncoderDecoderCache(own, make(len(SOURCE))) if self.key.has_target else own

    def renew(self) -> None:
        """Take a fresh model, after a call that may have damaged this one."""
        self.model = _model(self.key, self.reference)


def heads(family: str) -> list[str]:
    """Names of a family's model classes, each once, and of the objectives that pretrain it."""
    classes = FAMILIES[family].classes
    return [*sorted(set(classes.values())), *(OBJECTIVES if "AutoModelForMaskedLM" in classes else [])]


def fits(family: str, head: str, variant: str) -> bool:
    """Whether a head can be built on a variant: a causal LM must not see what it predicts, and a masked one must."""
    if family == "terraformer":
        return head.endswith("CausalLM") != VARIANTS[family][variant].get("is_encoder_decoder", True)
    if family != "srupp":
        return True
    causal = not {"bidirectional", "is_causal"} & set(VARIANTS[family][variant])
    return causal if head.endswith("CausalLM") else not (causal and head.endswith(("MaskedLM", "Objective")))


def draw_key(rng: random.Random, head: str | None = None) -> Key:
    """Draw what a subject is built from, for one head or for all heads of all families evenly."""
    everything = [(family, name) for family in FAMILIES for name in heads(family)]
    family, head = rng.choice([(family, name) for family, name in everything if head in (None, name)])
    variant = rng.choice([name for name in VARIANTS[family] if fits(family, head, name)])
    problem = rng.choice(list(PROBLEMS)) if head.endswith("SequenceClassification") else None
    dtype = rng.choices(DTYPES, weights=(8, 2, 1))[0]
    if "ff_sparsity" in VARIANTS[family][variant] and dtype == torch.bfloat16:
        dtype = torch.float32  # else what is before a controller is rounded, and it chooses other units
    return Key(family, head, variant, problem, rng.choice(ATTENTIONS), dtype)


def fields(key: Key) -> dict[str, Any]:
    """Fields of a subject's config."""
    extra: dict[str, Any] = {}
    if key.problem is not None:
        problem_type, num_labels = PROBLEMS[key.problem]
        extra = {"problem_type": problem_type, "num_labels": num_labels}
    elif key.task == "token":
        extra = {"num_labels": 3}
    return {**VARIANTS[key.family][key.variant], **extra}


@functools.cache
def _reference(family: str, head: str, variant: str, problem: str | None) -> Any:
    """A float64 model in eager form. All weights are drawn anew, so that no part is too small to be seen."""
    key = Key(family, head, variant, problem, "eager", torch.float64)
    reference = _new(key).double().eval()
    if family == "terraformer":
        reference.config.reversible = False  # ordinary autograd, which minds no change between train and eval
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            mean = 1.0 if "norm.weight" in name or "alpha" in name else 0.0
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 + mean
            parameter.copy_(drawn.bfloat16())  # the same in all dtypes
    return reference


def _new(key: Key) -> Any:
    family: Any = FAMILIES[key.family]
    config = family.load(family.config)(**fields(key))
    wrapped = {"MaskedLMObjective": "AutoModelForMaskedLM"}.get(key.head, "AutoModel")
    name = family.classes[wrapped] if key.is_objective else key.head
    model = family.load(name)._from_config(config, attn_implementation=key.attention)
    if key.head == "MaskedLMObjective":
        return MaskedLMObjective(model=model)
    if key.head == "ReplacedTokenObjective":
        return ReplacedTokenObjective(encoder=model, generator_divider=2)
    if key.head == "MetaControllerObjective":
        return MetaControllerObjective(encoder=model, generator_divider=2, nota_token_id=2, num_candidates=3)
    return model


def _model(key: Key, reference: Any) -> Any:
    model = _new(key).to(key.dtype).eval()
    model.load_state_dict(reference.state_dict())
    return model


@functools.cache
def build(key: Key) -> Subject:
    """Build a subject, once in a process."""
    reference = _reference(key.family, key.head, key.variant, key.problem)
    return Subject(key, _model(key, reference), reference)
