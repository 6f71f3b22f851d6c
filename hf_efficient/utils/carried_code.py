"""Configs that came with the code of their models, and take it along to every folder they are saved to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar


class CarriedCodeMixin:
    """
    Mixin of configs whose folders may hold code for `trust_remote_code`, named by `auto_map` in `config.json`.

    Where the package is installed its classes are taken in place of that code, so transformers does not copy the code
    when such a model is saved, but keeps `auto_map`, and the new folder loads nowhere else. A config with an `auto_map`
    therefore writes the code of its family beside it. As everything that saves a model saves its config, this holds for
    Trainer's checkpoints, `push_to_hub` and libraries that wrap a model, too.

    `write_code(config, folder)` is set by the package. A copy of this class that was loaded as remote code has none,
    and takes along the files that were loaded with it.
    """

    write_code: ClassVar[Callable[[Any, Path], None] | None] = None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See [`~transformers.PreTrainedConfig.save_pretrained`]."""
        if getattr(self, "auto_map", None):
            write_code = CarriedCodeMixin.write_code or _copy_code
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_code(self, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _copy_code(config: Any, folder: Path) -> None:
    """Copy the Python files of the flat folder that this one lies in, as do those of the model."""
    for path in Path(__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)
