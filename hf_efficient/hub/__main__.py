"""Command line: write a model with its code for the Hugging Face Hub, or upload it."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import has_file

from ..auto import FAMILIES
from .exporting import export, push_to_hub


@dataclass(kw_only=True)
class ModelArguments:
    """The model to export, and the details on its card."""

    model: str = field(
        metadata={
            "help": "Folder that save_pretrained or Trainer wrote, or a Hub repository; its tokenizer goes along."
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


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the model of a folder by the package's own class, and its tokenizer if it has one."""
    config = AutoConfig.from_pretrained(name)
    family = FAMILIES.get(config.model_type)
    architecture = (config.architectures or [""])[0]
    if family is None or architecture not in family.classes.values():
        raise SystemExit(
            f"{name} holds {architecture or 'no named class'} of model type {config.model_type!r}, which is no class "
            f"of hf_efficient; its families are {', '.join(FAMILIES)}."
        )
    model_class: Any = family.load(architecture)
    tokenizer = AutoTokenizer.from_pretrained(name) if has_file(name, "tokenizer_config.json") else None
    return model_class.from_pretrained(name), tokenizer


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see `python -m hf_efficient.hub --help`."""
    parser = ArgumentParser(
        prog="python -m hf_efficient.hub",
        description="Write a model with its code for the Hugging Face Hub, or upload it.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
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
    main()
