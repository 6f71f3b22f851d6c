"""Checkpoint files of original programs, read without running code from them, and the converters' command line."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .atomic_write import new_folder
from .model_files import ModelFileError, error_line, file_fault, file_faults_named, load_pickle, pickle_damage
from .process import OneLineErrorParser
from .weight_stream import SUFFIXES, read_weight_stream


def load_original(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Read a checkpoint file: `.safetensors`, a `.pt` as fairseq or plain torch writes it, or a weight file of trax
    (`.npy.gz`). Only tensors, plain containers and the `argparse.Namespace` of its arguments are unpickled.

    Returns:
        `tuple[dict[str, Tensor], dict[str, Any]]`: the state dict, without the `module.` that data-parallel training
        puts before names, and the arguments of the training command, empty where the file has none. Weights of trax
        have no names; they are numbered from `"0"`.

    Raises:
        ValueError: the file holds something else; it is not opened with full unpickling instead.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder: give the checkpoint file in it.")
    if path.suffix == ".safetensors":
        if path.exists() and (fault := file_fault(path)) is not None:
            raise ModelFileError(fault)
        return load_file(path), {}
    if path.name.endswith(SUFFIXES):
        return {str(index): tensor for index, tensor in enumerate(read_weight_stream(path))}, {}
    try:
        content = load_pickle(path)
    except OSError:
        raise
    except Exception as error:
        if (damage := pickle_damage(path, error)) is not None:
            raise ModelFileError(f"{path} {damage}. Copy or save it again.") from error
        raise ValueError(
            f"{path} could not be read without running code from it ({error_line(error)}). If you trust it, load it "
            "yourself and save its weights (the unique tensors of its 'model' entry, if it has one) as .safetensors."
        ) from error
    whole = content if isinstance(content, dict) else {}
    state_dict, arguments = whole.get("model", whole), whole.get("args")
    is_state_dict = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    )
    if not state_dict or not is_state_dict:
        raise ValueError(f"{path} holds no state dict: expected tensors by name, or a 'model' entry with them.")
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    return state_dict, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def parse_fields(assignments: Iterable[str], fields: Iterable[str]) -> dict[str, Any]:
    """
    Parse fields of a config from the command line.

    Args:
        assignments (`Iterable[str]`): such as `["dropout=0.1", "rescale=true"]`; values are JSON, or else text.
        fields (`Iterable[str]`): the names that are allowed.

    Raises:
        ValueError: if an assignment has no `=`, or names no such field.
    """
    allowed, values = set(fields), dict[str, Any]()
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name not in allowed:
            raise ValueError(f"--set {assignment}: write NAME=VALUE with a field of the config.")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def load_tokenizer(folder: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer to be saved beside a converted model.

    Raises:
        ValueError: if it has more ids than the model has rows for.
    """
    with file_faults_named(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} ids, the checkpoint {vocab_size}: it is of another text."
        )
    return tokenizer


@dataclass
class Converter:
    """
    The command line of a converter: a checkpoint of an original program becomes a folder for `from_pretrained`.

    The folder appears whole or not at all. `run` prints the result, and settings that the checkpoint does not record.

    Args:
        description (`str`): first paragraph of `--help`.
        fields (`Iterable[str]`): fields of the config that `--set NAME=VALUE` may name.
        build (`Callable`): `build(original, training_arguments, overrides, options)` gives the model: from a state dict
            and the arguments of its training command, as [`load_original`] reads them, the fields that were set, and
            the parsed command line.
        remarks (`Callable`): `remarks(model, original, training_arguments, overrides, options)` gives sentences to
            print at the end.
        add_options (`Callable`, *optional*): adds further options to the parser.
        load_tokenizer (`Callable`, *optional*): `load_tokenizer(folder, vocab_size)` for `--tokenizer`.
        tokenizer_help (`str`, *optional*): how to come by a tokenizer, for `--help`.
        formats (`str`, *optional*): kinds of files that it reads, for `--help`.
    """

    description: str
    fields: Iterable[str]
    build: Callable[[dict[str, Tensor], dict[str, Any], dict[str, Any], argparse.Namespace], PreTrainedModel]
    remarks: Callable[..., Iterable[str]]
    add_options: Callable[[argparse.ArgumentParser], object] | None = None
    load_tokenizer: Callable[[str, int], PreTrainedTokenizerBase] = load_tokenizer
    tokenizer_help: str = "the original has none"
    formats: str = ".pt, or .safetensors"

    def parser(self) -> argparse.ArgumentParser:
        parser = OneLineErrorParser(description=self.description)
        parser.add_argument("--checkpoint", required=True, help=f"original checkpoint: {self.formats}")
        parser.add_argument(
            "--output_dir", required=True, help="new folder for config.json, model.safetensors and the tokenizer"
        )
        parser.add_argument(
            "--set",
            nargs="+",
            default=[],
            metavar="NAME=VALUE",
            help="fields of the config that the checkpoint does not tell, such as num_attention_heads=12",
        )
        parser.add_argument(
            "--tokenizer", help=f"folder of a tokenizer to save beside the model; {self.tokenizer_help}"
        )
        if self.add_options is not None:
            self.add_options(parser)
        return parser

    def run(self, argv: list[str] | None = None) -> None:
        """
        Parse the command line, convert, and write.

        Raises:
            ValueError, OSError: for a fault in what was given, in words that fit on one line.
        """
        options = self.parser().parse_args(argv)
        folder = Path(options.output_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output_dir {folder} exists and is not empty; name a new folder.")
        overrides = parse_fields(options.set, self.fields)
        original, training_arguments = load_original(options.checkpoint)
        model = self._build(original, training_arguments, overrides, options)
        tokenizer = None
        if options.tokenizer is not None:
            embeddings: Any = model.get_input_embeddings()
            tokenizer = self.load_tokenizer(options.tokenizer, embeddings.num_embeddings)
        with new_folder(folder) as staging:
            model.save_pretrained(staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        print(f"Wrote {type(model).__name__} with {model.num_parameters():,} parameters to {folder}.")
        for remark in self.remarks(model, original, training_arguments, overrides, options):
            print(remark)

    def _build(
        self, original: dict[str, Tensor], told: dict[str, Any], overrides: dict[str, Any], options: argparse.Namespace
    ) -> PreTrainedModel:
        """Build the model; whatever a foreign file makes fail on the way is a fault of the file, which is named."""
        try:
            return self.build(original, told, overrides, options)
        except ValueError as error:
            raise ValueError(f"{options.checkpoint}: {error}") from error
        except Exception as error:
            names = ", ".join(list(original)[:3])
            raise ValueError(
                f"{options.checkpoint}: The checkpoint is of another program, or damaged ({type(error).__name__}: "
                f"{error_line(error)}). Its first tensors are {names}."
            ) from error
