"""Started by torchrun in test_distributed.py: pretraining as given, then the objective under FSDP, versions 1 and 2."""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForMaskedLM, BertConfig


sys.path.insert(0, str(Path(__file__).parent))
import pretraining_runs

import hf_efficient
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.trainer import settle_process_group


SIZES = {
    "vocab_size": 57,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def shard(objective, version):
    names = objective._no_split_modules
    if version == 2:
        mesh = init_device_mesh("cpu", (2,))
        for module in [module for module in objective.modules() if type(module).__name__ in names]:
            fully_shard(module, mesh=mesh)
        return fully_shard(objective, mesh=mesh)
    classes = {type(module) for module in objective.modules() if type(module).__name__ in names}
    if not objective.all_tied_weights_keys:
        classes.add(type(objective.encoder))
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return FullyShardedDataParallel(
        objective, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def compare(config, version):
    """Loss and norm of the gradient: whole, and on two halves of the batch with sharded weights."""
    torch.manual_seed(0)
    objective = MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config))
    ids = torch.randint(5, 57, (4, 13))
    ids[:, 0] = 0
    labels = torch.where(torch.rand(4, 13) < 0.3, ids, -100)
    whole = objective(ids, torch.ones_like(ids), labels)
    whole.loss.backward()
    norm = torch.stack([p.grad.norm() for p in objective.parameters() if p.grad is not None]).norm().item()
    objective.zero_grad()

    sharded = shard(objective, version)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    part = sharded(ids[half], torch.ones_like(ids[half]), labels[half], num_items_in_batch=(labels != -100).sum())
    (2 * part.loss).backward()  # as Trainer does, since the processes' gradients are averaged
    if version == 2:
        gradients = [p.grad.full_tensor() for p in sharded.parameters() if p.grad is not None]
        sharded_norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    else:
        sharded_norm = sharded.clip_grad_norm_(1e9).item()
    total = part.loss.detach().clone()
    dist.all_reduce(total)
    return {"loss": [whole.loss.item(), total.item()], "gradient": [norm, sharded_norm]}


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
