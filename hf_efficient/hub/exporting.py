"""Models as folders for the Hub, with the code that loads them where `hf_efficient` is not installed.

`export` writes such a folder, `push_to_hub` uploads one, and `python -m hf_efficient.hub --help` does both from a
terminal. A folder loads by `AutoModel.from_pretrained(folder, trust_remote_code=True)` anywhere, and without that
argument where `hf_efficient` was imported first.
"""

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..auto import FAMILIES, PIPELINE_MODELS, Family
from ..utils.atomic_write import new_folder
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
        results (`str`, `Path`, `dict` or `list`, *optional*): measurements for the card's `model-index`; see
            `hf_efficient.hub.model_card.read_results`.
        name (`str`, *optional*): name on the card and in its example; the folder's name by default.
        license (`str`, *optional*): licence of the weights as the Hub spells it, such as `"apache-2.0"`.
        language (`str`, *optional*): language of the training text, such as `"en"`.

    Returns:
        `Path`: the folder.

    Raises:
        TypeError: if the model's class does not belong to the package.
        FileExistsError: if the folder is not empty.
        ValueError: if the results do not have the form that `read_results` describes.
    """
    folder = Path(folder)
    family = family_of(model)
    # A class of several names is known by its last: AutoModelForPreTraining stands before what a model is good for
    auto_class = [auto for auto, cls in family.classes.items() if cls == type(model).__name__][-1]
    code, auto_map = _family_code(family.model_type)
    card = model_card(model, tokenizer, auto_class, name or folder.name, list(code), results, license, language)
    with new_folder(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _write_files(code, staging)
        # Not by register_for_auto_class: it marks the classes as remote code for the rest of the process
        config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = auto_map
        if pipelines := _pipelines(family, config.get("architectures")):
            config["custom_pipelines"] = pipelines
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")
    return folder


def write_code(config: PreTrainedConfig, folder: Path) -> None:
    """
    Write the code of a config's family to `folder`, and name it in the config's `auto_map`, and its pipelines in
    `custom_pipelines`.

    A config of a derived class gets the code of the family that it has the `model_type` of; one with a `model_type` of
    its own loses the entries of `auto_map` that name files of the folder it came from. Entries of classes that
    `register_for_auto_class` marked, whose files transformers has already written to `folder`, stay.
    """
    family = FAMILIES.get(type(config).model_type)  # an instance may have that of the folder it came from
    code, auto_map = ({}, {}) if family is None else _family_code(family.model_type)
    registered = {
        auto: name
        for auto, name in config.auto_map.items()
        if isinstance(name, str) and (file := f"{name.partition('.')[0]}.py") not in code and (folder / file).is_file()
    }
    on_the_hub = {auto: name for auto, name in config.auto_map.items() if family is None and "--" in str(name)}
    _write_files(code, folder)
    config.auto_map = {**auto_map, **on_the_hub, **registered}
    if not config.auto_map:
        del config.auto_map
    if family is not None and (pipelines := _pipelines(family, config.architectures)):
        config.custom_pipelines = {**getattr(config, "custom_pipelines", {}), **pipelines}


def _pipelines(family: Family, architectures: list[str] | None) -> dict[str, dict[str, Any]]:
    """`custom_pipelines` of a model of these classes: the family's tasks that it can do, and where their code is."""
    return {
        task: {"impl": f"pipeline_{family.model_type}.{name}", "pt": [PIPELINE_MODELS[task]], "type": "text"}
        for task, name in family.pipelines.items()
        if family.classes[PIPELINE_MODELS[task]] in (architectures or ())
    }


@functools.cache
def _family_code(model_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """Flat code of a family, file name to source, and the `auto_map` that names its classes."""
    family = FAMILIES[model_type]
    classes = {auto: family.load(name) for auto, name in {"AutoConfig": family.config, **family.classes}.items()}
    auto_map = {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()}
    modules = {*classes.values(), *(family.load(name) for name in family.pipelines.values())}
    return flatten_code(cls.__module__ for cls in modules), auto_map


def _write_files(code: dict[str, str], folder: Path) -> None:
    for name, source in code.items():
        (folder / name).write_text(source, encoding="utf-8")


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
        HfHubHTTPError: if the Hub refuses the upload.
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
    Find the row of `hf_efficient.auto.FAMILIES` that a model belongs to.

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
