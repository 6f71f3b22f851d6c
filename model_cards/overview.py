"""Figures of training/results in the README: a sentence a family, and one table.

Every figure is measured. A result that lacks one is an error, so that neither has a gap.
"""

import json
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


def families(folder: Path, prefix: str = "") -> str:
    """
    A list with a sentence a family.

    Args:
        folder (`Path`): of the result files.
        prefix (`str`, *optional*): what a link to a page of the repository begins with.
    """
    figures = Figures(folder)
    get = figures.summary
    share = get("pretrain_race", "tupe_r passes bert's final held-out loss, share of its time (worst seed)")
    short = get("lm_race", "race: SRU++ reaches GPT-2's final value within the same schedule (worst seed)")
    long = get("lm_race", "long race: SRU++ reaches GPT-2's final value within the same schedule (worst seed)")
    twin = get("decode_speed_native", "bf16 all against its dense twin at 16")
    llama = get("decode_speed_native", "bf16 all against llama Q4_0 at 16")
    decoding = get("seq2seq_decode_native", "terraformer-medium against its dense twin")
    peak = get("long_input", "peak at 16,384 tokens")
    masked, replaced, controller = (
        figures.cell("objective_race", method, "exchanged neighbours").partition(" ")[0]
        for method in ("TUPE-R", "TUPE-R, masked LM, then replaced tokens", "TUPE-R, meta-controller")
    )
    sentences = (
        "**TUPE-BERT** is BERT with positions and words kept apart in attention: pretrained for 15 minutes on one "
        f"core, it passes the final loss of a BERT of equal size after {share:.0%} of the time.",
        "**SRU++** is a language model of fast recurrence and a little attention: it passes the final bits per byte of "
        f"a GPT-2 of equal size after {short:.0%} of 8 minutes on one core, and after {long:.0%} of 40.",
        f"**Scaling Transformer** reads a tenth of its weights for a token: it writes {twin:.1f} times as many tokens "
        f"a second on one core as a dense model of equal size, and {llama:.1f} times as many as llama.cpp with such a "
        "model in 4 bits.",
        "**Terraformer** is such a model that reads a document and writes its summary: it decodes "
        f"{decoding:.1f} times as fast as its dense twin, and training on 16,384 tokens peaks at {peak:.1f} GB.",
        "**Objectives** beside masked words, for any encoder: after 20 minutes on one core, encoders trained to find "
        f"replaced words ({replaced} %) or to choose among candidates ({controller} %, the meta-controller) recognise "
        f"more exchanged neighbours than one trained on masked words ({masked} %; chance is 50 %). Notes on rare words "
        "(TNF) go with each of them.",
    )
    pages = ("pretraining", "results", "decoding", "summarization", "pretraining")
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
    worse = get("sparse_quality", "bits per byte, sparse FF, QKV and loss / dense (worst seed)")
    sparse = get("decode_speed_native", "bf16 all against its dense twin at 16")
    kept = get("long_input", "kept by the forward pass, 24 layers over 4")
    decoding = get("seq2seq_decode_native", "terraformer-medium against its dense twin")
    rows = (
        ("family", "loads as", "compared with", "quality or memory", "speed"),
        ("---",) * 5,
        (
            f"[TUPE-BERT]({prefix}model_cards/tupe-base.md)",
            "`AutoModelForMaskedLM`, ...",
            "BERT of equal size",
            f"loss of {race[0]:.2f} against {race[1]:.2f} nats after 15 minutes",
            f"training step {encoder['train']:.2f}, inference {encoder['inference']:.2f} times the time",
        ),
        (
            f"[SRU++]({prefix}model_cards/srupp-enwik8-base.md)",
            "`AutoModelForCausalLM`, ...",
            "GPT-2 of equal size",
            f"{bits[0]:.2f} against {bits[1]:.2f} bits per byte after 8 minutes",
            f"training step {step:.2f}, a token {token:.2f} times the time",
        ),
        (
            f"[Scaling Transformer]({prefix}model_cards/scaling_transformer-24x1024-all.md)",
            "`AutoModelForCausalLM`",
            "its dense twin",
            f"{worse:.3f} times the bits per byte after the same text",
            f"{sparse:.1f} times the tokens a second",
        ),
        (
            f"[Terraformer]({prefix}model_cards/terraformer-medium.md)",
            "`AutoModelForSeq2SeqLM`, ...",
            "its dense twin; itself with fewer layers",
            f"24 layers keep {kept:.2f} times the memory of 4 in training",
            f"{decoding:.1f} times the tokens a second",
        ),
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
