"""Figures of training/results in the README: a sentence a family, and one table.

Every figure is measured. A result that lacks one is an error, so that neither has a gap.
"""

import json
import statistics
from pathlib import Path
from typing import Any


class Figures:
    """
    Figures of result files.

    Args:
        folder (`Path`): of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, name: str) -> dict[str, Any]:
        """Content of `NAME.json`."""
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def summary(self, name: str, row: str) -> float:
        """
        The value of a row of a file's `summary`.

        Raises:
            ValueError: if there is no such row, or it was not measured.
        """
        found = [entry["value"] for entry in self.file(name)["summary"] if entry["name"] == row]
        if len(found) != 1 or found[0] is None:
            raise ValueError(f"{name}.json has no measured {row!r} in its summary.")
        return found[0]

    def cell(self, name: str, row: str, column: str) -> str:
        """
        A cell of a file's `table`, of the row that begins with `row` and the column that begins with `column`.

        Raises:
            ValueError: if there is not exactly one.
        """
        table = self.file(name)["table"]
        columns = [index for index, title in enumerate(table["columns"]) if title.startswith(column)]
        rows = [cells for cells in table["rows"] if cells[0] == row]
        if len(columns) != 1 or len(rows) != 1:
            raise ValueError(f"{name}.json has {len(rows)} rows {row!r} and {len(columns)} columns {column!r}.")
        return str(rows[0][columns[0]])

    def peak(self, form: str, layers: int, tokens: int) -> float:
        """
        Gigabytes that a training step on long input takes at its peak.

        Raises:
            ValueError: if that was not measured.
        """
        wanted = {"form": form, "layers": layers, "tokens": tokens}
        entries = self.file("long_input")["entries"]
        found = [entry["peak_bytes"] for entry in entries if wanted.items() <= entry.items()]
        if len(found) != 1:
            raise ValueError(f"long_input.json has no measured peak of {wanted}.")
        return statistics.median(found[0]) / 1e9


def families(folder: Path, prefix: str = "") -> str:
    """
    A list of the families: what each is for, what it is, and a figure.

    Args:
        folder (`Path`): of the result files.
        prefix (`str`, *optional*): what a link to a page of the repository begins with.
    """
    figures = Figures(folder)
    get = figures.summary
    share = get("pretrain_race", "tupe_r passes bert's final held-out loss, share of its time (worst seed)")
    short = get("lm_race", "race: SRU++ reaches GPT-2's final value within the same schedule (worst seed)")
    long = get("lm_race", "long race: SRU++ reaches GPT-2's final value within the same schedule (worst seed)")
    token = get("lm_speed_kernel_avx512", "decode after 128 tokens, SRU++ / GPT-2")
    twin = get("decode_speed_native", "bf16 all against its dense twin at 16")
    llama = get("decode_speed_native", "bf16 all against llama Q4_0 at 16")
    decoding = get("seq2seq_decode_native", "terraformer-medium against its dense twin")
    deep = {form: figures.peak(form, layers=24, tokens=8192) for form in ("reversible", "checkpointed")}
    masked, replaced, controller = (
        figures.cell("objective_race", method, "exchanged neighbours").partition(" ")[0]
        for method in ("TUPE-R", "TUPE-R, masked LM, then replaced tokens", "TUPE-R, meta-controller")
    )
    sentences = (
        "**Scaling Transformer**, for fast generation on a CPU: a causal language model that reads a tenth of its "
        f"weights per token. It writes {twin:.1f} times as many tokens a second as a dense model of equal size "
        f"(24 layers, 1,024 wide, bf16, batch 1, one thread), and {llama:.1f} times as many as llama.cpp with such a "
        "model in 4 bits.",
        "**TUPE-BERT**, for pretraining an encoder with little compute: BERT whose attention scores words and "
        "positions separately, without cross terms. It reaches the loss that a BERT of equal size has after 15 "
        f"minutes in {share:.0%} of that time; BERT is still on its first plateau then.",
        "**SRU++**, for training a language model with little compute: a fast recurrence, with a little attention. It "
        f"reaches the bits per byte that a GPT-2 of equal size has after 8 minutes in {short:.0%} of the time, and its "
        f"40-minute value in {long:.0%} of the time; generating a token takes {token:.2f} times as long.",
        "**Terraformer**, for reading long documents and summarising them: an encoder-decoder with the layers of the "
        "Scaling Transformer, attention by hashing (LSH), and reversible layers, which recompute activations instead "
        f"of storing them. A training step of 24 + 24 layers on 8,192 tokens peaks at {deep['reversible']:.1f} GB, "
        f"where gradient checkpointing takes {deep['checkpointed']:.1f}; 24 decoder layers, 1,024 wide, generate "
        f"{decoding:.1f} times as fast as their dense twin.",
        "**Objectives** for any encoder: replaced-token detection (ELECTRA), choosing among a generator's candidates "
        "(MC-BERT's meta-controller), and, with either or with masked words, notes on rare words (TNF). After 20 "
        "minutes the first two tell which sentences have two neighbouring words exchanged in "
        f"{replaced} and {controller} % of cases, masked words alone in {masked} % (chance is 50 %; one seed).",
    )
    pages = ("decoding", "pretraining", "results", "summarization", "pretraining")
    return "\n".join(
        f"- {sentence} [More]({prefix}docs/{page}.md)" for sentence, page in zip(sentences, pages, strict=True)
    )


def overview(folder: Path, prefix: str = "") -> str:
    """A table of the families: how each loads, what it was compared with, what it learned and how fast it runs.
    Arguments are those of [`families`]."""
    figures = Figures(folder)
    get = figures.summary
    encoder = figures.file("encoder_speed")["table"]["4x256"]
    race = [get("pretrain_race", f"held-out MLM loss, {name}") for name in ("tupe_r", "bert")]
    bits = [get("lm_race", f"race: bits per byte of all validation, {name}") for name in ("SRU++", "GPT-2")]
    step = get("lm_speed_kernel_avx512", "train step, SRU++ / GPT-2")
    token = get("lm_speed_kernel_avx512", "decode after 128 tokens, SRU++ / GPT-2")
    learns = figures.file("lm_race")["races"]["race"][0]["runs"]["srupp"]["parameters"]
    timed = figures.file("lm_speed_kernel_avx512")["parts"]["train"]["parameters"]["srupp"]
    of_sparse = figures.file("sparse_quality")["kinds"]["all"]["parameters"]
    worse = get("sparse_quality", "bits per byte, sparse FF, QKV and loss / dense (worst seed)")
    sparse = get("decode_speed_native", "bf16 all against its dense twin at 16")
    kept = get("long_input", "kept by the forward pass, 24 layers over 4")
    decoding = get("seq2seq_decode_native", "terraformer-medium against its dense twin")
    rows = (
        ("family", "loads as", "compared with", "quality or memory", "speed"),
        ("---",) * 5,
        (
            f"[Scaling Transformer]({prefix}model_cards/scaling_transformer-24x1024-all.md)",
            "`AutoModelForCausalLM`",
            f"its dense twin (quality: {of_sparse / 1e6:.1f} M parameters; speed: 24 layers, 1,024 wide)",
            f"{worse:.3f} times the bits per byte after the same text",
            f"{sparse:.1f} times the tokens a second",
        ),
        (
            f"[TUPE-BERT]({prefix}model_cards/tupe-base.md)",
            "`AutoModelForMaskedLM`, ...",
            "BERT of equal size (4 layers, 256 wide)",
            f"loss of {race[0]:.2f} against {race[1]:.2f} nats after 15 minutes",
            f"training step {encoder['train']:.2f}, inference {encoder['inference']:.2f} times the time",
        ),
        (
            f"[SRU++]({prefix}model_cards/srupp-enwik8-base.md)",
            "`AutoModelForCausalLM`, ...",
            f"GPT-2 of equal size (quality: {learns / 1e6:.1f} M parameters; speed: {timed / 1e6:.0f} M)",
            f"{bits[0]:.2f} against {bits[1]:.2f} bits per byte after 8 minutes",
            f"training step {step:.2f}, a token {token:.2f} times the time",
        ),
        (
            f"[Terraformer]({prefix}model_cards/terraformer-medium.md)",
            "`AutoModelForSeq2SeqLM`, ...",
            "its dense twin (24 layers, 1,024 wide); itself with fewer layers",
            f"24 layers keep {kept - 1:.0%} more activations than 4 in training",
            f"{decoding:.1f} times the tokens a second",
        ),
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
