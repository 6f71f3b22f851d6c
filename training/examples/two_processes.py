"""
Train in several processes by torchrun; Trainer does the rest.

    torchrun --standalone --nproc_per_node 2 -m training.examples.two_processes --output /tmp/two
    python -m training.examples.two_processes --output /tmp/one --batch_size 4

Both commands see four texts a step and print the same losses: two processes read two texts each, and their gradients
are averaged. Without a GPU the processes talk by gloo; with GPUs Trainer gives one to each, by the same command. The
scripts of hf_efficient start this way too, for instance `torchrun --nproc_per_node 2 training/pretrain.py ...`. For
models that do not fit on one GPU, `--fsdp full_shard` of those scripts shards the weights.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import json
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_efficient.utils.process import errors_in_one_line, settle_process_group

from .small_models import TEXTS, example_parser, load_or_make


def main(argv: list[str] | None = None) -> list[float]:
    """Train a language model, and return the losses of the steps, which are those of all processes."""
    parser = example_parser("two_processes", __doc__)
    parser.add_argument("--family", default="srupp", help="of the model that is made where no folder is given")
    parser.add_argument("--batch_size", type=int, default=2, help="texts of a step, of each process")
    parser.add_argument("--steps", type=int, default=6, help="of training")
    args = parser.parse_args(argv)
    model, tokenizer = load_or_make(args.model, args.family, "AutoModelForCausalLM")
    arguments = TrainingArguments(
        str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    rows: Any = [tokenizer(text) for text in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # by the first process
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero():
        (args.output / "losses.json").write_text(json.dumps(losses))
        print(f"{arguments.world_size} processes: {', '.join(f'{loss:.4f}' for loss in losses)}")
    settle_process_group()
    trainer.accelerator.end_training()
    return losses


if __name__ == "__main__":
    with errors_in_one_line():
        main()
