"""Train a fast tokenizer with BERT's special tokens and layout on any corpus.

python training/train_tokenizer.py --corpus builtin --output_dir tokenizer
python training/train_tokenizer.py --corpus "texts/*.txt" --algorithm bpe --vocab_size 30000 --output_dir tokenizer
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

from dataclasses import dataclass, field

from hf_efficient.data.tokenizers import Texts, train_tokenizer
from hf_efficient.trainer.arguments import CorpusArguments, parse_with_preset
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import errors_in_one_line


@dataclass
class TokenizerArguments(CorpusArguments):
    """The text, and the kind of tokenizer to train on it."""

    output_dir: str = field(metadata={"help": "Folder that gets tokenizer.json and its settings."})
    algorithm: str = field(default="wordpiece", metadata={"help": "How units are learned: wordpiece or bpe (bytes)."})
    vocab_size: int = field(default=8192, metadata={"help": "Number of ids, the five special tokens included."})
    lowercase: bool = field(default=True, metadata={"help": "Lower-case the text and drop accents. --no_lowercase"})
    model_max_length: int = field(default=512, metadata={"help": "Longest input of the model, in tokens."})


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_with_preset([TokenizerArguments], argv, __doc__)
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
    with errors_in_one_line():
        main()
