"""A tiny training run of an objective with a generator; by itself, a worker that torchrun starts in two processes."""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import TrainingArguments


sys.path.append(str(Path(__file__).parent))
from encoders import VOCAB, make_batch, make_encoder

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.trainer import EfficientTrainer, settle_process_group


TIMES = ("runtime", "per_second")


class Tokenizer:
    """What the collator and checkpoints ask of a tokenizer."""

    pad_token_id, mask_token_id, all_special_ids = 1, 4, [0, 1, 2, 3, 4]

    def __len__(self):
        return VOCAB

    def save_pretrained(self, folder):
        return ()


def make_rows(count=48):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 15, (count,), generator=generator)
    return [{"input_ids": [0, *torch.randint(5, VOCAB, (int(n),), generator=generator).tolist()]} for n in lengths]


def make_trainer(output_dir, objective=None, trainer_class=EfficientTrainer, **changes):
    """A trainer of 6 steps on 12 rows each; the detector joins at step 3."""
    if objective is None:
        objective = ReplacedTokenObjective(encoder=make_encoder("tupe"), detector_start_step=3)
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        **changes,
    }
    collator = MaskingCollator(Tokenizer(), probability=0.4, draw_seeds=True, seed=7)
    return trainer_class(
        objective,
        TrainingArguments(output_dir=str(output_dir), **settings),
        train_dataset=make_rows(),
        data_collator=collator,
        callbacks=objective.callbacks(),
    )


def history(trainer):
    """The log without what is measured in seconds."""
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not any(t in key for t in TIMES)} for entry in log]


def weights(model):
    return {name: value.tolist() for name, value in model.state_dict().items()}


def shard(objective, version):
    names = objective._no_split_modules
    if version == 2:
        mesh = init_device_mesh("cpu", (2,))
        for module in [module for module in objective.modules() if type(module).__name__ in names]:
            fully_shard(module, mesh=mesh)
        return fully_shard(objective, mesh=mesh)
    classes = {type(module) for module in objective.modules() if type(module).__name__ in names}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return FullyShardedDataParallel(
        objective, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def compare_sharded(name, version, detector_on):
    """Loss and norm of the gradient: whole, and on two halves of the batch with sharded weights."""
    objective = ReplacedTokenObjective(encoder=make_encoder(name))
    objective.detector_on.fill_(detector_on)
    batch = make_batch(batch=4)
    count = (batch["labels"] != -100).sum()
    whole = objective(**batch, num_items_in_batch=count)
    whole.loss.backward()
    norm = torch.stack([p.grad.norm() for p in objective.parameters() if p.grad is not None]).norm().item()
    objective.zero_grad()

    sharded = shard(objective, version)
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
    found = {"history": history(trainer), "weights": weights(trainer.accelerator.unwrap_model(trainer.model))}
    found["sharded"] = {
        f"{name}, FSDP {version}, detector {'on' if on else 'off'}": compare_sharded(name, version, on)
        for name in ("tupe", "bert")
        for version in (1, 2)
        for on in (True, False)
    }
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))
    settle_process_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
