"""Teach a small Terraformer to copy, to reverse or to sort a row of symbols, in minutes on one core.

    python -m training.examples.copy_task
    python -m training.examples.copy_task --task sort --steps 4000
    python -m training.examples.copy_task --config_overrides position_max_offset=33,position_zero_probability=0.5
    python -m training.examples.copy_task --config_overrides encoder_long_attention=lsh,decoder_long_attention=lsh

A row is 1 to 32 symbols of 11 kinds, drawn anew for each step, as in the original's test of its layers (its code is
named in arXiv 2111.12763). Feed-forward, attention and output layer are sparse, and the layers reversible. It prints
the loss, and the share of unseen rows that are right from the first symbol to the last, also for rows of up to twice
the length, whose last positions are learned with random starts alone (position_max_offset). As source and target begin
at starts of their own, the model then finds its place by the symbols before it, which repeat, and learns more slowly.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup, set_seed

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.trainer.arguments import HelpFormatter, parse_overrides
from hf_efficient.utils.labels import IGNORE_INDEX
from hf_efficient.utils.process import errors_in_one_line, start_script


logger = logging.getLogger(__name__)

SYMBOLS = 11  # ids from 1; 0 is padding, and begins a target
ORDERS = {
    "copy": lambda row: row,
    "reverse": lambda row: row.flip(0),
    "sort": lambda row: row.sort().values,
}
CONFIG: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "attentions_per_layer": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "position_init_scale": 0.1,
    "ff_sparsity": 8,
    "ff_rank": 8,
    "ff_hard_probability": 0.6,
    "attention_type": "multiplicative_conv",
    "attention_sparsity": 4,
    "lm_head_type": "multiplicative",
    "loss_sparsity": 4,
    "dropout": 0.0,
    "activation_dropout": 0.0,
}


@dataclass
class CopySettings:
    """The task, and how long it is learned."""

    task: str = field(default="copy", metadata={"help": f"What to write: {', '.join(ORDERS)}."})
    length: int = field(default=32, metadata={"help": "Most symbols of a row."})
    steps: int = field(default=800, metadata={"help": "Steps of training."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest rate of AdamW."})
    config_overrides: str | None = field(default=None, metadata={"help": "Changes to the config."})
    rows: int = field(default=500, metadata={"help": "Unseen rows to measure on."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and rows."})


def draw_rows(task: str, count: int, length: int, generator: torch.Generator, shortest: int = 1) -> dict[str, Tensor]:
    """
    Draw rows of the task, each of a length of its own.

    Args:
        task (`str`): a key of `ORDERS`.
        count (`int`), length (`int`): rows, and most symbols of one.
        generator (`torch.Generator`): of the draws.
        shortest (`int`, defaults to 1): fewest symbols.

    Returns:
        `dict[str, Tensor]`: `input_ids`, `attention_mask` and `labels`, `(count, length)`.
    """
    lengths = torch.randint(shortest, length + 1, (count, 1), generator=generator)
    mask = torch.arange(length) < lengths
    ids = torch.randint(1, SYMBOLS + 1, (count, length), generator=generator) * mask
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, wanted, size in zip(ids, labels, lengths[:, 0].tolist(), strict=True):
        wanted[:size] = ORDERS[task](row[:size])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def exact_matches(model: TerraformerForConditionalGeneration, rows: dict[str, Tensor]) -> float:
    """Share of rows that the model writes without a fault."""
    wanted = rows["labels"]
    length = wanted.shape[1]
    source = {name: rows[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    found: Any = model.eval().generate(**source, eos_token_id=None, **options)
    right = (found[:, 1:] == wanted) | (wanted == IGNORE_INDEX)
    return right.all(1).double().mean().item()


def teach(settings: CopySettings) -> tuple[TerraformerForConditionalGeneration, dict[str, float]]:
    """
    Train a model on the task.

    Returns:
        `tuple`: the model, and `exact` and `exact_twice_as_long`, shares of unseen rows that are right; the second of
            rows of more than `length` symbols up to twice as many, as far as the table of positions goes.

    Raises:
        ValueError: for a task that does not exist, or a config that does not fit.
    """
    if settings.task not in ORDERS:
        raise ValueError(f"`task` must be one of {', '.join(ORDERS)}, not {settings.task!r}.")
    set_seed(settings.seed)
    model = TerraformerForConditionalGeneration(
        TerraformerConfig(**CONFIG | parse_overrides(settings.config_overrides))
    )
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(1, settings.steps + 1):
        rows = draw_rows(settings.task, settings.batch_size, settings.length, generator)
        loss: Any = model.train()(**rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(settings.steps // 20, 1) == 0:
            logger.info("Step %d: loss %.4f", step, loss.item())
    unseen = torch.Generator().manual_seed(settings.seed + 1_000_003)
    found = {"exact": exact_matches(model, draw_rows(settings.task, settings.rows, settings.length, unseen))}
    longest = min(2 * settings.length, model.config.max_position_embeddings)
    if longest > settings.length:
        longer = draw_rows(settings.task, settings.rows, longest, unseen, settings.length + 1)
        found["exact_twice_as_long"] = exact_matches(model, longer)
    return model, found


def main(argv: list[str] | None = None) -> None:
    start_script(__name__)
    parser = HfArgumentParser([CopySettings], description=__doc__, formatter_class=HelpFormatter)  # type: ignore[list-item]
    (settings,) = parser.parse_args_into_dataclasses(argv)
    _, found = teach(settings)
    for name, share in found.items():
        print(f"{name}: {share:.2%}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
