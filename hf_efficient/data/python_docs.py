"""Real English text that every Python installation already holds, and tasks made from it.

The text is the documentation inside the standard library: the help topics of `pydoc_data.topics` and the
docstrings of the library's modules. Sources are read and parsed, never imported or run. The result
depends on the installed Python version only.
"""

import ast
import random
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.get_logger(__name__)

# Test suites, demonstrations, generated code pages and the help text itself, which is read in another way.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "site-packages",
    "__pycache__",
}
PASSAGE_WORDS = (15, 45)
# The task is made from the largest topics; of each one half as many passages are taken as of the one before it.
TOPICS = 4
VALIDATION_SHARE = 0.15
TRAIN_PAIRS, VALIDATION_PAIRS = 6000, 1000
# Every so-manieth stretch of a document, of whole paragraphs and about so many characters, is kept from training.
HELD_OUT_STRETCH, STRETCH_CHARACTERS = 8, 1200
# Sentences of the task of word order.
ORDERED_WORDS = (8, 20)
ORDER_LABELS = ("as written", "shuffled")
# A summary is a docstring's first paragraph, if it is that short and what it stands for is longer.
SUMMARY_WORDS, SUMMARISED_WORDS = (5, 25), (20, 150)

FUNCTION_WORDS = frozenset(
    """a an and are as at be been but by can do does each for from given has have if in into is it its may
    must no not of on only or other returns return should so such than that the their then there these they
    this to used using was when where which while will with you""".split()  # noqa: SIM905
)
ROLE = re.compile(r":[\w+:.-]+:`([^`]*)`")
EMPHASIS = re.compile(r"(?<![\w*`])(\*\*|\*|``|`)(?=\S)([^*`]+?)(?<=\S)\1(?![\w*`])")
BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,2}[.)])\s+")
SIGNATURE = re.compile(r"^(?:(?:class|def|async)\s+)*[\w.]+\s?\(.*\)?\s*(?:->.*)?:?$")
RULE = re.compile(r"^\W+$")
WORD = re.compile(r"[\"'(\[]*[A-Za-z][A-Za-z'\u2019-]*[\"')\].,:;!?]*")
SENTENCE_END = re.compile(r"(?<=[a-z\"')\]][.!?])\s+(?=[\"'(]?[A-Z])")


def builtin_corpus() -> "Dataset":
    """
    Load the documentation text of the standard library as a corpus, without a download.

    One row is one document: a module's docstrings in source order, or one help topic. A paragraph that occurs
    more than once is kept at its first place only. Rows are sorted and do not change under one Python
    version.

    Returns:
        `datasets.Dataset`: with the columns `topic` (top-level module, or `help:` and the help topic's name;
        several modules of one package share a topic) and `text` (paragraphs separated by a blank line).

    Raises:
        FileNotFoundError: if the installation has no sources of the standard library to read.
    """
    from datasets import Dataset

    documents = _documents()
    return Dataset.from_dict({"topic": [topic for topic, _ in documents], "text": [text for _, text in documents]})


def builtin_split() -> "DatasetDict":
    """
    Split the built-in corpus into text to train on and unseen text, of every topic.

    Of each document every eighth stretch of about 1,200 characters goes to `validation`, so that what is learned from
    one part can be measured on another of the same modules.

    Returns:
        `datasets.DatasetDict`: `train` and `validation` with the columns of [`builtin_corpus`].
    """
    from datasets import Dataset, DatasetDict

    parts = dict(zip(("train", "validation"), _split_documents(), strict=True))
    return DatasetDict(
        {
            name: Dataset.from_dict({"topic": [topic for topic, _ in rows], "text": [text for _, text in rows]})
            for name, rows in parts.items()
        }
    )


def builtin_word_order(train_sentences: int = 3000, validation_sentences: int = 1000, seed: int = 0) -> "DatasetDict":
    """
    Build the built-in acceptability task: is this sentence in the order in which it was written?

    Sentences of 8 to 20 words; in every other one all words but the first and the last were put into another order.
    `train` is made from the text to train on of [`builtin_split`], `validation` from its unseen text. Which words a
    sentence has tells nothing, so that the task is about how words follow each other.

    Args:
        train_sentences, validation_sentences (`int`, *optional*, default to 3000 and 1000):
            Number of sentences, as far as there are so many.
        seed (`int`, *optional*, defaults to 0):
            Decides which sentences are taken, and what is done to them.

    Returns:
        `datasets.DatasetDict`: `train` and `validation` with `text` and `label`, `as written` or `shuffled`.
    """
    from datasets import Dataset, DatasetDict

    rng = random.Random(seed)
    shortest, longest = ORDERED_WORDS
    splits = {}
    for name, documents, count in zip(
        ("train", "validation"), _split_documents(), (train_sentences, validation_sentences), strict=True
    ):
        found = {
            sentence: None
            for _, text in documents
            for paragraph in text.split("\n\n")
            for sentence in SENTENCE_END.split(paragraph)
            if shortest <= len(sentence.split()) <= longest
        }
        sentences = rng.sample(list(found), min(count, len(found)))
        rows = [
            {"text": _shuffled(text, rng) if i % 2 else text, "label": ORDER_LABELS[i % 2]}
            for i, text in enumerate(sentences)
        ]
        rng.shuffle(rows)
        splits[name] = Dataset.from_list(rows)
    return DatasetDict(splits)


