"""
SRU++ against its peers: the recurrence against the original's, and a language model of 42 M parameters against a GPT-2
of equal size, in training and in token-by-token decoding. Without compiled kernels, or with them:

    python training/benchmarks/lm_speed.py
    python training/benchmarks/lm_speed.py --backend cpu
    python training/benchmarks/lm_speed.py --parts train decode --repeats 20 --result speed.json

One process, one thread, peers in turn, medians of core time. The original (`pip install --no-deps sru==3.0.0.dev6
ninja`) compiles its C++ at the first import; without it the rows that need it say so.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, describe, write_result
from lm_peers import TOKENS_PER_TURN, Decoder, OriginalDecoder, build_models, original_recurrence, original_sru
from lm_race import MODELS
from lm_shares import shares
from timing import interleave, medians
from torch import Tensor, nn

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.sru import sru_recurrence


CPU = torch.device("cpu")
BATCH, LENGTH, WIDTH = 8, 512, 1024
# By ratio: with plain torch, with the compiled kernel. A ratio that stands here without goals is reported alone.
GOALS: dict[str, tuple[float | None, float | None]] = {
    "recurrence forward, ours / original's C++": (0.7, 1 / 5),
    "recurrence forward + backward, ours / original": (0.15, 1 / 30),
    "train step, SRU++ / GPT-2": (1.2, 1.0),
    "train step, attention in the last layer only / GPT-2": (0.95, None),
    "train step of the race, SRU++ / GPT-2": (1.2, None),
    "train step of the race, attention in the last layer only / GPT-2": (0.95, None),
    "train step with carried memory at the race's size, SRU++ / GPT-2": (None, None),
    "train step with carried memory at the race's size, attention in the last layer only / GPT-2": (None, None),
    "decode after 128 tokens, SRU++ / GPT-2": (1.3, 1.1),
    "decode after 128 tokens, SRU++ / the original's way": (1 / 3, None),
    "decode, attention in the last layer only, context 4,096 / 128": (1.15, None),
    "cache at 16,384 tokens, k = 10 / k = 1": (1 / 8, None),
}
BACKENDS = ("reference", "cpu")
SHARED = ("srupp", "gpt2")  # whose time is told by kind of operator


def copy_seconds(numbers: int) -> float:
    """Core seconds to copy so many float32 numbers, in tensors of 64 MiB."""
    size = 1 << 24
    source, target = torch.randn(size), torch.empty(size)
    return medians(interleave({"copy": lambda: target.copy_(source)}, 10, CPU, "copy"))["copy"] * numbers / size


def measure_recurrence(repeats: int) -> dict[str, Any]:
    """(batch 8, length 512, width 1,024), pre-activations given; against the time to copy what has to be moved."""
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
    """Forward, backward and AdamW on two rows of 128 tokens in float32."""
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
    return {"seconds": seconds, "parameters": parameters, "shares": {name: shares(runs[name], 3) for name in SHARED}}


def measure_race_steps(repeats: int) -> dict[str, Any]:
    """A step of the language-model race: 2.6 M parameters, four segments of 128 bytes; without memory, as both models
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
    return {"seconds": interleave(runs, 3 * repeats, CPU, "race step")}


def measure_decoding(turns: int) -> dict[str, Any]:
    """Core seconds of `TOKENS_PER_TURN` tokens at batch 1, after 128; with one attention layer after 4,096 too."""
    models = build_models()
    runs: dict[str, Any] = {name: Decoder(model, 128) for name, model in models.items()}
    runs["srupp_last_4096"] = Decoder(models["srupp_last"], 4096)
    if (sru := original_sru()) is not None:
        runs["original"] = OriginalDecoder(sru, 128)
    seconds = interleave(runs, turns, CPU, "decode")
    return {"seconds": seconds, "shares": {name: shares(runs[name], 5) for name in SHARED}}


def measure_caches(tokens: int = 16_384) -> dict[str, Any]:
    """Bytes of the caches of two models of ten layers, made by reading so many tokens; a tenth of the width of the 42 M
    model, since the ratio does not depend on it."""
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
    """The measured ratios by the names of `GOALS`; `None` for what was not measured."""
    times = {part: medians(result["seconds"]) for part, result in parts.items() if "seconds" in result}

    def ratio(part: str, ours: str, peer: str) -> float | None:
        found = times.get(part, {})
        return found[ours] / found[peer] if ours in found and peer in found else None

    values = [
        ratio("recurrence", "forward", "original_forward"),
        ratio("recurrence", "train", "original_train"),
        ratio("train", "srupp", "gpt2"),
        ratio("train", "srupp_last", "gpt2"),
        ratio("race", "srupp", "gpt2"),
        ratio("race", "srupp_last", "gpt2"),
        ratio("race", "srupp_memory", "gpt2"),
        ratio("race", "srupp_last_memory", "gpt2"),
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


def headline_of(environment: dict[str, Any], backend: str) -> str:
    machine, versions = environment["machine"], environment["versions"]
    kernels = "without" if backend == "reference" else "with"
    return (
        f"Ratios are medians of core time of interleaved runs in one process, {kernels} compiled kernels, against "
        "transformers' GPT-2 of equal size: a train step of 2 x 128 tokens in float32, and one token at batch 1 after "
        f"128. Machine: {machine['processor']}, {machine['threads']} thread; torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    )


PARTS = {
    # First, as in a process of its own: malloc keeps more once large models have run, see training/LOG.md.
    "race": measure_race_steps,
    "recurrence": measure_recurrence,
    "train": measure_training,
    "decode": measure_decoding,
    "cache": lambda repeats: measure_caches(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each peer")
    parser.add_argument("--backend", default="reference", choices=BACKENDS, help="what runs the recurrence")
    parser.add_argument(
        "--result", type=Path, help="by default training/results/lm_speed.json, or lm_speed_kernel.json"
    )
    args = parser.parse_args()
    result = args.result or RESULTS / ("lm_speed.json" if args.backend == "reference" else "lm_speed_kernel.json")
    torch.set_num_threads(1)
    parts: dict[str, Any] = {}
    for name in args.parts:
        with use_backend(args.backend):
            parts[name] = PARTS[name](args.repeats)
        # After every part, so that an interrupted run leaves what it has.
        environment = describe()
        headline, summary = headline_of(environment, args.backend), summarise(parts, args.backend)
        shown = {"headline": headline, "table": table_of(parts), "summary": summary}
        write_result(result, {**shown, **environment, "backend": args.backend, "parts": parts})
    for row in summarise(parts, args.backend):
        print(f"{row['name']}: {row['value']} {row['unit']}, {row['goal']}")


if __name__ == "__main__":
    main()
