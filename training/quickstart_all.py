"""
Further stages of the demo, by `--all`: pretraining by the meta-controller with notes on rare words, a sparse decoder
beside its dense twin, and summaries by a small Terraformer. See quickstart.py, which calls this.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

import hf_efficient
from hf_efficient.data.python_docs import builtin_summaries
from hf_efficient.objectives.diagnostics import chance_level_loss
from hf_efficient.trainer.arguments import PretrainingArguments
from hf_efficient.utils.atomic_write import write_files

from .count_rare_words import FILE_NAME, RareWordArguments, find_rare_words
from .pretrain import PretrainingSettings, pretrain
from .quickstart import ENCODER, SHORT, VOCABULARY, Length, Plan, Stages, rows_of, wrapped
from .train_seq2seq import Seq2SeqSettings, SummarizationArguments, train_seq2seq


CANDIDATES = 10
RARE = (30, 400)  # occurrences of a word that gets a note
CONTROLLER = Length(seconds=60, gflop=40, least=200, most=500)
SUMMARIZER = Length(seconds=90, gflop=300, least=100, most=250)
SUMMARIZER_CONFIG = (
    "hidden_size=128,intermediate_size=512,num_encoder_layers=2,num_decoder_layers=2,num_attention_heads=4,"
    "max_position_embeddings=256,position_init_scale=0.1,ff_sparsity=16,ff_rank=16,ff_sru_layers=1,"
    "attention_type=multiplicative_conv,attention_sparsity=8,lm_head_type=multiplicative,loss_sparsity=4,dropout=0.1,"
    "activation_dropout=0.0"
)
DECODER_LAYERS, DECODED_TOKENS = 6, 48
HELD_OUT_PAIRS = 8  # every so-manieth pair


def count_words(data: Path, folder: Path, steps: int) -> int:
    """Choose the words that get notes; return their number."""
    found = find_rare_words(
        RareWordArguments(
            corpus=str(data / "train.jsonl"),
            tokenizer=str(data / "tokenizer"),
            output_dir=str(folder),
            min_count=RARE[0],
            max_count=RARE[1],
            training_rows=steps * 16,
        )
    )
    return len(found.keys)


def pretrain_by_controller(plan: Plan, data: Path, folder: Path) -> dict[str, Any]:
    """Pretrain by the meta-controller with notes, draw the losses, and return how far it came."""
    steps = (SHORT if plan.short else CONTROLLER).steps(plan.gflops)
    words = count_words(data, folder.with_name("rare-words"), steps)
    settings = PretrainingSettings(
        corpus=str(data / "train.jsonl"),
        objective="meta_controller",
        objective_overrides=f"num_candidates={CANDIDATES},loss_weight=20,generator_divider=2",
        notes=str(folder.with_name("rare-words") / FILE_NAME),
        config_overrides=ENCODER,
        tokenizer=str(data / "tokenizer"),
        block_size=64,
        max_eval_rows=128,
    )
    options = {"learning_rate": 1e-3, "per_device_train_batch_size": 16}
    training = plan.training(folder, steps, PretrainingArguments, **options)
    history = pretrain(settings, training).state.log_history
    draw_losses(history, folder / "meta-controller.png")
    last = [entry for entry in history if "eval_loss" in entry][-1]
    return {
        "words": words,
        "note_updates": [entry for entry in history if "note_updates" in entry][-1]["note_updates"],
        "generator_loss": last["eval_generator_loss"],
        "discriminator_loss": last["eval_discriminator_loss"],
        "chance_level_loss": chance_level_loss(last["eval_replaced_fraction"], CANDIDATES),
        "picture": str(folder / "meta-controller.png"),
    }


def draw_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses of controller and encoder over steps, and that of a blind choice. Without matplotlib there is no
    picture, as `pretrain` said."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    names = ("generator_loss", "discriminator_loss")
    titles = ("controller: masked words", f"encoder: one of {CANDIDATES} candidates, or none")
    for axes, name, title in zip(panels, names, titles, strict=True):
        for prefix, label, style in (("", "training", "-"), ("eval_", "held out", "o-")):
            points = [(entry["step"], entry[prefix + name]) for entry in history if prefix + name in entry]
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
        axes.set(title=title, xlabel="step", ylabel="loss (nats)")
        axes.grid(alpha=0.3)
    seen = [entry for entry in history if "discriminator_loss" in entry]
    blind = [chance_level_loss(entry["replaced_fraction"], CANDIDATES) for entry in seen]
    panels[1].plot([entry["step"] for entry in seen], blind, "--", color="gray", label="blind choice")
    for axes in panels:
        axes.legend()
    write_files(path.parent, lambda place: figure.savefig(Path(place, path.name), dpi=120))


def decoding_rate(model: Any, count: int) -> float:
    """Tokens a second of a model that writes so many tokens after 16, at batch 1 on one thread."""
    prompt = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    seconds = []
    for new in (8, 1, 1 + count):  # to warm up; the prompt; the prompt and the tokens
        start = time.perf_counter()
        model.generate(prompt, min_new_tokens=new, max_new_tokens=new, **options)
        seconds.append(time.perf_counter() - start)
    return count / (seconds[2] - seconds[1])


def compare_decoders(plan: Plan) -> dict[str, Any]:
    """Let a dense and a sparse decoder of equal size write; return weights and tokens a second of each."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4} if plan.short else {}
    found: dict[str, Any] = {"layers": DECODER_LAYERS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, preset in (("dense", "24x1024-dense"), ("sparse", "24x1024-all")):
            fields = {**sizes, "num_hidden_layers": DECODER_LAYERS, "use_cache": True}
            config = hf_efficient.ScalingTransformerConfig.preset(preset, **fields)
            model = hf_efficient.ScalingTransformerForCausalLM(config).eval()
            rate = decoding_rate(model, DECODED_TOKENS)
            found[name] = {
                "parameters": model.num_parameters(),
                "read": model.weights_read_per_token(),
                "tokens_per_second": rate,
            }
            found["width"] = config.hidden_size
            del model
    finally:
        torch.set_num_threads(threads)
    return found


def train_summarizer(plan: Plan, data: Path, folder: Path) -> dict[str, Any]:
    """Train Terraformer to sum up what docstrings explain; return scores, those of first sentences, and an example."""
    pairs = builtin_summaries()
    held_out = [index for index in range(len(pairs)) if index % HELD_OUT_PAIRS == 0]
    kept = [index for index in range(len(pairs)) if index % HELD_OUT_PAIRS]

    def write(place: str) -> None:
        for name, rows in (("train", kept), ("validation", held_out)):
            pairs.select(rows).to_json(Path(place, f"pairs-{name}.jsonl"))

    write_files(data, write)
    settings = Seq2SeqSettings(
        pairs=str(data / "pairs-train.jsonl"),
        validation=str(data / "pairs-validation.jsonl"),
        config_overrides=SUMMARIZER_CONFIG,
        vocab_size=VOCABULARY,
        max_source_length=128,
        max_target_length=32,
        lead_sentences=1,
        max_eval_samples=16,
        memory_check="off",
    )
    steps = (replace(SHORT, least=20, most=20) if plan.short else SUMMARIZER).steps(plan.gflops)
    options = {"learning_rate": 2e-3, "per_device_train_batch_size": 16, "eval_steps": steps}
    history = train_seq2seq(settings, plan.training(folder, steps, SummarizationArguments, **options)).state.log_history
    (final,) = [entry for entry in history if "final_rouge1" in entry]
    pair = pairs[held_out[0]]
    summarize: Any = pipeline("summarization", model=str(folder), device="cpu")  # type: ignore[call-overload]
    return {
        "documents": len(held_out),
        "rouge1": final["final_rouge1"],
        "lead_rouge1": final["final_lead_rouge1"],
        "loss": final["final_loss"],
        "document": pair["document"],
        "reference": pair["summary"],
        "summary": summarize(pair["document"])[0]["summary_text"],
    }


def run_all(stages: Stages, plan: Plan) -> None:
    """Run the further stages."""
    folder = stages.folder
    found = stages.run(
        "meta_controller",
        "Pretrain by the meta-controller, with notes on rare words (TNF)",
        lambda: pretrain_by_controller(plan, folder / "data", folder / "meta-controller"),
    )
    print(
        f"   on held-out text: controller {found['generator_loss']:.2f} nats a masked token; encoder "
        f"{found['discriminator_loss']:.3f} a token, a blind choice {found['chance_level_loss']:.3f}\n"
        f"   {found['words']} words have notes, moved {found['note_updates']:.0f} times; figure: {found['picture']}"
    )
    found = stages.run(
        "decoders", "Decode with a sparse model beside its dense twin, on one thread", lambda: compare_decoders(plan)
    )
    dense, sparse = found["dense"], found["sparse"]
    print(f"   {found['layers']} layers of width {found['width']}, random weights, batch 1:")
    rows_of(
        *(
            (
                f"{name}: {kind['read'] / 1e6:.0f} of {kind['parameters'] / 1e6:.0f} M weights read a token",
                f"{kind['tokens_per_second']:.1f} tokens/s",
            )
            for name, kind in (("dense", dense), ("sparse", sparse))
        ),
        ("sparse / dense", f"{sparse['tokens_per_second'] / dense['tokens_per_second']:.1f} times"),
        indent=6,
    )
    found = stages.run(
        "summaries",
        "Summarise with a small Terraformer: what a docstring explains, in its first line",
        lambda: train_summarizer(plan, folder / "data", folder / "summarizer"),
    )
    print(f"   ROUGE-1 on {found['documents']} unseen documents:")
    rows_of(
        ("their first sentence", f"{100 * found['lead_rouge1']:.1f}"),
        ("Terraformer", f"{100 * found['rouge1']:.1f}"),
        indent=6,
    )
    for name in ("document", "summary", "reference"):
        print(wrapped(f"{name}: {found[name]}", indent=6, lines=2))
