"""Tokenizers made from a text: WordPiece and BPE for encoders; characters, words and subwords for language models."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

MAX_ALPHABET = 1000
# Characters after which a run without spaces is cut, for training, which takes the square of the longest run, and for
# encoding: WordPiece knows no longer words. BPE counts bytes.
MAX_WORD, MAX_WORD_BYTES = 100, 512
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# Under which generation and evaluation look for them.
SENTENCE_TOKENS = {"bos_token": SPECIAL_TOKENS["cls_token"], "eos_token": SPECIAL_TOKENS["sep_token"]}
# Combining marks that belong to no script of their own and are written on Latin, Greek, Cyrillic and symbols, and
# selectors of variants. Those on Arabic (U+064B), Devanagari (U+0951) and kana (U+3099), say, are not among them.
_ACCENTS = "".join(
    rf"\x{{{first:X}}}-\x{{{last:X}}}"
    for first, last in (
        (0x300, 0x36F),
        (0x485, 0x486),
        (0x1AB0, 0x1ACE),
        (0x1DC0, 0x1DFF),
        (0x20D0, 0x20DC),
        (0x20E1, 0x20E1),
        (0x20E5, 0x20F0),
        (0xFE00, 0xFE0F),
        (0xFE20, 0xFE2D),
        (0xE0100, 0xE01EF),
    )
)
UNKNOWN, END, PAD = "<unk>", "<eos>", "<pad>"
END_OF_TEXT = "<|endoftext|>"


def _bounded(pre_tokenizer: Any, length: int) -> Any:
    """Let a pre-tokenizer cut words that are longer."""
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{{length}}}"), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizer, cut])


def _strip_accents() -> list[Any]:
    """Steps that drop the accents of Latin, Greek and Cyrillic and the selectors of variants, but not the vowels, tones
    and voicing marks that are written as marks in other scripts."""
    from tokenizers import Regex, normalizers

    return [normalizers.NFD(), normalizers.Replace(Regex(rf"[{_ACCENTS}]"), "")]


def _count_characters(tokenizer: "Tokenizer", texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    for character in [c for c in counts if c.isspace()]:
        del counts[character]
    return counts


def _alphabet(tokenizer: "Tokenizer", counts: Counter[str], vocab_size: int) -> tuple[list[list[str]], list[str]]:
    """
    Choose the characters to learn words from; the others come after the words, if ids are left.

    They are the 1000 most frequent, a quarter of the ids at most. More are taken as long as they are more than one in
    10,000 characters of the text and fill no more than half of the ids.

    Returns:
        `tuple`: for each character to learn from its tokens, which are itself and, unless it always stands alone, its
        form inside words; and the tokens of the others, the most frequent first.
    """

    def forms(character: str) -> list[str]:
        word = tokenizer.normalizer.normalize_str(f"x{character}")
        stands_alone = len(tokenizer.pre_tokenizer.pre_tokenize_str(word)) > 1
        return [character] if stands_alone else [character, f"##{character}"]

    ordered = sorted(counts, key=lambda c: (-counts[c], c))
    size = min(MAX_ALPHABET, vocab_size // 4, len(ordered))
    tokens = [forms(character) for character in ordered]
    missing = sum(counts[c] for c in ordered[size:])
    ids = sum(map(len, tokens[:size]))
    while missing > 1e-4 * counts.total() and ids + len(tokens[size]) <= vocab_size // 2:
        missing -= counts[ordered[size]]
        ids += len(tokens[size])
        size += 1
    return tokens[:size], [token for forms in tokens[size:] for token in forms]


def _wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    """
    Train a WordPiece model with BERT's normalisation, which drops control, invisible (soft hyphens, joiners of zero
    width) and private-use characters. While ids are left every other character of the texts has one.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    unknown = SPECIAL_TOKENS["unk_token"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    cleaning: list[Any] = [normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)]
    tokenizer.normalizer = normalizers.Sequence(cleaning + (_strip_accents() if lowercase else []))
    tokenizer.pre_tokenizer = _bounded(pre_tokenizers.BertPreTokenizer(), MAX_WORD)
    tokenizer.decoder = decoders.WordPiece()
    characters, others = _alphabet(tokenizer, _count_characters(tokenizer, texts), vocab_size)
    alphabet = sorted(forms[0] for forms in characters)
    # The library numbers "##a", "##b", ... in the order of a hash table, so that the same text gives another
    # vocabulary each time. They keep their places when they go first.
    inside_words = sorted(form for forms in characters for form in forms[1:])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), *inside_words],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab()
    for token in others[: max(0, vocab_size - len(vocab))]:
        vocab[token] = len(vocab)
    trained = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=MAX_WORD))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = tokenizer.decoder
    return trained


