"""A tiny corpus with rare words, and a WordPiece tokenizer that splits them."""

from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


PIECES = ["qu", "##ok", "##ka", "ax", "##olotl", "the", "a", "sees", ",", "ok", "##a"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUOKKA, AXOLOTL = (5, 6, 7), (8, 9)
TEXTS = [
    "The Quokka sees the quokka,quokka",
    "the axolotl sees a zebra",
    "QUOKKA",
    "the quokka axolotl sees the axolotl",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *PIECES])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    )


def make_corpus() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})
