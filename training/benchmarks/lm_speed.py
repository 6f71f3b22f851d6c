"""
SRU++ against its peers: the recurrence against the original's, and a language model of 42 M parameters against a GPT-2
of equal size, in training and in token-by-token decoding. Without compiled kernels, or with them:

    python -m training.benchmarks.lm_speed
    python -m training.benchmarks.lm_speed --backend cpu
    python -m training.benchmarks.lm_speed --parts train decode --repeats 20 --result speed.json

One process, one thread, peers in turn, medians of core time. The original (`pip install --no-deps sru==3.0.0.dev6
ninja`) compiles its C++ at the first import; without it the rows that need it say so.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.sru import sru_recurrence
from hf_efficient.utils.cache_naming import cache_kwarg

from .environment import RESULTS, describe, write_result
from .lm_comparison import MODELS
from .timing import interleave, medians, operator_shares


CPU = torch.device("cpu")
BATCH, LENGTH, WIDTH = 8, 512, 1024
# By ratio: with plain torch, with the compiled kernel. A ratio that stands here without goals is reported alone.
GOALS: dict[str, tuple[float | None, float | None]] = {
    "recurrence forward, ours / original's C++": (0.7, 1 / 5),
    "recurrence forward + backward, ours / original": (0.15, 1 / 30),
    "train step, SRU++ / GPT-2": (1.2, 1.0),
    "train step, attention in the last layer only / GPT-2": (0.95, None),
    "train step at 2.6 M parameters, SRU++ / GPT-2": (1.2, None),
    "train step at 2.6 M parameters, attention in the last layer only / GPT-2": (0.95, None),
    "train step with carried memory at 2.6 M parameters, SRU++ / GPT-2": (None, None),
    "train step with carried memory at 2.6 M parameters, attention in the last layer only / GPT-2": (None, None),
    "decode after 128 tokens, SRU++ / GPT-2": (1.3, 1.1),
    "decode after 128 tokens, SRU++ / the original's way": (1 / 3, None),
    "decode, attention in the last layer only, context 4,096 / 128": (1.15, None),
    "cache at 16,384 tokens, k = 10 / k = 1": (1 / 8, None),
}
BACKENDS = ("reference", "cpu")
SHARED = ("srupp", "gpt2")  # whose time is told by kind of operator
TOKENS_PER_TURN = 4


def original_sru():
    """Import the original package; `None` where it is not installed."""
    # Its build looks for ninja on the path, where a virtual environment that is not activated is not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        import sru
    except ImportError:
        return None
    return sru


def original_recurrence(u: Tensor, x: Tensor, weight_c: Tensor, bias: Tensor, cotangent: Tensor) -> dict[str, Callable]:
    """Give the original's two paths on the same numbers: its C++ forward, and the one it trains by on a CPU; nothing
    where it is not installed."""
    if (sru := original_sru()) is None:
        return {}
    ops, (batch, length, width) = sru.ops, x.shape
    given = (
        u.detach().permute(1, 0, 3, 2).reshape(length, batch, -1).requires_grad_(),
        x.detach().transpose(0, 1).contiguous().requires_grad_(),
        weight_c.detach().flatten().requires_grad_(),
        bias.detach().flatten().requires_grad_(),
    )
    cotangent = cotangent.transpose(0, 1).contiguous()
    rest = (torch.zeros(batch, width), 0, width, False, True)

    @torch.no_grad()
    def forward() -> Tensor:
        return ops.elementwise_recurrence_inference(*given, *rest, torch.ones(1), None, None)[0]

    def train() -> None:
        h = ops.elementwise_recurrence_naive(*given, *rest, None, None, None)[0]
        torch.autograd.grad(h, given, cotangent)

    with torch.no_grad():
        ours = sru_recurrence(u, x, weight_c, bias)[0].transpose(0, 1)
    torch.testing.assert_close(forward(), ours, atol=1e-3, rtol=1e-3)  # random peepholes amplify
    return {"original_forward": forward, "original_train": train}


def build_models() -> dict[str, nn.Module]:
    """Build the published 42 M character model, the same with one attention layer, and a GPT-2 of equal size."""
    torch.manual_seed(0)
    dropout = {"dropout": 0.0, "attention_dropout": 0.0}
    gpt2 = GPT2Config(
        vocab_size=205, n_embd=592, n_layer=10, n_head=8, n_positions=1024, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return {
        "srupp": SruppForCausalLM(SruppConfig.preset("enwik8-42m", **dropout)),
        "srupp_last": SruppForCausalLM(SruppConfig.preset("enwik8-42m", attention_every_n_layers=10, **dropout)),
        "gpt2": GPT2LMHeadModel(gpt2),
    }


class Decoder:
    """Decoder of a model that has read `context` tokens and goes on, some tokens a call."""

    def __init__(self, model: nn.Module, context: int, chunk: int = 512):
        self.model = model.eval()
        self.cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        self.token = torch.zeros(1, 1, dtype=torch.long)
        ids = torch.randint(0, 205, (1, context))
        for part in ids.split(chunk, dim=1):
            self._read(part)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, **cache_kwarg(self.cache), use_cache=True, logits_to_keep=1).logits

    def __call__(self) -> None:
        for _ in range(TOKENS_PER_TURN):
            self.token = self._read(self.token).argmax(-1)


class OriginalDecoder:
    """Decoder in the original's way: the inputs of all layers are kept, and keys and values made anew at each token."""

    def __init__(self, sru, context: int):
        config = SruppConfig.preset("enwik8-42m")
        depth, width, size = config.num_hidden_layers, config.hidden_size, config.projection_size
        self.embed, self.head = nn.Embedding(205, width), nn.Linear(width, 205)
        self.rnn = sru.SRUpp(width, width, size, num_layers=depth).eval()
        self.state, self.memory = None, [None] * depth
        self.token = torch.zeros(1, 1, dtype=torch.long)
        self._read(torch.randint(0, 205, (context, 1)))

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        length, past = ids.shape[0], 0 if self.memory[0] is None else self.memory[0].shape[0]
        mask = torch.full((length, past + length), -10000.0).triu(past + 1)
        h, self.state, bank = self.rnn(self.embed(ids), self.state, attn_mask=mask, memory=self.memory)
        kept = bank["saved_inputs"]
        pairs = zip(self.memory, kept, strict=True)
        self.memory = [new if old is None else torch.cat([old, new]) for old, new in pairs]
        return self.head(h[-1:])

    def __call__(self) -> None:
        for _ in range(TOKENS_PER_TURN):
            self.token = self._read(self.token).argmax(-1)


