"""
Training on a stream: memory over a large text, resuming after a kill, and what the reading costs.

    python -m training.benchmarks run streaming
    python -m training.benchmarks run streaming --bytes 20000000 --steps 12

Writes text of random words, as frequent as in the built-in corpus, into a temporary folder, and in fresh processes of
one thread each

- reads all of it as segments of bytes, and `--packed_bytes` of it as packed rows of 128 tokens with a shuffle buffer of
  10,000, while the memory of the process is sampled; goes on from the last place that was kept, and measures the time
  to the next row;
- pretrains a small TUPE and trains a small SRU++ with `--streaming`, whole, and killed by SIGKILL and resumed, and
  compares their losses;
- makes batches of 32 rows from the stream and from the packed text in memory, in turn.

Times are those of a core. Writes training/results/streaming.json.
"""

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoTokenizer

from hf_efficient.data.corpus import load_corpus
from hf_efficient.data.document_stream import DocumentSettings, DocumentStream
from hf_efficient.data.packing import pack_blocks
from hf_efficient.data.python_docs import builtin_corpus
from hf_efficient.data.row_streams import BlockStream, RowStream, SegmentStream
from hf_efficient.data.token_stream import build_tokenizer, encode_document
from hf_efficient.data.tokenizers import train_tokenizer
from hf_efficient.objectives.masking import MaskingCollator

from .environment import RESULTS, ROOT, describe, write_result
from .timing import core_time, in_fresh_processes, interleave, medians


RESULT = RESULTS / "streaming.json"
FILES, BLOCK, SEGMENT, BUFFER, BATCH = 4, 128, 512, 10_000, 32
SAMPLED, KEPT = 1000, 50  # rows between two samples of the memory, and samples between two places that are kept
CPU = torch.device("cpu")
SIZES = {
    "pretrain": "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=256",
    "train_lm": "hidden_size=64,num_hidden_layers=2,projection_size=16,attention_layers=[1]",
}


def write_text(folder: Path, size: int) -> None:
    """Write `size` bytes of documents of 50 to 400 words, parted by empty lines, into files."""
    counts = Counter(word for text in builtin_corpus()["text"] for word in text.split())
    words, numbers = zip(*counts.most_common(50_000), strict=True)
    shares = np.cumsum(numbers) / sum(numbers)
    rng = np.random.default_rng(0)
    for number in range(FILES):
        written = 0
        with (folder / f"part-{number}.txt").open("w", encoding="utf-8") as file:
            while written < size / FILES:
                drawn = np.searchsorted(shares, rng.random(200_000)).clip(0, len(words) - 1).tolist()
                ends = np.cumsum(rng.integers(50, 400, 1000))
                texts = (" ".join(map(words.__getitem__, drawn[a:b])) for a, b in pairwise(ends))
                written += file.write("\n\n".join(text for text in texts if text) + "\n\n")


def documents(folder: str, passes: int | None = None) -> DocumentStream:
    return DocumentStream(DocumentSettings(corpus=f"{folder}/*.txt", txt_documents="blank_line"), passes=passes)


def byte_segments(folder: str, passes: int | None = None) -> RowStream:
    tokenizer = build_tokenizer("byte", [])
    return SegmentStream(
        documents(folder, passes), lambda text, is_next: encode_document(text, tokenizer, "byte", is_next)[0], SEGMENT
    )


def blocks(folder: str, passes: int | None = None) -> RowStream:
    tokenizer = AutoTokenizer.from_pretrained(str(Path(folder, "tokenizer")))
    return BlockStream(documents(folder, passes), tokenizer, BLOCK, shuffle_buffer_size=BUFFER)


STREAMS: dict[str, Callable[..., RowStream]] = {"bytes": byte_segments, "blocks": blocks}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drain(name: str, folder: str, tokens: int | None) -> dict[str, Any]:
    """Read a stream to its end, or for so many tokens, and go on from there in another one."""
    torch.set_num_threads(1)
    stream = STREAMS[name](folder, 1)
    samples: list[int] = []
    state: dict[str, Any] = {}
    start, seen, rows = core_time(CPU), 0, 0
    for row in stream:
        seen += len(row["input_ids"])
        rows += 1
        if rows % SAMPLED == 0:
            samples.append(resident())
            if len(samples) % KEPT == 1:
                state = stream.state_dict()
        if tokens is not None and seen >= tokens:
            break
    seconds = core_time(CPU) - start
    other = STREAMS[name](folder)
    start = core_time(CPU)
    other.load_state_dict(state)
    next(iter(other))
    kept = sum(value.nbytes for value in state.values() if isinstance(value, np.ndarray))
    again = core_time(CPU) - start
    figures = {"rows": rows, "tokens": seen, "seconds": seconds, "resume_seconds": again, "state_bytes": kept}
    return {"stream": name, **figures, "resident_bytes": samples}


