"""Parts of the GPU agenda that time train steps of whole models against their peers in transformers: TUPE against BERT,
SRU++ against GPT-2.

Forward, backward and AdamW in bfloat16 autocast, the models in turn, first as they come and then compiled. As they
come, peers may use flash attention alone. The recurrence that ran is recorded and asserted, and so is the form of
attention, but for compiled models, whose code hides it: `attention_asserted` is false there.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_efficient import SruppConfig, SruppForCausalLM, TupeConfig, TupeForMaskedLM
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.sru import BACKWARD_NAME, OP_NAME
from training.benchmarks.gpu.context import PartContext
from training.benchmarks.gpu.speed import Timer, compiled_backend, medians


ATTENTION_OP = "aten::_scaled_dot_product_"
IGNORED = -100
VOCABULARY, CLS = 30_522, 101  # BERT's
# Seconds to compile two models or three, and to time them.
COMPILING = 45


class WrongBackendError(Exception):
    """Another implementation ran than the one that was to be measured."""


class TrainStep:
    """
    A model with its optimiser.

    Args:
        model (`nn.Module`): one that takes labels and gives a loss.
        batch (`dict[str, Tensor]`): what it is given.
        flash (`bool`): whether attention must run by flash attention. Compiled, a model chooses for itself: while it is
            traced transformers gives attention a mask, which flash attention does not take.
        compiler (`str`, *optional*): the backend of `torch.compile`; none compiles nothing.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Any], flash: bool, compiler: str | None = None):
        self.model, self.batch, self.flash = model.train(), batch, flash and compiler is None
        self.forward: Any = torch.compile(model, backend=compiler) if compiler else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        device = self.batch["input_ids"].device.type
        attention = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.flash else nullcontext()
        with attention, torch.autocast(device, torch.bfloat16):
            loss = self.forward(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def attention_ops(run: Callable[[], object]) -> list[str]:
    """The forms of scaled dot-product attention in a call, such as `flash` or `efficient`; none is `explicit`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key for event in profile.key_averages() if event.key.startswith(ATTENTION_OP)}
    forward = {name.removeprefix(ATTENTION_OP).split("_attention")[0] for name in names if "backward" not in name}
    return sorted(forward - {"fused"}) or ["explicit"]


def check_attention(steps: dict[str, TrainStep]) -> dict[str, list[str]]:
    """
    Run each step once, and return the forms of attention that it used.

    Raises:
        WrongBackendError: if a step that must use flash attention used another form.
    """
    ran = {name: attention_ops(step) for name, step in steps.items()}
    wrong = {name: ops for name, ops in ran.items() if steps[name].flash and ops != ["flash"]}
    if wrong:
        raise WrongBackendError(f"flash attention was to run, and this did: {wrong}")
    return ran


def time_steps(
    context: PartContext,
    models: dict[str, nn.Module],
    batch: dict[str, Any],
    flash: Collection[str],
    compiler: str | None,
) -> dict[str, Any]:
    """Tokens a second of all models, and what share of a large matrix product's rate they reach."""
    steps = {name: TrainStep(model, batch, name in flash, compiler) for name, model in models.items()}
    attention = None if compiler else check_attention(steps)
    timer = Timer(context)
    timer.repeats = min(timer.repeats, 10)
    times = timer.in_turn(steps)
    tokens = batch["input_ids"].numel()
    rate = timer.matmul_rate(context.device)
    found: dict[str, Any] = {}
    for name, microseconds in medians(times).items():
        matrices = sum(p.numel() for n, p in models[name].named_parameters() if p.dim() > 1 and "embed" not in n)
        found[name] = {
            "tokens_per_second": 1e6 * tokens / microseconds,
            "matmul_rate_fraction": 6 * matrices * tokens / microseconds / rate,
            "attention": attention[name] if attention else None,
            "attention_asserted": attention is not None and name in flash,
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "microseconds": times[name],
        }
    return found


def report(context: PartContext, found: dict[str, Any], title: str, measured: dict[str, Any], peer: str) -> None:
    """Keep one measurement, with its ratios to the peer."""
    speeds = {name: figures["tokens_per_second"] for name, figures in measured.items()}
    ratios = {name: speed / speeds[peer] for name, speed in speeds.items() if name != peer}
    found["measured"][title] = {"models": measured, "tokens_per_second_over_peer": ratios}
    said = ", ".join(f"{name} {ratio:.2f} x {peer}" for name, ratio in ratios.items())
    found["line"] = "; ".join([*filter(None, [found.get("line")]), f"{title}: {said}"])
    context.save(found)
    context.say(f"{title}: {said}")


def compilers(context: PartContext) -> tuple[str | None, ...]:
    """First the models as they come, then compiled; in a rehearsal without the generation of code."""
    return None, context.choose("inductor", "eager")


def has_time(context: PartContext, compiler: str | None) -> bool:
    """Return whether a measurement can be begun; print that one is left out where there is no time to compile."""
    enough = compiler is None or context.seconds_left() > COMPILING
    if not enough:
        context.say(f"compiled models are left out: {context.seconds_left():.0f} seconds are left")
    return enough


def build_encoders(context: PartContext, length: int) -> dict[str, nn.Module]:
    """TUPE-R and BERT of the base size with masked-LM heads that run at the targets alone, dropout 0.1."""
    # On a CPU flash attention takes no dropout.
    dropout = {"attention_probs_dropout_prob": context.choose(0.1, 0.0)}
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    chosen: dict[str, Any] = {**context.choose(sizes, tiny), **dropout, "max_position_embeddings": length}
    vocabulary = context.choose(VOCABULARY, 1200)
    sdpa: dict[str, Any] = {"attn_implementation": "sdpa"}
    torch.manual_seed(0)
    tupe = TupeForMaskedLM(TupeConfig(vocab_size=vocabulary, cls_token_id=CLS, **chosen))
    bert = BertForMaskedLM(BertConfig(vocab_size=vocabulary, **chosen, **sdpa))
    models = {"tupe_r": tupe, "bert": bert}
    return {name: MaskedLMObjective(model=model).to(context.device) for name, model in models.items()}  # type: ignore


def measure_encoders(context: PartContext) -> dict[str, Any]:
    """TUPE-R against BERT at lengths 128 and 512, without padding, 15 % of the tokens being targets."""
    found: dict[str, Any] = {"measured": {}}
    for compiler, (rows, length) in product(compilers(context), context.choose(((128, 128), (32, 512)), ((2, 8),))):
        if not has_time(context, compiler):
            break
        models = build_encoders(context, length)
        ids = torch.randint(1000, context.choose(VOCABULARY, 1200), (rows, length), device=context.device)
        ids[:, 0] = CLS
        labels = torch.where(torch.rand(rows, length, device=context.device) < 0.15, ids, IGNORED)
        labels[0, 1] = 1000  # a tiny batch may have no target
        batch = {"input_ids": ids, "labels": labels}
        title = f"length {length}{', compiled' if compiler else ''}"
        report(context, found, title, time_steps(context, models, batch, ["bert"], compiler), "bert")
    context.needs_gpu("inductor")
    return found


def build_lm(name: str, context: PartContext, length: int, dropout: float = 0.0) -> nn.Module:
    """
    The published 42 M character model, or a GPT-2 of as many parameters, on bytes.

    Args:
        name (`str`): `"srupp"`, `"srupp_last"` with attention in the last layer alone, or `"gpt2"`.
        context (`PartContext`): device, and whether the size is to be tiny.
        length (`int`): positions of GPT-2.
        dropout (`float`, defaults to 0): the rate of all dropouts.
    """
    if name == "gpt2":
        tiny: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2}
        sizes = context.choose({"n_embd": 592, "n_layer": 10, "n_head": 8}, tiny)
        rates: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        fixed: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
        config = GPT2Config(vocab_size=256, n_positions=length, **fixed, **sizes, **rates)
        return GPT2LMHeadModel(config).to(context.device)  # type: ignore[arg-type]
    tiny = {"hidden_size": 64, "projection_size": 16, "num_hidden_layers": 2}
    places: dict[str, Any] = {"attention_layers": [-1]} if name == "srupp_last" else {}
    chosen = {**context.choose({}, tiny), **places, "dropout": dropout, "attention_dropout": dropout}
    return SruppForCausalLM(SruppConfig.preset("enwik8-42m", vocab_size=256, **chosen)).to(context.device)


