"""Second runs of the same call that come out as the first: their random numbers, autocast, and decisions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .backend import is_transformed


def read_generators(device: torch.device) -> list[Tensor]:
    """States of the generators that a call on a device may draw from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        of_device = () if device.type == "mps" else (device,)
        states.append(torch.get_device_module(device).get_rng_state(*of_device))
    return states


def write_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        of_device = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state, *of_device)


@contextmanager
def autocast_as(modes: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was found. Without its cache: a weight that was cast without a graph must not serve another use
    of it, which needs one."""
    with ExitStack() as stack:
        for kind, enabled, dtype in modes:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def autocast_modes(device: torch.device) -> list[tuple[str, bool, torch.dtype]]:
    kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


class Remembered:
    """
    Decisions of one call of a function, for a second run of the same call, which might decide otherwise by rounding
    alone.

    Args:
        keeps (`bool`, defaults to `True`): `False` where there will be no second run.
    """

    def __init__(self, keeps: bool = True):
        self._keeps = keeps
        self._device = torch.device("cpu")
        self._kept: dict[tuple[str, int], tuple[Any, list[Tensor] | None]] = {}
        self._asked: dict[str, int] = {}

    def begin(self, device: torch.device) -> None:
        """Begin a run on a device: names are asked for in the same order again."""
        self._device, self._asked = device, {}

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """
        Return what `make` returns in the first run, and in later runs the same object without calling it.

        It is a constant to autograd. Random numbers that follow are the same in each run, although `make` draws in one
        of them only.

        Args:
            name (`str`): of the decision; asked for again in the same run, it stands for another one.
            make (`Callable`): takes nothing. Whatever it returns stays until the backward pass is over and counts
                against the memory that is saved, so let it be indices of a narrow integer dtype.
        """
        if not self._keeps or torch.compiler.is_compiling() or is_transformed():
            with torch.no_grad():
                return make()
        key = (name, self._asked.get(name, 0))
        self._asked[name] = key[1] + 1
        if key not in self._kept:
            before = read_generators(self._device)
            with torch.no_grad():
                value = make()
            after = read_generators(self._device)
            drew = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
            self._kept[key] = value, (after if drew else None)
            return value
        value, states = self._kept[key]
        if states is not None:
            write_generators(self._device, states)
        return value


_traced: WeakSet[nn.Module] = WeakSet()  # modules whose graph was seen once


def refuse_captured(module: nn.Module, output: Tensor, known: Sequence[Tensor], where: str) -> None:
    """Raise where a graph ends in leaves besides those known, whose gradients nobody would return."""
    if module in _traced:
        return
    allowed = set(map(id, known))
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in allowed:
            raise RuntimeError(
                f"{where} uses a tensor that needs a gradient, or was computed from one (of shape "
                f"{tuple(leaf.shape)}), and is neither a parameter of the module nor among its arguments: it would get "
                "none. Register it, pass it in `arguments`, or use reversible=False."
            )
        pending += [before for before, _ in node.next_functions]
    _traced.add(module)
