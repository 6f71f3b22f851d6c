"""Work that waits until a module is imported, and costs nothing where it never is."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # while the others look
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                self.action(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


class _EarlyFinder(MetaPathFinder):
    def __init__(self, matches: Callable[[str], bool], action: Callable[[], object]):
        self.matches, self.action = matches, action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self not in sys.meta_path or not self.matches(fullname):
            return None
        sys.meta_path.remove(self)
        self.action()
        module = sys.modules.get(fullname)
        if module is not None:
            module.__spec__ = ModuleSpec(fullname, _Imported(module))  # which is what importlib goes on with
        return None if module is None else module.__spec__


class _Imported(Loader):
    """Gives a module that was imported while it was looked for, which must not run twice."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """
    Call a function with a module, at once if it is imported already, or else right after it is imported.

    Args:
        name (`str`): full name of the module.
        action (`Callable`): what to do with it.
    """
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def before_import(matches: Callable[[str], bool], action: Callable[[], object]) -> None:
    """
    Call a function before the first module is imported that is of a certain kind.

    Args:
        matches (`Callable`): tells by its full name whether a module is of that kind.
        action (`Callable`): what to do then, once.
    """
    sys.meta_path.insert(0, _EarlyFinder(matches, action))
