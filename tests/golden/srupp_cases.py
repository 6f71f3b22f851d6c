"""The cases recorded from the original SRU and SRU++ code, and the configs that its options amount to."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_efficient.models.srupp.configuration_srupp import SruppConfig


GOLDEN = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent))
CASES, SRU_CASES = GOLDEN / "srupp" / "cases", GOLDEN / "sru" / "cases"

# Options of the original's classes -> fields of SruppConfig; an option that is in neither table fails.
STACK_OPTIONS = {
    "input_size": "embedding_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "proj_size": "projection_size",
    "projection_size": "projection_size",
    "num_heads": "num_attention_heads",
    "bidirectional": "bidirectional",
    "layer_norm": "layer_norm",
    "normalize_after": "normalize_after",
    "attn_layer_norm": "attention_layer_norm",
    "attention_every_n_layers": "attention_every_n_layers",
    "attention_last_n_layers": "attention_last_n_layers",
    "has_skip_term": "has_skip_term",
    "rescale": "rescale",
    "highway_bias": "highway_bias",
    "proj_input_to_hidden_first": "project_input",
    "use_tanh": "recurrence_activation",
    "v1": "use_peephole",
    "weight_c_init": "weight_c_init",
    "dropout": "dropout",
    "attn_dropout": "attention_dropout",
    "rnn_dropout": "input_dropout",
}
LM_OPTIONS = {
    "n_d": "hidden_size",
    "n_proj": "projection_size",
    "depth": "num_hidden_layers",
    "n_e": "adaptive_embedding_size",
    "div_val": "adaptive_divisor",
    "attn_heads": "num_attention_heads",
    "attn_every_n_layers": "attention_every_n_layers",
    "layer_norm": "layer_norm",
    "bias": "highway_bias",
    "dropout": "dropout",
    "emb_dropout": "embedding_dropout",
    "attn_dropout": "attention_dropout",
}
VALUES = {
    "recurrence_activation": lambda value: "tanh" if value else "identity",
    "use_peephole": lambda value: not value,
    "attention_last_n_layers": lambda value: None if value < 0 else value,
    "projection_size": lambda value: [size or 0 for size in value] if isinstance(value, list) else value or 0,
    "adaptive_divisor": int,
}
# Defaults of the original's classes where they are not ours.
SRU = {"attention_layers": [], "attention_layer_norm": False, "projection_size": 0, "projection_dropout": 0.0}
DEFAULTS = {
    "sru.SRUCell": {**SRU, "highway_bias": 0.0, "num_hidden_layers": 1, "normalize_after": True},
    "sru.SRU": {**SRU, "highway_bias": 0.0, "num_hidden_layers": 2},
    "sru.SRUpp": {"highway_bias": -2.0, "num_hidden_layers": 2},
}


def translate(options: dict, names: dict[str, str]) -> dict:
    unknown = set(options) - set(names)
    assert not unknown, f"options that this test does not know: {sorted(unknown)}"
    fields = {names[name]: value for name, value in options.items()}
    return {name: VALUES[name](value) if name in VALUES else value for name, value in fields.items()}


class Case:
    def __init__(self, name: str):
        self.name = name
        self.about = json.loads((CASES / f"{name}.json").read_text())
        tensors = load_file(CASES / f"{name}.safetensors")
        self.weights, self.inputs, self.outputs, self.probes, self.grads = (
            {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
            for part in ("weights.", "input.", "output.", "probe.", "grad.")
        )
        assert self.about.get("mode", "eval") == "eval"
        self.kind, self.fields = self._read()

    def _read(self) -> tuple[str, dict]:
        """Which part of the model the case is of, and the fields of its config."""
        kind, options = self.about["class"], dict(self.about.get("kwargs") or {})
        if kind in DEFAULTS:
            self.flat_state = options.pop("nn_rnn_compatible_return", False)
            fields = {**DEFAULTS[kind], **translate(options, STACK_OPTIONS)}
            # The original's hidden_size is that of a direction.
            fields["hidden_size"] *= 2 if fields.get("bidirectional") else 1
            return ("chunks" if "chunks" in self.about else "stack"), fields
        if kind == "sru.modules.SRUppAttention":
            return "attention", attention_fields(options)
        if kind.startswith("experiments/srupp_experiments/") and kind.endswith(":Model"):
            fields = translate(self.about["args"], LM_OPTIONS)
            fields["vocab_size"] = self.about["vocab"]
            if "cutoffs" in self.about:
                tied = any("emb_projs" in name for name in self.about["tied_state_dict_entries"])
                fields |= {"adaptive_cutoffs": self.about["cutoffs"], "tie_adaptive_projections": tied}
            return "language model", {**fields, "tie_word_embeddings": "cutoffs" in self.about}
        raise ValueError(f"{self.name}: {kind} is no kind of case that this test knows")

    @property
    def is_cell(self) -> bool:
        return self.about["class"] == "sru.SRUCell"

    def config(self, attention: str, **overrides) -> SruppConfig:
        config = SruppConfig(**{**self.fields, **overrides})
        config._attn_implementation = attention
        return config

    def leaf(self, name: str) -> torch.Tensor | None:
        """An input whose gradient is asked for, as the case has it."""
        return self.inputs[name].clone().requires_grad_() if name in self.inputs else None


def attention_fields(options: dict) -> dict:
    """A layer around an attention module of its own. Only its number of rows tells what the recurrence would have."""
    inputs, rows = options.pop("in_features"), options.pop("out_features")
    hidden = rows // 3 if rows % 3 == 0 else rows // 4
    fields = {
        "embedding_size": inputs,
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "projection_size": options.pop("proj_features"),
        "num_attention_heads": options.pop("num_heads", 1),
        "attention_layer_norm": options.pop("layer_norm", False),
        "attention_normalize_after": options.pop("normalize_after", True),
        "has_skip_term": rows % 3 != 0 or hidden == inputs,
        "dropout": options.pop("dropout", 0.0),
        "attention_dropout": options.pop("attn_dropout", 0.0),
    }
    assert not options, f"options that this test does not know: {sorted(options)}"
    return fields


def tied_names(case: Case) -> set[str]:
    """Names that stand for a tensor with another name that has the gradient."""
    tied = case.about["tied_state_dict_entries"]
    return {name for pair in tied.items() for name in pair if f"weights.{name}" not in case.grads}


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.json"))