def _shuffled(sentence: str, rng: random.Random) -> str:
    """Put the words between the first and the last, which tell by capital and stop where they belong, into an order
    that differs."""
    words = sentence.split()
    middle = words[1:-1]
    changed = list(middle)
    while changed == middle and len(set(middle)) > 1:
        rng.shuffle(changed)
    return " ".join([words[0], *changed, words[-1]])


def builtin_summaries() -> "Dataset":
    """
    Make pairs for summarisation: what a docstring explains, and its first line, which by custom sums it up.

    Returns:
        `datasets.Dataset`: with `document` and `summary`, in the order of the corpus; no document twice.
    """
    from datasets import Dataset

    pairs: dict[str, str] = {}
    for _, docstrings in _modules():
        for docstring in docstrings:
            paragraphs = list(prose_paragraphs(docstring))
            summary, document = paragraphs[:1], " ".join(paragraphs[1:])
            if (
                summary
                # Else its first line was left out, as no prose.
                and docstring.split()[:3] == summary[0].split()[:3]
                and SUMMARY_WORDS[0] <= len(summary[0].split()) <= SUMMARY_WORDS[1]
                and SUMMARISED_WORDS[0] <= len(document.split()) <= SUMMARISED_WORDS[1]
            ):
                pairs.setdefault(document, summary[0])
    return Dataset.from_dict({"document": list(pairs), "summary": list(pairs.values())})


