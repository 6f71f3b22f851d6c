"""One of two processes that share the rows of a batch; torchrun starts it.

torchrun --nproc_per_node 2 -m training.compatibility.process ddp|fsdp FAMILY FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_efficient.utils.labels import IGNORE_INDEX
from hf_efficient.utils.process import settle_process_group

from .subjects import Subject


def wrap(model: nn.Module, way: str) -> nn.Module:
    """Distribute a model: whole in each process, or with the weights of each of its layers sharded."""
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]  # type: ignore
    assert layers, "no class of _no_split_modules is in the model"
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place
    return model


def gradient_norm(model: nn.Module) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return torch.stack([gradient.norm() for gradient in whole]).norm().item()


def compare(subject: Subject, way: str) -> dict[str, list[float]]:
    """Loss and norm of the gradient of a batch: in one process, and in all of them together."""
    batch = subject.training_batch()
    labels = batch["labels"][:, 1:] if subject.home == "AutoModelForCausalLM" else batch["labels"]
    count = labels.ne(IGNORE_INDEX).sum()
    # Soft masks of units, of which no draw decides anything.
    soft: Any = {"ff_hard_probability": 0.0} if subject.family in ("scaling_transformer", "terraformer") else {}
    alone = subject.model(**soft).train()
    loss: Tensor = alone(**batch, num_items_in_batch=count).loss
    loss.backward()
    rank, processes = dist.get_rank(), dist.get_world_size()
    own = {name: tensor.chunk(processes)[rank] for name, tensor in batch.items()}
    model = subject.model(**soft).train()
    wrapped = wrap(model, way)
    part = wrapped(**own, num_items_in_batch=count).loss
    (processes * part).backward()  # gradients are averaged over processes
    total = part.detach().clone()
    dist.all_reduce(total)
    return {"loss": [loss.item(), total.item()], "gradient": [gradient_norm(alone), gradient_norm(model)]}


def main(way: str, family: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = compare(Subject(family), way)
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "found.json").write_text(json.dumps(found))
    settle_process_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
