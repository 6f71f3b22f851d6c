"""Tokenised text in blocks: rows of limited length, each framed by the tokenizer's special tokens."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text_files import check_arrow_file


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when the packing of equal settings changes.
_PACKING_VERSION = 1


def _special_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    for probe in ("a", "the", "1", "."):
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        framed = tokenizer(probe)["input_ids"]
        for start in range(len(framed) - len(bare) + 1):
            if bare and framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
    raise ValueError("Can't tell which special tokens the tokenizer adds: it does not keep a text's tokens together.")


def _block_ends(length: int, body: int, min_tail: int) -> Iterator[int]:
    """Ends of the blocks of a document of `length` tokens: full blocks, and a last one that is not tiny."""
    tail = length % body
    full = length - tail
    if tail and full and tail < min_tail:
        middle = full - body + (body + tail + 1) // 2
        yield from range(body, full, body)
        yield from (middle, length)
        return
    yield from range(body, full + 1, body)
    if tail:
        yield length


def packing_settings(
    tokenizer: "PreTrainedTokenizerBase", block_size: int, cross_documents: bool, word_ids: bool, min_tail: int
) -> dict[str, Any]:
    """
    Collect the arguments of [`pack_batch`], besides the texts and the tokenizer, from those of [`pack_blocks`].

    Raises:
        ValueError: if `block_size` leaves no room for text, or `word_ids` are asked of a tokenizer that has none.
    """
    frame = _special_frame(tokenizer)
    body = block_size - len(frame[0]) - len(frame[1])
    if body < 1:
        raise ValueError(f"A block of {block_size} tokens has no room beside the special tokens: raise `block_size`.")
    if word_ids and not tokenizer.is_fast:
        raise ValueError("Whole words need a fast tokenizer (one with a tokenizer.json).")
    settings = {"body": body, "frame": frame, "cross_documents": cross_documents, "word_ids": word_ids}
    return {**settings, "min_tail": min_tail}


def pack_batch(
    batch: dict[str, list[str]],
    tokenizer: "PreTrainedTokenizerBase",
    body: int,
    frame: tuple[list[int], list[int]],
    cross_documents: bool,
    word_ids: bool,
    min_tail: int,
) -> dict[str, list[list[int]]]:
    """Turn the documents of a batch, its column `text`, into rows of `input_ids`, with `word_ids` on request."""
    prefix, suffix = frame
    encoded = tokenizer(
        batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    columns = {"input_ids": encoded["input_ids"]}
    if word_ids:
        columns["word_ids"] = [
            [-1 if word is None else word for word in encoded.word_ids(i)] for i in range(len(encoded["input_ids"]))
        ]
    if cross_documents:
        columns = _join_documents(columns, suffix)
    edges = {"input_ids": (prefix, suffix), "word_ids": ([-1] * len(prefix), [-1] * len(suffix))}
    rows: dict[str, list[list[int]]] = {name: [] for name in columns}
    for name, documents in columns.items():
        before, after = edges[name]
        for document in documents:
            start = 0
            for end in _block_ends(len(document), body, min_tail):
                rows[name].append([*before, *document[start:end], *after])
                start = end
    return rows


def _join_documents(columns: dict[str, list[list[int]]], separator: list[int]) -> dict[str, list[list[int]]]:
    """Join documents with a separator such as [SEP] between them; word numbers continue across documents."""
    joined: dict[str, list[int]] = {name: [] for name in columns}
    first_word = 0
    for i, ids in enumerate(columns["input_ids"]):
        between = separator if i else []
        joined["input_ids"] += [*between, *ids]
        if "word_ids" in columns:
            words = columns["word_ids"][i]
            joined["word_ids"] += [-1] * len(between)
            joined["word_ids"] += [word if word < 0 else word + first_word for word in words]
            first_word += max(words, default=-1) + 1
    return {name: [document] for name, document in joined.items()}


def _cache_key(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", settings: dict[str, Any]) -> str:
    """A cache key that depends on the text, the tokenizer and the settings alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: Any = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        described = json.loads(backend.to_str())
        # State of the tokenizer's last call, not part of its definition.
        for state in ("truncation", "padding"):
            described.pop(state, None)
    key = hashlib.blake2b(json.dumps([_PACKING_VERSION, described, settings], sort_keys=True).encode(), digest_size=16)
    for batch in dataset.iter(batch_size=1000):
        for text in batch["text"]:
            data = text.encode("utf-8", "surrogatepass")
            key.update(len(data).to_bytes(8, "little"))
            key.update(data)
    return key.hexdigest()


def pack_blocks(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    *,
    cross_documents: bool = False,
    word_ids: bool = False,
    min_tail: int = 8,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> "Dataset":
    """
    Tokenise documents and cut them into rows of at most `block_size` tokens.

    A row has the form that the tokenizer gives a single text, such as [CLS], up to `block_size - 2` tokens, [SEP]. The
    last row of a document may be short; the collator pads it. The result is cached on disk by text, tokenizer and
    settings.

    Args:
        dataset (`datasets.Dataset`):
            Documents in a column `text`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its special tokens frame each row.
        block_size (`int`):
            Longest row, special tokens included.
        cross_documents (`bool`, *optional*, defaults to `False`):
            Let a row go on into the next document, after a separator: hardly any padding, but unrelated text in one
            row. Documents are joined in groups of 1,000.
        word_ids (`bool`, *optional*, defaults to `False`):
            Add a column `word_ids` (-1 for special tokens), as whole-word masking needs it.
        min_tail (`int`, *optional*, defaults to 8):
            A last row of fewer tokens shares those of the row before it evenly.
        num_proc (`int`, *optional*):
            Number of processes.
        cache_dir (`str`, *optional*):
            Where the rows are cached, by default in the cache of `datasets`.

    Returns:
        `datasets.Dataset`: rows with a list `input_ids`.

    Raises:
        ValueError: if `block_size` leaves no room for text, `word_ids` are asked of a tokenizer that has none, or the
            file of the cache is cut off.
    """
    import datasets

    settings = packing_settings(tokenizer, block_size, cross_documents, word_ids, min_tail)
    columns = ["input_ids", "word_ids"] if word_ids else ["input_ids"]
    key = _cache_key(dataset, tokenizer, settings)
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_efficient_blocks")
    folder.mkdir(parents=True, exist_ok=True)
    for kept in folder.glob(f"{key}*.arrow"):
        check_arrow_file(kept)
    rows = dataset.map(
        pack_batch,
        batched=True,
        batch_size=1000,
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, **settings},
        features=datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in columns}),
        num_proc=num_proc,
        load_from_cache_file=True,
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        desc="Tokenising",
    )
    logger.info("%d documents became %d rows of at most %d tokens.", len(dataset), len(rows), block_size)
    return rows
