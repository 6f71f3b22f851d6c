"""Command line: write a model with its code for the Hugging Face Hub, or upload it."""

import json
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, has_file

from ..auto import FAMILIES
from ..utils.model_files import ModelFileError, error_line, file_faults_named
from ..utils.process import OneLineErrorParser, errors_in_one_line
from .exporting import export, push_to_hub


@dataclass(kw_only=True)
class ModelArguments:
    """The model to export, and the details on its card."""

    model: str = field(
        metadata={
            "help": "Folder that save_pretrained, Trainer or PEFT wrote, or a Hub repository; its tokenizer goes "
            "along, and an adapter is merged into its model."
        }
    )
    results: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with what was measured, for the model card: "
            '{"task": "sst2", "metrics": {"accuracy": 0.91}}, or a list of such. training/finetune_glue.py writes one.'
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights, such as apache-2.0; left out if not given."}
    )
    language: str | None = field(
        default=None, metadata={"help": "Language of the training text, such as en; left out if not given."}
    )


@dataclass(kw_only=True)
class ExportArguments(ModelArguments):
    """Arguments of `export`."""

    output: str = field(metadata={"help": "Folder to write. It must not exist yet, or be empty."})


@dataclass(kw_only=True)
class PushArguments(ModelArguments):
    """Arguments of `push`."""

    repo_id: str = field(metadata={"help": "Repository, such as org/name. It is created if it is missing."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to, created if missing; without it, the main branch."}
    )
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    commit_message: str = field(default="Upload model, tokenizer and code", metadata={"help": "Message of the commit."})


EXAMPLES = """examples:
  python -m hf_efficient.hub export --model glue/sst2/seed-0/model --results glue/sst2/seed-0/results.json \\
      --output exported/tupe-sst2
  python -m hf_efficient.hub push --model glue/sst2/seed-0/model --repo_id org/tupe-sst2 --private true

push uses the access token that `hf auth login` saved, or the environment variable HF_TOKEN."""


# Auto classes by the tasks that an adapter may name.
_ADAPTER_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """
    Load what a folder or repository holds by the package's own classes: a model, or the model with an adapter merged
    into it, and the tokenizer if there is one.

    Raises:
        ModelFileError: if there is something else; says what to give instead.
    """
    with file_faults_named(name):
        adapter = _read_json(name, "adapter_config.json")
        if adapter is not None:
            model, places = _merge(name, adapter)
        else:
            model, places = _load_model(name), [name]
    for place in places:
        if has_file(place, "tokenizer_config.json"):
            with file_faults_named(place):
                return model, AutoTokenizer.from_pretrained(place)
    return model, None


def _load_model(name: str) -> PreTrainedModel:
    fields = _read_json(name, "config.json")
    if fields is not None and str(fields.get("model_type", "")).endswith("_objective"):
        raise ModelFileError(
            f"{name} is a checkpoint of pretraining: it holds the whole objective ({fields['model_type']}), with all "
            "that is trained beside the encoder. A run that has ended leaves the encoder in its output_dir: give that. "
            "To take it out of this checkpoint: import hf_efficient.objectives, save "
            f"AutoModel.from_pretrained({name!r}) by save_pretrained, and give the folder that this writes."
        )
    config = AutoConfig.from_pretrained(name)
    return _load_class(name, config, (config.architectures or [""])[0])


def _load_class(name: str, config: PreTrainedConfig, architecture: str) -> PreTrainedModel:
    family = FAMILIES.get(config.model_type)
    if family is None or architecture not in family.classes.values():
        raise ModelFileError(
            f"{name} holds {architecture or 'no named class'} of model type {config.model_type!r}, which is no class "
            f"of hf_efficient; its families are {', '.join(FAMILIES)}."
        )
    model_class: Any = family.load(architecture)
    return model_class.from_pretrained(name, config=config)


def _merge(name: str, adapter: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """Merge an adapter of PEFT into its base model; give the model, and where its tokenizer may be."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelFileError(
            f"{name} holds an adapter: `pip install peft` lets it be merged into its model."
        ) from error
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ModelFileError(f"{name}/adapter_config.json does not name the base model (base_model_name_or_path).")
    with file_faults_named(base):
        config = AutoConfig.from_pretrained(base)
        family, auto_class = FAMILIES.get(config.model_type), _ADAPTER_TASKS.get(str(adapter.get("task_type")))
        classes = family.classes if family is not None else {}
        model = _load_class(base, config, classes.get(str(auto_class), (config.architectures or [""])[0]))
    try:
        merged: Any = PeftModel.from_pretrained(model, name)
        return merged.merge_and_unload(), [name, base]
    except Exception as error:
        raise ModelFileError(
            f"The adapter in {name} cannot be merged into {base} ({error_line(error)}). Merge it where it was trained, "
            "by save_pretrained of what its merge_and_unload() returns, and give the folder that this writes."
        ) from error


def _read_json(name: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a folder or repository; `None` if it has none of that name."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_bytes())


class _CommandParser(OneLineErrorParser, HfArgumentParser):
    """Parser of one command."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see `python -m hf_efficient.hub --help`."""
    parser = OneLineErrorParser(
        prog="hf-efficient",
        description="Write a model with its code for the Hugging Face Hub, or upload it.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_CommandParser)
    for command, arguments, text in (
        ("export", ExportArguments, "Write a folder that loads anywhere with trust_remote_code=True."),
        ("push", PushArguments, "Write such a folder and upload it in one commit."),
    ):
        commands.add_parser(command, dataclass_types=arguments, help=text, description=text)
    args = parser.parse_args(argv)
    model, tokenizer = _load(args.model)
    card = {"results": args.results, "license": args.license, "language": args.language}
    if args.command == "export":
        print(f"Wrote {export(model, tokenizer, args.output, **card)}")
        return
    commit = push_to_hub(
        model,
        tokenizer,
        args.repo_id,
        revision=args.revision,
        private=args.private,
        commit_message=args.commit_message,
        **card,
    )
    print(f"Uploaded: {commit.commit_url}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
