"""Teach a small Terraformer to copy, to reverse or to sort a row of symbols, in minutes on one core.

    python -m training.examples.copy_task
    python -m training.examples.copy_task --task sort --steps 4000
    python -m training.examples.copy_task --lsh --steps 2000 --full_steps 600
    python -m training.examples.copy_task --config_overrides \\
        position_shared_start=true,position_max_offset=33,position_zero_probability=0.1

A row is 1 to 32 symbols of 11 kinds, drawn anew for each step, as in the original's test of its layers (its code is
named in arXiv 2111.12763). Feed-forward, attention and output layer are sparse, and the layers reversible. It prints
the loss, and the share of unseen rows that are right from the first symbol to the last, also for rows of up to twice
the length, whose last positions are learned with random starts alone (position_max_offset). Where source and target
begin at starts of their own, a symbol's place does not say where its copy is: position_shared_start gives them one.
--lsh hashes queries and keys in both stacks, so that a query sees at most 32 keys, those in its buckets: half of the 64
that source and target have in the decoder, where rows are longest, and all of the encoder's. Hashing has no gradient;
the first steps therefore attend to all keys, by which alike places become alike vectors.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.modules.lsh_layers import LshAttention
from hf_efficient.trainer.arguments import parse_overrides, parse_with_preset
from hf_efficient.utils.labels import IGNORE_INDEX
from hf_efficient.utils.process import errors_in_one_line, start_script
from training.benchmarks.environment import describe, write_result


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


# Two rounds of chunks of 8 tokens, its own and the one before; rows are to be longer than `lsh_full_length`.
LSH: dict[str, Any] = {
    "encoder_long_attention": "mixed",
    "decoder_long_attention": "mixed",
    "lsh_full_length": 128,
    "lsh_rounds": 2,
    "lsh_chunk_length": 8,
    "lsh_chunks_before": 1,
    "lsh_encoder_chunks_after": 0,
}


@dataclass
class CopySettings:
    """The task, and how long it is learned."""

    task: str = field(default="copy", metadata={"help": f"What to write: {', '.join(ORDERS)}."})
    length: int = field(default=32, metadata={"help": "Most symbols of a row."})
    steps: int = field(default=800, metadata={"help": "Steps of training."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest rate of AdamW."})
    lsh: bool = field(default=False, metadata={"help": "Attend by hashing, in both stacks."})
    full_steps: int = field(default=500, metadata={"help": "First steps with attention to all keys before --lsh."})
    config_overrides: str | None = field(default=None, metadata={"help": "Changes to the config."})
    rows: int = field(default=500, metadata={"help": "Unseen rows to measure on."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and rows."})
    result: Path | None = field(default=None, metadata={"help": "JSON to which the figures are added."})


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


def hash_all(model: TerraformerForConditionalGeneration) -> None:
    """Let mixed attention hash rows of any length from now on."""
    model.config.lsh_full_length = 0
    for module in model.modules():
        if isinstance(module, LshAttention):
            module.full_length = 0


def keys_seen(config: TerraformerConfig, length: int) -> dict[str, float]:
    """Share of the keys that a query sees at most, of the encoder's and of those of source and target in the decoder,
    behind a source of `length` symbols and as many in the target."""
    found = {}
    for stack, beside, keys in (("encoder", config.lsh_encoder_chunks_after, length), ("decoder", 0, 2 * length)):
        chunks = max(config.lsh_rounds, config.lsh_eval_rounds or 0) * (1 + config.lsh_chunks_before + beside)
        kind = getattr(config, f"{stack}_long_attention")
        hashed = kind == "lsh" or (kind == "mixed" and keys > config.lsh_full_length)
        found[stack] = min(1.0, chunks * config.lsh_chunk_length / keys) if hashed else 1.0
    return found


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
        ValueError: for a task that does not exist, steps or a config that do not fit.
    """
    if settings.task not in ORDERS:
        raise ValueError(f"`task` must be one of {', '.join(ORDERS)}, not {settings.task!r}.")
    if settings.lsh and settings.full_steps >= settings.steps:
        raise ValueError(f"`full_steps` ({settings.full_steps}) leave none of {settings.steps} `steps` to hash in.")
    set_seed(settings.seed)
    fields = CONFIG | (LSH if settings.lsh else {}) | parse_overrides(settings.config_overrides)
    model = TerraformerForConditionalGeneration(TerraformerConfig(**fields))
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(1, settings.steps + 1):
        if settings.lsh and step == settings.full_steps + 1:
            hash_all(model)
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
    (settings,) = parse_with_preset([CopySettings], argv, __doc__)
    started = time.process_time()
    model, found = teach(settings)
    seconds = time.process_time() - started
    seen = keys_seen(model.config, settings.length)
    for name, share in found.items():
        print(f"{name}: {share:.2%}")
    print("keys that a query sees at most:", ", ".join(f"{share:.0%} in the {stack}" for stack, share in seen.items()))
    if settings.result is not None:
        chosen = {name: value for name, value in asdict(settings).items() if name != "result"}
        row = {**chosen, **found, "keys_seen": seen, "core_s": seconds, "parameters": model.num_parameters()}
        row["chunk_length"] = model.config.lsh_chunk_length
        add_row(settings.result, row, chosen)


def add_row(path: Path, row: dict[str, Any], settings: dict[str, Any]) -> None:
    """Add a run to a file of results, in the place of an earlier one of the same settings; each names the commit, the
    command and the processor that it was run by."""
    made = describe()
    row = {**row, "processor": made["machine"]["processor"], **{name: made[name] for name in ("commit", "command")}}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [other for other in before if any(other.get(name) != value for name, value in settings.items())]
    rows = [*others, row]
    write_result(path, {"summary": [summary_of(one) for one in rows], "rows": rows, **made})


def summary_of(row: dict[str, Any]) -> dict[str, Any]:
    """Make a row for pages of a run: its share of right rows, beside the time that it learned and the keys it saw."""
    how = f"hashing in chunks of {row['chunk_length']}" if row.get("lsh") else "all keys"
    settings = f", {row['config_overrides']}" if row["config_overrides"] else ""
    seen = ", ".join(f"{share:.0%} in the {stack}" for stack, share in row["keys_seen"].items())
    twice = f", {row['exact_twice_as_long']:.1%} at twice the length" if "exact_twice_as_long" in row else ""
    return {
        "name": f"{row['task']}, {how}{settings}",
        "value": row["exact"],
        "unit": f"of unseen rows right{twice}; {row['core_s']:.0f} core seconds; keys seen at most: {seen}",
        "goal": "at least 0.99" if row["task"] == "copy" else None,
    }


if __name__ == "__main__":
    with errors_in_one_line():
        main()
