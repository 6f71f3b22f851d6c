"""What the common tests import from folders that transformers' source distribution leaves out.

Our own words, as small as the imports ask for: two mixins that the tests inherit from or look for, and the values that
`ConfigTester` hands to a config. A module that a distribution does ship is used as it is.
"""

import sys
import types
from pathlib import Path


class ExportTesterMixin:
    """No tests: exporting has its own tests beside the models."""


class GenerationTesterMixin:
    """Marks test classes of models that generate; encoders do not. Generating has its own tests beside the models."""


# Every common field of a config, at a value that is not its default.
CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "is_encoder_decoder": True,
    "architectures": ["SomeModel"],
    "id2label": {0: "no", 1: "maybe", 2: "yes"},
    "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "problem_type": "regression",
}

_MODULES = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_VALUES},
}


def install(folder: Path, package: str) -> None:
    """Provide the modules that `package` in `folder` imports and lacks."""
    for name, content in _MODULES.items():
        if (folder / package / name.replace(".", "/")).with_suffix(".py").is_file():
            continue
        module = types.ModuleType(f"{package}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
