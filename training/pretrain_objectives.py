"""What `pretrain.py` can learn: how each objective is built around an encoder, and the batches that it takes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from command_line import parse_overrides
from pretrain_args import PretrainingSettings
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from hf_efficient.data.rare_words import RareWordCollator, RareWords
from hf_efficient.objectives.collapse import CollapseWatch
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, attach
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective


# Runs with other seeds are measured on the same masks.
EVAL_MASK_SEED = 1
NOTA_TOKEN = "[NOTA]"  # none of the above: the meta-controller's reject option


@dataclass
class Objective:
    """
    What an objective brings to a run.

    Args:
        model (`PreTrainedModel`): computes the loss; saved whole in checkpoints.
        product_name (`str`): the attribute of `model` that people load afterwards.
        collator, eval_collator (`Callable`): make its batches.
        callbacks (`list[TrainerCallback]`): what it asks of the trainer.
    """

    model: PreTrainedModel
    product_name: str
    collator: Any
    eval_collator: Any
    callbacks: list[TrainerCallback] = field(default_factory=list)

    @property
    def product(self) -> PreTrainedModel:
        return getattr(self.model, self.product_name)


def _collators(
    settings: PretrainingSettings, tokenizer: PreTrainedTokenizerBase, seed: int, **options: Any
) -> dict[str, MaskingCollator]:
    """`options` are the objective's own; the settings come before them."""
    shares = {"mask_share": settings.mask_share, "random_share": settings.random_share}
    options |= {name: share for name, share in shares.items() if share is not None}
    collator = MaskingCollator(
        tokenizer,
        probability=settings.mask_probability,
        whole_word=settings.whole_word,
        mask_special_tokens=settings.mask_special_tokens,
        seed=seed,
        **options,
    )
    return {"collator": collator, "eval_collator": collator.with_seed(EVAL_MASK_SEED)}


# For objectives that replace what is masked: every target is hidden, and samples belong to a row.
ALL_MASKED = {"mask_share": 1.0, "random_share": 0.0, "draw_seeds": True}


def build_mlm(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Objective:
    """Masked language modelling: 80 % mask, 10 % random, 10 % kept."""
    if settings.objective_overrides:
        raise ValueError("mlm has no options (--objective_overrides).")
    model = MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config, dtype=torch.float32))
    return Objective(model, "model", **_collators(settings, tokenizer, seed), callbacks=[CollapseWatch()])


def _build_detector(
    objective: Any,
    settings: PretrainingSettings,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    **given: Any,
) -> Objective:
    """An objective with a generator, by what `--objective_overrides` says: a preset, and changes to it."""
    fields = parse_overrides(settings.objective_overrides)
    preset = fields.pop("preset", None)
    config_class: Any = objective.config_class
    unknown = sorted(set(fields) - {known.name for known in dataclasses.fields(config_class)})
    if unknown:
        raise ValueError(f"{settings.objective} has no option {', '.join(unknown)} (--objective_overrides).")
    make = config_class if preset is None else functools.partial(config_class.preset, preset)
    encoder = AutoModel.from_config(config, dtype=torch.float32)
    fields = {"target_share": settings.mask_probability, "encoder_config": encoder.config.to_dict(), **given, **fields}
    model = objective(make(**fields), encoder)
    collators = _collators(settings, tokenizer, seed, **ALL_MASKED)
    return Objective(model, "encoder", **collators, callbacks=model.callbacks())


def build_replaced_token(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Objective:
    """ELECTRA: which tokens did a small generator replace? All targets are masked, as in the released baseline."""
    return _build_detector(ReplacedTokenObjective, settings, config, tokenizer, seed)


def build_meta_controller(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Objective:
    """MC-BERT: which of K candidates, or none of them, belongs here? All targets are masked."""
    nota_token_id = tokenizer.convert_tokens_to_ids(NOTA_TOKEN)
    return _build_detector(MetaControllerObjective, settings, config, tokenizer, seed, nota_token_id=nota_token_id)


def add_notes(objective: Objective, settings: PretrainingSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Notes on the rare words of `settings.notes` (TNF), whatever the objective."""
    words = RareWords.load(str(settings.notes), tokenizer)
    fields = parse_overrides(settings.notes_overrides)
    unknown = set(fields) - {known.name for known in dataclasses.fields(NoteSettings)}
    if unknown:
        raise ValueError(f"Notes have no option {', '.join(sorted(unknown))} (--notes_overrides).")
    encoder: Any = objective.model.encoder
    notes = NoteDictionary(words.keys, encoder.config.hidden_size, NoteSettings(**fields))
    objective.callbacks.append(attach(objective.model, notes))
    objective.collator = RareWordCollator(objective.collator, words.keys)
    objective.collator.tokenizer = tokenizer  # where Trainer looks for what it saves in checkpoints
    objective.eval_collator = RareWordCollator(objective.eval_collator, words.keys)


def build_objective(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Objective:
    """
    The objective that the settings name, around a new encoder.

    Raises:
        ValueError: for options that it does not have, or an encoder that it can't train.
    """
    objective = OBJECTIVES[settings.objective](settings, config, tokenizer, seed)
    if settings.notes is not None:
        add_notes(objective, settings, tokenizer)
    return objective


def add_special_tokens(settings: PretrainingSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """What an objective needs and a tokenizer may lack."""
    add_extra_tokens(tokenizer, EXTRA_TOKENS.get(settings.objective, ()))


def add_extra_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Tokens that are special: never a target, never drawn as a random one."""
    missing = [token for token in tokens if token not in tokenizer.all_special_tokens]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "mlm": build_mlm,
    "replaced_token": build_replaced_token,
    "meta_controller": build_meta_controller,
}
# Special tokens that an objective adds to any tokenizer.
EXTRA_TOKENS = {"meta_controller": [NOTA_TOKEN]}
