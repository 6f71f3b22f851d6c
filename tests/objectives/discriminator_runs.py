"""Tiny training runs of objectives with a generator.

By torchrun, `-m tests.objectives.discriminator_runs FOLDER KIND STAGE` runs them in two processes.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.trainer import EfficientTrainer
from hf_efficient.utils.process import settle_process_group
from tests.helpers import sharding
from tests.objectives.discriminator_models import KINDS
from tests.objectives.encoders import VOCAB, make_batch, make_encoder


TIMES = ("runtime", "per_second", "preparation_time")
# Options of stage one, by what learns in it.
PHASES = {
    "generator": {"discriminator_start_step": 3},
    "masked_lm": {"discriminator_start_step": 3, "stage_one": "masked_lm", "discriminator_warmup_steps": 2},
}


class Tokenizer:
    """The part of a tokenizer that the collator and checkpoints use."""

    pad_token_id, mask_token_id, all_special_ids = 1, 4, [0, 1, 2, 3, 4]

    def __len__(self):
        return VOCAB

    def save_pretrained(self, folder):
        return ()


def make_rows(count=48):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 15, (count,), generator=generator)
    return [{"input_ids": [0, *torch.randint(5, VOCAB, (int(n),), generator=generator).tolist()]} for n in lengths]


def make_objective(kind="replaced_token", name="tupe", **options):
    objective, needed = KINDS[kind]
    encoder = make_encoder(name)
    torch.manual_seed(4)
    return objective(encoder=encoder, **{**needed, **options})


def make_trainer(output_dir, objective, trainer_class=EfficientTrainer, **changes):
    """A trainer of 6 steps on 12 rows each."""
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
    collator = MaskingCollator(Tokenizer(), mlm_probability=0.4, sample_seeds=True, seed=7)
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


def evaluate(trainer):
    """On ten rows."""
    metrics = trainer.evaluate(make_rows(10))
    return {name: value for name, value in metrics.items() if not any(t in name for t in TIMES)}


def weights(model):
    return {name: value.tolist() for name, value in model.state_dict().items()}


def main():
    folder, kind, phase = Path(sys.argv[1]), *sys.argv[2:]
    objective = make_objective(kind, **PHASES[phase])
    options = {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False, "per_device_eval_batch_size": 2}
    trainer = make_trainer(folder / "two", objective, **options)
    trainer.train()
    found = {"history": history(trainer), "weights": weights(trainer.accelerator.unwrap_model(trainer.model))}
    found["evaluation"] = evaluate(trainer)
    found["sharded"] = {}
    for name in ("tupe", "bert"):
        for version in (1, 2):
            for on in (True, False):
                objective = make_objective(kind, name, **PHASES[phase])
                objective.enable_discriminator(on)
                case = f"{name}, FSDP {version}, {'discriminator' if on else 'first stage'}"
                found["sharded"][case] = sharding.compare(objective, make_batch(batch=4), version)
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))
    settle_process_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
