"""Settings of the running process: malloc, logging, the precision that is fast, the end of a process group."""

import argparse
import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch


if TYPE_CHECKING:
    from transformers import Trainer


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def disable_malloc_trim() -> bool:
    """
    Let this process keep what it frees, for the next step.

    By itself glibc gives large blocks back to the system, which hands them out again page by page, each filled with
    zeros: a tenth of a train step's time and more, by luck. The process then stays as large as it ever was. Call it
    once, at the start.

    Returns:
        `bool`: False where there is no glibc, and nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    most = 2**31 - 1
    return mallopt(_TRIM_THRESHOLD, most) == mallopt(_MMAP_THRESHOLD, most) == 1


def bf16_support() -> str | None:
    """Name the hardware that computes bf16 matrix products fast on this machine; `None` if there is none."""
    if torch.cuda.is_available():
        return "the GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # torch has no public test; a version without these two just gets fp32.
    for name, test in (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, test, lambda: False)():
            return f"the processor's {name}"
    return None


def settle_process_group() -> None:
    """Let a process group come to rest before it is destroyed, which can hang: gloo's threads let go of finished work
    under Python's lock, and destroying holds that lock while it waits for them (torch 2.13)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.2)  # without the lock


def start_script(name: str) -> None:
    """
    Set up the process of a training script: freed memory is kept, and the package and the script may say what they do,
    the first of several processes alone.

    Args:
        name (`str`): the script's logger, `__name__`.
    """
    disable_malloc_trim()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    is_first = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate number processes
    for logger in ("hf_efficient", name):
        logging.getLogger(logger).setLevel(logging.INFO if is_first else logging.WARNING)


class OneLineErrorParser(argparse.ArgumentParser):
    """Parser of a command line that tells a fault in it on one line, and leaves the options to `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}. --help shows the options.\n")


def names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """
    Make the type of an option that takes some of several names, with commas between.

    Args:
        known (`Iterable[str]`): the names.

    Returns:
        `Callable`: makes a list of the option's value; an unknown name is a fault in the command line.
    """
    known = list(known)

    def parse(value: str) -> list[str]:
        chosen = [name.strip() for name in value.split(",")]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(map(repr, unknown))}, but {', '.join(known)}")
        return chosen

    return parse


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """
    Let a fault in what the user gave end the script with one line on stderr and exit code 2, as argparse does.

    Such faults are `ValueError` and `OSError`: the settings, files and folders that this package and transformers
    refuse. Other errors, and values that torch or numpy refuse deep inside, are faults of the program and keep their
    traceback.

    Raises:
        SystemExit: with the line as its message.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if _raised_in(error) in ("torch", "numpy"):
            raise
        line = " ".join(f"Error: {error}".split())
        print(line, file=sys.stderr, flush=True)
        end = SystemExit(line)
        end.code = 2
        raise end from error


def _raised_in(error: BaseException) -> str:
    """Name of the package whose code raised an error."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    return module.partition(".")[0]


def end_script(trainer: "Trainer") -> None:
    """Say where the model is, and leave the process group, at the end of a training script."""
    if trainer.is_world_process_zero():
        print(f"The model is in {trainer.args.output_dir}.")
    settle_process_group()
    trainer.accelerator.end_training()
