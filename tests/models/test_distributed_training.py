"""Training by several processes, or by one that stands for many, is that of one process."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from tests.helpers.comparison import assert_close
from tests.helpers.families import FAMILIES
from tests.helpers.processes import run_distributed
from tests.helpers.sharding import shard
from tests.models import distributed_worker


# Names of the classes that FSDP takes as units.
UNITS = {
    "srupp": {"SruppLayer"},
    "scaling_transformer": {"ScalingTransformerLayer"},
    "tupe": {"TupeLayer", "TupePositionBias"},
    "terraformer": {"TerraformerEncoderLayer", "TerraformerDecoderLayer"},
    "terraformer-cross": {"PlainEncoderLayer", "PlainDecoderLayer"},
    "terraformer_lm": {"TerraformerDecoderLayer"},
}


@pytest.fixture
def process_group(tmp_path):
    """One process stands for many."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "ddp"])
@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_one_process_that_stands_for_many(case, way, process_group):
    """Parameters are flattened and gathered layer by layer; under DDP each has a gradient, whatever mask was drawn."""
    name, ending, fields = distributed_worker.CASES[case]
    family = FAMILIES[name]
    model, reference = (family.make_model(family.head(ending), dtype=torch.float64, **fields).train() for _ in range(2))
    units = {type(module).__name__ for module in model.modules()} & set(model._no_split_modules)
    assert units == UNITS.get(case, UNITS[name])
    ids = family.make_ids(2, 7)
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = shard(model, int(way[-1]))
        trunk = wrapped.module.model if way == "fsdp1" else wrapped.model
        layers = trunk.layers if hasattr(trunk, "layers") else trunk.decoder.layers
        assert all(isinstance(layer, (FullyShardedDataParallel, FSDPModule)) for layer in layers)
    losses = []
    for trained in (wrapped, reference):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained.train()
        for step in range(2):
            torch.manual_seed(step)
            optimizer.zero_grad()
            trained(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(trained.eval()(input_ids=ids, labels=ids).loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    """Each has half of the rows: the loss, every gradient and every weight after the step."""
    run_distributed(distributed_worker, tmp_path)
    for case in distributed_worker.CASES:
        expected = distributed_worker.step(case)
        for way in distributed_worker.WAYS:
            assert_close(f"{case}, {way}", load_file(tmp_path / f"{case}-{way}.safetensors"), expected, 1e-12)
