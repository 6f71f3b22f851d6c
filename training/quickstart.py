"""
Demo of the package, on this machine alone and without a download: measure the machine, pretrain a small TUPE as a
masked language model, fine-tune it and compare it with the same encoder never pretrained, use both through pipelines,
and train a small SRU++ that writes a sentence.

    python -m training.quickstart
    python -m training.quickstart --output_dir my-first-models
    python -m training.quickstart --all     goes on: the meta-controller and notes, sparse decoding, a summary
    python -m training.quickstart --short   every step in about a minute, too short to learn much

The text is the documentation that every Python brings along, so the models are toys; the steps are those of a real run.
An eighth of the text is kept from all training, and everything is measured there. Lengths follow from what the
processor measures at the start. Interrupted, the same command takes up what is there.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import json
import os
import re
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    TextStreamer,
    pipeline,
    set_seed,
)

from hf_efficient.data.python_docs import ORDER_LABELS, builtin_split, builtin_word_order
from hf_efficient.data.tokenizers import train_tokenizer
from hf_efficient.trainer.arguments import PretrainingArguments, parse_with_preset
from hf_efficient.utils.atomic_write import write_files
from hf_efficient.utils.process import bf16_support, errors_in_one_line, start_script

from . import finetune
from .pretrain import PretrainingSettings, pretrain
from .train_lm import LanguageModelArguments, LanguageModelSettings, train_lm


ENCODER = (
    "hidden_size=128,num_hidden_layers=2,num_attention_heads=4,intermediate_size=512,max_position_embeddings=64,"
    "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0,initializer_range=0.09"
)
LANGUAGE_MODEL = "hidden_size=256,projection_size=64,num_hidden_layers=4"
VOCABULARY = 2048  # small, so that a small model meets each token often
ENCODER_ROWS, ENCODER_LENGTH = 64, 32  # of a step; in short rows an encoder finds its neighbours sooner
LANGUAGE_ROWS, LANGUAGE_LENGTH = 16, 64
SENTENCE_TOKENS = 48
EXAMPLES, LETTERS = 3, 3  # the examples that are shown, and the least letters of a word that fills a mask in them
WRITTEN = ORDER_LABELS[0]
PROMPT = "Return the"
LOG = "log.txt"


@dataclass(frozen=True)
class Length:
    """
    Steps of a run by the rate of the machine.

    Args:
        seconds (`float`): that it shall take.
        gflop (`float`): of a step, in terms of the rate that [`measure`] measures.
        least, most (`int`): steps, whatever the rate.
    """

    seconds: float
    gflop: float
    least: int
    most: int

    def steps(self, gflops: float) -> int:
        """Steps at a rate, in tens."""
        return 10 * round(min(max(self.seconds * gflops / self.gflop, self.least), self.most) / 10)


# Below `least` nothing is learned that is worth a look; beyond `most` little is gained from so little text.
PRETRAINING = Length(seconds=110, gflop=12, least=600, most=1000)
LANGUAGE = Length(seconds=80, gflop=12, least=400, most=800)
SHORT = Length(seconds=0, gflop=1, least=40, most=40)
EPOCHS = 3.0


@dataclass
class QuickstartArguments:
    """Length of the demo, and its folder."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder for all that the demo writes."})
    all: bool = field(
        default=False, metadata={"help": "Go on to the meta-controller and notes, sparse decoding, and a summary."}
    )
    short: bool = field(default=False, metadata={"help": "A minute instead of some: shows that every step works."})


