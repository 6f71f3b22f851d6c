"""Count the words of a corpus, and choose the rare ones on which pretraining keeps notes (TNF).

python training/count_rare_words.py --corpus "texts/*.txt" --tokenizer my-tokenizer --output_dir rare-words
python training/count_rare_words.py --tokenizer my-tokenizer --min_count 200 --max_count 1000 --output_dir rare-words

The folder gets rare_words.json: the words of the band as token ids, how often each occurs, and a report of what they
cover. Words of a band help if they recur (a note needs about 50 updates to forget its random start; choose the band so
that a run brings 100 or more) and if they are not so frequent that their embeddings are well trained anyway. The paper
takes words seen 100 to 500 times in 3.5 billion; the table that is printed shows other bands too. Take the corpus,
tokenizer and validation size that pretraining takes.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hf_efficient  # noqa: F401  (registers the tokenizers)
from hf_efficient.data.corpus import split_documents
from hf_efficient.data.packing import pack_blocks
from hf_efficient.data.rare_words import RareWords, choose_band, count_words, describe_band
from hf_efficient.objectives.notes import SpanFinder
from hf_efficient.trainer.arguments import CorpusArguments, parse_with_preset
from hf_efficient.trainer.model_setup import load_tokenizer
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import errors_in_one_line


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "rare_words.json"


@dataclass
class RareWordArguments(CorpusArguments):
    """The words to choose, and the corpus that they are counted in."""

    tokenizer: str = field(metadata={"help": "Folder or Hub name of the tokenizer that pretraining will use."})
    output_dir: str = field(default="rare-words", metadata={"help": f"Folder that gets {FILE_NAME}."})
    min_count: int = field(default=100, metadata={"help": "Leave words out that the corpus holds fewer times."})
    max_count: int = field(default=500, metadata={"help": "Leave words out that the corpus holds more often."})
    min_tokens: int = field(
        default=2,
        metadata={
            "help": "Leave words of fewer tokens out; 1 keeps all, and leaks a little to a replaced-token objective."
        },
    )
    max_keys: int | None = field(default=None, metadata={"help": "Keep at most so many words, the most frequent."})
    validation_size: float = field(
        default=0.02, metadata={"help": "Fraction of the documents that pretraining validates on; not counted."}
    )
    block_size: int = field(default=128, metadata={"help": "Longest row of pretraining in tokens, for the report."})
    sample_documents: int = field(
        default=2000, metadata={"help": "Look for the words in the rows of so many documents, for the report."}
    )
    training_rows: int | None = field(
        default=None,
        metadata={"help": "Rows that pretraining will see (steps x rows per step): reports the updates per word."},
    )


def row_hits(documents: "Dataset", tokenizer: "PreTrainedTokenizerBase", words: RareWords, block_size: int) -> dict:
    """Count words in rows as pretraining sees them: rows looked at, the share that hold a word, and words per row."""
    rows = pack_blocks(documents, tokenizer, block_size, word_ids=True)
    find = SpanFinder(words.keys)
    hits = [
        len(find(ids, word_ids))
        for batch in rows.iter(batch_size=1000)
        for ids, word_ids in zip(batch["input_ids"], batch["word_ids"], strict=True)
    ]
    return {
        "sampled_rows": len(hits),
        "share_of_rows": sum(count > 0 for count in hits) / max(len(hits), 1),
        "words_per_row": sum(hits) / max(len(hits), 1),
    }


def make_report(
    counts: Mapping[tuple[int, ...], int],
    words: RareWords,
    sample: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    training_rows: int | None,
    **chosen_by: Any,
) -> dict[str, Any]:
    """Measure how much the chosen words cover, of the corpus and of rows of it."""
    report: dict[str, Any] = {
        **chosen_by,
        "words_in_corpus": sum(counts.values()),
        "tokens_in_corpus": sum(len(word) * count for word, count in counts.items()),
        **describe_band(counts, words),
        **row_hits(sample, tokenizer, words, block_size),
    }
    if training_rows is not None:
        seen = training_rows * report["words_per_row"]
        report["updates_per_word"] = seen / report["keys"]
    return report


def print_report(
    report: Mapping[str, Any], counts: Mapping[tuple[int, ...], int], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Print the report in words, and a table of other bands."""
    low, high = report["band"]
    print(
        f"{report['keys']:,} words of {report['min_tokens']} tokens or more occur {low} to {high} times (half up to "
        f"{report['middle_count']}), {report['occurrences']:,} times in all: {report['words_fraction']:.2%} of "
        f"{report['words_in_corpus']:,} words, {report['tokens_fraction']:.2%} of {report['tokens_in_corpus']:,} tokens"
    )
    sampled, share, number = report["sampled_rows"], report["share_of_rows"], report["words_per_row"]
    print(f"of the corpus. Of {sampled:,} rows {share:.1%} hold one, {number:.2f} a row.")
    if "updates_per_word" in report:
        print(
            f"The run will meet each word about {report['updates_per_word']:.0f} times (100 or more is good). A step "
            "moves a note once; beside a discriminator only words without a replaced token count, about two in three."
        )
    print(f"\n{'band':>17} {'keys':>9} {'of words':>9} {'of tokens':>9}")
    for factor in (0.1, 0.3, 1, 3, 10):
        lowest, highest = max(round(low * factor), 1), max(round(high * factor), 1)
        try:
            band = choose_band(counts, tokenizer, min_count=lowest, max_count=highest, min_tokens=report["min_tokens"])
        except ValueError:
            print(f"{lowest:>8,} {highest:>8,} {0:>9}")
            continue
        covered = describe_band(counts, band)
        print(
            f"{lowest:>8,} {highest:>8,} {covered['keys']:>9,} {covered['words_fraction']:>9.2%} "
            f"{covered['tokens_fraction']:>9.2%}"
        )


def find_rare_words(args: RareWordArguments) -> RareWords:
    """
    Count the words, choose those of the band, print a report, and write `args.output_dir/rare_words.json`.

    Raises:
        ValueError: if no word is in the band, or the tokenizer does not know words.
    """
    tokenizer = load_tokenizer(args.tokenizer)
    documents, _ = split_documents(args.load(), args.validation_size)
    counts = count_words(documents, tokenizer)
    words = choose_band(
        counts,
        tokenizer,
        min_count=args.min_count,
        max_count=args.max_count,
        min_tokens=args.min_tokens,
        max_keys=args.max_keys,
    )
    sample = documents.shuffle(seed=0).select(range(min(args.sample_documents, len(documents))))
    chosen_by = {"band": [args.min_count, args.max_count], "min_tokens": args.min_tokens}
    report = make_report(counts, words, sample, tokenizer, args.block_size, args.training_rows, **chosen_by)
    words = replace(words, report=report)
    write_files(args.output_dir, lambda folder: words.save(Path(folder, FILE_NAME)))
    print_report(report, counts, tokenizer)
    return words


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_with_preset([RareWordArguments], argv, __doc__)
    find_rare_words(args)
    print(f"\nThe words are in {Path(args.output_dir, FILE_NAME)}.")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
