"""Train a fast tokenizer with BERT's special tokens and layout on any corpus.

python training/train_tokenizer.py --corpus builtin --output_dir tokenizer
python training/train_tokenizer.py --corpus "texts/*.txt" --algorithm bpe --vocab_size 30000 --output_dir tokenizer
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser, PreTrainedTokenizerFast

from hf_efficient.trainer.arguments import CorpusArguments, HelpFormatter


if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

MAX_ALPHABET = 1000
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass
class TokenizerArguments(CorpusArguments):
    """What to train the tokenizer on, and how."""

    output_dir: str = field(metadata={"help": "Folder that gets tokenizer.json and its settings."})
    algorithm: str = field(default="wordpiece", metadata={"help": "How units are learned: wordpiece or bpe (bytes)."})
    vocab_size: int = field(default=8192, metadata={"help": "Number of ids, the five special tokens included."})
    lowercase: bool = field(default=True, metadata={"help": "Lower-case the text and drop accents. --no_lowercase"})
    model_max_length: int = field(default=512, metadata={"help": "Longest input of the model, in tokens."})


def _wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    """Trained WordPiece model with BERT's normalisation."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # The library numbers "##a", "##b", ... in the order of a hash table, so that the same text gives another
    # vocabulary each time. They keep their places when they go first.
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    by_frequency = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(by_frequency[: min(MAX_ALPHABET, vocab_size // 4)])
    inside_words = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str("x" + c)) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), *inside_words],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token=SPECIAL_TOKENS["unk_token"]))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = tokenizer.decoder
    return trained


def _bpe(texts: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    """Trained BPE model over bytes, which knows every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    steps: list[Any] = [normalizers.NFC()]
    if lowercase:
        steps = [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
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
            `"wordpiece"` as BERT's, or `"bpe"` over bytes as RoBERTa's.
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
    )


class Texts:
    """The texts of a dataset, with a progress bar each time they are read."""

    def __init__(self, dataset: "Dataset", column: str = "text"):
        self.dataset = dataset.select_columns([column])
        self.column = column

    def __iter__(self) -> Iterator[str]:
        from tqdm.auto import tqdm

        with tqdm(total=len(self.dataset), desc="Reading for the tokenizer", unit=" documents") as progress:
            for batch in self.dataset.iter(batch_size=100):
                yield from batch[self.column]
                progress.update(len(batch[self.column]))


def main() -> None:
    from hf_efficient.utils.atomic_write import write_files

    parser = HfArgumentParser(
        TokenizerArguments,  # type: ignore[arg-type]
        description=__doc__,
        usage="%(prog)s --output_dir FOLDER [--setting value ...]",
        formatter_class=HelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses()
    tokenizer = train_tokenizer(
        Texts(args.load()),
        algorithm=args.algorithm,
        vocab_size=args.vocab_size,
        lowercase=args.lowercase,
        model_max_length=args.model_max_length,
    )
    write_files(args.output_dir, tokenizer.save_pretrained)
    print(f"A {args.algorithm} tokenizer of {len(tokenizer)} ids is in {args.output_dir}.")


if __name__ == "__main__":
    main()