def command(script: str, folder: Path, output: str, steps: int) -> list[str]:
    """Command line of a small run with checkpoints after each quarter."""
    settings = {
        "corpus": folder / "*.txt",
        "txt_documents": "blank_line",
        "streaming": True,
        "output_dir": folder / output,
        "config_overrides": SIZES[script],
        "max_steps": steps,
        "save_steps": max(1, steps // 4),
        "logging_steps": 1,
        "eval_steps": max(1, steps // 2),
        "warmup_steps": 1,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "auto_bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if script == "pretrain":
        settings |= {"tokenizer": folder / "tokenizer", "max_eval_rows": 64}
    else:
        settings |= {"max_eval_tokens": 8192, "sample_tokens": 0, "final_evaluation": False}
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "training" / f"{script}.py"), *options]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Read the losses that a run logged, and its norms of the gradient."""
    log = json.loads((folder / "history.json").read_text())["log_history"]
    names = ("loss", "eval_loss", "grad_norm")
    return [(entry["step"], name, entry[name]) for entry in log for name in names if name in entry]


def kill_and_resume(script: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train whole, and again with a kill between the second and the third checkpoint, and compare."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = functools.partial(subprocess.run, check=True, env=environment, stdout=subprocess.DEVNULL)
    run(command(script, folder, f"{script}-whole", steps))
    parts = command(script, folder, f"{script}-parts", steps)
    process = subprocess.Popen(parts, env=environment, stdout=subprocess.DEVNULL)
    awaited = folder / f"{script}-parts" / f"checkpoint-{2 * max(1, steps // 4)}"
    while not awaited.is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{script} ended before it was killed: give it more --steps.")
    run([*parts, "--resume"])
    found = [losses(folder / f"{script}-{name}") for name in ("whole", "parts")]
    return {"script": script, "steps": steps, "equal": found[0] == found[1], "losses": len(found[0])}


def batches(folder: str, repeats: int) -> dict[str, list[float]]:
    """Measure the time of a masked batch, from the stream and from rows in memory that are cached."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(str(Path(folder, "tokenizer")))
    collator = MaskingCollator(tokenizer)
    texts = load_corpus(f"{folder}/part-0.txt", txt_documents="blank_line")
    rows = pack_blocks(texts.select(range(min(len(texts), 3000))), tokenizer, BLOCK, cache_dir=folder)

    def endless(make: Callable[[], Any]) -> Iterator[Any]:
        while True:
            yield from make()

    stream = blocks(folder)
    next(iter(stream))  # fills the buffer
    sources = {
        "stream": DataLoader(stream, BATCH, collate_fn=collator),
        "memory": endless(lambda: DataLoader(rows, BATCH, sampler=RandomSampler(rows), collate_fn=collator)),
    }
    hundred = {name: iter(source) for name, source in sources.items()}

    def take(name: str) -> None:
        for _ in islice(hundred[name], 100):
            pass

    runs = {name: functools.partial(take, name) for name in sources}
    found = interleave(runs, repeats, CPU, "Batches", warmup=1)
    return {name: [value / 100 for value in values] for name, values in found.items()}


def report(
    size: int, drained: list[dict[str, Any]], runs: list[dict[str, Any]], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Make the table and the sentence for pages."""
    rows = []
    for entry in drained:
        early, most = entry["resident_bytes"][len(entry["resident_bytes"]) // 10], max(entry["resident_bytes"])
        speed = entry["tokens"] / entry["seconds"] / 1e6
        figures = [
            f"{speed:.2f}",
            f"{entry['seconds']:.0f}",
            f"{early / 1e6:.0f}",
            f"{most / 1e6:.0f}",
            f"{entry['resume_seconds']:.2f}",
        ]
        rows.append([entry["stream"], f"{entry['tokens'] / 1e6:.0f}", *figures, f"{entry['state_bytes'] / 1e6:.2f}"])
    ended = {entry["script"]: "to the bit" if entry["equal"] else "NOT" for entry in runs}
    middle = medians(seconds)
    headline = (
        f"{size / 1e9:.2g} GB of text were read with {rows[0][5]} MB in memory at most, {rows[0][4]} after a tenth. "
        f"Killed and resumed, pretrain gave the same losses {ended['pretrain']} and train_lm {ended['train_lm']}. "
        f"A masked batch of {BATCH} rows of {BLOCK} tokens takes {middle['stream'] * 1e3:.1f} ms of a core from the "
        f"stream, tokenised on the way, and {middle['memory'] * 1e3:.1f} ms from packed rows on the disk."
    )
    columns = ["rows of", "million tokens", "million tokens/s", "s to read", "MB after a tenth", "MB at most"]
    table = {"columns": [*columns, "s to resume", "MB of a checkpoint"], "rows": rows}
    ratio = statistics.median(a / b for a, b in zip(seconds["stream"], seconds["memory"], strict=True))
    costs = {"seconds_per_batch": seconds, "stream_to_memory": ratio}
    return {"headline": headline, "table": table, "text_bytes": size, "drained": drained, "runs": runs, **costs}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bytes", type=int, default=1_000_000_000, help="size of the text (%(default)s)")
    parser.add_argument("--packed_bytes", type=int, default=150_000_000, help="read as packed rows (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="hundreds of batches (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder, args.bytes)
        size = sum(path.stat().st_size for path in folder.glob("*.txt"))
        texts = [document.text for document in islice(documents(name), 3000)]
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(folder / "tokenizer")
        share = sum(map(len, tokenizer(texts, verbose=False)["input_ids"])) / sum(map(len, texts))
        tokens = round(min(args.packed_bytes, 0.9 * size) * share)
        drained = [
            in_fresh_processes(drain, given, 1)[0] for given in (("bytes", name, None), ("blocks", name, tokens))
        ]
        seconds = in_fresh_processes(batches, (name, args.repeats), 1)[0]
        runs = [kill_and_resume(script, folder, args.steps) for script in SIZES]
    found = report(size, drained, runs, seconds)
    write_result(args.result, {**found, **describe()})
    print(found["headline"])


if __name__ == "__main__":
    main()
