"""Loading of pretraining checkpoints by transformers' Auto classes, which take the encoder out of the objective."""

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from .base import config_from_dict
from .meta_controller import MetaControllerObjective
from .mlm import MaskedLMObjective
from .replaced_token import ReplacedTokenObjective


_TASKS = ("MaskedLM", "MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification")
AUTO_CLASSES = (transformers.AutoModel, *(getattr(transformers, f"AutoModelFor{task}") for task in _TASKS))
# Each objective, and the part of it that Auto classes load.
PRETRAINED_PARTS: dict[Any, str] = {
    MaskedLMObjective: "model",
    MetaControllerObjective: "encoder",
    ReplacedTokenObjective: "encoder",
}
# Arguments that say where the files are.
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class EncoderFromObjective:
    """
    Stands in for the models of an Auto class where a checkpoint is that of an objective, and loads its encoder.

    There is one subclass for each pair of them, with three attributes: the `objective`, its `config_class`, and the
    `auto_class`.
    """

    objective: Any
    config_class: Any
    auto_class: Any

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """Build the model of the Auto class, with new weights, from a config of the objective."""
        fields = getattr(config, f"{PRETRAINED_PARTS[cls.objective]}_config")
        return cls.auto_class.from_config(config_from_dict(fields), **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """
        Load the encoder in a checkpoint of the objective as a model of the Auto class.

        The result is the same as that from the folder which the run leaves at its end. All arguments are Auto's; those
        that are fields of a config change the encoder's.
        """
        place = {name: kwargs.pop(name) for name in _PLACE if name in kwargs}
        saved = cls.config_class.from_pretrained(folder, **place)
        objective = cls.objective.from_pretrained(folder, config=saved, **place)
        part = getattr(objective, PRETRAINED_PARTS[cls.objective])
        # Auto has put arguments that any config has, such as the number of labels, into the objective's.
        before = saved.to_dict()
        changes = {name: value for name, value in config.to_dict().items() if value != before.get(name)}
        changes |= {name: kwargs.pop(name) for name in list(kwargs) if hasattr(part.config, name)}
        part.config.update(changes)
        if config._attn_implementation is not None:
            kwargs["attn_implementation"] = config._attn_implementation
        with torch.device("meta"):
            model_class = type(cls.auto_class.from_config(part.config))
        return model_class.from_pretrained(None, *args, config=part.config, state_dict=part.state_dict(), **kwargs)


def register() -> None:
    """Make checkpoints of every objective known to transformers. Twice is harmless."""
    for objective in PRETRAINED_PARTS:
        config_class = objective.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in AUTO_CLASSES:
            name = auto_class.__name__.replace("Auto", objective.__name__)
            attributes = {"objective": objective, "config_class": config_class, "auto_class": auto_class}
            # Named in this module, as classes must be that are pickled: transformers' tables are.
            globals()[name] = type(name, (EncoderFromObjective,), attributes)
            auto_class.register(config_class, globals()[name], exist_ok=True)
