"""Cells of training: Trainer and Seq2SeqTrainer, PEFT, TRL, sentence-transformers, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_efficient.hub import export

from ..examples.small_models import LENGTH, TEXTS
from .loading import ROOT
from .subjects import Refused, Subject, assert_close, outputs_of


QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 0}


def _losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _falls(losses: list[float], share: float = 0.97) -> str:
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    assert last < share * first, f"the loss went from {first:.3f} to {last:.3f}"
    return f"{len(losses)} steps, the loss fell from {first:.2f} to {last:.2f}"


def trainer(subject: Subject, folder: Path) -> str:
    """Train by plain Trainer, with evaluation and checkpoints; go on from the middle to the same loss."""
    settings = {**QUIET, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "eval_strategy": "steps"}
    settings |= {"max_steps": 12, "save_steps": 6, "eval_steps": 6, "lr_scheduler_type": "constant"}
    rows, losses = subject.training_rows(), []
    for resume in (None, str(folder / "first" / "checkpoint-6")):
        place = folder / ("first" if resume is None else "second")
        arguments = TrainingArguments(output_dir=str(place), **settings)
        run = Trainer(subject.model(), arguments, train_dataset=rows, eval_dataset=rows[:4])
        run.train(resume_from_checkpoint=resume)
        losses.append(_losses(run))
    whole, resumed = losses
    assert abs(whole[-1] - resumed[-1]) < 1e-4, f"{whole[-1]} without an interruption, {resumed[-1]} after one"
    return f"{_falls(whole)}; resumed from a checkpoint it ends at the same loss"


def seq2seq_trainer(subject: Subject, folder: Path) -> str:
    """Train and evaluate by Seq2SeqTrainer, with texts that the model generates."""
    settings = {**QUIET, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_steps": 8, "save_strategy": "no"}
    settings |= {"predict_with_generate": True, "generation_max_length": LENGTH - 1, "lr_scheduler_type": "constant"}
    model = subject.model()
    arguments = Seq2SeqTrainingArguments(output_dir=str(folder), **settings)
    rows = subject.training_rows()
    run = Seq2SeqTrainer(model, arguments, train_dataset=rows, processing_class=subject.tokenizer)
    run.train()
    try:
        found = run.predict(rows[:2])  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError) as error:
        if not subject.generates and "generate" in str(error):
            raise Refused(
                "Seq2SeqTrainer evaluates what a model generates, and masked LMs have no generate()."
            ) from error
        raise
    assert len(found.predictions) == 2
    return f"{_falls(_losses(run))}; predict_with_generate"


def peft(subject: Subject, folder: Path) -> str:
    """Train LoRA on the layers that PEFT chooses for the family, save it, load it, and merge it."""
    import peft as library

    adapted = library.get_peft_model(subject.model(), library.LoraConfig(r=4))
    layers = sum("lora_A" in name for name, _ in adapted.named_parameters())
    batch = subject.training_batch()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = adapted.eval()(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = outputs_of(adapted, batch)
    adapted.save_pretrained(str(folder))
    again: Any = library.PeftModel.from_pretrained(subject.model(), str(folder))
    equal = assert_close(outputs_of(again.merge_and_unload(), batch), expected, 1e-3, batch["attention_mask"])
    return f"LoRA on {layers} layers, without target_modules; {_falls(losses, 0.995)}; saved, loaded, merged: {equal}"


def trl(subject: Subject, folder: Path) -> str:
    """Train by TRL: supervised fine-tuning and DPO of a language model, a reward model of an encoder."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    settings = {**QUIET, "max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "bf16": False}
    settings |= {"lr_scheduler_type": "constant", "learning_rate": 3e-3, "max_length": LENGTH - 1}
    settings["activation_checkpointing"] = False
    pairs = Dataset.from_dict(
        {"prompt": ["Say it: "] * 4, "chosen": list(TEXTS[:4]), "rejected": [text[::-1] for text in TEXTS[:4]]}
    )
    common: dict[str, Any] = {"processing_class": subject.tokenizer}
    if not subject.generates:
        model = subject.model("AutoModelForSequenceClassification", num_labels=1)
        reward = RewardTrainer(model, RewardConfig(str(folder), **settings), train_dataset=pairs, **common)
        reward.train()
        return f"RewardTrainer: {_falls(_losses(reward))}"
    # TRL computes the loss from `lm_head.weight`, which a multiplicative output layer does not have.
    dense = {} if subject.family == "srupp" else {"lm_head_type": "dense", "loss_sparsity": None}
    base = str(export(subject.model("AutoModelForCausalLM", **dense), subject.tokenizer, folder / "exported"))
    texts = Dataset.from_dict({"text": list(TEXTS)})
    tuned = SFTTrainer(base, SFTConfig(str(folder), **settings), train_dataset=texts, **common)
    batch = {**subject.training_batch(), "use_cache": False}
    with torch.no_grad():
        own, fused = (tuned.model.eval()(**batch, **option).loss for option in ({}, {"fused_lm_head": True}))
    assert abs(own - fused) < 1e-3, f"the model's loss is {own:.4f}, and TRL's {fused:.4f}"
    tuned.train()
    preferences = DPOTrainer(base, args=DPOConfig(str(folder), **settings), train_dataset=pairs, **common)
    preferences.train()
    how = {"scaling_transformer": " (dense output layer)", "terraformer": " (without encoder; dense output layer)"}
    found = f"SFTTrainer{how.get(subject.family, '')}: {_falls(_losses(tuned))}"
    return f"{found}; DPOTrainer: {_falls(_losses(preferences))}; both from an exported folder"