def _bpe(texts: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    """Train a BPE model over bytes, which knows every text that is left when accents are dropped."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    steps: list[Any] = [normalizers.NFC()]
    if lowercase:
        steps = [normalizers.Lowercase(), *_strip_accents()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = _bounded(pre_tokenizers.ByteLevel(add_prefix_space=True), MAX_WORD_BYTES)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


ALGORITHMS = {"wordpiece": _wordpiece, "bpe": _bpe}


def train_tokenizer(
    texts: Iterable[str],
    *,
    algorithm: str = "wordpiece",
    vocab_size: int = 8192,
    lowercase: bool = True,
    model_max_length: int = 512,
) -> PreTrainedTokenizerFast:
    """
    Learn a vocabulary from texts. The same texts and settings give the same tokenizer.

    Ids 0 to 4 are [PAD], [UNK], [CLS], [SEP] and [MASK]; a text becomes `[CLS] A [SEP]`, a pair
    `[CLS] A [SEP] B [SEP]`.

    Args:
        texts (`Iterable[str]`):
            Documents.
        algorithm (`str`, *optional*, defaults to `"wordpiece"`):
            `"wordpiece"` as BERT's, which drops invisible and private-use characters, or `"bpe"` over bytes as
            RoBERTa's, which keeps them.
        vocab_size (`int`, *optional*, defaults to 8192):
            Number of ids. Fewer come out if the text does not hold as many units.
        lowercase (`bool`, *optional*, defaults to `True`):
            Lower-case the text and drop accents.
        model_max_length (`int`, *optional*, defaults to 512):
            Truncate to this length when asked to truncate.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]

    Raises:
        ValueError: for an unknown algorithm or a vocabulary too small for it.
    """
    from tokenizers import processors

    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}.")
    smallest = 256 + len(SPECIAL_TOKENS) if algorithm == "bpe" else 2 * len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest} for {algorithm}, got {vocab_size}.")
    if iter(texts) is texts:  # can be read only once
        texts = list(texts)
    tokenizer = ALGORITHMS[algorithm](texts, vocab_size, lowercase)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    cls, sep = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **SPECIAL_TOKENS,
        **SENTENCE_TOKENS,
    )


class Texts:
    """Texts of a dataset, with a progress bar each time they are read."""

    def __init__(self, dataset: "Dataset", column: str = "text"):
        self.dataset = dataset.select_columns([column])
        self.column = column

    def __iter__(self) -> Iterator[str]:
        from tqdm.auto import tqdm

        with tqdm(total=len(self.dataset), desc="Reading for the tokenizer", unit=" documents") as progress:
            for batch in self.dataset.iter(batch_size=100):
                yield from batch[self.column]
                progress.update(len(batch[self.column]))


def add_extra_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add special tokens that the tokenizer lacks: never a target of masking, never drawn as a random token."""
    missing = [token for token in tokens if token not in tokenizer.all_special_tokens]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Make a tokenizer of characters: those of the texts, and the line break that stands between them, in the order of
    Unicode, then `<eos>`, `<pad>`, and `<unk>` for all others."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = {"\n"}
    for text in texts:
        characters.update(text)
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    for token in (END, PAD, UNKNOWN):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer, END, pad_token=PAD, unk_token=UNKNOWN)


def word_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """
    Make a tokenizer of words, which stand between white space, the most frequent first, as an adaptive softmax needs
    them; the end of a line is `<eos>`, as is usual for Penn Treebank and WikiText.

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
    return _fast(tokenizer, END, unk_token=UNKNOWN)


def _byte_pairs(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> "Tokenizer":
    """Train BPE over bytes as GPT-2's, whose first ids are special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(special_tokens)
    if vocab_size < least:
        tokens = " and ".join(special_tokens)
        raise ValueError(
            f"A vocabulary of subwords needs at least {least} ids (all bytes, {tokens}), not {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _bounded(pre_tokenizers.ByteLevel(add_prefix_space=False), MAX_WORD_BYTES)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def subword_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerBase:
    """Train BPE over bytes as GPT-2's, which knows every text; `<|endoftext|>` ends a document."""
    return _fast(_byte_pairs(texts, vocab_size, [END_OF_TEXT]), END_OF_TEXT)


def seq2seq_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerBase:
    """Train BPE over bytes for an encoder-decoder: `<pad>`, with the id 0, begins a target, and `<eos>`, with the id 1,
    ends every text."""
    from tokenizers import processors

    tokenizer = _byte_pairs(texts, vocab_size, [PAD, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return _wrapped(tokenizer, eos_token=END, pad_token=PAD)


def _fast(tokenizer: "Tokenizer", end: str, **special: str) -> PreTrainedTokenizerBase:
    """Wrap a tokenizer for language models: `end` ends a text and stands between the texts of a pair. It pads batches
    too, if there is no `pad_token`."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {end} $B", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    return _wrapped(tokenizer, **{"eos_token": end, "pad_token": end, **special})


def _wrapped(tokenizer: "Tokenizer", **special: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
