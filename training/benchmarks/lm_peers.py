"""SRU++ and its peers as the speed benchmark sees them: models of equal size, and what decodes with them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.ops.sru import sru_recurrence
from hf_efficient.utils.cache_naming import cache_kwarg


def original_sru():
    """The original package, or `None` where it is not installed."""
    # Its build looks for ninja on the path, where a virtual environment that is not activated is not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        import sru
    except ImportError:
        return None
    return sru


def original_recurrence(u: Tensor, x: Tensor, weight_c: Tensor, bias: Tensor, cotangent: Tensor) -> dict[str, Callable]:
    """The original's two paths on the same numbers: its C++ forward, and the one it trains by on a CPU; nothing where
    it is not installed."""
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
    """The published 42 M character model, the same with one attention layer, and a GPT-2 of as many parameters."""
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


TOKENS_PER_TURN = 4


class Decoder:
    """A model that has read `context` tokens and goes on, some tokens a call."""

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
    """The original's way: the inputs of all layers are kept, and keys and values made of them anew at each token."""

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
