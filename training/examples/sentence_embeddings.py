"""
Make an encoder a model of sentence embeddings, by sentence-transformers: near vectors for texts that belong together.

    pip install sentence-transformers
    python -m training.examples.sentence_embeddings --output /tmp/embeddings
    python -m training.examples.sentence_embeddings --output /tmp/embeddings --model my-encoder

The folder needs no code of its own: sentence-transformers loads the encoder by `AutoModel`, and the mean of its
states is the embedding. TUPE, SRU++ and Scaling Transformer work; with a causal model `Pooling(..., "lasttoken")` is
usual too. What is written here loads by `SentenceTransformer(folder)` after `import hf_efficient`. Where that is not
installed, write the encoder by `hf-efficient export`, and load with `trust_remote_code=True`.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

from pathlib import Path
from typing import Any

from hf_efficient.utils.process import errors_in_one_line

from .small_models import TEXTS, example_parser, load_or_make


# Questions, each of which belongs to the text at its place.
QUESTIONS = (
    "Where does the dog rest?",
    "Who is on the wall?",
    "When does the train go?",
    "What was the weather?",
    "Who paints at sea?",
    "What happened in court?",
    "What is there to eat?",
    "Who won?",
)


def prepare(folder: Path, source: Path | None, family: str) -> Any:
    """Put an encoder and a mean over its states into one model of embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if source is None:
        source = folder / "encoder"
        for part in load_or_make(None, family, "AutoModel"):
            part.save_pretrained(source)
    words = Transformer(str(source))
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), "mean")], device="cpu")


def train(model: Any, folder: Path, steps: int) -> None:
    """Pull each question to its text and away from the other texts of the batch."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    arguments = SentenceTransformerTrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=len(TEXTS),
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    pairs = Dataset.from_dict({"anchor": list(QUESTIONS), "positive": list(TEXTS)})
    SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)).train()


def nearest(model: Any) -> list[int]:
    """For each question, which text lies nearest."""
    questions, texts = model.encode(list(QUESTIONS)), model.encode(list(TEXTS))
    return model.similarity(questions, texts).argmax(dim=1).tolist()


def main(argv: list[str] | None = None) -> list[int]:
    """Train, save and load a model of embeddings, and return the texts that it finds for the questions."""
    parser = example_parser("sentence_embeddings", __doc__)
    parser.add_argument("--steps", type=int, default=30, help="of training")
    parser.add_argument("--family", default="tupe", help="of the model that is made where no folder is given")
    args = parser.parse_args(argv)
    from sentence_transformers import SentenceTransformer

    model = prepare(args.output, args.model, args.family)
    train(model, args.output, args.steps)
    model.save_pretrained(str(args.output / "embeddings"))
    found = nearest(SentenceTransformer(str(args.output / "embeddings"), device="cpu"))
    for question, index in zip(QUESTIONS, found, strict=True):
        print(f"{question} -> {TEXTS[index]}")
    return found


if __name__ == "__main__":
    with errors_in_one_line():
        main()
