"""
Efficient language models for the Hugging Face ecosystem. Importing the package registers them with transformers.

They are registered as soon as transformers is imported, or a module of this package that needs it. Until then neither
transformers nor torch is loaded: the console command answers at once, and can choose what torch reads at its start.
"""

import sys
from importlib import import_module

from . import auto
from .utils.after_import import after_import, before_import
from .utils.version import __version__ as __version__


_FAMILY_OF = {
    name: family
    for family in auto.FAMILIES.values()
    for name in (family.config, *family.classes.values(), *family.pipelines.values())
}

# What is public besides, and the module that has it, imported on first use.
_MODULE_OF = {
    "DistillationTrainer": ".trainer",
    "SparseQuantizationConfig": ".modules.quantization",
    "from_gpt2": ".models.scaling_transformer.convert_gpt2",
    "sparsify": ".models.scaling_transformer.sparsify",
}

__all__ = sorted([*_FAMILY_OF, *_MODULE_OF])

# Modules that decide themselves when torch is loaded, with all that is below them.
_LIGHT_MODULES = ("cli", "training", "utils.openmp")


def _needs_transformers(module: str) -> bool:
    name = module.removeprefix(f"{__name__}.")
    return name != module and not any(f"{name}.".startswith(f"{light}.") for light in _LIGHT_MODULES)


def _write_code(config, folder) -> None:
    import_module(".hub", __name__).write_code(config, folder)


def _register(_transformers) -> None:
    auto.register()
    import_module(".utils.carried_code", __name__).CarriedCodeMixin.write_code = _write_code


after_import("transformers", _register)
if "transformers" not in sys.modules:
    # Not in the middle of a module of ours that transformers, when it is registered with, needs whole.
    before_import(_needs_transformers, lambda: import_module("transformers"))


def __getattr__(name: str):
    if name == "hub":
        return import_module(".hub", __name__)
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    if name in _FAMILY_OF:
        return _FAMILY_OF[name].load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
