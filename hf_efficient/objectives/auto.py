"""Checkpoints of pretraining in transformers' Auto classes: the encoder is found in the objective that holds it."""

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from .meta_controller import MetaControllerObjective
from .mlm import MaskedLMObjective
from .replaced_token import ReplacedTokenObjective


AUTO_CLASSES = (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
# Each objective, and the part of it that people load.
PRODUCTS: dict[Any, str] = {
    MaskedLMObjective: "model",
    MetaControllerObjective: "encoder",
    ReplacedTokenObjective: "encoder",
}
# Arguments that say where the files are.
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ProductReader:
    """
    Stands for the models of an Auto class in place of an objective, which is none of them. There is one subclass for
    each pair of them, with three attributes: the `objective`, its `config_class`, and the `auto_class`.
    """

    objective: Any
    config_class: Any
    auto_class: Any

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """The model of the Auto class, with new weights, for a config of the objective."""
        settings = dict(getattr(config, f"{PRODUCTS[cls.objective]}_config"))
        return cls.auto_class.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """
        The model of the Auto class with the weights of the encoder in a checkpoint of the objective, as it would be
        read from the folder that the run leaves at its end. All arguments are Auto's; those that are fields of a config
        are the encoder's.
        """
        place = {name: kwargs.pop(name) for name in _PLACE if name in kwargs}
        saved = cls.config_class.from_pretrained(folder, **place)
        objective = cls.objective.from_pretrained(folder, config=saved, **place)
        product = getattr(objective, PRODUCTS[cls.objective])
        # Auto has put arguments that any config has, such as the number of labels, into the objective's.
        before = saved.to_dict()
        changes = {name: value for name, value in config.to_dict().items() if value != before.get(name)}
        changes |= {name: kwargs.pop(name) for name in list(kwargs) if hasattr(product.config, name)}
        product.config.update(changes)
        if config._attn_implementation is not None:
            kwargs["attn_implementation"] = config._attn_implementation
        with torch.device("meta"):
            model_class = type(cls.auto_class.from_config(product.config))
        return model_class.from_pretrained(
            None, *args, config=product.config, state_dict=product.state_dict(), **kwargs
        )


def register() -> None:
    """Make checkpoints of every objective known to transformers. Twice is harmless."""
    for objective in PRODUCTS:
        config_class = objective.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in AUTO_CLASSES:
            name = auto_class.__name__.replace("Auto", objective.__name__)
            attributes = {"objective": objective, "config_class": config_class, "auto_class": auto_class}
            # Named in this module, as classes must be that are pickled: transformers' tables are.
            globals()[name] = type(name, (ProductReader,), attributes)
            auto_class.register(config_class, globals()[name], exist_ok=True)
