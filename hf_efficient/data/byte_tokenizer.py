"""
Tokenizers with one token per byte, for character-level models such as those of enwik8.

An id is a byte's rank among those that occur in a text, as in SRU++'s character models (205 on enwik8), or the byte
itself where all 256 are there. From the command line:

    python -m hf_efficient.data.byte_tokenizer --text enwik8 --output_dir enwik8-tokenizer
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..utils.process import OneLineErrorParser, errors_in_one_line
from .text_files import find_files


if TYPE_CHECKING:
    import numpy

# The tokenizers library's error for a byte without an id; the only one it has is that <unk> is missing.
_REFUSAL = "for a byte outside the alphabet (hf_efficient.data.byte_tokenizer.encode_bytes says which)"


def _characters() -> list[str]:
    """The character that stands for each byte in the library's ByteLevel steps: itself where Latin-1 prints it, else
    one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]


def byte_alphabet(text: str | bytes) -> list[int]:
    """The bytes that occur in a text (in UTF-8), in rising order."""
    data = text.encode() if isinstance(text, str) else text
    return [byte for byte in range(256) if byte in data]


def alphabet_of_files(texts: Iterable[str]) -> list[int]:
    """
    The bytes that occur in files, compressed or not, in rising order.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for one that is damaged or no text.
    """
    found: set[int] = set()
    for text in texts:
        files = find_files(text)
        if not files:
            raise FileNotFoundError(f"There is no file {text!r}.")
        for file in files:
            with file.open_text() as stream:
                while part := stream.read(1 << 20):
                    found.update(byte_alphabet(part))
    return sorted(found)


def byte_tokenizer(
    alphabet: Iterable[int] | None = None,
    *,
    unk_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    mask_token: str | None = None,
    **kwargs,
) -> PreTrainedTokenizerFast:
    """
    Build a fast tokenizer with one token per byte. Decoding restores any UTF-8 text exactly. It is saved as
    `tokenizer.json` and loaded by `AutoTokenizer`, without this package too.

    It encodes about 1 MB a second and keeps much beside each id; for files there is [`encode_bytes`].

    Args:
        alphabet (`Iterable[int]`, *optional*): the bytes that have an id, which is their rank; all 256 by default.
        unk_token (`str`, *optional*): token for any other byte. Without it such a byte is an error.
        eos_token, pad_token, mask_token (`str`, *optional*): these have ids after the bytes, in this order with
            `unk_token` first; equal ones share an id. None by default, so that the ids are those of a model of bytes
            alone. An `eos_token` stands between the texts of a pair. They are never read from a text, where `"<eos>"`
            is five bytes as any other; set `tokenizer.split_special_tokens = False` to change that.
        kwargs: further arguments of `PreTrainedTokenizerFast`, such as `model_max_length`.

    Raises:
        ValueError: an alphabet that is empty or holds no bytes, a special token that is a single character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    members = list(range(256)) if alphabet is None else sorted(set(alphabet))
    if not members or members[0] < 0 or members[-1] > 255:
        raise ValueError(
            f"An alphabet holds at least one byte, all from 0 to 255; got {members[:3]} to {members[-1:]}."
        )
    named = {"unk_token": unk_token, "eos_token": eos_token, "pad_token": pad_token, "mask_token": mask_token}
    special = {name: token for name, token in named.items() if token is not None}
    for name, token in special.items():
        if len(token) < 2:
            raise ValueError(f"{name} {token!r} would be taken for a byte; name it with several characters.")
    characters = _characters()
    tokens = [characters[byte] for byte in members] + ([] if unk_token is None else [unk_token])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unk_token or _REFUSAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    if eos_token is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair=f"$A {eos_token} $B", special_tokens=[(eos_token, tokenizer.token_to_id(eos_token))]
        )
    settings = {
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**settings, **special, **kwargs})


@functools.lru_cache(maxsize=4)  # documents may be short
def _byte_table(tokenizer: PreTrainedTokenizerBase, size: int, unknown: int | None) -> tuple[bytes, bytes]:
    """The bytes that have an id, and the id of each byte, in the vocabulary of that size and with that unknown one."""
    vocab = tokenizer.get_vocab()
    ids = [vocab.get(character) for character in _characters()]
    known = bytes(byte for byte, index in enumerate(ids) if index is not None)
    return known, bytes((unknown or 0) if index is None else index for index in ids) if known else b""


def encode_bytes(data: bytes, tokenizer: PreTrainedTokenizerBase) -> "numpy.ndarray":
    """
    Encode a whole file at once. 100 MB take about a second; the text need not be UTF-8.

    Args:
        data (`bytes`): a text.
        tokenizer (`PreTrainedTokenizerBase`): made by [`byte_tokenizer`], or loaded again.

    Returns:
        `numpy.ndarray` of shape `(len(data),)`: uint8, read-only.

    Raises:
        ValueError: a byte outside the alphabet, named with its place, where there is no `unk_token`.
    """
    import numpy

    known, table = _byte_table(tokenizer, len(tokenizer), tokenizer.unk_token_id)
    if not known:
        raise ValueError("This is no tokenizer of single bytes: make one with byte_tokenizer.")
    if tokenizer.unk_token_id is None:
        unknown = data.translate(None, delete=known)
        if unknown:
            raise ValueError(
                f"Byte 0x{unknown[0]:02x} at {data.index(unknown[:1]):,} is outside the tokenizer's alphabet of "
                f"{len(known)} bytes. Use the alphabet of the whole text, or a tokenizer with an unk_token."
            )
    return numpy.frombuffer(data.translate(table), dtype=numpy.uint8)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrorParser(description="Make a tokenizer with one token a byte.")
    parser.add_argument(
        "--text",
        nargs="+",
        help="files whose bytes get an id each, by rank, as the whole of enwik8; all 256 without it",
    )
    parser.add_argument("--output_dir", required=True, help="folder that gets tokenizer.json and its settings")
    for name in ("unk_token", "eos_token", "pad_token", "mask_token"):
        parser.add_argument(f"--{name}", help=f"as <{name[:3]}>: a token with an id after the bytes; none by default")
    arguments = vars(parser.parse_args(argv))
    texts, folder = arguments.pop("text"), arguments.pop("output_dir")
    tokenizer = byte_tokenizer(None if texts is None else alphabet_of_files(texts), **arguments)
    tokenizer.save_pretrained(folder)
    print(f"Wrote a tokenizer with {len(tokenizer)} ids to {folder}.")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
