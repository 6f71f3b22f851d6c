"""Tiny runs with notes, in this process or, started by torchrun, in two: `note_runs.py FOLDER UPDATE OBJECTIVE`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from transformers import TrainingArguments

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, RareWordCollator, attach
from hf_efficient.trainer import EfficientTrainer
from hf_efficient.utils.process import settle_process_group
from tests.objectives.notes.note_models import KEYS, MASK, PAD, TARGETS, VOCAB, make_batch, make_discriminator, make_mlm


STEPS = 9


class Tokenizer:
    """The part of a tokenizer that the collator and checkpoints use."""

    pad_token_id, mask_token_id, all_special_ids = PAD, MASK, [0, 1, 2, 3, 4]

    def __len__(self):
        return VOCAB

    def save_pretrained(self, folder):
        return ()


class Rows(torch.utils.data.Dataset):
    """Random words between keys; rows of several lengths."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        words = []
        for _ in range(int(torch.randint(3, 8, (), generator=generator))):
            draw = int(torch.randint(0, 2 * len(KEYS), (), generator=generator))
            words.append(KEYS[draw] if draw < len(KEYS) else (20 + draw,))
        word_ids = [number for number, word in enumerate(words) for _ in word]
        return {"input_ids": [0, *sum(words, ()), 2], "word_ids": [-1, *word_ids, -1]}


def make_trainer(folder, update, objective="mlm", callbacks=(), kind=EfficientTrainer, **options):
    """Of masked language modelling, or of the objective of another name."""
    if objective == "mlm":
        model, masking = make_mlm("tupe"), MaskingCollator(Tokenizer(), mlm_probability=0.3)
    else:
        model = make_discriminator(objective)
        callbacks = [*model.callbacks(), *callbacks]
        all_masked = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0, "sample_seeds": True}
        masking = MaskingCollator(Tokenizer(), mlm_probability=0.3, **all_masked)
    notes = NoteDictionary(KEYS, 16, NoteSettings(update=update, half_window=3, start_step=2), seed=5)
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no" if "save_steps" not in options else "steps",
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
    }
    return kind(
        model,
        TrainingArguments(**{**settings, **options}),
        train_dataset=Rows(),
        data_collator=RareWordCollator(masking, KEYS),
        callbacks=[attach(model, notes), *callbacks],
    )


def losses(trainer):
    """Every log but the last, which holds run times."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def shard(objective, version):
    if version == 2:
        return fully_shard(objective, mesh=init_device_mesh("cpu", (2,)))
    # Whole numbers only are left as they are by this.
    precision = MixedPrecision(buffer_dtype=torch.bfloat16)
    return FullyShardedDataParallel(
        objective, device_id=torch.device("cpu"), use_orig_params=True, mixed_precision=precision
    )


def compare_sharded(version):
    """Loss and notes: whole, and on two parts of the batch with sharded weights."""
    batch, found = make_batch(TARGETS), []
    rows = [range(3), [0, 1] if dist.get_rank() == 0 else [2]]
    for sharded in (False, True):
        objective = make_mlm("bert")
        notes = NoteDictionary(KEYS, 16, NoteSettings(half_window=3), seed=5)
        attach(objective, notes)
        model = (shard(objective, version) if sharded else objective).train()
        part = {name: value[rows[sharded]] for name, value in batch.items()}
        loss = model(**part, num_items_in_batch=len(TARGETS)).loss
        loss.backward()
        total = loss.detach().clone()
        if sharded:
            dist.all_reduce(total)
        notes.apply_updates()
        found.append([total.item(), *notes.values.double().flatten().tolist()])
    return found


def main():
    folder, update, objective = sys.argv[1:]
    trainer = make_trainer(folder, update, objective, per_device_train_batch_size=2)
    trainer.train()
    trainer.model.notes.save(Path(folder, f"rank-{trainer.args.process_index}"))
    if trainer.args.process_index == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses(trainer)))
    own = {id(buffer) for buffer in trainer.model.notes.buffers()}
    sent = [id(buffer) in own for buffer in trainer.model_wrapped.modules_buffers]  # by DDP, in each forward pass
    results = {"sent": sum(sent), "sharded": []}
    if objective == "mlm":
        results["sharded"] = [compare_sharded(version) for version in (1, 2)]
    if dist.get_rank() == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    settle_process_group()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
