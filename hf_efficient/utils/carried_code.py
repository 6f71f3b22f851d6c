"""Configs that came with the code of their models, and take it along to every folder they are saved to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers.dynamic_module_utils import get_relative_import_files


class CarriedCodeMixin:
    """
    Mixin of configs whose folders may hold code for `trust_remote_code`, named by `auto_map` in `config.json`.

    Where the package is installed its classes are taken in place of that code, so transformers does not copy the code
    when such a model is saved, but keeps `auto_map`, and the new folder loads nowhere else. A config with an `auto_map`
    therefore writes the code of its family beside it. As everything that saves a model saves its config, this holds for
    Trainer's checkpoints, `push_to_hub` and libraries that wrap a model, too.

    `write_code(config, folder)` is set by the package. A copy of this class that was loaded as remote code has none,
    and takes along the files that were loaded with it.

    The pipelines of a family are named in the config too (`custom_pipelines`), for processes without the package. Where
    it is, they are registered, and `pipeline` must not ask for trust in code: a config that is loaded there does not
    have them, and gets them back in each folder that it is saved to.
    """

    write_code: ClassVar[Callable[[Any, Path], None] | None] = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See [`~transformers.PreTrainedConfig.from_dict`]."""
        if CarriedCodeMixin.write_code is not None:
            config_dict = _without_own_pipelines(config_dict, cls)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See [`~transformers.PreTrainedConfig.save_pretrained`]."""
        if getattr(self, "auto_map", None):
            write_code = CarriedCodeMixin.write_code or _copy_code
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_code(self, Path(save_directory))
        for info in getattr(self, "custom_pipelines", {}).values():
            info["pt"] = _names(info.get("pt", ()))  # where `pipeline` has put classes in the place of names
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if CarriedCodeMixin.write_code is not None and hasattr(self, "custom_pipelines"):
            kept = _without_own_pipelines({"custom_pipelines": self.custom_pipelines}, type(self))
            del self.custom_pipelines
            vars(self).update(kept)


def _without_own_pipelines(fields: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Fields of a config without the entries of `custom_pipelines` whose code is that of the config's family."""
    if "custom_pipelines" not in fields:
        return fields
    own = f"pipeline_{config_class.model_type}."
    others = {
        task: info for task, info in fields["custom_pipelines"].items() if not str(info.get("impl")).startswith(own)
    }
    kept = {name: value for name, value in fields.items() if name != "custom_pipelines"}
    return {**kept, "custom_pipelines": others} if others else kept


def _names(classes: Any) -> list[str]:
    return [classes] if isinstance(classes, str) else [getattr(cls, "__name__", cls) for cls in classes]


def _copy_code(config: Any, folder: Path) -> None:
    """
    Copy the Python files of the flat folder that this one lies in, as do those of the model.

    The files of pipelines come from the folder that the config was read from, since the loader of remote code puts them
    elsewhere; a pipeline whose file is in neither is no longer named in the config.
    """
    own = Path(__file__).parent
    for path in own.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)
    kept = {}
    for task, info in (getattr(config, "custom_pipelines", None) or {}).items():
        name = f"{str(info.get('impl')).partition('.')[0]}.py"
        source = Path(str(config.name_or_path), name)
        needed = [source, *map(Path, get_relative_import_files(source))] if source.is_file() else []
        for path in needed:
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        if (folder / name).is_file():
            kept[task] = info
    if kept:
        config.custom_pipelines = kept
    elif hasattr(config, "custom_pipelines"):
        del config.custom_pipelines
