"""Tables, a tiny encoder and quick runs of `training/finetune.py`, which several test files share."""

import csv
import itertools
import json
import random

from tests.training.tiny_glue import make_tokenizer, save_encoder
from training import finetune


TOPICS = {"sport": ["ball", "team"], "food": ["bread", "soup"], "law": ["court", "judge"]}
TAGS = ["O", "B-LOC", "B-PER", "I-PER"]
FILLING = ["the", "a", "was", "very", "today", "about", "we", "saw"]
QUICK = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none", "--learning_rate", "1e-2"]
QUICK += ["--per_device_train_batch_size", "8", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
AT_THE_END = ["--num_train_epochs", "14", "--eval_strategy", "no", "--save_strategy", "no"]


def save_tiny_encoder(folder):
    """An encoder whose tokenizer knows the words of the tables."""
    save_encoder(folder, make_tokenizer([" ".join([*itertools.chain(*TOPICS.values()), *FILLING]), "paul anna rome"]))
    return str(folder)


def topic_rows(counts, seed=0):
    """Texts of any length whose topic one word tells."""
    rng = random.Random(seed)
    rows = []
    for topic, count in counts.items():
        for _ in range(count):
            words = [*rng.choices(FILLING, k=rng.randint(0, 3)), rng.choice(TOPICS[topic])]
            rng.shuffle(words)
            rows.append({"review": " ".join(words), "topic": topic})
    rng.shuffle(rows)
    return rows


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments):
    return finetune.main([*QUICK, *AT_THE_END, *map(str, arguments)])


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tagged_rows(count):
    rng = random.Random(1)
    pieces = [(["paul", "anna"], ["B-PER", "I-PER"]), (["rome"], ["B-LOC"]), (["the"], ["O"]), (["saw"], ["O"])]
    rows = []
    for _ in range(count):
        chosen = rng.choices(pieces, k=rng.randint(1, 4))
        words, tags = ([*itertools.chain(*parts)] for parts in zip(*chosen, strict=True))
        rows.append({"words": words, "tags": tags})
    return rows
