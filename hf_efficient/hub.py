"""Models as folders for the Hub, with the code that loads them where `hf_efficient` is not installed.

`export` writes such a folder, `push_to_hub` uploads one, and `python -m hf_efficient.hub --help` does both from a
terminal. A folder loads by `AutoModel.from_pretrained(folder, trust_remote_code=True)` anywhere, and without that
argument where `hf_efficient` was imported first.
"""

import json
import shutil
import uuid
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import has_file

from .auto import FAMILIES, Family
from .flat_code import flatten_code
from .model_card import model_card


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    results: str | Path | dict | list | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
    language: str | None = None,
) -> Path:
    """
    Write a model as a folder for the Hub: weights in safetensors, config with `auto_map`, tokenizer, the code of its
    family in flat files, and a model card. The folder appears whole or not at all.

    Args:
        model (`PreTrainedModel`): a model of one of the families in `hf_efficient.auto.FAMILIES`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, or `None`.
        folder (`str` or `Path`): where to write; must not exist yet, or be empty.
        results (`str`, `Path`, `dict` or `list`, *optional*): what was measured, for the card's `model-index`; see
            `hf_efficient.model_card.read_results`.
        name (`str`, *optional*): name on the card and in its example; the folder's name by default.
        license (`str`, *optional*): licence of the weights as the Hub spells it, such as `"apache-2.0"`.
        language (`str`, *optional*): language of the training text, such as `"en"`.

    Returns:
        `Path`: the folder.

    Raises:
        TypeError: if the model's class is none of the package's.
        FileExistsError: if the folder holds something already.
        ValueError: if the results are not of the form that `read_results` knows.
    """
    folder = Path(folder)
    family = family_of(model)
    # A class of several names is known by its last: AutoModelForPreTraining stands before what a model is good for
    auto_class = [auto for auto, cls in family.classes.items() if cls == type(model).__name__][-1]
    auto_map = {"AutoConfig": family.config, **family.classes}
    classes = {auto: family.load(cls) for auto, cls in auto_map.items()}
    code = flatten_code(cls.__module__ for cls in classes.values())
    card = model_card(model, tokenizer, auto_class, name or folder.name, list(code), results, license, language)
    with _whole_or_not_at_all(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for file_name, source in code.items():
            (staging / file_name).write_text(source, encoding="utf-8")
        # Not by register_for_auto_class: it marks the classes as remote code for the rest of the process
        config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {
            auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()
        }
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")
    return folder


def push_to_hub(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    repo_id: str,
    results: str | Path | dict | list | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model, tokenizer and code",
    license: str | None = None,
    language: str | None = None,
) -> CommitInfo:
    """
    Export a model and upload the folder in one commit. Repository and branch are made where they are missing.

    Args:
        model, tokenizer, results, license, language: as for [`export`].
        repo_id (`str`): repository, such as `"org/name"`.
        revision (`str`, *optional*): branch to commit to; the default branch if `None`.
        private (`bool`, *optional*): whether a new repository is private; the account's default if `None`.
        token (`str`, *optional*): access token; the one that `hf auth login` saved if `None`.
        commit_message (`str`): message of the commit.

    Returns:
        `CommitInfo`: the commit, with its `oid` and `commit_url`.

    Raises:
        TypeError, ValueError: as [`export`], before anything is sent.
        HfHubHTTPError: if the Hub refuses.
    """
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        export(model, tokenizer, folder, results, name=repo_id, license=license, language=language)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)


def family_of(model: PreTrainedModel) -> Family:
    """
    The row of `hf_efficient.auto.FAMILIES` that a model belongs to.

    Raises:
        TypeError: if the model's class is none of the package's.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is not None and any(type(model) is family.load(name) for name in family.classes.values()):
        return family
    ours = sorted({name for family in FAMILIES.values() for name in family.classes.values()})
    raise TypeError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a class of hf_efficient, so there is no code of "
        f"its family to pack. A model of transformers needs none: `model.save_pretrained(folder)`. One that was "
        f"loaded with `trust_remote_code=True` has to be loaded again without it, after `import hf_efficient`. "
        f"The classes of hf_efficient are {', '.join(ours)}."
    )


@contextmanager
def _whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name when the block ends well, and is removed when it fails."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: remove it, or name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@dataclass(kw_only=True)
class ModelArguments:
    """What is exported, and what its card says."""

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
    """The model that a folder's config names, by the package's own class, and its tokenizer if it has one."""
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
    """The command line; see `python -m hf_efficient.hub --help`."""
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