def sentence_transformers(subject: Subject, folder: Path) -> str:
    """Make embeddings of texts, train them, save them and load them."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    subject.save(folder / "base", "AutoModel")
    words = Transformer(str(folder / "base"))
    model = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), "mean")], device="cpu")
    try:
        alone = model.encode([TEXTS[0]])
    except ValueError as error:
        if subject.family == "terraformer" and "decoder_input_ids" in str(error):
            raise Refused(
                "it calls AutoModel with a text alone, and an encoder-decoder wants a target besides; only of T5-like "
                "models, which it knows by name, it loads the encoder."
            ) from error
        raise
    together = model.encode(list(TEXTS))
    assert abs(together[0] - alone[0]).max() < 1e-4, "padding changes an embedding"
    pairs = Dataset.from_dict({"anchor": list(TEXTS), "positive": [*TEXTS[1:], TEXTS[0]]})
    arguments = SentenceTransformerTrainingArguments(
        str(folder), **QUIET, max_steps=8, per_device_train_batch_size=8, learning_rate=3e-3, save_strategy="no"
    )
    run = SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    run.train()
    model.save_pretrained(str(folder / "trained"))
    again = SentenceTransformer(str(folder / "trained"), device="cpu")
    assert abs(again.encode(list(TEXTS)) - model.encode(list(TEXTS))).max() < 1e-5
    return f"embeddings by mean pooling; {_falls(_losses(run))}; saved and loaded"


def _several_processes(subject: Subject, folder: Path, way: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "training.compatibility.process", way, subject.family, str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "found.json").read_text())
    for name, (alone, together) in found.items():
        assert abs(alone - together) < 1e-3 * abs(alone), f"{name}: {alone} in one process, {together} in two"
    return "two processes (gloo): loss and norm of the gradient equal those of one"


def ddp(subject: Subject, folder: Path) -> str:
    """A step in two processes by DistributedDataParallel."""
    return _several_processes(subject, folder, "ddp")


def fsdp(subject: Subject, folder: Path) -> str:
    """A step in two processes whose weights torch's FSDP 2 shards."""
    return _several_processes(subject, folder, "fsdp")
