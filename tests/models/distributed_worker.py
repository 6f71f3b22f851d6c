"""A step of training of each family. Run as a script, it is one process of several that share the rows: by
DistributedDataParallel, or with weights that torch's FSDP 2 shards."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from hf_efficient.modules import sparse_layers
from hf_efficient.utils.process import settle_process_group
from tests.helpers.families import ALL_SPARSE, CROSS, FAMILIES
from tests.helpers.sharding import shard


SPARSE = {**ALL_SPARSE, "lm_head_sparse_probability": 1.0, "lm_head_bias": True}
# Family, how its class ends, and fields. One kind of mask for all calls: each process draws for itself which one it is.
CASES = {
    "srupp": ("srupp", "ForCausalLM", {}),
    "tupe": ("tupe", "ForMaskedLM", {}),
    "scaling_transformer-dense": ("scaling_transformer", "ForCausalLM", {}),
    "scaling_transformer-soft": ("scaling_transformer", "ForCausalLM", {**SPARSE, "ff_hard_probability": 0.0}),
    "scaling_transformer-hard": ("scaling_transformer", "ForCausalLM", {**SPARSE, "ff_hard_probability": 1.0}),
    "terraformer-hard": ("terraformer", "ForConditionalGeneration", {**SPARSE, "ff_hard_probability": 1.0}),
    "terraformer-soft": ("terraformer", "ForConditionalGeneration", {**SPARSE, "ff_hard_probability": 0.0}),
    "terraformer-cross": ("terraformer", "ForConditionalGeneration", {**CROSS}),
    "terraformer_lm": ("terraformer_lm", "ForCausalLM", {"ff_sru_layers": 1}),
}
WAYS = ("ddp", "fsdp2")


@contextmanager
def noise_of_all_rows(rank, processes):
    """Winners by noise that is drawn for the tokens of all processes alike, of which each takes that of its own."""
    draw, generator = sparse_layers.draw_winners, torch.Generator().manual_seed(1)

    def drawn(logits, temperature, uniforms):
        assert uniforms is None
        shape = (processes * len(logits), *logits.shape[1:])
        noise = torch.rand(shape, generator=generator, dtype=logits.dtype)
        return draw(logits, temperature, noise.chunk(processes)[rank])

    sparse_layers.draw_winners = drawn
    try:
        yield
    finally:
        sparse_layers.draw_winners = draw


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(case, way=None, rank=0, processes=1):
    """Loss and gradients of a step over four rows, of which each process sees its share, and the weights after it."""
    name, ending, fields = CASES[case]
    family = FAMILIES[name]
    model = family.make_model(family.head(ending), dtype=torch.float64, **fields).train()
    ids = family.make_ids(4, 7)
    mask = torch.ones_like(ids)
    mask[3, 4:] = 0
    labels = ids.masked_fill((mask == 0) | (ids % 4 == 1), -100)
    count = (labels[:, 1:] if ending == "ForCausalLM" else labels).ne(-100).sum()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    own = {key: tensor.chunk(processes)[rank] for key, tensor in batch.items()}
    if way is not None:
        wrapped = nn.parallel.DistributedDataParallel(model) if way == "ddp" else shard(model, 2)
    else:
        wrapped = model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with noise_of_all_rows(rank, processes):
        loss = wrapped(**own, num_items_in_batch=count).loss
    (processes * loss).backward()  # gradients are averaged over processes, so that each weighs its share so many times
    # A head that the step leaves out has a gradient of zero, or none.
    gradients = {
        f"gradient of {key}": whole(torch.zeros_like(x) if x.grad is None else x.grad)
        for key, x in model.named_parameters()
    }
    optimizer.step()
    total = loss.detach().clone()
    if processes > 1:
        dist.all_reduce(total)
    return {"loss": total, **gradients, **{key: whole(x) for key, x in model.named_parameters()}}


def main():
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    for case in CASES:
        for way in WAYS:
            found = step(case, way, rank, processes)
            if rank == 0:
                save_file(found, Path(sys.argv[1], f"{case}-{way}.safetensors"))
    settle_process_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