def copy_seconds(numbers: int) -> float:
    """Measure the core seconds to copy so many float32 numbers, in tensors of 64 MiB."""
    size = 1 << 24
    source, target = torch.randn(size), torch.empty(size)
    return medians(interleave({"copy": lambda: target.copy_(source)}, 10, CPU, "copy"))["copy"] * numbers / size


def measure_recurrence(repeats: int) -> dict[str, Any]:
    """Measure the recurrence at (batch 8, length 512, width 1,024), and the time to copy the bytes that it moves."""
    u = torch.randn(BATCH, LENGTH, 3, WIDTH, requires_grad=True)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    weight_c, bias = (torch.randn(2, WIDTH, requires_grad=True) for _ in range(2))
    cotangent = torch.randn(BATCH, LENGTH, WIDTH)
    leaves = (u, x, weight_c, bias)

    def train(forward) -> None:
        torch.autograd.grad(forward(), leaves, cotangent)

    def forward() -> Tensor:
        return sru_recurrence(u, x, weight_c, bias)[0]

    runs = {"forward": torch.no_grad()(forward), "train": lambda: train(forward)}
    runs |= original_recurrence(*leaves, cotangent)
    unit = BATCH * LENGTH * WIDTH
    # Read u and x, write h; in training write c, then read u, x, c and the gradient, write those of u and x.
    limits = {"forward": copy_seconds(5 * unit) / 2, "train": copy_seconds(16 * unit) / 2}
    return {"seconds": interleave(runs, repeats, CPU, "recurrence"), "copy_limit_seconds": limits}


