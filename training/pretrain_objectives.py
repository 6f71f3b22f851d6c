"""What `pretrain.py` can learn: how each objective is built around an encoder, and the batches that it takes."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pretrain_args import PretrainingArguments, PretrainingSettings
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from hf_efficient.data.rare_words import RareWords
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, RareWordCollator, attach
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.trainer.arguments import parse_overrides


logger = logging.getLogger(__name__)

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
    given = {name: getattr(settings, name) for name in ("mask_replace_prob", "random_replace_prob", "bernoulli")}
    options = {**options, **{name: value for name, value in given.items() if value is not None}}
    collator = MaskingCollator(
        tokenizer,
        mlm_probability=settings.mlm_probability,
        whole_word_mask=settings.whole_word_mask,
        mask_special_tokens=settings.mask_special_tokens,
        seed=seed,
        **options,
    )
    return {"collator": collator, "eval_collator": collator.with_seed(EVAL_MASK_SEED)}


# For objectives that replace what is masked: every target is hidden, and samples belong to a row.
ALL_MASKED = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0, "sample_seeds": True}
# Presets that mask otherwise; the paper of MC-BERT does so as BERT does.
PRESET_MASKING = {
    ("meta_controller", "paper"): {
        "mask_replace_prob": 0.8,
        "random_replace_prob": 0.1,
        "bernoulli": True,
        "sample_seeds": True,
    }
}


def build_mlm(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int
) -> Objective:
    """Masked language modelling: 80 % mask, 10 % random, 10 % kept."""
    if settings.objective_overrides:
        raise ValueError("mlm has no options (--objective_overrides).")
    model = MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config, dtype=torch.float32))
    return Objective(model, "model", **_collators(settings, tokenizer, seed), callbacks=model.callbacks())


def _build_discriminator(
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
    fields = {
        "target_fraction": settings.mlm_probability,
        "encoder_config": encoder.config.to_dict(),
        **given,
        **fields,
    }
    model = objective(make(**fields), encoder)
    masking = PRESET_MASKING.get((settings.objective, preset), ALL_MASKED)
    return Objective(model, "encoder", **_collators(settings, tokenizer, seed, **masking), callbacks=model.callbacks())


def build_replaced_token(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int
) -> Objective:
    """
    ELECTRA: which tokens did a small generator replace? All targets are masked, as in the released baseline.

    Such a discriminator stays blind for very long if its encoder starts from random weights. So without a preset or a
    stage one of its own, the encoder is a masked LM for a third of the run (if its embeddings are as wide as its
    states).
    """
    fields = parse_overrides(settings.objective_overrides)
    given: dict[str, Any] = {}
    one_width = getattr(config, "embedding_size", config.hidden_size) == config.hidden_size
    if one_width and not {"preset", "stage_one", "discriminator_start_step", "discriminator_start_loss"} & set(fields):
        share = round(0.95 * settings.mlm_probability, 4)  # the generator is seldom right
        given = {"stage_one": "masked_lm", "discriminator_start_step": steps // 3, "initial_replaced_fraction": share}
        logger.info(
            "For the first %d of %d steps the encoder is a masked language model, since a discriminator that starts "
            "from random weights stays blind for long. As ELECTRA's authors do: --objective_overrides preset=electra",
            *(steps // 3, steps),
        )
    return _build_discriminator(ReplacedTokenObjective, settings, config, tokenizer, seed, **given)


def build_meta_controller(
    settings: PretrainingSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int
) -> Objective:
    """MC-BERT: which of K candidates, or none of them, belongs here? All targets are masked."""
    nota_token_id = tokenizer.convert_tokens_to_ids(NOTA_TOKEN)
    return _build_discriminator(MetaControllerObjective, settings, config, tokenizer, seed, nota_token_id=nota_token_id)


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
    objective.eval_collator = RareWordCollator(objective.eval_collator, words.keys)


def check_settings(settings: PretrainingSettings, args: PretrainingArguments) -> None:
    """
    What can be refused before anything is read.

    Raises:
        ValueError: for an unknown objective, or settings that do not go together.
        FileNotFoundError: if the file of rare words is missing.
    """
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, not {settings.objective!r}.")
    if settings.notes is not None:
        if not settings.tokenizer:
            raise ValueError("Notes need the tokenizer that their words were counted with: give --tokenizer.")
        if not Path(settings.notes).is_file():
            raise FileNotFoundError(
                f"There is no file {settings.notes} (--notes): make it by training/count_rare_words.py."
            )
    by_loss = args.load_best_model_at_end and args.metric_for_best_model in (None, "loss", "eval_loss")
    if by_loss and settings.objective != "mlm":
        raise ValueError(
            "The loss rises when a discriminator joins after a first stage, so it does not tell the best checkpoint: "
            "give --metric_for_best_model discriminator_loss, or leave out --load_best_model_at_end."
        )


def build_objective(
    settings: PretrainingSettings,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    steps: int,
) -> Objective:
    """
    The objective that the settings name, around a new encoder, for a run of so many `steps`.

    Raises:
        ValueError: for options that it does not have, or an encoder that it can't train.
    """
    treats_cls_apart = config.model_type == "tupe" and config.cls_token_id is not None
    if settings.mask_special_tokens and treats_cls_apart:
        raise ValueError(
            "TUPE treats [CLS] apart, which --mask_special_tokens would hide: add --config_overrides cls_token_id=null."
        )
    objective = OBJECTIVES[settings.objective](settings, config, tokenizer, seed, steps)
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
