"""Answers of the demo page: models of a folder that fill masks, write, and summarise, with limits to what they are
given. This knows nothing of the page, which shows a `PageError` as it is."""

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    GPT2LMHeadModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from hf_efficient import from_gpt2
from hf_efficient.utils.cache_naming import cache_kwarg


MOST_CHARACTERS = {"fill": 4_000, "write": 4_000, "sparse": 4_000, "summarize": 200_000}
MOST_NEW_TOKENS = 400
_MASK = re.compile(r"\[MASK\]|<mask>|_{3,}")


@dataclass(frozen=True)
class Job:
    """
    Something that a model of the page does.

    Args:
        name (`str`): of its folder, and of its option.
        auto_class (`type`): loads it.
        trained_by (`str`): the command that makes such a model.
        of_demo (`str`, *optional*): its folder among those of `make demo ALL=1`, which leaves no twins.
    """

    name: str
    auto_class: Any
    trained_by: str
    of_demo: str | None = None


JOBS = {
    job.name: job
    for job in (
        Job("fill", AutoModelForMaskedLM, "hf-efficient pretrain tupe_small", "pretrained"),
        Job("write", AutoModelForCausalLM, "hf-efficient train-lm srupp_small", "language-model"),
        Job("dense", AutoModelForCausalLM, "hf-efficient train-lm"),
        Job("sparse", AutoModelForCausalLM, "hf-efficient train-lm scaling_transformer_small"),
        Job("summarize", AutoModelForSeq2SeqLM, "hf-efficient train-seq2seq terraformer_small", "summarizer"),
    )
}


class PageError(Exception):
    """Message for a visitor whose request cannot be answered, or for which a model is missing."""


def find_folders(root: Path, given: dict[str, Path | None]) -> dict[str, Path]:
    """
    Find the folders of models.

    Args:
        root (`Path`): with a folder for each job, or of a demo.
        given (`dict[str, Path | None]`): folders by the names of [`JOBS`], which come first.

    Returns:
        `dict[str, Path]`: those that hold a model.

    Raises:
        PageError: if a folder was given that holds none.
    """
    found = {}
    for name, job in JOBS.items():
        places = [given[name]] if given.get(name) else [root / name, root / (job.of_demo or name)]
        models = [place for place in places if place is not None and (place / "config.json").is_file()]
        if models:
            found[name] = models[0]
        elif given.get(name):
            raise PageError(f"{given[name]} holds no model: it has no config.json.")
    return found


class Models:
    """
    Models of a folder, each loaded when it is first asked for.

    Args:
        folders (`dict[str, Path]`): as [`find_folders`] gives them.
    """

    def __init__(self, folders: dict[str, Path]):
        self.folders = folders
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()

    def missing(self, *names: str) -> str | None:
        """Say which of these models are missing, and how they are made; `None` where none is."""
        jobs = [JOBS[name] for name in names if name not in self.folders]
        if not jobs:
            return None
        what = " and ".join(f"`{job.name}`" for job in jobs)
        made = "; ".join(f"`{job.trained_by}` makes one" for job in jobs)
        return f"There is no model {what} here. Train one ({made}), and put it into a folder of that name."

    def load(self, name: str) -> tuple[Any, Any]:
        """
        Load a model and its tokenizer.

        Raises:
            PageError: if it is missing or cannot be read.
        """
        if missing := self.missing(name):
            raise PageError(missing)
        with self._lock:
            if name not in self._loaded:
                folder = str(self.folders[name])
                try:
                    model = JOBS[name].auto_class.from_pretrained(folder).eval()
                    tokenizer = AutoTokenizer.from_pretrained(folder)
                except Exception as error:
                    raise PageError(f"The model `{name}` cannot be loaded: {error}") from error
                # The dense model that gives the same logits runs by the same compiled code as a sparse one.
                model = from_gpt2(model).eval() if isinstance(model, GPT2LMHeadModel) else model
                self._loaded[name] = model, tokenizer
            return self._loaded[name]


def checked(text: Any, name: str) -> str:
    """
    Check what a visitor wrote.

    Raises:
        PageError: if it is empty, or longer than the page takes.
    """
    # Half of a character, which a browser may send, is none that a tokenizer reads.
    text = text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""
    if not text.strip():
        raise PageError("Write something first.")
    if len(text) > MOST_CHARACTERS[name]:
        raise PageError(f"The text has {len(text):,} characters; this page takes up to {MOST_CHARACTERS[name]:,}.")
    return text


def fill_mask(models: Models, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
    """
    Find the likeliest words for each mask of a text.

    Args:
        models ([`Models`]): with `fill`.
        text (`str`): with `[MASK]`, `<mask>` or `___` where words are missing.
        count (`int`, defaults to 5): of words for each.

    Returns:
        `list[list[tuple[str, float]]]`: words with their probabilities, for each mask.

    Raises:
        PageError: for a text that has no mask, or is too long, and without a model.
    """
    text = checked(text, "fill")
    model, tokenizer = models.load("fill")
    text, masks = _MASK.subn(tokenizer.mask_token, text)
    if masks == 0:
        raise PageError("Write [MASK] where a word is missing.")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    most = getattr(model.config, "max_position_embeddings", None) or ids.shape[1]
    if ids.shape[1] > most:
        raise PageError(f"The text has {ids.shape[1]:,} tokens; this model reads {most:,}.")
    with torch.inference_mode():
        probabilities = model(ids).logits[0].float().softmax(-1)
    found = []
    for place in (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]:
        best = probabilities[place].topk(count)
        words = [tokenizer.decode([index]).strip() for index in best.indices.tolist()]
        found.append(list(zip(words, best.values.tolist(), strict=True)))
    return found


def prompt_ids(tokenizer: Any, model: Any, prompt: str, count: int) -> torch.Tensor:
    """
    The ids of a prompt, `(1, length)`.

    Raises:
        PageError: for one without tokens, and one that leaves no room for `count` tokens in the table of positions.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
    if ids.shape[1] == 0:
        raise PageError("Write something first.")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and ids.shape[1] + count > most:
        raise PageError(
            f"The prompt has {ids.shape[1]:,} tokens. This model has room for {most:,}, and {count} are to be written: "
            "shorten it, or let it write less."
        )
    return ids


class _Stopped(StoppingCriteria):
    """Ends `generate` once nobody reads any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool)


