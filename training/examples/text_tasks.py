"""
Fine-tune an encoder for three tasks by transformers' own Trainer, and use it: classes, names in text, answers in
text.

    python -m training.examples.text_tasks --output /tmp/tasks
    python -m training.examples.text_tasks --output /tmp/tasks --model my-encoder --tasks answers

Nothing here is special to TUPE but the import of `hf_efficient`, which registers it: BERT is fine-tuned the same way.
For tables of your own, several seeds and scores there is `hf-efficient finetune` (docs/finetuning.md).

For classes and for names there are pipelines. For answers transformers 5 has none: `find_answer` below is what it
takes. A long document does not fit into a model; give it in pieces, and take the answer with the best score.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from hf_efficient.utils.labels import IGNORE_INDEX
from hf_efficient.utils.process import errors_in_one_line, names_among

from .small_models import LENGTH, TEXTS, example_parser, load_or_make


CLASSES = ["animals", "animals", "city", "city", "sea", "law", "food", "sport"]  # one for each text
# A row of words with the tag of each: B- begins a name, I- goes on with it, O is no name.
TAGGED = [
    (["Anna", "Paul", "saw", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"]),
    (["Rome", "has", "old", "walls"], ["B-LOC", "O", "O", "O"]),
    (["In", "Oslo", "lives", "Anna"], ["O", "B-LOC", "O", "B-PER"]),
    (["Paul", "paints", "in", "Oslo"], ["B-PER", "O", "O", "B-LOC"]),
]
# A question, a text, and the words of the text that answer.
ASKED = [
    ("Who sleeps?", TEXTS[0], "The old dog"),
    ("Where is the cat?", TEXTS[1], "on the garden wall"),
    ("When does the train leave?", TEXTS[2], "at noon"),
    ("What fell?", TEXTS[3], "Rain"),
]


def settings(folder: Path, steps: int) -> TrainingArguments:
    """Settings for a few rows; for real data give epochs, a smaller rate and an evaluation."""
    return TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def named(labels: list[str]) -> dict[str, Any]:
    """Settings of a model's config that give its labels names, which pipelines answer with."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def learn_classes(folder: Path, source: Path | None, steps: int) -> list[dict[str, Any]]:
    """Learn the class of a text, save the model, and ask a pipeline."""
    labels = sorted(set(CLASSES))
    model, tokenizer = load_or_make(source, "tupe", "AutoModelForSequenceClassification", **named(labels))
    rows = [
        {**tokenizer(text, truncation=True), "labels": labels.index(name)}
        for text, name in zip(TEXTS, CLASSES, strict=True)
    ]
    trainer = Trainer(
        model,
        settings(folder, steps),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "classes"))  # with the tokenizer
    classify = pipeline("text-classification", model=str(folder / "classes"))
    return classify(list(TEXTS))


def learn_names(folder: Path, source: Path | None, steps: int) -> list[list[dict[str, Any]]]:
    """Learn tags of words, save the model, and ask a pipeline for names, each word by the tag of its first piece."""
    labels = sorted({tag for _, tags in TAGGED for tag in tags})
    model, tokenizer = load_or_make(source, "tupe", "AutoModelForTokenClassification", **named(labels))
    rows = []
    for words, tags in TAGGED:
        row = tokenizer(words, is_split_into_words=True, truncation=True)
        # The first piece of a word has its tag; further pieces and special tokens have none.
        before = [None, *row.word_ids()[:-1]]
        row["labels"] = [
            IGNORE_INDEX if word is None or word == last else labels.index(tags[word])
            for word, last in zip(row.word_ids(), before, strict=True)
        ]
        rows.append(dict(row))
    trainer = Trainer(
        model,
        settings(folder, steps),
        train_dataset=rows,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "names"))
    find = pipeline("token-classification", model=str(folder / "names"), aggregation_strategy="first")
    return [find(" ".join(words)) for words, _ in TAGGED]


def learn_answers(folder: Path, source: Path | None, steps: int) -> list[tuple[str, float]]:
    """Learn where in a text the answer to a question begins and ends, save the model, and find answers with it."""
    model, tokenizer = load_or_make(source, "tupe", "AutoModelForQuestionAnswering")
    rows = []
    for question, text, answer in ASKED:
        row = tokenizer(question, text, truncation="only_second", padding="max_length", max_length=LENGTH)
        start = text.index(answer)
        row["start_positions"] = row.char_to_token(start, sequence_index=1)
        row["end_positions"] = row.char_to_token(start + len(answer) - 1, sequence_index=1)
        rows.append(dict(row))
    trainer = Trainer(
        model,
        settings(folder, steps),
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "answers"))
    model, tokenizer = load_or_make(folder / "answers", "tupe", "AutoModelForQuestionAnswering")
    return [find_answer(model, tokenizer, question, text) for question, text, _ in ASKED]


def find_answer(model: Any, tokenizer: Any, question: str, text: str, most: int = 30) -> tuple[str, float]:
    """
    Find the words of a text that answer a question.

    Args:
        model (`PreTrainedModel`): of `AutoModelForQuestionAnswering`.
        tokenizer (`PreTrainedTokenizerFast`): its tokenizer.
        question, text (`str`): both, which the model reads together.
        most (`int`, defaults to 30): tokens that an answer may have.

    Returns:
        `tuple[str, float]`: the words, and the probability of their first token being the start times that of their
            last being the end.
    """
    inputs = tokenizer(question, text, return_tensors="pt", truncation="only_second")
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    in_text = torch.tensor([sequence == 1 for sequence in inputs.sequence_ids()])
    start, end = (
        logits[0].masked_fill(~in_text, float("-inf")).softmax(-1)
        for logits in (outputs.start_logits, outputs.end_logits)
    )
    scores = (start[:, None] * end).triu().tril(most - 1)  # an end before its start, or too far behind it, is none
    first, last = divmod(int(scores.argmax()), len(end))
    characters = inputs.token_to_chars(first).start, inputs.token_to_chars(last).end
    return text[slice(*characters)], scores[first, last].item()


TASKS = {"classes": learn_classes, "names": learn_names, "answers": learn_answers}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Learn the tasks, print what the models answer, and return it."""
    parser = example_parser("text_tasks", __doc__)
    parser.add_argument("--tasks", type=names_among(TASKS), default=",".join(TASKS), help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=100, help="of training, for each")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for task in args.tasks:
        found[task] = TASKS[task](args.output, args.model, args.steps)
        for answer in found[task]:
            print(f"{task}: {answer}")
    return found


if __name__ == "__main__":
    with errors_in_one_line():
        main()