def measure_training(repeats: int) -> dict[str, Any]:
    """Measure forward, backward and AdamW on two rows of 128 tokens in float32."""
    models = build_models()
    ids = torch.randint(0, 205, (2, 128))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    runs = {name: partial(step, model.train(), optimizers[name]) for name, model in models.items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    seconds = interleave(runs, repeats, CPU, "train step")
    return {
        "seconds": seconds,
        "parameters": parameters,
        "shares": {name: operator_shares(runs[name], 3) for name in SHARED},
    }


def measure_small_steps(repeats: int) -> dict[str, Any]:
    """Measure a step of `lm_comparison`: 2.6 M parameters, four segments of 128 bytes; without memory, as both models
    learn best, and with that of one segment."""
    ids, labels = torch.randint(0, 256, (2, 4, 128))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, carried: dict[str, Any] | None) -> None:
        inputs = {"input_ids": ids, "labels": labels, "shift_labels": labels, "use_cache": False}
        if carried is not None:
            inputs |= {"memory": carried.get("memory"), "return_memory": True}
        output = model(**inputs)
        if carried is not None:
            carried["memory"] = output.memory.detach()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    runs = {}
    for name, with_memory in (
        ("srupp", False),
        ("srupp_last", False),
        ("gpt2", False),
        ("srupp", True),
        ("srupp_last", True),
    ):
        torch.manual_seed(0)
        model = MODELS[name](128).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        runs[f"{name}_memory" if with_memory else name] = partial(step, model, optimizer, {} if with_memory else None)
    return {"seconds": interleave(runs, 3 * repeats, CPU, "small train step")}


def measure_decoding(turns: int) -> dict[str, Any]:
    """Measure the core seconds of `TOKENS_PER_TURN` tokens at batch 1 after 128, with one attention layer after 4,096
    too."""
    models = build_models()
    runs: dict[str, Any] = {name: Decoder(model, 128) for name, model in models.items()}
    runs["srupp_last_4096"] = Decoder(models["srupp_last"], 4096)
    if (sru := original_sru()) is not None:
        runs["original"] = OriginalDecoder(sru, 128)
    seconds = interleave(runs, turns, CPU, "decode")
    return {"seconds": seconds, "shares": {name: operator_shares(runs[name], 5) for name in SHARED}}


def measure_caches(tokens: int = 16_384) -> dict[str, Any]:
    """Count the bytes of the caches of two models of ten layers, made by reading so many tokens, at a tenth of the
    width of the 42 M model, since the ratio does not depend on it."""
    sizes = {"hidden_size": 192, "projection_size": 48}
    found = {}
    for every in (1, 10):
        model = SruppForCausalLM(SruppConfig.preset("enwik8-42m", attention_every_n_layers=every, **sizes))
        cache = Decoder(model, tokens, chunk=1024).cache
        layers: list[Any] = cache.layers
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        tensors += [state for layer in layers for state in layer.conv_states.values()]
        found[f"k={every}"] = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return {"bytes": found, "tokens": tokens}


def ratios(parts: dict[str, Any]) -> dict[str, float | None]:
    """Take the measured ratios by the names of `GOALS`; `None` for what was not measured."""
    times = {part: medians(result["seconds"]) for part, result in parts.items() if "seconds" in result}

    def ratio(part: str, ours: str, peer: str) -> float | None:
        found = times.get(part, {})
        return found[ours] / found[peer] if ours in found and peer in found else None

    values = [
        ratio("recurrence", "forward", "original_forward"),
        ratio("recurrence", "train", "original_train"),
        ratio("train", "srupp", "gpt2"),
        ratio("train", "srupp_last", "gpt2"),
        ratio("small", "srupp", "gpt2"),
        ratio("small", "srupp_last", "gpt2"),
        ratio("small", "srupp_memory", "gpt2"),
        ratio("small", "srupp_last_memory", "gpt2"),
        ratio("decode", "srupp", "gpt2"),
        ratio("decode", "srupp", "original"),
        ratio("decode", "srupp_last_4096", "srupp_last"),
        parts["cache"]["bytes"]["k=10"] / parts["cache"]["bytes"]["k=1"] if "cache" in parts else None,
    ]
    return dict(zip(GOALS, values, strict=True))


