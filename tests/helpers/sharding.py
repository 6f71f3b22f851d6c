"""Models and objectives with their weights sharded by torch's own FSDP, and on two processes against the whole."""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy


def shard(model, version, *units):
    """By the classes that a model or an objective names, and for version 1 those in `units` besides."""
    names = model._no_split_modules
    if version == 2:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={*classes, *units})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def compare(objective, batch, version, *units):
    """Loss and norm of the gradient: whole, and on two halves of the batch of 4 rows with sharded weights."""
    count = (batch["labels"] != -100).sum()
    whole = objective(**batch, num_items_in_batch=count)
    whole.loss.backward()
    norm = torch.stack([p.grad.norm() for p in objective.parameters() if p.grad is not None]).norm().item()
    objective.zero_grad()

    sharded = shard(objective, version, *units)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    part = sharded(**{key: value[half] for key, value in batch.items()}, num_items_in_batch=count)
    (2 * part.loss).backward()  # as Trainer does, since the processes' gradients are averaged
    if version == 2:
        found = [p.grad.full_tensor() for p in sharded.parameters() if p.grad is not None]
        sharded_norm = torch.stack([gradient.norm() for gradient in found]).norm().item()
    else:
        sharded_norm = sharded.clip_grad_norm_(1e9).item()
    total = part.loss.detach().clone()
    dist.all_reduce(total)
    return {"loss": [whole.loss.item(), total.item()], "gradient": [norm, sharded_norm]}
