"""The directory of one training run: its settings at the start, the model, the result and the loss curve at the end."""

import json
import logging
import math
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.atomic_write import write_files
from ..utils.version import __version__


logger = logging.getLogger(__name__)

# Arguments that the result of a training run depends on, besides its model, data, seed and batch size.
RESUME_CRITICAL = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "train_sampling_strategy",
    "data_seed",
)
# Fields of a config that say how and by what it was written.
CONFIG_PROVENANCE = ("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path")


class StartedOtherwiseError(ValueError):
    """The folder holds a run that was started with other settings."""


def resume_critical_args(args: TrainingArguments, *more: str) -> dict[str, Any]:
    """
    Arguments of Trainer that must be the same when a run is resumed, and the rows of a step.

    The number of processes may change as long as the rows of a step do not.

    Args:
        args (`TrainingArguments`): the arguments of the run.
        more (`str`): names of further ones.
    """
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**{name: getattr(args, name) for name in (*RESUME_CRITICAL, *more)}, "rows_per_step": rows}


def resume_critical_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a model's config that must be the same when a run is resumed, each under a name of its own."""
    return {f"config.{name}": value for name, value in config.to_dict().items() if name not in CONFIG_PROVENANCE}


class RunDirectory:
    """
    Directory with `settings.json` from the start of a run on, checkpoints while it goes on, and a result at its end.

    Every file is written whole or not at all, by the main process. The result comes last: where it is, the run is
    finished. As long as there is neither a checkpoint nor a result nothing is lost by starting anew, so other settings
    then replace those that were written.

    Fine-tuning uses the default places, and [`~RunDirectory.close`]: checkpoints in a folder of their own that goes in
    the end, the model in another. Pretraining keeps its checkpoints, and the model, in the folder itself, and writes
    them and its result by itself: `RunDirectory(path, checkpoints=".", result="history.json")`.

    Args:
        path (`str` or `Path`):
            The folder.
        checkpoints (`str`, *optional*, defaults to `"checkpoints"`):
            Where in it the `checkpoint-<step>` folders are.
        result (`str`, *optional*, defaults to `"results.json"`):
            The file whose presence says that the run is finished.
    """

    def __init__(self, path: str | Path, checkpoints: str = "checkpoints", result: str = "results.json"):
        self.path = Path(path)
        self.checkpoints = self.path / checkpoints
        self.model = self.path / "model"
        self.result = result

    def open(self, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """
        Start the run, or make sure that it may be resumed.

        Args:
            settings (`dict`):
                What the result depends on.
            resume (`bool`):
                Whether the run may have been started before.

        Returns:
            `dict` or `None`: the result, if the run is finished.

        Raises:
            FileExistsError: if the run has a checkpoint or a result, and `resume` is off or its settings are not known.
            StartedOtherwiseError: if it has one, and was started with other settings.
        """
        before = self.check(settings, resume)
        result = self._read(self.result) if before is not None else None
        old = self._read("settings.json")
        PartialState().wait_for_everyone()
        if before is None:
            if old is not None and (changed := "; ".join(_changes(old, settings))):
                logger.warning("%s starts anew, since its last run left no checkpoint: %s.", self.path, changed)
            self._write("settings.json", settings)
        return result

    def check(self, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """
        Refuse what `open` refuses, without starting anything. Arguments and errors are those of `open`; `settings` may
        hold only what is known already.

        Returns:
            `dict` or `None`: the settings of the run to go on with; `None` if there is none.
        """
        before = self._read("settings.json")
        begun = (self.path / self.result).is_file() or any(self.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        if not begun:
            return None
        if before is None:
            raise FileExistsError(
                f"{self.path} holds a checkpoint or a result, and no settings.json that says of what. Choose another "
                "output_dir, or remove the folder."
            )
        if not resume:
            raise FileExistsError(
                f"{self.path} holds a run already. Take up its results and checkpoints by resume (--resume on the "
                "command line), choose another output_dir, or remove the folder."
            )
        if changed := _changes(before, settings):
            raise StartedOtherwiseError(
                f"{self.path} was started otherwise: {'; '.join(changed)}. Use those, choose another output_dir "
                "(--output_dir), or remove the folder."
            )
        return before

    def reopen(self) -> None:
        """Forget that the run is finished, so that `open` begins a further stage of it on what it has left here."""
        PartialState().wait_for_everyone()  # until all have read the settings
        if PartialState().is_main_process:
            # In this order: a folder with a result and no settings would be refused.
            for name in (self.result, "settings.json"):
                (self.path / name).unlink(missing_ok=True)
        PartialState().wait_for_everyone()

    def close(self, result: dict[str, Any], save_model: Callable[[str], Any]) -> dict[str, Any]:
        """
        End the run: write the model, then the result, then remove the checkpoints.

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
            self._write(self.result, result)
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


def _changes(before: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The settings that have changed, in words."""
    return [
        f"{name} was {before.get(name)!r} and is {new!r} now"
        for name, new in json.loads(json.dumps(settings)).items()
        if before.get(name) != new
    ]


def finite(value: Any) -> Any:
    """Replace every number in `value` that JSON does not know by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of the software that a result depends on."""
    packages = ("torch", "transformers", "accelerate", "datasets", "evaluate")
    return {
        "python": platform.python_version(),
        "hf_efficient": __version__,
        **{package: version(package) for package in packages},
    }


def draw_losses(log_history: list[dict[str, Any]], path: str) -> None:
    """
    Draw the training and the validation loss over steps. Without matplotlib there is a warning and no picture.

    Args:
        log_history (`list[dict]`): as `Trainer.state` keeps it.
        path (`str`): the picture, a .png file.
    """
    try:
        import matplotlib
    except ImportError:
        logger.warning("No picture of the losses, since matplotlib is not installed: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.set_xlabel("step")
    weighted = any("discriminator_loss" in entry for entry in log_history)
    axes.set_ylabel("generator's loss + weighted discriminator's loss" if weighted else "loss (nats per target)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
