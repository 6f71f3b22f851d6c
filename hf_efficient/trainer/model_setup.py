"""A new model for a training script: its tokenizer, its config, and a trial of the longest row."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.atomic_write import write_files
from ..utils.model_files import file_faults_named
from .arguments import PretrainingArguments, parse_overrides


logger = logging.getLogger(__name__)


def load_or_build_tokenizer(
    name: str | None, build: Callable[[], PreTrainedTokenizerBase], args: PretrainingArguments, resumed: bool
) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer by its name, or build one and keep it in `output_dir/tokenizer`.

    Args:
        name (`str`, *optional*): folder or Hub name; without it the tokenizer is built.
        build (`Callable`): makes the tokenizer, in the main process only.
        args (`PretrainingArguments`): arguments of the run.
        resumed (`bool`): whether a run goes on, whose tokenizer is then taken up from its folder.
    """
    if name is not None:
        return load_tokenizer(name)
    folder = Path(args.output_dir, "tokenizer")
    with args.main_process_first(desc="training the tokenizer"):
        kept = resumed and (folder / "tokenizer.json").is_file()
        if args.local_process_index == 0 and not kept:
            write_files(folder, build().save_pretrained)
    return load_tokenizer(folder)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer from a folder or the Hub.

    Raises:
        ValueError: if a file of the folder cannot be used; the message names it.
    """
    with file_faults_named(name):
        return AutoTokenizer.from_pretrained(name)


def published_fields(model_type: str, preset: str) -> dict[str, Any]:
    """
    Look up the fields of a published configuration, without its vocabulary, which a new tokenizer replaces.

    Args:
        model_type (`str`): a family of this package.
        preset (`str`): one of the names that the config's `presets()` lists.

    Raises:
        ValueError: if the kind of model has no presets, or none of that name.
    """
    config_class: Any = type(AutoConfig.for_model(model_type))
    if not hasattr(config_class, "preset_fields"):
        raise ValueError(f"{model_type} models have no presets (--preset): give --config, or --config_overrides.")
    fields = config_class.preset_fields(preset)
    if "adaptive_cutoffs" not in fields:  # which are cut to the vocabulary
        fields.pop("vocab_size", None)
    return fields


def _vocabulary_size(tokens: int, loss_sparsity: int) -> int:
    """Round the size of a vocabulary up to what an output layer of so many modules can share evenly."""
    size = tokens + -tokens % loss_sparsity
    if size != tokens:
        logger.info(
            "The vocabulary is rounded up from %d to %d ids, since the %d modules of the output layer (loss_sparsity) "
            "share it evenly; no text holds the others.",
            tokens,
            size,
            loss_sparsity,
        )
    return size


def build_config(
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    config: str | None = None,
    overrides: str | dict[str, Any] | None = None,
    preset: str | None = None,
) -> PreTrainedConfig:
    """
    Build the config of a new model with the special tokens and the vocabulary of its tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer; an override may ask for a larger vocabulary than it has,
            and with a `loss_sparsity` the model has the next multiple.
        model_type (`str`): kind of model, such as `"bert"`, where there is no `config`.
        config (`str`, *optional*): config file, folder or Hub name to start from.
        overrides (`str` or `dict`, *optional*): changes to the config, see [`parse_overrides`].
        preset (`str`, *optional*): published configuration to start from, in place of `config`.

    Raises:
        ValueError: if there are both a config and a preset, or there is no such preset, the config does not say its
            kind, or an override names a field that the config does not have, or a vocabulary that is too small.
    """
    if config is not None and preset is not None:
        raise ValueError("A preset is a whole configuration: give no --config beside it.")
    given: dict[str, Any] = {"model_type": model_type}
    if config is not None:
        with file_faults_named(config):
            given, _ = PreTrainedConfig.get_config_dict(config)
            AutoConfig.for_model(given.get("model_type", model_type))
        if "model_type" not in given:
            raise ValueError(f"The config {config} does not say its `model_type`.")
    model_type = given.pop("model_type")
    base = AutoConfig.for_model(model_type)
    fields = {**(published_fields(model_type, preset) if preset is not None else {}), **parse_overrides(overrides)}
    unknown = [name for name in fields if not hasattr(base, name)]
    if unknown:
        raise ValueError(f"A {model_type} config has no {', '.join(unknown)} (--config_overrides).")
    if "vocab_size" not in fields:
        fields["vocab_size"] = _vocabulary_size(len(tokenizer), {**given, **fields}.get("loss_sparsity") or 1)
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"vocab_size={fields['vocab_size']} (--config_overrides) has no room for the tokenizer's {len(tokenizer)} "
            "tokens. Leave it out, or give at least that many. (--vocab_size sets the size of a tokenizer to train.)"
        )
    for name in ("pad", "cls", "sep", "mask", "bos", "eos"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if name == "pad" and token_id == tokenizer.eos_token_id:
            token_id = None  # embeddings do not learn the row of the padding id
        if token_id is None and name in ("bos", "eos"):
            token_id = tokenizer.cls_token_id if name == "bos" else tokenizer.sep_token_id
            if getattr(base, f"{name}_token_id", None) is None:
                continue  # only replaces an id of another vocabulary
        if hasattr(base, f"{name}_token_id"):
            fields.setdefault(f"{name}_token_id", token_id)
    return AutoConfig.for_model(model_type, **{**given, **fields})


def check_block_size(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    block_size: int,
    option: str = "--block_size",
    target_length: int | None = None,
) -> None:
    """
    Run one full row through a model, so that a limit of it shows before training and not in the middle.

    Args:
        model (`PreTrainedModel`): the model, which is in evaluation mode afterwards.
        config (`PreTrainedConfig`): its config.
        block_size (`int`): tokens in the longest row.
        option (`str`, defaults to `"--block_size"`): how the command line calls that length, for the error.
        target_length (`int`, *optional*): tokens in the longest target of an encoder-decoder.

    Raises:
        ValueError: if the model can't take such a row.
    """
    first = next((i for i in (getattr(config, "cls_token_id", None), config.pad_token_id) if i is not None), 0)
    row = torch.full((1, block_size), (config.pad_token_id or 0) + 1, device=model.device) % config.vocab_size
    row[0, 0] = first
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if target_length is not None:
        inputs["labels"] = row[:, :1].expand(1, target_length)
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except (IndexError, RuntimeError, ValueError) as error:
        limit = getattr(config, "max_position_embeddings", None)
        targets = "" if target_length is None else f" with targets of {target_length}"
        raise ValueError(
            f"The model can't take rows of {block_size} tokens{targets} (its max_position_embeddings is {limit}). "
            f"Lower {option} or raise the limit, say --config_overrides "
            f"max_position_embeddings={2 * max(block_size, target_length or 0)}. It said: {error}"
        ) from error
