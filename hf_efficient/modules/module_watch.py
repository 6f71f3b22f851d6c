"""Notice of changes in a module: whether what was once found in it is still right."""

from collections.abc import Iterable
from itertools import repeat
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import nn
from transformers.utils import output_capturing


_SETTINGS = (
    *("eps", "activation", "multiply_by_controller", "scaling"),
    *("rotations", "factors", "eval_rounds", "chunk_length", "chunks_before"),  # of attention by hashing
)
_training = itemgetter("training")
_FORWARD = repeat("forward")  # an attribute of a module by which libraries replace its method


def is_silent(hooks: dict) -> bool:
    """Return whether hooks do nothing but record outputs for transformers, which they do where it is asked for."""
    return all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks.values())


class ModuleWatch(NamedTuple):
    """
    Modules, parameters and buffers below a module, and the settings that compiled code is told beside them, as they
    were when they were looked up; and the places in which something may have been put to watch or to replace a call.

    Asked for every token, so that it is a few passes over flat lists, and nothing of Python's own for each module.

    Args:
        entries, names, values (`list`): dictionaries of modules, names in them, and what was found there.
        states, hooks, pre_hooks (`list[dict]`): of each module whose call is stood in for.
    """

    entries: list[dict]
    names: list[str]
    values: list[Any]
    states: list[dict]
    hooks: list[dict]
    pre_hooks: list[dict]

    @classmethod
    def below(cls, module: nn.Module) -> "ModuleWatch":
        """Watch a module, but for calls of itself."""
        inner = [one for one in module.modules() if one is not module]
        links: list[tuple[Any, str, Any]] = [
            (entries, name, value)
            for one in (module, *inner)
            for entries in (one._modules, one._parameters, one._buffers)
            for name, value in entries.items()
        ]
        links += [
            (one.__dict__, name, one.__dict__[name]) for one in inner for name in _SETTINGS if name in one.__dict__
        ]
        entries, names, values = [link[0] for link in links], [link[1] for link in links], [link[2] for link in links]
        return cls(entries, names, values, *cls._calls_of(inner))

    @staticmethod
    def _calls_of(modules: Iterable[nn.Module]) -> tuple[list[dict], list[Any], list[Any]]:
        modules = list(modules)
        return (
            [one.__dict__ for one in modules],
            [one._forward_hooks for one in modules],
            [one._forward_pre_hooks for one in modules],
        )

    @classmethod
    def joined(cls, watches: Iterable["ModuleWatch"], modules: Iterable[nn.Module]) -> "ModuleWatch":
        """Watch what several watch, and calls of some modules themselves."""
        found = cls([], [], [], *cls._calls_of(modules))
        for watch in watches:
            ours: Any
            for ours, theirs in zip(found, watch, strict=True):
                ours.extend(theirs)
        return found

    def has_changed(self) -> bool:
        """Return whether anything that was found is another object now."""
        return not all(map(is_, map(dict.get, self.entries, self.names), self.values))

    def is_looked_at(self) -> bool:
        """Return whether a module trains, something listens to one, or stands in the place of its forward pass."""
        if any(map(_training, self.states)) or any(self.pre_hooks):
            return True
        if any(map(dict.__contains__, self.states, _FORWARD)):
            return True
        return any(self.hooks) and not all(map(is_silent, self.hooks))


__all__ = ["ModuleWatch", "is_silent"]