def summarise(parts: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    goals = {name: pair[BACKENDS.index(backend)] for name, pair in GOALS.items()}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "value": value,
            "unit": "times",
            "goal": None if goals[name] is None else f"at most {goals[name]:.3g}",
        }
        for name, value in ratios(parts).items()
    ]
    if "recurrence" in parts:
        times = medians(parts["recurrence"]["seconds"])
        for pass_, limit in parts["recurrence"]["copy_limit_seconds"].items():
            name = f"recurrence {pass_}, distance to the copy limit"
            rows.append({"name": name, "value": times[pass_] / limit, "unit": "times", "goal": None})
    if "decode" in parts:
        for name, seconds in medians(parts["decode"]["seconds"]).items():
            rows.append(
                {
                    "name": f"decode, {name}",
                    "value": 1e3 * seconds / TOKENS_PER_TURN,
                    "unit": "ms a token",
                    "goal": None,
                }
            )
    for part, result in parts.items():
        for name, found in result.get("shares", {}).items() if backend == "cpu" else ():
            for kind, share in found.items():
                rows.append({"name": f"{part}, {name}: {kind}", "value": share, "unit": "of the time", "goal": None})
    return rows


def table_of(parts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The ratios to GPT-2 that the README shows, by preset."""
    found = ratios(parts)
    cells = {
        "train": found["train step, SRU++ / GPT-2"],
        "decode": found["decode after 128 tokens, SRU++ / GPT-2"],
    }
    return {"enwik8-42m": {name: round(value, 3) for name, value in cells.items() if value is not None}}


def headline_of(environment: dict[str, Any], backend: str, parts: dict[str, Any]) -> str:
    machine, versions = environment["machine"], environment["versions"]
    kernels = "without" if backend == "reference" else "with"
    found = ratios(parts)
    shown = {"a train step": "train step, SRU++ / GPT-2", "a decoded token": "decode after 128 tokens, SRU++ / GPT-2"}
    measured = [f"{found[name]:.2f} for {what}" for what, name in shown.items() if found[name] is not None]
    return (f"SRU++ over GPT-2: {', '.join(measured)}. " if measured else "") + (
        f"Ratios are medians of core time of interleaved runs in one process, {kernels} compiled kernels, against "
        "transformers' GPT-2 of equal size: a train step of 2 x 128 tokens in float32, and one token at batch 1 after "
        f"128. Machine: {machine['processor']} ({machine['vector_instructions']}), {machine['threads']} thread; torch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )


def default_result(backend: str) -> Path:
    """Place of the result: a file for each set of vector instructions, since speed with kernels depends on it."""
    if backend == "reference":
        return RESULTS / "lm_speed.json"
    instructions = describe()["machine"]["vector_instructions"].partition(",")[0].partition(" ")[0]
    return RESULTS / f"lm_speed_kernel_{instructions.replace('-', '').lower()}.json"


PARTS = {
    # First, as in a process of its own: malloc keeps more once large models have run, see training/LOG.md.
    "small": measure_small_steps,
    "recurrence": measure_recurrence,
    "train": measure_training,
    "decode": measure_decoding,
    "cache": lambda repeats: measure_caches(),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.lm_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each peer")
    parser.add_argument("--backend", default="reference", choices=BACKENDS, help="what runs the recurrence")
    parser.add_argument(
        "--result",
        type=Path,
        help="by default training/results/lm_speed.json; with compiled kernels lm_speed_kernel_avx512.json or "
        "lm_speed_kernel_avx2.json, by the vector instructions that torch uses",
    )
    args = parser.parse_args(argv)
    result = args.result or default_result(args.backend)
    torch.set_num_threads(1)
    parts: dict[str, Any] = {}
    for name in args.parts:
        with use_backend(args.backend):
            parts[name] = PARTS[name](args.repeats)
        # After every part, so that an interrupted run leaves what it has.
        environment = describe()
        headline, summary = headline_of(environment, args.backend, parts), summarise(parts, args.backend)
        shown = {"headline": headline, "table": table_of(parts), "summary": summary}
        write_result(result, {**shown, **environment, "backend": args.backend, "parts": parts})
    for row in summarise(parts, args.backend):
        print(f"{row['name']}: {row['value']} {row['unit']}, {row['goal']}")


if __name__ == "__main__":
    main()
