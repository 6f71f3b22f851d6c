"""Efficient language models for the Hugging Face ecosystem. Importing the package registers them with transformers."""

from importlib import import_module

from . import auto
from .utils.carried_code import CarriedCodeMixin
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

auto.register()


def _write_code(config, folder) -> None:
    import_module(".hub", __name__).write_code(config, folder)


CarriedCodeMixin.write_code = _write_code


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
