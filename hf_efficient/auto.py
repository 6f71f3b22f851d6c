"""The table of all model families, and their registration with transformers' Auto classes.

A new family is a new folder under `models/` and a row in `FAMILIES`.
"""

from collections import UserDict
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from .utils.after_import import after_import


# Names of the tables in transformers that Trainer and the pipelines read (to shift labels, to detect heads).
_NAME_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
}
# The Auto class of the models that a pipeline of ours takes, by its task.
PIPELINE_MODELS = {"summarization": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Family:
    """Names by which a model family is imported and registered.

    Args:
        package (`str`): the package that holds `configuration_<model_type>.py` and `modeling_<model_type>.py`.
        config (`str`): name of the config class.
        classes (`dict[str, str]`): for each Auto class of transformers, the name of the model class that it returns.
        tokenizer (`str`): name of the tokenizer class in transformers for folders that do not name one.
        pipelines (`dict[str, str]`): for each task of `pipeline` that transformers does not have, the name of the class
            in `pipeline_<model_type>.py`, which takes any model of the Auto class that `PIPELINE_MODELS` names.
        lora_targets (`tuple[str, ...]` or `str`): names of the layers that PEFT's LoRA adapts where its config names
            none; `"all-linear"` where a layer of one name may be linear or sparse, which PEFT refuses.
    """

    package: str
    config: str
    classes: dict[str, str]
    tokenizer: str = "PreTrainedTokenizerFast"
    pipelines: dict[str, str] = field(default_factory=dict)
    lora_targets: tuple[str, ...] | str = "all-linear"

    @property
    def model_type(self) -> str:
        return self.package.rpartition(".")[2]

    @property
    def modules(self) -> tuple[str, str]:
        """Full names of the configuration module and the modeling module."""
        return f"{self.package}.configuration_{self.model_type}", f"{self.package}.modeling_{self.model_type}"

    @property
    def presets(self) -> list[str]:
        """Names of the published configurations, which the config's `preset` builds."""
        config: Any = self.load(self.config)
        return config.presets()

    def load(self, name: str) -> type:
        """Import the config, model or pipeline class called `name`."""
        configuration, modeling = self.modules
        module = configuration if name == self.config else modeling
        if name in self.pipelines.values():
            module = f"{self.package}.pipeline_{self.model_type}"
        return getattr(import_module(module), name)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            package="hf_efficient.models.srupp",
            config="SruppConfig",
            classes={
                "AutoModel": "SruppModel",
                "AutoModelForPreTraining": "SruppForCausalLM",
                "AutoModelForCausalLM": "SruppForCausalLM",
                "AutoModelForMaskedLM": "SruppForMaskedLM",
                "AutoModelForSequenceClassification": "SruppForSequenceClassification",
                "AutoModelForTokenClassification": "SruppForTokenClassification",
                "AutoModelForQuestionAnswering": "SruppForQuestionAnswering",
            },
            lora_targets=("down_proj", "q_proj", "k_proj", "v_proj", "out_proj"),
        ),
        Family(
            package="hf_efficient.models.scaling_transformer",
            config="ScalingTransformerConfig",
            classes={
                "AutoModel": "ScalingTransformerModel",
                "AutoModelForPreTraining": "ScalingTransformerForCausalLM",
                "AutoModelForCausalLM": "ScalingTransformerForCausalLM",
                "AutoModelForSequenceClassification": "ScalingTransformerForSequenceClassification",
            },
        ),
        Family(
            package="hf_efficient.models.terraformer",
            config="TerraformerConfig",
            classes={
                "AutoModel": "TerraformerModel",
                "AutoModelForPreTraining": "TerraformerForConditionalGeneration",
                "AutoModelForSeq2SeqLM": "TerraformerForConditionalGeneration",
                "AutoModelForCausalLM": "TerraformerForCausalLM",
                "AutoModelForSequenceClassification": "TerraformerForSequenceClassification",
            },
            pipelines={"summarization": "TerraformerSummarizationPipeline"},
        ),
        Family(
            package="hf_efficient.models.tupe",
            config="TupeConfig",
            classes={
                "AutoModel": "TupeModel",
                "AutoModelForPreTraining": "TupeForPreTraining",
                "AutoModelForMaskedLM": "TupeForMaskedLM",
                "AutoModelForSequenceClassification": "TupeForSequenceClassification",
                "AutoModelForTokenClassification": "TupeForTokenClassification",
                "AutoModelForQuestionAnswering": "TupeForQuestionAnswering",
                "AutoModelForMultipleChoice": "TupeForMultipleChoice",
            },
            lora_targets=("q_proj", "v_proj"),
        ),
    )
}


class _LazyClasses(UserDict):
    """A mapping from config class to model class that imports each model class on first access.

    `AutoModel.register` requires the class itself, and importing one modeling file more than doubles the time of
    `import transformers`. The classes are therefore stored in a mapping of this type, where `register` would put
    them. It is a `UserDict` because all of that class's methods that read values go through `__getitem__`.
    """

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, tuple):
            family, name = value
            value = self.data[key] = family.load(name)
        return value


def _register_class(auto_class: type, config: type, family: Family, name: str) -> None:
    mapping = auto_class._model_mapping  # type: ignore[attr-defined]
    if not isinstance(mapping._extra_content, _LazyClasses):
        mapping._extra_content = _LazyClasses(mapping._extra_content)
    if config not in mapping._extra_content:
        mapping._extra_content[config] = (family, name)


class _LazyPipeline(UserDict):
    """A task in transformers' table of pipelines, whose class is imported when it is asked for."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, tuple) and key == "impl":
            family, name = value
            value = self.data[key] = family.load(name)
        return value


def _register_pipelines(pipelines: ModuleType) -> None:
    """Add tasks to `transformers.pipelines`. Releases from 5.22 on refuse the names of tasks that they have removed,
    before they look at that table."""
    import transformers

    tasks = pipelines.PIPELINE_REGISTRY.supported_tasks
    for family in FAMILIES.values():
        for task, name in family.pipelines.items():
            if task not in tasks:
                models = (getattr(transformers, PIPELINE_MODELS[task]),)
                tasks[task] = _LazyPipeline({"impl": (family, name), "pt": models, "type": "text"})
                getattr(pipelines, "REMOVED_TASKS", {}).pop(task, None)


def _register_lora_targets(constants: ModuleType) -> None:
    """Name the layers that LoRA adapts by default, as PEFT's table does for the models of transformers."""
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for model_type, family in FAMILIES.items():
        targets = family.lora_targets
        table.setdefault(model_type, targets if isinstance(targets, str) else list(targets))


def register() -> None:
    """Register every family with transformers: config, heads, tokenizer, name tables, and pipelines as soon as those of
    transformers are imported; and with PEFT as soon as that is. Calling it again is harmless."""
    import transformers
    from transformers.models.auto import modeling_auto

    after_import("transformers.pipelines", _register_pipelines)
    after_import("peft.utils.constants", _register_lora_targets)
    for model_type, family in FAMILIES.items():
        config = family.load(family.config)
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        for auto_class, name in family.classes.items():
            _register_class(getattr(transformers, auto_class), config, family, name)
            getattr(modeling_auto, _NAME_TABLES[auto_class])[model_type] = name
        tokenizer = getattr(transformers, family.tokenizer)
        transformers.AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)