@dataclass
class Plan:
    """
    Sizes of the demo, and what they follow from.

    Args:
        threads (`int`): of torch.
        fp32_gflops, bf16_gflops (`float`): rates of matrix products; 0 for bf16 without units for it.
        bf16 (`bool`): whether training computes in bf16.
        pretraining_steps, language_model_steps (`int`): steps of the two runs.
        epochs (`float`): passes of fine-tuning over its passages.
        short (`bool`): whether this is the short form.
    """

    threads: int
    fp32_gflops: float
    bf16_gflops: float
    bf16: bool
    pretraining_steps: int
    language_model_steps: int
    epochs: float
    short: bool

    @property
    def gflops(self) -> float:
        """Rate of the precision that is trained in."""
        return self.bf16_gflops if self.bf16 else self.fp32_gflops

    def training(self, folder: Path, steps: int, kind: type[Any] = PretrainingArguments, **options: Any) -> Any:
        """Arguments of a run of so many steps, which a killed demo takes up at its last checkpoint."""
        part = max(steps // 4, 1)
        defaults: dict[str, Any] = {
            "logging_steps": max(steps // 20, 1),
            "eval_steps": part,
            "save_steps": part,
            "save_total_limit": 1,
        }
        defaults |= {"resume": True, "max_grad_norm": 1.0, **self.precision, **QUIET}
        return kind(output_dir=str(folder), max_steps=steps, **{**defaults, **options})

    @property
    def precision(self) -> dict[str, Any]:
        """Arguments of Trainer that say what it computes in, and where."""
        return {"auto_bf16": False, "bf16": self.bf16, "use_cpu": not torch.accelerator.is_available()}


QUIET: dict[str, Any] = {"report_to": [], "disable_tqdm": True}


def matrix_rate(dtype: torch.dtype, seconds: float) -> float:
    """
    Measure matrix products as the models of the demo have them.

    Args:
        dtype (`torch.dtype`): of both matrices.
        seconds (`float`): that are measured, after a third of it to warm up.

    Returns:
        `float`: GFLOP/s, on the accelerator if there is one.
    """
    device: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rows, width, wide = ENCODER_ROWS * ENCODER_LENGTH, 128, 512
    left, right = torch.randn(rows, width, device=device), torch.randn(width, wide, device=device)
    left, right = left.to(dtype), right.to(dtype)

    def products_per_second(lasting: float) -> float:
        products, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < lasting:
            for _ in range(10):
                left @ right
            if device.type != "cpu":
                torch.accelerator.synchronize()
            products += 10
        return products / spent

    products_per_second(seconds / 3)
    return products_per_second(seconds) * 2 * rows * width * wide / 1e9


def measure(short: bool) -> Plan:
    """Measure the machine, and size the runs."""
    seconds = 0.2 if short else 1.0
    fp32 = matrix_rate(torch.float32, seconds)
    bf16 = matrix_rate(torch.bfloat16, seconds) if bf16_support() is not None else 0.0
    # Not for a little more: half of a step is no matrix product.
    fast = bf16 > 1.5 * fp32
    rate = bf16 if fast else fp32
    pretraining, language = (SHORT, SHORT) if short else (PRETRAINING, LANGUAGE)
    return Plan(
        threads=torch.get_num_threads(),
        fp32_gflops=round(fp32, 1),
        bf16_gflops=round(bf16, 1),
        bf16=fast,
        pretraining_steps=pretraining.steps(rate),
        language_model_steps=language.steps(rate),
        epochs=1.0 if short else EPOCHS,
        short=short,
    )


class Ticker:
    """Tells behind a stage's title how long it has taken, in a terminal; elsewhere it says nothing."""

    def __init__(self, terminal: int):
        self.terminal, self.ended = terminal, threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Ticker":
        if os.isatty(self.terminal):
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
            os.write(self.terminal, b"\x1b[K")  # clears the line from here on

    def _tick(self) -> None:
        start = time.perf_counter()
        while not self.ended.wait(1):
            os.write(self.terminal, f"\x1b7{time.perf_counter() - start:.0f} s\x1b8".encode())  # and back


@contextmanager
def output_in(log: Path) -> Iterator[None]:
    """Let all that this process prints, compiled code included, go to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with log.open("a", encoding="utf-8") as file, Ticker(kept[0]):
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            try:
                # Where Python's streams are others than the process's, as in a notebook, these are meant too.
                with redirect_stdout(file), redirect_stderr(file):
                    yield
            finally:
                for stream in streams:
                    stream.flush()
                for number, saved in zip((1, 2), kept, strict=True):
                    os.dup2(saved, number)
    finally:
        for saved in kept:
            os.close(saved)


class Stages:
    """
    Stages of the demo, each of which leaves its result in the folder and is not run again where it has.

    Args:
        folder (`Path`): the demo's; `log.txt` gets what the scripts print.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.seconds_before = 0.0  # of stages that an earlier call has run
        self.results: dict[str, Any] = {}

    def run(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage unless its result is there; return the result, with its `seconds` and those of all threads."""
        self.count += 1
        print(f"\n{self.count}. {title}", end=" ", flush=True)
        file = self.folder / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            self.seconds_before += result["seconds"]
            print("(done before)")
        else:
            start, computed = time.perf_counter(), time.process_time()
            with output_in(self.folder / LOG):
                result = work()
            result["seconds"] = round(time.perf_counter() - start, 1)
            result["core_seconds"] = round(time.process_time() - computed, 1)
            print(f"({result['seconds']:.0f} s)")
            text = json.dumps(result, indent=1) + "\n"
            write_files(self.folder, lambda place: Path(place, file.name).write_text(text, encoding="utf-8"))
        self.results[name] = result
        return result


def rows_of(*rows: tuple[str, str], indent: int = 3) -> None:
    """Print names and figures below each other."""
    width = max(len(name) for name, _ in rows)
    for name, figure in rows:
        print(f"{' ' * indent}{name:<{width}}  {figure:>8}")


def wrapped(text: str, indent: int = 3, width: int = 100, lines: int = 3) -> str:
    """Break a text into indented lines, and cut what goes beyond."""
    margin = " " * indent
    return textwrap.fill(
        text, width, initial_indent=margin, subsequent_indent=margin, max_lines=lines, placeholder=" ..."
    )


def write_data(folder: Path) -> dict[str, Any]:
    """Write text, the task and a tokenizer into `folder`; return their sizes."""
    split, task = builtin_split(), builtin_word_order()

    def write(place: str) -> None:
        for name in split:
            split[name].to_json(Path(place, f"{name}.jsonl"))
            task[name].to_csv(Path(place, f"sentences-{name}.csv"))

    write_files(folder, write)
    tokenizer = train_tokenizer(split["train"]["text"], vocab_size=VOCABULARY, model_max_length=128)
    write_files(folder / "tokenizer", tokenizer.save_pretrained)
    sizes = {name: sum(len(text.encode()) for text in rows["text"]) for name, rows in split.items()}
    return {"bytes": sizes, "sentences": {name: len(rows) for name, rows in task.items()}}


def pretrain_encoder(plan: Plan, data: Path, folder: Path) -> dict[str, Any]:
    """Pretrain TUPE; return its losses."""
    settings = PretrainingSettings(
        corpus=str(data / "train.jsonl"),
        config_overrides=ENCODER,
        tokenizer=str(data / "tokenizer"),
        block_size=ENCODER_LENGTH,
        cross_documents=True,
        max_eval_rows=256,
        mlm_probability=0.3,  # twice as many targets a step
    )
    options: dict[str, Any] = {"learning_rate": 4e-3, "adam_beta2": 0.95, "per_device_train_batch_size": ENCODER_ROWS}
    history = pretrain(settings, plan.training(folder, plan.pretraining_steps, **options)).state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    return {"loss": evaluations[-1]["eval_loss"], "accuracy": evaluations[-1]["eval_accuracy"]}


def make_unpretrained(pretrained: Path, folder: Path) -> None:
    """Save the same encoder with random weights, unless it is there."""
    if (folder / "config.json").is_file():
        return
    set_seed(0)
    model: Any = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(pretrained))
    tokenizer = AutoTokenizer.from_pretrained(pretrained)

    def write(place: str) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    write_files(folder, write)


def finetune_encoder(plan: Plan, data: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Fine-tune on the task of [`builtin_word_order`]; return the accuracy and that of always one answer."""
    settings = finetune.FinetuneSettings(
        model=str(model),
        train=str(data / "sentences-train.csv"),
        validation=str(data / "sentences-validation.csv"),
        max_length=SENTENCE_TOKENS,
        metrics="accuracy",
        max_train_samples=640 if plan.short else None,
        resume=True,
    )
    precision = {name: value for name, value in plan.precision.items() if name != "auto_bf16"}
    training = finetune.FinetuneArguments(
        output_dir=str(folder),
        num_train_epochs=plan.epochs,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        eval_strategy="no",
        seed=0,
        **precision,
        **QUIET,
    )
    summary = finetune.run(settings, training)
    (row,) = summary["rows"]
    return {
        "accuracy": row["median"],
        "one_answer": row["one answer"],
        "examples": summary["examples"],
        "model": summary["models"][0],
    }


def fine_tuning(plan: Plan, folder: Path) -> dict[str, Any]:
    """Fine-tune the pretrained encoder and the one that never was."""
    data, fresh = folder / "data", folder / "never-pretrained"
    make_unpretrained(folder / "pretrained", fresh)
    found = finetune_encoder(plan, data, folder / "pretrained", folder / "finetuned")
    without = finetune_encoder(plan, data, fresh, folder / "finetuned-never-pretrained")
    return {**found, "accuracy_never_pretrained": without["accuracy"]}


def masked_words(texts: Sequence[str], tokenizer: Any) -> list[tuple[str, str]]:
    """Hide one word in each text, one of two letters or more that is a single token; which one goes by turns."""
    found: list[tuple[str, str]] = []
    for text in texts:
        words = text.split()
        whole = [
            i for i, word in enumerate(words) if len(word) > 1 and word.isalpha() and word.lower() in tokenizer.vocab
        ]
        if whole:
            place = whole[len(found) % len(whole)]
            hidden = [*words[:place], tokenizer.mask_token, *words[place + 1 :]]
            found.append((" ".join(hidden), words[place].lower()))
    return found


def use_pipelines(folder: Path, model: str) -> dict[str, Any]:
    """Fill masks and judge sentences of unseen text; return scores, and the answers that the models are surest of."""
    sentences = builtin_word_order()["validation"].to_dict()
    written = [text for text, label in zip(sentences["text"], sentences["label"], strict=True) if label == WRITTEN]
    fill: Any = pipeline("fill-mask", model=str(folder / "pretrained"), device="cpu")
    hidden = masked_words(written, fill.tokenizer)
    filled = [
        {"text": text, "word": word, "answers": [[one["token_str"], one["score"]] for one in answers[:3]]}
        for (text, word), answers in zip(hidden, fill([text for text, _ in hidden], batch_size=16), strict=True)
    ]
    classify: Any = pipeline("text-classification", model=model, device="cpu")
    answers = classify(sentences["text"], batch_size=16, truncation=True, max_length=SENTENCE_TOKENS)
    classified = [
        {"text": text, "label": label, "answer": answer["label"], "score": answer["score"]}
        for text, label, answer in zip(sentences["text"], sentences["label"], answers, strict=True)
    ]
    filled.sort(key=lambda row: -row["answers"][0][1])
    classified.sort(key=lambda row: -row["score"])
    right = sum(row["answers"][0][0] == row["word"] for row in filled)
    words = [row for row in filled if row["answers"][0][0].isalpha() and len(row["answers"][0][0]) >= LETTERS]
    return {
        "masks": len(filled),
        "masks_right": right / len(filled),
        "filled": first_of_each(words, lambda row: row["answers"][0][0]),
        "classified": first_of_each(classified, lambda row: row["answer"]),
    }


def first_of_each(rows: list[dict[str, Any]], answer: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The first rows with different answers."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(answer(row), row)
    return list(found.values())[:EXAMPLES]


def bits_of_byte_frequencies(train: str, text: str) -> float:
    """Bits per byte of a model that knows how often each byte occurs in `train`, and nothing else."""
    counts = Counter(train.encode())
    total = sum(counts.values()) + 256
    bits = np.array([-np.log2((counts[byte] + 1) / total) for byte in range(256)])
    return float(bits[np.frombuffer(text.encode(), dtype=np.uint8)].mean())


def train_language_model(plan: Plan, data: Path, folder: Path) -> dict[str, Any]:
    """Train SRU++; return its bits per byte and those of byte frequencies."""
    settings = LanguageModelSettings(
        corpus=str(data / "train.jsonl"),
        validation=str(data / "validation.jsonl"),
        config_overrides=LANGUAGE_MODEL,
        level="subword",
        vocab_size=VOCABULARY,
        unroll_size=LANGUAGE_LENGTH,
        max_eval_tokens=20_000,
        sample_tokens=0,
    )
    options = {"learning_rate": 5e-3, "per_device_train_batch_size": LANGUAGE_ROWS}
    training = plan.training(folder, plan.language_model_steps, LanguageModelArguments, **options)
    history = train_lm(settings, training).state.log_history
    (bits,) = [entry["final_bits_per_byte"] for entry in history if "final_bits_per_byte" in entry]
    split = builtin_split()
    texts = ["\n".join(split[name]["text"]) for name in ("train", "validation")]
    return {"bits_per_byte": bits, "bits_per_byte_of_frequencies": bits_of_byte_frequencies(*texts)}


class WrappedStreamer(TextStreamer):
    """Streams text in indented lines of at most so many characters, and three dots at its end."""

    def __init__(self, tokenizer: Any, width: int = 100, indent: int = 3):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.width, self.margin = width, " " * indent
        self.begun, self.column = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the words that are complete; the last one may go on in the next piece of text."""
        *words, self.begun = re.split(r"\s+", self.begun + text)
        for word in [*words, f"{self.begun} ..."] if stream_end else words:
            if word:
                self._print(word)
        if stream_end:
            print()

    def _print(self, word: str) -> None:
        if self.column == 0 or self.column + len(word) > self.width:
            print(("\n" if self.column else "") + self.margin, end="")
            self.column = len(self.margin)
        print(f"{word} ", end="", flush=True)
        self.column += len(word) + 1


def write_sentence(folder: Path) -> None:
    """Let the language model go on with a prompt, word by word."""
    with output_in(folder.with_name(LOG)):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    set_seed(0)
    model.generate(
        **inputs,
        max_new_tokens=48,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        streamer=WrappedStreamer(tokenizer),
    )


def show_plan(plan: Plan) -> None:
    bf16 = f", {plan.bf16_gflops:.0f} in bf16" if plan.bf16_gflops else ", no units for bf16"
    print(
        f"   {plan.threads} threads; matrix products at {plan.fp32_gflops:.0f} GFLOP/s in fp32{bf16}: training is in "
        f"{'bf16' if plan.bf16 else 'fp32'}\n   so the encoder gets {plan.pretraining_steps} steps, the language model "
        f"{plan.language_model_steps}"
    )


def show_pipelines(found: dict[str, Any]) -> None:
    print(f"   fill-mask: {found['masks_right']:.0%} of {found['masks']} hidden words right; the surest answers:")
    for row in found["filled"]:
        best, score = row["answers"][0]
        others = ", ".join(f"{word} {value:.2f}" for word, value in row["answers"][1:])
        verdict = "right" if best == row["word"] else f"the text has: {row['word']}"
        print(wrapped(around_mask(row["text"]), indent=6, lines=1))
        print(f"         -> {best} {score:.2f} ({verdict}); then {others}")
    print("   text-classification; the surest answers:")
    for row in found["classified"]:
        verdict = "right" if row["answer"] == row["label"] else f"it is {row['label']}"
        print(wrapped(row["text"], indent=6, lines=1))
        print(f"         -> {row['answer']} {row['score']:.2f} ({verdict})")


def around_mask(text: str, words: int = 7) -> str:
    """The words beside the mask."""
    parts = text.split()
    place = next(index for index, word in enumerate(parts) if "[MASK]" in word)
    before, after = parts[max(place - words, 0) : place], parts[place + 1 : place + 1 + words]
    return " ".join([*(["..."] if place > words else []), *before, parts[place], *after])


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def make_plan(folder: Path, short: bool) -> Plan:
    """Measure the machine, or take what a demo that was begun has measured."""
    file = folder / "plan.json"
    if file.is_file():
        return Plan(**json.loads(file.read_text(encoding="utf-8")))
    plan = measure(short)
    text = json.dumps(asdict(plan), indent=1) + "\n"
    write_files(folder, lambda place: Path(place, file.name).write_text(text, encoding="utf-8"))
    return plan


def run_encoder(stages: Stages, plan: Plan) -> None:
    """Pretrain, fine-tune and use the encoder."""
    folder = stages.folder
    data = stages.results["text"]
    megabytes = data["bytes"]["train"] / 1e6
    found = stages.run(
        "pretraining",
        f"Pretrain a masked language model (TUPE) on {megabytes:.1f} MB of text",
        lambda: pretrain_encoder(plan, folder / "data", folder / "pretrained"),
    )
    print(f"   on held-out text: {found['loss']:.2f} nats a masked token, {percent(found['accuracy'])} of them right")
    sentences = data["sentences"]
    found = stages.run(
        "finetuning",
        f"Fine-tune it on {sentences['train']} sentences: is this one as written, or were its words shuffled?",
        lambda: fine_tuning(plan, folder),
    )
    print(f"   accuracy on {sentences['validation']} sentences of unseen text:")
    rows_of(
        ("always one answer", percent(found["one_answer"])),
        ("the same encoder, never pretrained", percent(found["accuracy_never_pretrained"])),
        ("pretrained", percent(found["accuracy"])),
        indent=6,
    )
    model = found["model"]
    found = stages.run("pipelines", "Use both through pipelines, on unseen text", lambda: use_pipelines(folder, model))
    show_pipelines(found)


def run_language_model(stages: Stages, plan: Plan) -> None:
    """Train the language model, and let it write."""
    folder = stages.folder
    found = stages.run(
        "language_model",
        "Train a language model (SRU++) on the same text",
        lambda: train_language_model(plan, folder / "data", folder / "language-model"),
    )
    print("   bits per byte of unseen text:")
    rows_of(
        ("byte frequencies alone", f"{found['bits_per_byte_of_frequencies']:.2f}"),
        ("SRU++", f"{found['bits_per_byte']:.2f}"),
        indent=6,
    )
    print(f'   it goes on with "{PROMPT}":', flush=True)
    write_sentence(folder / "language-model")


def run(args: QuickstartArguments) -> dict[str, Any]:
    """Take all steps; return the content of `quickstart.json`."""
    folder = Path(args.output_dir + ("-short" if args.short else ""))
    stages = Stages(folder)
    started = time.perf_counter()
    print("1. Measure the machine", flush=True)
    plan = make_plan(folder, args.short)
    stages.count = 1
    show_plan(plan)
    found = stages.run(
        "text", "Collect the documentation of Python, and train a tokenizer", lambda: write_data(folder / "data")
    )
    sizes = found["bytes"]
    print(f"   {sizes['train'] / 1e6:.2f} MB to train on, {sizes['validation'] / 1e6:.2f} MB unseen until measured on")
    run_encoder(stages, plan)
    run_language_model(stages, plan)
    if args.all:
        from .quickstart_all import run_all

        run_all(stages, plan)
    seconds = stages.seconds_before + time.perf_counter() - started
    report = {"plan": asdict(plan), **stages.results, "seconds": round(seconds, 1)}
    text = json.dumps(report, indent=1) + "\n"
    write_files(folder, lambda place: Path(place, "quickstart.json").write_text(text, encoding="utf-8"))
    print(f"\nDone in {report['seconds']:.0f} s. Models and log.txt are in {folder}.")
    return report


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = parse_with_preset([QuickstartArguments], argv, __doc__)
    start_script(__name__)
    return run(args)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
