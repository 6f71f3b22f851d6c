"""A step of training of a reversible stack in several processes that share the rows: each way of sharing must give the
gradients of one process with all rows."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.comparison import assert_gradients_close, named_gradients
from tests.ops.reversible_stacks import CALM, Block, loss_of, make_input, make_stack


def calm_stack():
    """The same for all rows and processes: buckets by the token alone."""
    stack = make_stack(2, torch.float64, **CALM)
    for block in stack.blocks:
        block.buckets.buckets_of = lambda x: x.argmax(-1).to(torch.uint8) % 4
    return stack


def ddp(stack):
    wrapped = DistributedDataParallel(stack)
    return wrapped, lambda: named_gradients(stack)


def fsdp2(stack):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in stack.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    return stack, lambda: {name: grad.full_tensor() for name, grad in named_gradients(stack).items()}


def fsdp2_whole(stack):
    fully_shard(stack, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return stack, lambda: {name: grad.full_tensor() for name, grad in named_gradients(stack).items()}


def fsdp1(stack):
    policy = ModuleWrapPolicy({Block})
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(stack, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)

    def gradients():
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            found = named_gradients(wrapped)
        return {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in found.items()}

    return wrapped, gradients


def sharded_part(stack):
    """FSDP inside of a block is refused."""
    fully_shard(stack.blocks[1].attention, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return stack, None


def main():
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    x = make_input(4)
    whole = calm_stack()
    sum(loss_of(whole(rows, reversible=False)) / count for rows in x.chunk(count)).backward()
    for way in (ddp, fsdp2, fsdp2_whole, fsdp1):
        model, gradients = way(calm_stack())
        for accumulated in range(2):  # a second step on top finds nothing left over from the first
            loss_of(model(x.chunk(count)[rank])).backward()
            expected = {name: (accumulated + 1) * grad for name, grad in named_gradients(whole).items()}
            assert_gradients_close(gradients(), expected, 1e-9)
    model, _ = sharded_part(calm_stack())
    with pytest.raises(ValueError, match=r"Half residual 0 of block 1 \(FSDPAttentionHalf\) is sharded by FSDP"):
        model(x)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
