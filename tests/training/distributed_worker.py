"""Started by torchrun in test_distributed.py: pretraining as given, then the objective under FSDP, versions 1 and 2."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForMaskedLM, BertConfig

import hf_efficient
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.utils.process import settle_process_group
from tests.helpers import sharding
from tests.training import pretraining_runs


SIZES = {
    "vocab_size": 57,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def compare(config, version):
    """Loss and norm of the gradient: whole, and on two halves of the batch with sharded weights."""
    torch.manual_seed(0)
    objective = MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config))
    ids = torch.randint(5, 57, (4, 13))
    ids[:, 0] = 0
    labels = torch.where(torch.rand(4, 13) < 0.3, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    units = () if objective.all_tied_weights_keys else (type(objective.encoder),)
    return sharding.compare(objective, batch, version, *units)


def main():
    output, *argv = sys.argv[1:]
    pretraining_runs.run_here(argv)
    configs = {
        "tupe": hf_efficient.TupeConfig(**SIZES),
        "bert": BertConfig(**SIZES),
        "untied bert": BertConfig(**SIZES, tie_word_embeddings=False),
    }
    found = {
        f"{name}, FSDP {version}": compare(config, version) for name, config in configs.items() for version in (1, 2)
    }
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    settle_process_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