def write(models: Models, prompt: str, count: int, temperature: float) -> Iterator[str]:
    """
    Go on with a text, word by word.

    Args:
        models ([`Models`]): with `write`.
        prompt (`str`): the beginning.
        count (`int`): most tokens that are written, up to 400.
        temperature (`float`): of sampling; 0 takes the likeliest token each time.

    Yields:
        `str`: the text so far.

    Raises:
        PageError: for a prompt that cannot be gone on with, and without a model.
    """
    prompt, count = checked(prompt, "write"), max(1, min(int(count), MOST_NEW_TOKENS))
    model, tokenizer = models.load("write")
    ids = prompt_ids(tokenizer, model, prompt, count)
    streamer, stopped = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), _Stopped()
    chance: dict[str, Any] = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 0.95}
    failures: list[Exception] = []

    def generate() -> None:
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stopped]),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **(chance if temperature > 0 else {"do_sample": False}),
            )
        except Exception as error:  # the page's own thread raises it
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    text = prompt
    try:
        for piece in streamer:
            text += piece
            yield text
    finally:
        stopped.event.set()
        thread.join()
    if failures:
        raise PageError(f"The model could not go on: {failures[0]}")


@dataclass
class Writer:
    """
    A model that writes token by token, the likeliest each time, and its time.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        ids (`torch.LongTensor` of shape `(1, length)`): the prompt, behind which it writes.
    """

    model: Any
    tokenizer: Any
    ids: torch.Tensor
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0  # of the tokens that were written, the prompt left out

    def __post_init__(self) -> None:
        self.cache: Any = DynamicCache(config=self.model.config)
        self._next = self._read(self.ids)

    def _read(self, ids: torch.Tensor) -> int:
        with torch.inference_mode():
            output = self.model(ids, **cache_kwarg(self.cache), use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    def write_token(self) -> None:
        """Write the next token, and find the one after it."""
        start = time.perf_counter()
        self.tokens.append(self._next)
        self._next = self._read(torch.tensor([[self._next]]))
        self.seconds += time.perf_counter() - start

    @property
    def has_ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] == self.tokenizer.eos_token_id

    @property
    def text(self) -> str:
        return self.tokenizer.decode([*self.ids[0].tolist(), *self.tokens], skip_special_tokens=True)

    @property
    def tokens_a_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def bytes_a_token(self) -> int:
        """Bytes of weights, keys and values that a token reads."""
        count = getattr(self.model, "weights_read_per_token", self.model.num_parameters)
        layers = [layer for layer in self.cache.layers if getattr(layer, "keys", None) is not None]
        past = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
        return count() * self.model.dtype.itemsize + past

    def figures(self) -> str:
        """Its speed, in a line."""
        rate = f"{self.tokens_a_second:.1f} tokens/s" if self.tokens else "waiting"
        return f"**{rate}**, {self.bytes_a_token / 1e6:.2f} MB read for a token"


def side_by_side(models: Models, prompt: str, count: int) -> Iterator[tuple[Writer, Writer]]:
    """
    Let the dense and the sparse model go on with a text, each with the same time: whichever has used less is next.

    Args:
        models ([`Models`]): with `dense` and `sparse`.
        prompt (`str`): the beginning.
        count (`int`): most tokens of each, up to 400.

    Yields:
        `tuple[Writer, Writer]`: both as they are after each token.

    Raises:
        PageError: for a prompt that cannot be gone on with, and without one of the models.
    """
    prompt, count = checked(prompt, "sparse"), max(1, min(int(count), MOST_NEW_TOKENS))
    if missing := models.missing("dense", "sparse"):
        raise PageError(missing)
    loaded = [models.load(name) for name in ("dense", "sparse")]
    pair = [Writer(model, tokenizer, prompt_ids(tokenizer, model, prompt, count)) for model, tokenizer in loaded]
    dense, sparse = pair
    while writing := [one for one in pair if len(one.tokens) < count and not one.has_ended]:
        min(writing, key=lambda one: one.seconds).write_token()
        yield dense, sparse


def summarize(models: Models, document: str, count: int) -> str:
    """
    Summarise a document; one that is longer than the model reads is summarised in pieces.

    Args:
        models ([`Models`]): with `summarize`.
        document (`str`): its text.
        count (`int`): most tokens of a piece's summary, up to 400.

    Raises:
        PageError: for a document that is empty or too long, and without a model.
    """
    document, count = checked(document, "summarize"), max(1, min(int(count), MOST_NEW_TOKENS))
    model, tokenizer = models.load("summarize")
    summarizer: Any = pipeline("summarization", model=model, tokenizer=tokenizer)  # type: ignore[call-overload]
    answer = summarizer(document, max_new_tokens=count)
    return answer[0]["summary_text"] or "(The model wrote nothing.)"
