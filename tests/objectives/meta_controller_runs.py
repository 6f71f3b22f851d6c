"""Tiny training runs of the meta-controller; by itself, a worker that torchrun starts in two processes."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.append(str(Path(__file__).parent))
import detector_runs
from encoders import VOCAB, make_batch, make_encoder

from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.trainer import settle_process_group


def make_objective(name="tupe", **options):
    torch.manual_seed(4)
    options = {"nota_token_id": VOCAB - 1, "num_candidates": 4, **options}
    return MetaControllerObjective(encoder=make_encoder(name), **options)


def make_trainer(output_dir, **changes):
    """6 steps on 12 rows each; the encoder joins at step 3."""
    return detector_runs.make_trainer(output_dir, make_objective(detector_start_step=3), **changes)


def compare_sharded(name, version, detector_on):
    """Loss and norm of the gradient: whole, and on two halves of the batch with sharded weights."""
    objective = make_objective(name)
    objective.detector_on.fill_(detector_on)
    batch = make_batch(batch=4)
    count = (batch["labels"] != -100).sum()
    whole = objective(**batch, num_items_in_batch=count)
    whole.loss.backward()
    norm = torch.stack([p.grad.norm() for p in objective.parameters() if p.grad is not None]).norm().item()
    objective.zero_grad()

    sharded = detector_runs.shard(objective, version)
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


def main():
    folder = Path(sys.argv[1])
    trainer = make_trainer(folder / "two", gradient_accumulation_steps=2, ddp_find_unused_parameters=False)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {"history": detector_runs.history(trainer), "weights": detector_runs.weights(model)}
    found["sharded"] = {
        f"{name}, FSDP {version}, detector {'on' if on else 'off'}": compare_sharded(name, version, on)
        for name in ("tupe", "roberta")
        for version in (1, 2)
        for on in (True, False)
    }
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))
    settle_process_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