def recurrence_ran(backend: str) -> dict[str, str | None]:
    """
    By which form both passes of the recurrence ran last.

    Raises:
        WrongBackendError: if by another than `backend`.
    """
    ran = {name: last_backend(name) for name in (OP_NAME, BACKWARD_NAME)}
    if set(ran.values()) != {backend}:
        raise WrongBackendError(f"the recurrence was to run by {backend!r}, and this ran: {ran}")
    return ran


def measure_lms(context: PartContext) -> dict[str, Any]:
    """SRU++ of 42 M parameters, also with one attention layer, against GPT-2: 24 segments of 512 bytes, as the paper
    trains."""
    rows, length = context.choose((24, 512), (2, 9))
    ids = torch.randint(0, 256, (rows, length), device=context.device)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    backend = compiled_backend(context.device)
    found: dict[str, Any] = {"measured": {}}
    for compiler in compilers(context):
        if not has_time(context, compiler):
            break
        torch.manual_seed(0)
        models = {name: build_lm(name, context, length) for name in ("srupp", "srupp_last", "gpt2")}
        with use_backend(backend):
            measured = time_steps(context, models, batch, ["gpt2"], compiler)
        found["recurrence"] = recurrence_ran(backend)
        report(context, found, "compiled" if compiler else "as they come", measured, "gpt2")
    context.needs_gpu("inductor")
    return found
