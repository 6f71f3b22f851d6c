"""The consumers of the matrix, in the order of the page, and what runs a cell of theirs."""

import importlib.util
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import deployment, learning, loading
from .subjects import Refused, Subject
from .table import FAILED, NOT_RUN, REFUSED, YES, Cell


@dataclass(frozen=True)
class Consumer:
    """
    A library that models are given to, or a way to use one.

    Args:
        name (`str`): as it stands on the page.
        package (`str`): whose version counts, by its name on PyPI.
        module (`str`): what is imported of it.
        check (`Callable`): gives a family to it. Takes a [`Subject`] and an empty folder, and returns what was run;
            raises [`Refused`] with the reason where the consumer refuses the family, and any other error where it
            fails.
    """

    name: str
    package: str
    module: str
    check: Callable[[Subject, Path], str]

    @property
    def version(self) -> str:
        """The version that is installed, or `"-"`."""
        try:
            return version(self.package) if importlib.util.find_spec(self.module) is not None else "-"
        except PackageNotFoundError:
            return "-"


CONSUMERS = {
    consumer.name: consumer
    for consumer in (
        Consumer("Auto classes", "transformers", "transformers", loading.auto_classes),
        Consumer("remote code", "transformers", "transformers", loading.remote_code),
        Consumer("pipelines", "transformers", "transformers", loading.pipelines),
        Consumer("Trainer", "transformers", "transformers", learning.trainer),
        Consumer("Seq2SeqTrainer", "transformers", "transformers", learning.seq2seq_trainer),
        Consumer("peft", "peft", "peft", learning.peft),
        Consumer("TRL", "trl", "trl", learning.trl),
        Consumer(
            "sentence-transformers", "sentence-transformers", "sentence_transformers", learning.sentence_transformers
        ),
        Consumer("DDP", "torch", "torch", learning.ddp),
        Consumer("FSDP", "torch", "torch", learning.fsdp),
        Consumer("torch.compile", "torch", "torch", deployment.torch_compile),
        Consumer("torch.export", "torch", "torch", deployment.torch_export),
        Consumer("ONNX Runtime", "onnxruntime", "onnxruntime", deployment.onnx_runtime),
        Consumer("torchao", "torchao", "torchao", deployment.torchao),
        Consumer("lm-eval", "lm-eval", "lm_eval", deployment.lm_eval),
    )
}


def run_cell(consumer: Consumer, family: str) -> Cell:
    """Execute a cell, in this process, and say what came of it."""
    installed, today = consumer.version, date.today().isoformat()
    if installed == "-":
        return Cell(consumer.name, "-", today, family, NOT_RUN, f"{consumer.package} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        try:
            result, detail = YES, consumer.check(Subject(family), Path(folder))
        except Refused as error:
            result, detail = REFUSED, str(error)
        except Exception as error:
            traceback.print_exc()
            result, detail = FAILED, f"{type(error).__name__}: {str(error)[-300:].replace(folder, 'FOLDER')}"
    return Cell(consumer.name, installed, today, family, result, detail)
