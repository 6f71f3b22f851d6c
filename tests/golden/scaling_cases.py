"""The cases recorded from trax, the configs that their options amount to, and the draws of their training runs."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_efficient.models.scaling_transformer.configuration_scaling_transformer import ScalingTransformerConfig
from hf_efficient.modules import sparse_blocks, token_positions
from hf_efficient.modules.sparse_layers import UnitDraws
from tests.helpers.comparison import assert_allclose


GOLDEN = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent))
CASES, TRAINED = GOLDEN / "scaling" / "cases", GOLDEN / "scaling" / "trained"

# Beginnings of the descriptions -> kinds.
KINDS = {
    "FactoredDense": "multiplicative_dense",
    "LocallyConvDense": "conv",
    "MultiplicativeModularSparseDense": "modular_dense",
    "MultiplicativeConvCausalAttention": "attention",
    "MultiplicativeCausalAttention": "attention",
    "MultiplicativeModularCausalAttention": "attention",
    "SparseFF": "sparse_ff",
    "FeedForwardWithOptions": "feed_forward",
    "trax tl.SRU": "sru",
    "SparseDenseWithOptions": "heads",
    "PositionalEncoding with d_feature": "positions",
    "Position encodings": "positions",
    "ConfigurableTransformerLM": "language_model",
    "Same tiny LM": "language_model",
    "ConfigurableTransformer encoder-decoder": "encoder-decoder",
    "ConfigurableTerraformer": "Terraformer",
    "ReformerLM": "Terraformer",
    "Reversible decoder block": "reversible",
    "PureLSHSelfAttention (no weights)": "lsh_core",
    "PureLSHSelfAttentionWrapper": "LSH wrapper",
    "SelfAttention and LSHSelfAttention": "heads-major attention",
}

ATTENTION_KINDS = {
    "dense": "dense",
    "mult": "multiplicative",
    "MultiplicativeCausalAttention": "multiplicative",
    "modular": "multiplicative_modular",
    "multmodular": "multiplicative_modular",
    "MultiplicativeModularCausalAttention": "multiplicative_modular",
    "multconv": "multiplicative_conv",
    "MultiplicativeConvCausalAttention": "multiplicative_conv",
}
OUTPUTS = {"none": "none", "mult": "multiplicative", "conv": "conv", "multconv": "multiplicative_conv"}
VALUE_INPUTS = {"none": "shared", "fixed": "by_module", "original": "concatenated"}
POSITIONS = {None: "learned", "fixed-base": "fixed_base", "lowrank": "low_rank", "none": "none"}
HEADS = {"mult": "multiplicative", "lowrank": "low_rank", "einsum": "einsum", "dense": "dense"}
# Options that say how the case was recorded, or are read elsewhere.
RECORDING = {
    *("batch", "length", "runs", "selects", "seed", "select_quant", "select_soft", "files", "noise", "grads"),
    *("predict_first_chunk", "stored_dtype", "chunk"),
}


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.json"))


class Case:
    """One recorded case: its options, and its tensors by the first part of their names."""

    def __init__(self, name: str):
        self.name = name
        self.about = json.loads((CASES / f"{name}.json").read_text())
        self.tensors = load_file(CASES / f"{name}.safetensors")
        self.options: dict[str, Any] = self.about["config"]
        self.weights = self.group("weights.")
        self.inputs = self.group("input.")
        self.outputs = self.group("output.")

    @property
    def kind(self) -> str:
        description = self.about["description"]
        fitting = [start for start in KINDS if description.startswith(start)]
        assert fitting, f"{self.name} is of a kind that is not known: {description!r}"
        return KINDS[max(fitting, key=len)]

    def group(self, prefix: str) -> dict[str, Tensor]:
        found = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def compare(self, name: str, actual: Tensor, expected: Tensor, what: str = "forward") -> None:
        tolerance = self.about["tolerance"][what]
        assert_allclose(f"{self.name}: {name}", actual.detach(), expected, tolerance["atol"], tolerance["rtol"])

    def compare_gradients(self, prefix: str, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        """Compare all gradients of a run, `weights` by their original names. Where a case has one that is not among
        them, or lacks one that is, the comparison fails."""
        expected = self.group(prefix)
        if not expected:
            return
        found = {f"weights.{name}": grad for name, grad in weights.items()}
        found |= {f"input.{name}": grad for name, grad in inputs.items() if f"input.{name}" in expected}
        assert set(found) == set(expected), sorted(set(found) ^ set(expected))
        for name, grad in expected.items():
            self.compare(f"{prefix}{name}", found[name], grad, "grad")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, zero where there is none, and forget them."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }
    module.zero_grad(set_to_none=True)
    return found


def restored(rules, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names in the original's names and layout."""
    by_name = {rule.ours: rule for rule in rules}
    assert set(ours) <= set(by_name), sorted(set(ours) - set(by_name))
    return {by_name[name].original: by_name[name].restore(tensor) for name, tensor in ours.items()}


def load_by_rules(module: nn.Module, rules, weights: dict[str, Tensor]) -> None:
    by_name = {rule.original: rule for rule in rules}
    assert set(weights) <= set(by_name), sorted(set(weights) - set(by_name))
    module.load_state_dict({by_name[name].ours: by_name[name].convert(tensor) for name, tensor in weights.items()})


