"""Checkpoint files of the original programs, read without running code from them."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_original(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Read a checkpoint file: `.safetensors`, or a `.pt` as fairseq or plain torch writes it. Nothing of it is unpickled
    but tensors, plain containers and the `argparse.Namespace` of its arguments.

    Returns:
        `tuple[dict[str, Tensor], dict[str, Any]]`: the state dict, without the `module.` that data-parallel training
        puts before names, and the arguments of the training command, empty where the file has none.

    Raises:
        ValueError: the file holds something else; it is not opened with full unpickling instead.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path), {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} could not be read without running code from it ({error}). If you trust it, load it yourself and "
            "save its weights (the unique tensors of its 'model' entry, if it has one) as .safetensors."
        ) from error
    whole = content if isinstance(content, dict) else {}
    state_dict, arguments = whole.get("model", whole), whole.get("args")
    is_state_dict = isinstance(state_dict, dict) and all(isinstance(value, Tensor) for value in state_dict.values())
    if not state_dict or not is_state_dict:
        raise ValueError(f"{path} holds no state dict: expected tensors by name, or a 'model' entry with them.")
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    return state_dict, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
