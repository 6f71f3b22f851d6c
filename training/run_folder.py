"""The folder of one training run: its settings at the start, the model and the result at the end."""

import json
import math
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

import hf_efficient
from hf_efficient.checkpoints import write_files


# What the result of a training run depends on, besides its model, data, seed and batch size.
DECISIVE = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "lr_scheduler_type",
    "optim",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "train_sampling_strategy",
)


def decisive(args: TrainingArguments, *more: str) -> dict[str, Any]:
    """Those of Trainer's arguments that a run is resumed only with the same values of; `more` names further ones."""
    return {name: getattr(args, name) for name in (*DECISIVE, *more)}


class RunFolder:
    """
    A folder with `settings.json`, `checkpoints` while the run goes on, and `model` and `results.json` when it is done.

    Every file is written whole or not at all, by the main process. `results.json` comes last: where it is, the run is
    finished.

    Args:
        path (`str` or `Path`):
            The folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    def open(self, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """
        Starts the run, or makes sure that it may be resumed.

        Args:
            settings (`dict`):
                What the result depends on.
            resume (`bool`):
                Whether the run may have been started before.

        Returns:
            `dict` or `None`: the result, if the run is finished.

        Raises:
            FileExistsError: if the run was started and `resume` is off.
            ValueError: if it was started with other settings.
        """
        before = self.check(settings, resume)
        result = self._read("results.json") if before is not None else None
        PartialState().wait_for_everyone()
        if before is None:
            self._write("settings.json", settings)
        return result

    def check(self, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """
        What `open` refuses, refused without starting anything. Arguments and errors are those of `open`.

        Returns:
            `dict` or `None`: the settings that the run was started with, if it was.
        """
        before = self._read("settings.json")
        if before is None:
            return None
        settings = json.loads(json.dumps(settings))
        if not resume:
            raise FileExistsError(
                f"{self.path} holds a run already. Take up its results and checkpoints by resume (--resume on the "
                "command line), or choose another output_dir."
            )
        changed = [
            f"{name} was {before.get(name)!r} and is {new!r} now"
            for name, new in settings.items()
            if before.get(name) != new
        ]
        if changed:
            raise ValueError(
                f"{self.path} was started otherwise: {'; '.join(changed)}. Use those, or another output_dir."
            )
        return before

    def close(self, result: dict[str, Any], save_model: Callable[[str], Any]) -> dict[str, Any]:
        """
        Ends the run: the model, then the result, then the checkpoints go.

        Args:
            result (`dict`):
                What is written, with the versions of the software; numbers that are not finite become None.
            save_model (`Callable`):
                Writes the model's files to the folder that it is given.

        Returns:
            `dict`: the result as written.
        """
        result = {**finite(result), "versions": versions()}
        if PartialState().is_main_process:
            write_files(self.model, save_model)
            self._write("results.json", result)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        PartialState().wait_for_everyone()
        return result

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON ({error}). Remove it, or choose another output_dir.") from error

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        if PartialState().is_main_process:
            write_files(self.path, lambda folder: Path(folder, name).write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """`value`, with None for every number in it that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "accelerate", "datasets", "evaluate")
    return {
        "python": platform.python_version(),
        "hf_efficient": hf_efficient.__version__,
        **{package: version(package) for package in packages},
    }
