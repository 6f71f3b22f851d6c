"""What a user of an exported model does, in a process of its own.

    python -I remote_client.py SCENARIO '{"argument": ...}'

prints JSON on its last line. Without `--installed ROOT` the process cannot import `hf_efficient`, wherever it lies.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from itertools import zip_longest
from typing import Any


TEXT = "the cat saw a dog"
GREEDY = {"max_new_tokens": 5, "do_sample": False}


class NoPackage(MetaPathFinder):
    """Makes `hf_efficient` unimportable, as on a machine where it was never installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_efficient":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def outputs_of(model) -> list[list]:
    """All output tensors of a model for one fixed batch of odd sizes, with padding, as nested lists."""
    import torch

    ids = torch.tensor([[0, 5, 7, 11, 6, 9, 2], [0, 4, 8, 2, 1, 1, 1], [0, 12, 3, 10, 5, 2, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    if model.config.is_encoder_decoder and not type(model).__name__.endswith("Classification"):
        batch["decoder_input_ids"] = ids.flip(1)
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: value[None] for name, value in batch.items()}
    with torch.no_grad():
        outputs = model.eval()(**batch)
    return [value.tolist() for value in outputs.to_tuple() if torch.is_tensor(value)]


def describe(model) -> dict:
    """Where a model's class comes from, a mark that a test set in its code, and what it computes."""
    mark = getattr(sys.modules[type(model).__module__], "MARK", None)
    return {"module": type(model).__module__, "mark": mark, "outputs": outputs_of(model)}


def load(auto_class: str, name: str, **kwargs) -> dict:
    """Loads a model by an Auto class; a weight that the file lacks would be random, so it is an error."""
    import transformers

    model, info = getattr(transformers, auto_class).from_pretrained(name, output_loading_info=True, **kwargs)
    assert not info["missing_keys"], info
    return describe(model)


def resave(auto_class: str, source: str, folders: list[str], by_class: Sequence[bool] = ()) -> dict:
    """Loads a model and saves it to the first folder, loads that one and saves it to the second, and so on.

    Where `by_class` is true the class itself is fetched, as by a library that bypasses the Auto classes. Gives the
    names of the classes' modules, and what a model computes that is loaded from the last folder.
    """
    with contextlib.suppress(ModuleNotFoundError):
        import hf_efficient  # noqa: F401  (registers the models, where it is installed)
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    modules = []
    for folder, fetched in zip_longest(folders, by_class):
        if fetched:
            with open(f"{source}/config.json") as file:
                name = json.load(file)["auto_map"][auto_class]
            model = get_class_from_dynamic_module(name, source).from_pretrained(source)
        else:
            model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        modules.append(type(model).__module__)
        source = folder
    return {"modules": modules, **load(auto_class, source, trust_remote_code=True)}


def resave_all(models: dict[str, dict]) -> dict:
    """`resave` for each of several models, in one process."""
    return {name: resave(**arguments) for name, arguments in models.items()}


def load_all(models: dict[str, list[str]]) -> dict:
    """Loads models with remote code, each by its Auto class from its folder."""
    return {name: load(*place, trust_remote_code=True) for name, place in models.items()}


def classify(model: str, **kwargs) -> dict:
    """The answer of a pipeline."""
    from transformers import pipeline

    return pipeline(model=model, **kwargs)(TEXT)[0]


def generate(model: str, **kwargs) -> list[int]:
    """The ids that the text-generation pipeline gives, the prompt's among them."""
    from transformers import GenerationConfig, pipeline

    # A whole config: transformers 5.17 warns of its own pipeline when it is given single arguments.
    greedy = GenerationConfig(**GREEDY)
    (answer,) = pipeline("text-generation", model=model, **kwargs)(TEXT, return_tensors=True, generation_config=greedy)
    return list(answer["generated_token_ids"])


def write(model: str, **kwargs) -> list[int]:
    """The ids that an encoder-decoder writes after a source."""
    import transformers

    inputs = transformers.AutoTokenizer.from_pretrained(model, **kwargs)(TEXT, return_tensors="pt")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(model, **kwargs).eval()
    return list(loaded.generate(**inputs, **GREEDY)[0].tolist())


def summarize(model: str, documents: list[str], again: str, **kwargs) -> dict:
    """The answers of the summarization pipeline for a folder, and for the one that its model saves itself to, which was
    loaded without a pipeline; and the tokens of the longest document."""
    import transformers

    pipe = transformers.pipeline("summarization", model=model, trust_remote_code=True, device="cpu")
    found = {"first": pipe(documents, **kwargs), "module": type(pipe).__module__}
    network = transformers.AutoModelForSeq2SeqLM.from_pretrained(model, trust_remote_code=True)
    network.save_pretrained(again)
    pipe.tokenizer.save_pretrained(again)
    pipe = transformers.pipeline("summarization", model=again, trust_remote_code=True, device="cpu")
    found["again"] = pipe(documents[:1], **kwargs)
    return {**found, "tokens": max(len(pipe.tokenizer(text).input_ids) for text in documents)}


def folders(folders: dict[str, str]) -> dict:
    """Each folder by its Auto class with remote code, the refusal without, tokenizer and pipeline."""
    import transformers

    answer: dict = {"loaded": {}, "refused": {}}
    for auto_class, folder in folders.items():
        answer["loaded"][auto_class] = load(auto_class, folder, trust_remote_code=True)
        try:
            getattr(transformers, auto_class).from_pretrained(folder)
        except ValueError as error:
            answer["refused"][auto_class] = str(error)
    if "AutoModelForCausalLM" in folders:
        answer["generated"] = generate(folders["AutoModelForCausalLM"], trust_remote_code=True)
    if "AutoModelForSeq2SeqLM" in folders:
        answer["summary"] = write(folders["AutoModelForSeq2SeqLM"], trust_remote_code=True)
    folder = folders["AutoModelForSequenceClassification"]
    answer["ids"] = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT).input_ids
    answer["pipeline"] = classify(folder, task="text-classification", trust_remote_code=True)
    return answer


def folders_all(families: dict[str, dict[str, str]]) -> dict:
    """`folders` for each of several families, in one process."""
    return {family: folders(places) for family, places in families.items()}


def quantized(folder: str, again: str) -> dict:
    """A quantised folder by remote code: outputs, a pipeline, the refusal to train, and saved anew."""
    import torch
    import transformers

    auto_class, remote = "AutoModelForCausalLM", {"trust_remote_code": True}
    answer: dict = {"loaded": load(auto_class, folder, **remote)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **remote)
    answer["quantizer"] = type(model.hf_quantizer).__module__
    pipe = transformers.pipeline("text-generation", model=folder, trust_remote_code=True)
    answer["generated"] = pipe(TEXT, return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    try:
        model.train()(torch.tensor([[0, 5, 7]]))
    except ValueError as error:
        answer["refused"] = str(error)
    model.eval().save_pretrained(again)
    answer["again"] = load(auto_class, again, **remote)
    return answer


def quantized_beside(folder: str, first: str) -> dict:
    """A quantised folder by the package's class and by its own, after the one or the other was imported first."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = "modeling_scaling_transformer.ScalingTransformerForCausalLM"
    if first == "package":
        import hf_efficient
    remote = get_class_from_dynamic_module(name, folder).from_pretrained(folder)
    import hf_efficient

    package = hf_efficient.ScalingTransformerForCausalLM.from_pretrained(folder)
    return {"loaded": describe(package), "remote": describe(remote)}


def repository(repo_id: str, pinned: str, task: str | None = None) -> dict:
    """Newest and pinned revision of a repository, and a pipeline on it."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 512  # of a broken download the client keeps whole chunks only
    auto_class = "AutoModelForSequenceClassification"
    return {
        "newest": load(auto_class, repo_id, trust_remote_code=True),
        "pinned": load(auto_class, repo_id, trust_remote_code=True, revision=pinned),
        "pipeline": classify(repo_id, task=task, trust_remote_code=True),
    }


def both_classes(folder: str) -> dict:
    """The package's class, found without remote code, and the flattened class, in one process; both train."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    import hf_efficient.hub

    package = AutoModelForSequenceClassification.from_pretrained(folder)
    remote_class: Any = get_class_from_dynamic_module(f"modeling_tupe.{type(package).__name__}", folder)
    remote = remote_class.from_pretrained(folder)
    gradients = []
    for model in (package, remote):
        model.eval()(input_ids=torch.tensor([[0, 5, 9, 2]]), labels=torch.tensor([1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10
    try:
        hf_efficient.hub.export(remote, None, f"{folder}-again")
    except TypeError as error:
        refusal = str(error)
    return {
        "package": describe(package),
        "remote": describe(remote),
        "same_gradients": gradients[0].keys() == gradients[1].keys()
        and all(
            torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)
            for name, gradient in gradients[0].items()
        ),
        "export_of_remote": refusal,
    }


def main(scenario: str, arguments: str, *installed: str) -> None:
    if installed:
        sys.path.insert(0, installed[1])
    else:
        sys.meta_path.insert(0, NoPackage())
    import torch

    torch.set_num_threads(1)
    answer = globals()[scenario](**json.loads(arguments))
    answer["package_seen"] = "hf_efficient" in sys.modules
    print("\n" + json.dumps(answer))  # a prompt that nobody answered may stand on the line before


if __name__ == "__main__":
    main(*sys.argv[1:])
