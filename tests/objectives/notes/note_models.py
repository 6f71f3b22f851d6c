"""Tiny objectives with notes, and batches for them."""

from dataclasses import dataclass

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.utils import ModelOutput

import hf_efficient
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective


VOCAB = 40
PAD, MASK = 1, 4
KEYS = [(10, 11), (12, 13, 14), (15,), (16, 17)]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
SRUPP = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, **BERT_DROPOUT, pad_token_id=PAD),
    "roberta": lambda: RobertaConfig(**SIZES, **BERT_DROPOUT),
    "electra": lambda: ElectraConfig(**SIZES, **BERT_DROPOUT, embedding_size=16, pad_token_id=PAD),
    "modernbert": lambda: ModernBertConfig(**SIZES, **MODERN),
    "tupe": lambda: hf_efficient.TupeConfig(**SIZES, **BERT_DROPOUT),
    "tupe without embedding norm": lambda: hf_efficient.TupeConfig(**SIZES, **BERT_DROPOUT, embedding_norm=False),
    "srupp": lambda: hf_efficient.SruppConfig(**SRUPP, projection_size=8, bidirectional=True, pad_token_id=PAD),
}


# Objectives with a generator, and options that they can't do without or that make them smaller.
DISCRIMINATORS = {
    "replaced_token": (ReplacedTokenObjective, {}),
    "meta_controller": (MetaControllerObjective, {"nota_token_id": 3, "num_candidates": 3}),
}


def make_mlm(name):
    torch.manual_seed(0)
    return MaskedLMObjective(model=AutoModelForMaskedLM.from_config(CONFIGS[name]()))


def make_discriminator(kind, name="tupe", **options):
    objective, needed = DISCRIMINATORS[kind]
    torch.manual_seed(0)
    encoder = AutoModel.from_config(CONFIGS[name]())
    return objective(encoder=encoder, generator_divider=2, **needed, **options)


@dataclass
class DiscriminatorOutput(ModelOutput):
    loss: torch.Tensor | None = None


class Discriminator(PreTrainedModel):
    """Which tokens of `sampled_ids`, put in at targets, are not the original ones?"""

    config_class = PreTrainedConfig
    base_model_prefix = ""

    def __init__(self, name):
        super().__init__(PreTrainedConfig())
        torch.manual_seed(0)
        self.encoder = AutoModel.from_config(CONFIGS[name]())
        self.head = torch.nn.Linear(16, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, sampled_ids=None):
        original = torch.where(labels == -100, input_ids, labels)
        corrupted = torch.where(labels == -100, original, sampled_ids)
        states = self.encoder(corrupted, attention_mask=attention_mask).last_hidden_state
        logits = self.head(states).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, (corrupted != original).float())
        return DiscriminatorOutput(loss)


# Adjacent words, one twice in a row, one of a single token, one at the last token before [SEP], and padding.
ORIGINAL = torch.tensor(
    [
        [0, 10, 11, 12, 13, 14, 20, 16, 17, 10, 11, 21, 2],
        [0, 22, 15, 15, 23, 12, 13, 14, 2, 1, 1, 1, 1],
        [0, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 2],
    ]
)
SPANS = [(0, 1, 3, 0), (0, 3, 6, 1), (0, 7, 9, 3), (0, 9, 11, 0), (1, 2, 3, 2), (1, 3, 4, 2), (1, 5, 8, 1)]


def note_spans(rows=range(3)):
    """`SPANS` of some rows, as a collator gives them."""
    found = [[span[1:] for span in SPANS if span[0] == row] for row in rows]
    batch = torch.full((len(found), max(map(len, found)), 3), -1)
    for row, spans in enumerate(found):
        for slot, span in enumerate(spans):
            batch[row, slot] = torch.tensor(span)
    return batch


def make_batch(targets=(), rows=range(3)):
    """The original rows with `targets`, (row, column, id that is seen instead)."""
    ids, labels = ORIGINAL.clone(), torch.full_like(ORIGINAL, -100)
    for row, column, seen in targets:
        labels[row, column], ids[row, column] = ids[row, column], seen
    rows = list(rows)
    return {
        "input_ids": ids[rows],
        "attention_mask": (ORIGINAL != PAD).long()[rows],
        "labels": labels[rows],
        "note_spans": note_spans(rows),
    }


# One word hidden, one replaced by a random id, one kept, and a target outside of all words.
TARGETS = [(0, 2, MASK), (0, 7, 33), (0, 10, 11), (0, 6, MASK), (1, 6, MASK), (2, 5, MASK)]
