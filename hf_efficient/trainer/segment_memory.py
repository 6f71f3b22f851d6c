"""Memory that a model carries from one segment of a text to the next: detecting, detaching, saving and loading it.

No model is imported. A model has a memory if it takes `memory` and `return_memory` and returns `output.memory`: named
tuples and tuples of tensors and None, with the batch as the first dimension of every tensor.
"""

import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


logger = logging.getLogger(__name__)

_FILE_NAME = "segment_memory-{:05d}-of-{:05d}.safetensors"
_FILE_PATTERN = re.compile(r"^segment_memory-(\d+)-of-(\d+)\.safetensors$")


def takes(model: nn.Module, *arguments: str) -> bool:
    """Return whether the forward pass of the model, unwrapped if need be, names all these arguments."""
    return any(set(arguments) <= set(inspect.signature(module.forward).parameters) for module in model.modules())


def takes_memory(model: nn.Module) -> bool:
    """Tell whether the model can carry memory from segment to segment."""
    return takes(model, "memory", "return_memory")


def _map(function: Callable[[str, Tensor | None], Tensor | None], memory: Any, name: str) -> Any:
    """The same structure with `function(name, tensor)` in place of each tensor or None."""
    if hasattr(memory, "_fields"):
        values = [_map(function, value, f"{name}.{field}") for field, value in zip(memory._fields, memory, strict=True)]
        return type(memory)(*values)
    if isinstance(memory, tuple):
        return tuple(_map(function, value, f"{name}.{index}") for index, value in enumerate(memory))
    return function(name, memory)


def detach(memory: Any) -> Any:
    """The same values without their history, and in the layout in which they would be read from a file."""
    return _map(lambda _, tensor: None if tensor is None else tensor.detach().contiguous(), memory, "memory")


def save_memory(memory: Any, folder: str, process: int, processes: int) -> None:
    """Write the memory of one process to a file of its own in `folder`."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            tensors[name] = tensor.detach().cpu().clone()

    _map(keep, memory, "memory")
    save_file(tensors, str(Path(folder) / _FILE_NAME.format(process, processes)))


def load_memory(template: Any, folder: str, rows: int, process: int, processes: int) -> Any | None:
    """
    Load the memory that `save_memory` wrote, for the same columns of text. The number of processes among which they are
    divided may have changed, if all files can be read.

    Args:
        template: any memory of the model; gives the structure and the device.
        folder (`str`): the checkpoint.
        rows (`int`): columns of one process.
        process (`int`): which process this is.
        processes (`int`): of how many.

    Returns:
        The memory of this process; `None`, with a warning, if the folder holds none.

    Raises:
        ValueError: if the memory is of another number of columns, or files of some processes are missing.
    """
    from safetensors.torch import load_file

    matches = [match for path in sorted(Path(folder).iterdir()) if (match := _FILE_PATTERN.match(path.name))]
    if not matches:
        logger.warning("The checkpoint %s holds no memory of the text before: it starts empty.", folder)
        return None
    own = Path(folder) / _FILE_NAME.format(process, processes)
    saved = int(matches[0][2])
    same = own.is_file()
    if not same and len(matches) != saved:
        raise ValueError(f"{folder} holds the memory of {len(matches)} of {saved} processes; all are needed here.")
    parts = [load_file(path) for path in ([own] if same else [Path(folder) / match[0] for match in matches])]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = next(iter(tensors.values())).shape[0]
    wanted = rows if same else rows * processes
    if found != wanted:
        raise ValueError(
            f"{folder} holds the memory of {found} columns of text, but here are {wanted}. Resume with the same rows a "
            "step (batch size times number of processes), or start anew."
        )
    device = next(tensor.device for tensor in _tensors(template))
    first = 0 if same else rows * process

    def place(name: str, _: Tensor | None) -> Tensor | None:
        return tensors[name][first : first + rows].clone().to(device) if name in tensors else None

    return _map(place, template, "memory")


def _tensors(memory: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda _, tensor: found.append(tensor) if tensor is not None else None, memory, "memory")
    return found
