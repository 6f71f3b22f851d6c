"""Faults in the files of models, tokenizers and checkpoints: one sentence each, and no code of theirs is run."""

import argparse
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_pt_utils import safe_globals


PICKLES = (".bin", ".pt", ".pth")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # plain, and in the archive that torch writes
_OF_MODELS = ("config.json", "generation_config.json", "model*.index.json", "model*.safetensors", "adapter_*")
_OF_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
_PICKLED_MODELS = ("pytorch_model*.index.json", "pytorch_model*.bin")


class ModelFileError(ValueError):
    """A file of a model, a tokenizer or a checkpoint cannot be used; the message names it and says what to do."""


def error_line(error: Exception) -> str:
    """The gist of an error's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    # Of torch's page on weights_only the sentence that says what was met, without the advice to switch it off
    text = text.rpartition("WeightsUnpickler error: ")[2].rpartition("from a trusted source. ")[2]
    text = text.partition(" Please ")[0].partition(" Check the doc")[0]
    return text if len(text) <= 160 else f"{text[:160].rsplit(' ', 1)[0]} ..."


def load_pickle(path: Path) -> Any:
    """
    Read a pickle of tensors, plain values, the random states of numpy, and arguments of `argparse`; run no code of it.

    Raises:
        pickle.UnpicklingError: if it holds anything else.
    """
    with warnings.catch_warnings(), safe_globals(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # on the protocol of a pickle that is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def pickle_damage(path: Path, error: Exception) -> str | None:
    """
    Say that a file which [`load_pickle`] failed on is empty, or damaged or cut off.

    Args:
        path (`Path`): the file.
        error (`Exception`): what was raised.

    Returns:
        `str` or `None`: a predicate such as "is empty"; `None` for a file that is read and holds what is not unpickled.
    """
    if path.stat().st_size == 0:
        return "is empty"
    if isinstance(error, pickle.UnpicklingError) and "truncated" not in str(error):
        return None
    return f"is damaged or cut off ({error_line(error)})"


@contextmanager
def file_faults_named(folder: str | Path) -> Iterator[None]:
    """
    Let an error that comes from a fault in a local folder's files name the file and say what to do.

    The files are looked at only when something has failed. Errors that no file explains pass; where there is no such
    folder, and no model of the name comes from the Hub, the error says both.

    Args:
        folder (`str` or `Path`): the argument of `from_pretrained`.

    Raises:
        ModelFileError: in place of any error, if [`find_fault`] finds a fault; of an `OSError` or a `ValueError`, if
            the folder does not exist.
    """
    try:
        yield
    except ModelFileError:
        raise
    except Exception as error:
        fault = find_fault(folder)
        if fault is not None:
            raise ModelFileError(fault) from error
        # A name that no repository can have raises `HFValidationError`, which is a `ValueError`.
        if isinstance(error, OSError | ValueError) and not Path(folder).exists():
            raise ModelFileError(
                f"There is no folder {str(folder)!r}, and the Hub gave no model of that name ({error_line(error)})"
            ) from error
        raise


def find_fault(folder: str | Path) -> str | None:
    """
    Look for a fault in the files of a model or a tokenizer.

    Args:
        folder (`str` or `Path`): a folder, or a config's own file; what is neither has no fault.

    Returns:
        `str` or `None`: the first fault found, with the file's name and what to do.
    """
    folder = Path(folder)
    if folder.is_file():
        of_a_folder = f"{folder} is a file: give the folder that save_pretrained wrote."
        return file_fault(folder) if folder.suffix == ".json" else of_a_folder
    if not folder.is_dir():
        return None
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror}): change its permissions, or name another folder."
    # Pickled weights are read only where there are no others
    pickled = () if any(name.endswith(".safetensors") for name in names) else _PICKLED_MODELS
    for pattern in (*_OF_MODELS, *pickled, *_OF_TOKENIZERS):
        for path in sorted(folder.glob(pattern)):
            if (fault := file_fault(path)) is not None:
                return fault
    if not names & {"config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"}:
        return f"{folder} has no config.json. {_models_below(folder)}"
    return None


def _models_below(folder: Path) -> str:
    found = [path.parent for path in (*folder.glob("*/config.json"), *folder.glob("*/*/config.json"))]
    if not found:
        return "Give the folder that save_pretrained or Trainer wrote."
    newest = max(found, key=lambda path: (path / "config.json").stat().st_mtime)
    if len(found) == 1:
        return f"The model in it is {newest}: give that folder."
    return f"Of the {len(found)} models in it the newest is {newest}: give the folder of the one that you mean."


def file_fault(path: Path, remedy: str | None = None) -> str | None:
    """
    Look for a fault in one file, by the kind that its name says: JSON, safetensors, or a pickle of tensors.

    Args:
        path (`Path`): the file.
        remedy (`str`, *optional*): a sentence that says what to do, in place of the one that goes with the fault.

    Returns:
        `str` or `None`: the fault, with the file's name and what to do.
    """
    checks = {".json": _json_fault, ".safetensors": _safetensors_fault, **dict.fromkeys(PICKLES, _pickle_fault)}
    found: tuple[str, str] | None
    try:
        if path.is_dir():
            found = "is a folder, and should be a file", "Remove it, and write the file again."
        else:
            found = checks[path.suffix](path) if path.suffix in checks else None
    except OSError as error:
        found = f"cannot be read ({error.strerror})", "Change its permissions, or write it again."
    return None if found is None else f"{path} {found[0]}. {remedy or found[1]}"


_AGAIN = "Write the file again, or take it from another copy of the folder."


def _json_fault(path: Path) -> tuple[str, str] | None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        return f"is not valid JSON ({error_line(error)})", _AGAIN
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__} and no JSON object", _AGAIN
    if path.name.endswith(".index.json"):
        return _index_fault(path.parent, content)
    try:
        if path.name == "config.json":
            return _config_fault(content)
        if path.name == "tokenizer.json":
            PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # whatever these files hold, the classes that read them say what is wrong
        return f"cannot be used ({error_line(error)})", _AGAIN
    return None


def _config_fault(content: dict[str, Any]) -> tuple[str, str] | None:
    model_type = content.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        unknown = f"names the model type {model_type!r}, which neither transformers nor hf_efficient knows"
        own_code = "Code that comes with a model is not run here: use the program that it was made for."
        return unknown, own_code if "auto_map" in content else "Correct it, or name the folder of another model."
    AutoConfig.for_model(model_type, **content)
    return None


def _index_fault(folder: Path, content: dict[str, Any]) -> tuple[str, str] | None:
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        return "has no weight_map from names of tensors to files", "Save the model again."
    missing = sorted(name for name in set(shards.values()) if not (folder / name).is_file())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return f"names {', '.join(missing[:3])}{more}, which the folder lacks", "Copy or save the whole model again."
    return None


def _safetensors_fault(path: Path) -> tuple[str, str] | None:
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(_PICKLE_STARTS) and not start.endswith(b"{"):  # the header's length may start alike
            return (
                "is a pickle under the name of a safetensors file, and is not opened",
                "If you trust it, load it yourself and save its tensors by safetensors.torch.save_file.",
            )
        return f"is damaged, or no safetensors file ({error_line(error)})", "Copy or save it again."
    return None


def _pickle_fault(path: Path) -> tuple[str, str] | None:
    try:
        load_pickle(path)
    except OSError:
        raise
    except Exception as error:
        if (damage := pickle_damage(path, error)) is not None:
            return damage, "Copy or save it again."
        return (
            "is damaged, or holds more than tensors and plain values, which is not unpickled since it could run code "
            f"({error_line(error)})",
            "If you trust it, load it yourself and save its tensors as .safetensors.",
        )
    return None
