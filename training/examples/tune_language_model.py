"""
Tune a language model by PEFT and TRL: LoRA, supervised fine-tuning, and preferences (DPO).

    pip install peft trl
    python -m training.examples.tune_language_model --output /tmp/tuned
    python -m training.examples.tune_language_model --output /tmp/tuned --model my-lm --ways sft,dpo

**LoRA.** `LoraConfig` without `target_modules` adapts the layers that hf_efficient has named to PEFT: of SRU++ and
TUPE the projections of attention, of Scaling Transformer and Terraformer all linear layers. Sparse layers are no
linear ones, and stay as they are.

**SFT, DPO.** TRL computes the loss from the last states and `lm_head.weight`, so it needs a dense output layer: SRU++
without an adaptive softmax, Scaling Transformer with `lm_head_type="dense"`. All other layers may be sparse.

DPO wants a second copy of the model, its reference. From the name of a folder TRL loads it by itself, but only if the
folder's config has an `auto_map`, as exported ones have (`hf-efficient export`): TRL 1.16 reads that attribute of
every model that is not transformers' own. From a folder of `save_pretrained` give both models, as `learn_preferences`
does.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import copy
from pathlib import Path
from typing import Any

from hf_efficient.utils.process import errors_in_one_line, names_among

from .small_models import LENGTH, TEXTS, example_parser, load_or_make


FAMILIES = ("srupp", "scaling_transformer")


def load(source: Path | None, family: str) -> tuple[Any, Any]:
    """Load or make a causal language model with a dense output layer."""
    fields = {"lm_head_type": "dense", "loss_sparsity": None} if family == "scaling_transformer" else {}
    return load_or_make(source, family, "AutoModelForCausalLM", **(fields if source is None else {}))


def settings(steps: int) -> dict[str, Any]:
    """Settings of both trainers of TRL, which by themselves want bf16 and activation checkpointing."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_length": LENGTH - 1,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": max(1, steps // 4),
        "report_to": [],
        "disable_tqdm": True,
    }


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def learn_texts(folder: Path, model: Any, tokenizer: Any, steps: int, peft_config: Any = None) -> list[float]:
    """Learn to write texts like those that are given, with all weights or with those of an adapter."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model,
        SFTConfig(str(folder), **settings(steps)),
        train_dataset=Dataset.from_dict({"text": list(TEXTS)}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return losses(trainer)


def learn_by_adapter(folder: Path, model: Any, tokenizer: Any, steps: int) -> list[float]:
    """The same by LoRA: the adapter alone is trained and saved. `merge_and_unload` puts it into the model."""
    from peft import LoraConfig, PeftModel

    base = copy.deepcopy(model)
    found = learn_texts(folder, model, tokenizer, steps, LoraConfig(r=8, task_type="CAUSAL_LM"))
    merged: Any = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return found


def learn_preferences(folder: Path, model: Any, tokenizer: Any, steps: int) -> list[float]:
    """Learn which of two texts is preferred, without moving far from the model that it was."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["Write: "] * 4, "chosen": list(TEXTS[:4]), "rejected": [text[::-1] for text in TEXTS[:4]]}
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model),
        DPOConfig(str(folder), **settings(steps)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return losses(trainer)


WAYS = {"sft": learn_texts, "lora": learn_by_adapter, "dpo": learn_preferences}


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Tune a model in each way, and return the losses of the steps, of several at once."""
    parser = example_parser("tune_language_model", __doc__)
    parser.add_argument("--ways", type=names_among(WAYS), default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument(
        "--family", default="srupp", choices=FAMILIES, help="of the model that is made without a folder"
    )
    parser.add_argument("--steps", type=int, default=20, help="of training, for each")
    args = parser.parse_args(argv)
    found = {}
    for way in args.ways:
        model, tokenizer = load(args.model, args.family)
        found[way] = WAYS[way](args.output / way, model, tokenizer, args.steps)
        print(f"{way}: loss {found[way][0]:.3f} in the first steps, {found[way][-1]:.3f} in the last")
    return found


if __name__ == "__main__":
    with errors_in_one_line():
        main()