def builtin_topic_pairs(seed: int = 0) -> "DatasetDict":
    """
    Build the built-in sentence-pair task: do two passages come from the same topic?

    Passages of 15 to 45 words from the four largest topics, in ratios of about 8 : 4 : 2 : 1, are split between train
    and validation, so none stands in both; then pairs are drawn at random, both passages independently. Like most
    real pairs they are unbalanced, and a passage of a frequent topic makes "same" likelier. Accuracy under Python
    3.11: always saying "different" gives 0.64, bags of words 0.60 from one passage and 0.71 from both.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Decides the split and the pairing.

    Returns:
        `datasets.DatasetDict`: `train` and `validation` with `sentence1`, `sentence2`, `label` (`ClassLabel`:
        `different_topic`, `same_topic`) and `idx`, as a GLUE task has them.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        sentence1=Value("string"),
        sentence2=Value("string"),
        label=ClassLabel(names=["different_topic", "same_topic"]),
        idx=Value("int32"),
    )
    rng = random.Random(seed)
    train, validation = _split_passages(_passages(_documents()), rng)
    splits = {"train": _pair(train, TRAIN_PAIRS, rng), "validation": _pair(validation, VALIDATION_PAIRS, rng)}
    return DatasetDict(
        {
            name: Dataset.from_list(
                [dict(zip(features, (*pair, i), strict=True)) for i, pair in enumerate(pairs)], features
            )
            for name, pairs in splits.items()
        }
    )


@cache
def _documents() -> tuple[tuple[str, str], ...]:
    seen: set[str] = set()
    documents = []
    for topic, raw_texts in (*_help_topics(), *_modules()):
        paragraphs = []
        for paragraph in (p for raw in raw_texts for p in prose_paragraphs(raw)):
            key = paragraph.casefold()
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append((topic, "\n\n".join(paragraphs)))
    return tuple(documents)


def _help_topics() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        logger.warning_once("This Python has no pydoc_data: the built-in corpus holds docstrings only.")
        return
    for name in sorted(topics):
        yield f"help:{name}", [topics[name]]


def _modules() -> Iterator[tuple[str, list[str]]]:
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(path.relative_to(library) for path in _sources(library))
    if not sources:
        raise FileNotFoundError(
            f"No Python sources of the standard library below {library}, and the built-in corpus is made "
            "from them. Use a Python that ships its sources, or give a corpus of your own."
        )
    for source in sources:
        try:
            tree = ast.parse((library / source).read_bytes())
        except (SyntaxError, ValueError, OSError) as error:
            logger.warning(f"The built-in corpus passes over {source}: {error}")
            continue
        yield source.parts[0].removesuffix(".py"), list(_docstrings(tree))


def _sources(library: Path) -> Iterator[Path]:
    for name in sys.stdlib_module_names - SKIPPED_FOLDERS:
        yield from (path for path in [library / f"{name}.py"] if path.is_file())
        for path in (library / name).rglob("*.py"):
            if not SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
                yield path


def _docstrings(tree: ast.Module) -> Iterator[str]:
    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(tree)


def prose_paragraphs(text: str) -> Iterator[str]:
    """
    Yield the paragraphs of a documentation text that are prose, each on one line.

    Examples at an interpreter's prompt, signatures, grammar, tables, headings and code are left out; list
    items become paragraphs of their own; reST roles, quotes of code and emphasis lose their marks.
    """
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        for lines in _items(block):
            paragraph = _plain(" ".join(lines))
            if _is_prose(paragraph):
                yield paragraph


def _items(block: str) -> Iterable[list[str]]:
    items: list[list[str]] = [[]]
    for line in block.splitlines():
        if line.lstrip().startswith(">>>"):
            break  # up to the blank line stand the example and its output
        if BULLET.match(line):
            items.append([])
        line = BULLET.sub("", line).strip()
        if line.startswith("..") or RULE.match(line) or SIGNATURE.match(line):
            continue
        items[-1].append(line)
    return items


def _plain(text: str) -> str:
    text = EMPHASIS.sub(r"\2", ROLE.sub(r"\1", text))
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\s?::$", ":", text)


def _is_prose(paragraph: str) -> bool:
    """Six words or more, mostly plain ones, among them the little words that code and tables do not have."""
    tokens = paragraph.split()
    plain = [token for token in tokens if WORD.fullmatch(token)]
    little = sum(token.strip("\"'()[].,:;!?").lower() in FUNCTION_WORDS for token in plain)
    return len(tokens) >= 6 and len(plain) >= 0.7 * len(tokens) and little >= 0.15 * len(tokens)


def _split_documents() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(topic, text) to train on, and of unseen text."""
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    stretches = 0
    for topic, text in _documents():
        kept: tuple[list[str], list[str]] = ([], [])
        characters = 0
        for paragraph in text.split("\n\n"):
            kept[stretches % HELD_OUT_STRETCH == HELD_OUT_STRETCH - 1].append(paragraph)
            characters += len(paragraph)
            if characters >= STRETCH_CHARACTERS:
                stretches, characters = stretches + 1, 0
        stretches += characters > 0
        for part, paragraphs in zip(parts, kept, strict=True):
            if paragraphs:
                part.append((topic, "\n\n".join(paragraphs)))
    return parts


def _passages(documents: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Passages of `PASSAGE_WORDS` words by topic: whole sentences of one document that follow each other."""
    shortest, longest = PASSAGE_WORDS
    by_topic: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for topic, document in documents:
        passage: list[str] = []
        for sentence in (s for paragraph in document.split("\n\n") for s in SENTENCE_END.split(paragraph)):
            words = sentence.split()
            if len(passage) + len(words) > longest:
                passage = []
            if len(words) > longest:
                continue
            passage += words
            if len(passage) >= shortest:
                text = " ".join(passage)
                if text.casefold() not in seen:
                    seen.add(text.casefold())
                    by_topic[topic].append(text)
                passage = []
    return by_topic


def _split_passages(
    by_topic: dict[str, list[str]], rng: random.Random
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(topic, passage) of train and of validation."""
    largest = sorted(by_topic, key=lambda topic: (-len(by_topic[topic]), topic))[:TOPICS]
    train: list[tuple[str, str]] = []
    validation: list[tuple[str, str]] = []
    for rank, topic in enumerate(largest):
        wanted = len(by_topic[largest[0]]) >> rank
        chosen = [(topic, text) for text in rng.sample(by_topic[topic], min(wanted, len(by_topic[topic])))]
        cut = round(VALIDATION_SHARE * len(chosen))
        validation += chosen[:cut]
        train += chosen[cut:]
    return train, validation


def _pair(passages: list[tuple[str, str]], count: int, rng: random.Random) -> list[tuple[str, str, int]]:
    """Pairs of two different passages, no pair twice in the same order."""
    pairs: dict[tuple[str, str], int] = {}
    while len(pairs) < count:
        (topic, text), (other_topic, other_text) = rng.sample(passages, 2)
        pairs[text, other_text] = int(topic == other_topic)
    return [(*texts, label) for texts, label in pairs.items()]
