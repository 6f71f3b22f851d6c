"""
Dense and sparse writing the same prompt beside each other, with tokens a second and the bytes that a token reads.

    python -m training.examples.decode_side_by_side
    python -m training.examples.decode_side_by_side DENSE_FOLDER SPARSE_FOLDER --prompt "The castle"
    python -m training.examples.decode_side_by_side --format int8 --max_new_tokens 400

Both models write in one process, and each is given the same time: whoever has used less writes the next token, so that
what you see is how far each would be by now if it had the processor to itself. Where the output is no terminal, the
columns are printed once, at the end.

A folder is whatever `AutoModelForCausalLM` loads: a GPT-2 of your own and what `training.sparsify` has made of it, or a
folder that was saved in int8. A GPT-2 runs as the dense Scaling Transformer that gives the same logits, by the same
compiled code as the sparse one. Without folders two models are made at random, a dense Scaling Transformer of 24 layers
of width 1024 and the sparse one of as many weights; what they write is noise, in made-up words, but it takes as
long as text would.

A token reads all of a dense model. Of a sparse one it reads in each block of the feed-forward layers one unit only, and
projections and output layer that share their weights: see the model card of 24x1024-all.
"""

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2LMHeadModel

from hf_efficient import from_gpt2
from hf_efficient.utils.cache_naming import cache_kwarg
from hf_efficient.utils.process import OneLineErrorParser, errors_in_one_line

from ..benchmarks.decoding.counting import bytes_read
from ..benchmarks.decoding.races import FULL, TINY, Size
from ..benchmarks.decoding.torch_engine import FORMATS, build


CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NOISE = "Both models are random: what they write is noise, at the speed of text."
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def made_up_word(token: int) -> str:
    """A word for an id, of as many syllables as it takes to tell ids apart."""
    syllables = []
    while True:
        token, index = divmod(token, len(CONSONANTS) * len(VOWELS))
        syllables.append(CONSONANTS[index // len(VOWELS)] + VOWELS[index % len(VOWELS)])
        if not token:
            return "".join(syllables)


def made_up_text(tokens: Sequence[int]) -> str:
    return " ".join(map(made_up_word, tokens))


@dataclass
class Writer:
    """
    A model that writes a text token by token.

    Args:
        name (`str`): for the head of its column.
        model (`Any`): a causal language model.
        prompt (`Tensor` of shape `(1, length)`): ids that it begins with.
        to_text (`Callable`): gives the text of ids.
        temperature (`float`): of sampling; 0 takes the best token.
        seed (`int`): of sampling.
        end (`int`, *optional*): id after which nothing is written.
    """

    name: str
    model: Any
    prompt: Tensor
    to_text: Callable[[Sequence[int]], str]
    temperature: float
    seed: int
    end: int | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0  # of the tokens that were written, the prompt left out
    prompt_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.cache: Any = DynamicCache(config=self.model.config)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.weight_bytes = sum(bytes_read(self.model).values())
        start = time.perf_counter()
        self.next = self._read(self.prompt)
        self.prompt_seconds = time.perf_counter() - start

    def _read(self, ids: Tensor) -> int:
        with torch.inference_mode():
            output = self.model(input_ids=ids, **cache_kwarg(self.cache), use_cache=True, logits_to_keep=1)
        logits = output.logits[0, -1].float()
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits / self.temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=self.generator))

    @property
    def has_ended(self) -> bool:
        """Tell whether the text is at its end."""
        return bool(self.tokens) and self.tokens[-1] == self.end

    def write_token(self) -> None:
        """Write the next token, and find the one after it."""
        start = time.perf_counter()
        self.tokens.append(self.next)
        self.next = self._read(torch.tensor([[self.next]]))
        self.seconds += time.perf_counter() - start

    @property
    def bytes_a_token(self) -> int:
        """Bytes of weights, keys and values that the last token has read."""
        layers = [layer for layer in self.cache.layers if getattr(layer, "keys", None) is not None]
        return self.weight_bytes + sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))

    def column(self, width: int, height: int) -> list[str]:
        """The lines of its column: a head, and the end of its text."""
        rate = len(self.tokens) / self.seconds if self.seconds else 0.0
        head = [self.name, f"{rate:.1f} tokens/s, {self.bytes_a_token / 1e6:.1f} MB read a token"]
        head.append(f"{len(self.tokens)} tokens; the prompt took {1e3 * self.prompt_seconds:.0f} ms")
        text = self.to_text([*self.prompt[0].tolist(), *self.tokens])
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        shown = lines[-height:] if height else lines
        return [line[:width] for line in [*head, "-" * width, *shown]]


def beside(left: list[str], right: list[str], width: int) -> list[str]:
    """Put two columns beside each other."""
    count = max(len(left), len(right))
    rows = zip(left + [""] * (count - len(left)), right + [""] * (count - len(right)), strict=True)
    return [f"{one:<{width}} | {other}".rstrip() for one, other in rows]


