"""
Whole meetings read at once: memory of a training step and of a summary, and what a few minutes of training teach.

    python -m training.benchmarks run long_summary --data summarization

Trains a small Terraformer with attention by hashing (LSH) on the transcripts of whole meetings of QMSum, the files
qmsum-train.parquet and so on in the folder `--data`, of up to 16,384 tokens. It measures the loss of held-out meetings
before and after, and in fresh processes the peak of the longest meeting's training step and of its summary; ROUGE of a
few summaries stands beside that of the first sentences, and is no claim. Writes training/results/long_summary.json.
Killed, the same command goes on from the last save.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.data.pairs import lead
from hf_efficient.modules.unit_usage import observed_units
from training.train_seq2seq import rouge_of

from .decoding.worker import resident_bytes
from .environment import RESULTS, describe, write_result
from .equal_time import TrainConfig, train_interleaved
from .summarization_race import Pairs, PairSet, SummaryTrainer, held_out_loss, write_summaries
from .timing import core_time, in_fresh_processes, peak_growth


RESULT = RESULTS / "long_summary.json"
LEAST_WORDS, LEAD = 2000, 3
CPU = torch.device("cpu")


def build(pairs: Pairs) -> TerraformerForConditionalGeneration:
    """Build a model of two and two sparse layers, which hash in both stacks."""
    config = TerraformerConfig(
        vocab_size=len(pairs.tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_attention_heads=4,
        attentions_per_layer=1,
        max_position_embeddings=max(pairs.kind.source, pairs.kind.target),
        position_init_scale=0.1,
        dropout=0.0,
        activation_dropout=0.0,
        ff_sparsity=16,
        ff_rank=16,
        ff_sru_layers=1,
        attention_type="multiplicative_conv",
        attention_sparsity=8,
        lm_head_type="multiplicative",
        loss_sparsity=4,
        encoder_long_attention="lsh",
        decoder_long_attention="lsh",
        lsh_chunk_length=min(64, pairs.kind.source),
        lsh_rounds=2,
    )
    return TerraformerForConditionalGeneration(config)


def measure_process(folder: str, what: str, batch: dict[str, torch.Tensor], target: int) -> dict[str, float]:
    """Measure the peak and the core seconds of a `"step"` or a `"summary"`, in this process, which should be a fresh
    one."""
    torch.set_num_threads(1)
    model: Any = TerraformerForConditionalGeneration.from_pretrained(folder)

    def run(given: dict[str, torch.Tensor], tokens: int) -> None:
        if what == "step":
            model.train()(**given, use_cache=False).loss.backward()
            return
        source = {name: given[name] for name in ("input_ids", "attention_mask")}
        model.eval().generate(**source, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    short = {name: values[:, :64] for name, values in batch.items()}
    run(short, 2)  # what is loaded and allocated on first use counts to what was there before
    before, started = resident_bytes(), core_time(CPU)
    growth = peak_growth(lambda: run(batch, target))
    return {"peak_bytes": before + growth, "growth_bytes": growth, "core_s": core_time(CPU) - started}


def losses(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return {"own": held_out_loss(model, batches), "exchanged": held_out_loss(model, batches, exchanged=True)}


def measure(args: argparse.Namespace) -> None:
    """Train, measure and write the result."""
    torch.manual_seed(args.seed)
    pairs = Pairs("qmsum", PairSet("qmsum", args.source, args.target, None, args.least_words), args)
    config = TrainConfig(
        budget_s=60 * args.minutes,
        batch_size=1,
        learning_rate=args.learning_rate,
        evaluations=1,
        weight_decay=0.1,
        schedule="cosine",
        decay_matrices_only=True,
    )
    trainer = SummaryTrainer("qmsum", build(pairs), pairs, config, args.seed, 1)
    # Rows of two meetings: one alone has none to be exchanged for.
    held_out = pairs.batches(pairs.rows("validation", args.rows), 2)
    before = losses(trainer.model, held_out)  # of weights that the seed gives, also where a run is taken up again
    train_interleaved([trainer], args.output_dir / "qmsum", args.slice, save_every=1)
    with observed_units(trainer.model) as usage:
        after = losses(trainer.model, held_out)
    folder = args.output_dir / "qmsum" / "model"
    trainer.model.save_pretrained(folder)
    batch = dict(pairs.pad([max(pairs.rows("train"), key=lambda row: len(row["input_ids"]))]))
    found = {
        what: in_fresh_processes(measure_process, (str(folder), what, batch, args.target), 1)[0]
        for what in ("step", "summary")
    }
    sample = pairs.splits["test"][: args.rows]
    texts = write_summaries(trainer.model, pairs, pairs.rows("test", args.rows), 1)
    tokens = [len(row["input_ids"]) for row in pairs.rows("train")]
    source, target = batch["input_ids"].shape[1], batch["labels"].shape[1]
    most = max(figures["peak_bytes"] for figures in found.values())
    result = {
        "headline": f"A training step and a summary of {source:,} tokens take {most / 1e9:.2f} GB of memory at most.",
        "tokens": {"source": source, "target": target, "written": args.target},
        **found,
        "meetings": {"train": len(tokens), "mean_tokens": sum(tokens) / len(tokens), "held_out": args.rows},
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.progress.steps,
        "core_s": trainer.progress.seconds,
        "loss_before": before,
        "loss_after": after,
        "summaries": rouge_of(texts, sample["references"]),
        "lead": rouge_of([lead(text, LEAD) for text in sample["document"]], sample["references"]),
        "distinct_summaries": len(set(texts)),
        "unit_usage": {name: layer.figures() for name, layer in usage.items()},
        "config": trainer.model.config.to_diff_dict(),
    }
    write_result(args.result, {**result, **describe()})
    print(result["headline"])
    print(f"Held-out loss {before['own']:.3f} before and {after['own']:.3f} after {trainer.progress.steps} steps.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run long_summary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--minutes", type=float, default=5.0, help="core time of the training (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--source", type=int, default=16_384, help="most tokens of a meeting (%(default)s)")
    parser.add_argument("--target", type=int, default=128, help="most tokens of a summary (%(default)s)")
    parser.add_argument("--least_words", type=int, default=LEAST_WORDS, help="of a meeting (%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids of the tokenizer (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="meetings that are held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slice", type=float, default=20.0, help="core seconds between saves (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long_summary"))
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    measure(args)


if __name__ == "__main__":
    main()
