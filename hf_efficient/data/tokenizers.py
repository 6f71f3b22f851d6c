"""Tokenizers of language models: characters, words, and subwords of bytes."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN, END = "<unk>", "<eos>"
END_OF_TEXT = "<|endoftext|>"


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The characters of the texts, and the line break that stands between them, in the order of Unicode, then `<unk>`
    for all others."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = {"\n"}
    for text in texts:
        characters.update(text)
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, UNKNOWN: len(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer, unk_token=UNKNOWN)


def word_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """
    What stands between white space, the most frequent first, as an adaptive softmax needs it; the end of a line is
    `<eos>`, as is usual for Penn Treebank and WikiText.

    Args:
        texts (`Iterable[str]`): texts whose words get ids.
        vocab_size (`int`, *optional*): keep so many, `<unk>` and `<eos>` included; all by default.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    counts: Counter[str] = Counter({UNKNOWN: 0, END: 0})
    for text in texts:
        counts.update(text.split())
        counts[END] += text.count("\n")
    if vocab_size is not None and vocab_size < 3:
        raise ValueError(f"A vocabulary of words needs at least 3 ids, not {vocab_size}.")
    words = sorted(counts.keys() - {UNKNOWN, END}, key=lambda word: (-counts[word], word))
    kept = words if vocab_size is None else words[: vocab_size - 2]
    counts[UNKNOWN] += counts.total() - sum(counts[word] for word in (*kept, UNKNOWN, END))
    ranked = sorted([*kept, UNKNOWN, END], key=lambda word: (-counts[word], word))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(ranked)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace("\n", f" {END} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # A space before the first word too: pipelines decode what follows a prompt by itself.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("^"), " "), decoders.Fuse()])
    return _fast(tokenizer, unk_token=UNKNOWN, eos_token=END)


def subword_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerBase:
    """BPE over bytes as GPT-2's, which knows every text; `<|endoftext|>` ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"A vocabulary of subwords needs at least 257 ids (all bytes and an end), not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer, eos_token=END_OF_TEXT)


def _fast(tokenizer: "Tokenizer", **special: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