def feed_forward_fields(options: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"intermediate_size": options["d_ff"]}
    sparsity = options.get("ff_sparsity") or None
    if isinstance(sparsity, str):  # as gin files have it
        sparsity = [float(number) if "." in number else int(number) for number in sparsity.split()]
        sparsity = sparsity if len(sparsity) > 1 else sparsity[0] or None
    if isinstance(sparsity, int):
        sparsity = [sparsity, options["d_ff"] // sparsity]
    if sparsity:
        names = ("ff_sparsity", "ff_rank", "ff_temperature", "ff_hard_probability")
        fields |= dict(zip(names, sparsity, strict=False))
    recurrences = options.get("ff_use_sru") or 0
    layers, units = (recurrences, 32) if isinstance(recurrences, int) else recurrences
    fields |= {"ff_sru_layers": layers, "ff_sru_units": units}
    activation = options.get("ff_activation", "relu")
    return fields | {"hidden_act": {"relu": "relu", "fastgelu": "gelu_new"}[activation.lower()]}


def attention_fields(options: dict[str, Any]) -> dict[str, Any]:
    attention = options.get("attention", "multconv")
    given = attention if isinstance(attention, dict) else {**options, "kind": attention}
    kind = ATTENTION_KINDS[given["kind"]]
    if kind == "dense":
        return {"attention_type": kind}
    fields = {"attention_type": kind, "attention_sparsity": given.get("sparsity", given.get("attn_sparsity"))}
    if kind != "multiplicative_conv":
        return fields
    return fields | {
        "attention_window": given.get("length_kernel_size", 3),
        "attention_share_qk": given.get("share_qk", False),
        "attention_output": OUTPUTS[given.get("output_layer_type", "none")],
        "attention_value_input": VALUE_INPUTS[given.get("v_concat_type", "none")],
    }


def language_model_config(options: dict[str, Any]) -> ScalingTransformerConfig:
    """The config that the options of a language model amount to; an option that nothing reads fails."""
    known = {
        *("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "max_len", "attention", "attn_sparsity"),
        *("length_kernel_size", "share_qk", "output_layer_type", "v_concat_type", "ff_sparsity", "ff_use_sru"),
        *("loss_sparsity_type", "loss_sparsity", "loss_d_lowrank", "loss_sparsity_prob", "pos_type", "pos_d_feature"),
        *("dropout", "ff_activation", "ff_dropout", "pos_start_from_zero_prob", "pos_max_offset_to_add"),
        *("ff_chunk_size",),
    }
    unknown = set(options) - known - RECORDING
    assert not unknown, f"options that are not known: {sorted(unknown)}"
    head = HEADS[options.get("loss_sparsity_type", "mult" if options.get("loss_sparsity") else "dense")]
    fields: dict[str, Any] = {"lm_head_type": head}
    if head == "multiplicative":
        fields["loss_sparsity"] = options["loss_sparsity"]
        fields["lm_head_sparse_probability"] = options.get("loss_sparsity_prob")
    if head == "low_rank":
        fields["lm_head_rank"] = options["loss_d_lowrank"]
    positions = POSITIONS[options.get("pos_type")]
    if options.get("pos_d_feature"):
        fields |= {"position_rank": options["pos_d_feature"]}
        positions = "low_rank"
    return ScalingTransformerConfig(
        vocab_size=options["vocab_size"],
        hidden_size=options["d_model"],
        num_hidden_layers=options["n_layers"],
        num_attention_heads=options["n_heads"],
        max_position_embeddings=options["max_len"],
        position_embedding_type=positions,
        position_zero_probability=options.get("pos_start_from_zero_prob", 1.0),
        position_max_offset=options.get("pos_max_offset_to_add", 0),
        dropout=options.get("dropout", 0.0),
        activation_dropout=options.get("ff_dropout") or 0.0,
        ff_chunk_size=options.get("ff_chunk_size", 0),
        attn_implementation="eager",
        **fields,
        **feed_forward_fields(options),
        **attention_fields(options),
    )


class Draws:
    """The draws of one training run, handed out in the order in which they were recorded, by kind."""

    def __init__(self, named: list[tuple[str, Tensor]], sizes: tuple[int, ...] = ()):
        self.named = named
        self.sizes = sizes

    def take(self, pattern: str) -> Tensor:
        for index, (name, tensor) in enumerate(self.named):
            if re.search(pattern, name):
                del self.named[index]
                return tensor
        raise AssertionError(f"no draw of {pattern} is left among {[name for name, _ in self.named]}")

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        keep = self.take(r"keep")
        assert keep.numel() == x.numel(), (tuple(keep.shape), tuple(x.shape))
        return x * keep.reshape(x.shape).to(x.dtype) / (1 - p)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if not shape:
            return self.take(r"uniform.*position|uniform").reshape(())
        # Whether a row begins elsewhere, and whether it keeps its position: integers, of which 0 says no.
        return self.take(r"start_flag|base_keep").clamp(max=1).float().reshape(shape)

    def integers(self, bound: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self.take(r"start\.|start$").long().reshape(shape)

    def units(self) -> UnitDraws:
        if not any("gumbel" in name for name, _ in self.named):
            return UnitDraws()
        uniforms, select = self.take("gumbel"), self.take("select").reshape(())
        return UnitDraws(select=select, uniforms=uniforms)


@contextmanager
def injected(draws: Draws) -> Iterator[None]:
    """Let all that a model draws come from a recording, all of which has to be used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", draws.dropout)
        patch.setattr(token_positions, "_uniform", draws.uniform)
        patch.setattr(token_positions, "_integers", draws.integers)
        patch.setattr(sparse_blocks, "UnitDraws", draws.units)
        # Pieces are recomputed from the state of the generator, which a recording does not have.
        patch.setattr(sparse_blocks, "checkpoint", lambda function, *arguments, use_reentrant: function(*arguments))
        patch.setattr(torch, "rand", lambda *shape, **options: draws.uniform((), torch.empty(())))
        yield
    assert not draws.named, f"draws that nothing asked for: {[name for name, _ in draws.named]}"
