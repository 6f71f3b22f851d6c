"""A tiny BERT, a tokenizer with its vocabulary, and GLUE-like rows that a bag of words can tell apart."""

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_efficient.data.glue import GLUE_TASKS


SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # at the ids that TUPE expects
GOOD, BAD = ["fine", "lovely", "grand", "sweet"], ["poor", "awful", "dull", "sour"]


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_rows(task, count, seed):
    """Rows whose label a bag of words can tell: each class has a word of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = i % (len(task.label_names) or 6)
        length = int(rng.integers(1, 9))
        text = " ".join(["the film is", *rng.choice([*"0123"], length), (GOOD + BAD)[label]])
        texts = dict(zip(task.text_columns, (text, "it was so very " + text[-4:]), strict=False))
        rows.append({**texts, "label": float(label) if task.is_regression else label, "idx": i})
    return rows


def save_encoder(folder, tokenizer):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_glue(folder):
    """Rows for four tasks: sst2, stsb and mnli whole, qnli without training data. Returns the folder."""
    splits = {
        "sst2": {"train": 90, "validation": 31},
        "stsb": {"train": 60, "validation": 33},
        "mnli": {"train": 60, "validation_matched": 21, "validation_mismatched": 22},
        "qnli": {"validation": 9},
    }
    for task, sizes in splits.items():
        (folder / task).mkdir()
        for seed, (split, count) in enumerate(sizes.items()):
            rows = make_rows(GLUE_TASKS[task], count, seed)
            Dataset.from_list(rows, features=GLUE_TASKS[task].features).to_parquet(folder / task / f"{split}.parquet")
    return folder


def numbers(history):
    """Take what a history says about learning, without times and the mean loss of the last process."""
    kept = [{key: value for key, value in entry.items() if "per_second" not in key} for entry in history]
    for entry in kept:
        for key in ("eval_runtime", "train_runtime", "train_loss", "total_flos"):
            entry.pop(key, None)
    return [entry for entry in kept if set(entry) - {"epoch", "step"}]