def show(writers: Sequence[Writer], live: bool) -> None:
    """Print both columns: over the last ones in a terminal, which then shows the ends of the texts."""
    columns, rows = shutil.get_terminal_size((100, 24))
    width = (columns - 3) // 2
    left, right = (writer.column(width, max(rows - 8, 1) if live else 0) for writer in writers)
    lines = beside(left, right, width)
    if live:
        sys.stdout.write(HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW)
    else:
        print("\n".join(lines))
    sys.stdout.flush()


def race(writers: Sequence[Writer], count: int, live: bool) -> None:
    """Let each write so many tokens, or until its text ends, whoever has used less time first; the fast one waits for
    nobody, and the other's end is not waited for longer than the time that the fast one takes four times."""
    while True:
        done = [writer for writer in writers if len(writer.tokens) >= count or writer.has_ended]
        writing = [writer for writer in writers if writer not in done]
        fastest = min((writer.seconds for writer in done), default=float("inf"))
        writing = [writer for writer in writing if writer.seconds < 4 * fastest]
        if not writing:
            return
        min(writing, key=lambda writer: writer.seconds).write_token()
        if live:
            show(writers, live)


def random_writers(args: argparse.Namespace, size: Size) -> list[Writer]:
    """Make a dense and a sparse model with random weights, and a prompt of random tokens."""
    prompt = torch.randint(size.vocabulary, (1, 16), generator=torch.Generator().manual_seed(args.seed))
    writers = []
    for kind in ("dense", "all"):
        preset, settings = size.settings(kind)
        say(f"Making a model of {size.layers} x {size.width}, {kind}, at random ...")
        model = build(preset, args.format, settings)
        check_positions(model, prompt.shape[1], args.max_new_tokens)
        name = f"{'dense' if kind == 'dense' else 'sparse'}, {args.format}, {size.layers} x {size.width}, random"
        writers.append(Writer(name, model, prompt, made_up_text, args.temperature, args.seed))
    return writers


def loaded_writers(args: argparse.Namespace) -> list[Writer]:
    """
    Load a model from each folder, with its tokenizer.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: for a prompt without tokens, and a text that is longer than a model's table of positions.
    """
    writers = []
    for folder in args.folders:
        say(f"Loading {folder} ...")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model, name = AutoModelForCausalLM.from_pretrained(folder).eval(), str(folder)
        if isinstance(model, GPT2LMHeadModel):
            model, name = from_gpt2(model).eval(), f"{folder}, as its dense twin"
        prompt = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
        if prompt.shape[1] == 0:
            raise ValueError("--prompt is empty: give at least one word.")
        check_positions(model, prompt.shape[1], args.max_new_tokens)
        end = tokenizer.eos_token_id
        writers.append(Writer(name, model, prompt, tokenizer.decode, args.temperature, args.seed, end))
    return writers


def check_positions(model: Any, prompt: int, count: int) -> None:
    """
    Check that a text fits into a model's table of positions.

    Raises:
        ValueError: if it does not.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and prompt + count > most:
        raise ValueError(
            f"A prompt of {prompt} tokens and {count} more do not fit into {most} positions: give "
            f"--max_new_tokens {max(most - prompt, 0)} or less."
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrorParser(
        prog="python -m training.examples.decode_side_by_side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="two models: the dense one, the sparse one")
    parser.add_argument("--prompt", default="The", help="text that both go on with, of models from folders")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens that each writes")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 takes the best token")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of random models' prompt")
    parser.add_argument("--threads", type=int, default=1, help="of both models")
    parser.add_argument("--format", default="bf16", choices=FORMATS, help="of random models (default: bf16)")
    parser.add_argument("--tiny", action="store_true", help="random models of a few thousand weights, to try it out")
    args = parser.parse_args(argv)
    if len(args.folders) not in (0, 2):
        parser.error(f"give two folders, the dense model's and the sparse one's, or none; got {len(args.folders)}")
    if args.max_new_tokens < 1:
        parser.error("--max_new_tokens must be at least 1")
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.temperature < 0:
        parser.error("--temperature must not be negative")
    return args


def main(argv: list[str] | None = None) -> list[Writer]:
    """Let two models write, and return them with what they wrote."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    live = sys.stdout.isatty()
    writers = loaded_writers(args) if args.folders else random_writers(args, TINY["full"] if args.tiny else FULL)
    if live:
        sys.stdout.write(HOME + CLEAR_BELOW)
    else:
        say("Both write ...")
    race(writers, args.max_new_tokens, live)
    show(writers, live)
    dense, sparse = writers
    faster = (len(sparse.tokens) / sparse.seconds) / (len(dense.tokens) / dense.seconds)
    fewer = dense.bytes_a_token / sparse.bytes_a_token
    print(f"\n{faster:.2f} times the tokens a second, {fewer:.1f} times fewer bytes a token.")
    if not args.folders:
        print(NOISE)
    return writers


if __name__ == "__main__":
    with errors_in_one_line():
        main()
