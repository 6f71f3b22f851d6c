"""The cases recorded from the original MC-BERT code, and the encoders that its options amount to."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, RobertaConfig, RobertaForSequenceClassification, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaLayer


CASES = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent)) / "mcbert" / "cases"

KINDS = ("mcbert_pretrain", "electra_pretrain", "mcbert_finetune_classification")
# Options of a case -> fields of the encoder's config.
ENCODER_OPTIONS = {
    "vocab_size": "vocab_size",
    "bos_id": "bos_token_id",
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
    "num_hidden_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "pre_layer_norm": "pre_layer_norm",
    "embedding_layer_norm": "embedding_layer_norm",
    "layer_norm_eps": "layer_norm_eps",
    "num_classes": "num_labels",
}
# Options that the tests read themselves, and those that have one value, which is that of RobertaModel.
OTHER_OPTIONS = {
    *("unk_id", "mask_id", "neither_id", "max_positions", "position_id_offset", "loss_lambda", "num_candidates"),
    *("controller_size_divider", "generator_size_divider"),
}
FIXED_OPTIONS = {"activation": "gelu (erf)", "dropout": 0.0, "pooler_activation": "tanh"}


@strict
class OriginalConfig(RobertaConfig):
    """Of the original's encoder with those options that transformers' RobertaModel lacks."""

    model_type = "mcbert_original"

    pre_layer_norm: bool = False
    embedding_layer_norm: bool = True


class PreNormLayer(RobertaLayer):
    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        normed = self.attention.output.LayerNorm(hidden_states)
        attended, _ = self.attention.self(normed, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.attention.output.dense(attended)
        normed = self.output.LayerNorm(hidden_states)
        return hidden_states + self.output.dense(self.intermediate(normed))


class OriginalModel(RobertaModel):
    """The original takes every `<pad>` in its input for padding, also one that a controller put there."""

    config_class = OriginalConfig

    def __init__(self, config, add_pooling_layer=False):
        super().__init__(config, add_pooling_layer)
        if config.pre_layer_norm:
            layers = (PreNormLayer(config, layer_idx=index) for index in range(config.num_hidden_layers))
            self.encoder.layer = nn.ModuleList(layers)
        if not config.embedding_layer_norm:
            self.embeddings.LayerNorm = nn.Identity()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class OriginalForSequenceClassification(RobertaForSequenceClassification):
    config_class = OriginalConfig

    def __init__(self, config):
        super().__init__(config)
        self.roberta = OriginalModel(config)


AutoConfig.register(OriginalConfig.model_type, OriginalConfig)
AutoModel.register(OriginalConfig, OriginalModel)


class Case:
    def __init__(self, name: str):
        about = json.loads((CASES / f"{name}.json").read_text())
        tensors = load_file(CASES / f"{name}.safetensors")
        self.name, self.kind, self.options, self.scalars = name, about["kind"], about["config"], about["scalars"]
        self.aliases, self.unused = about.get("aliases", {}), set(about.get("unused_parameters", []))
        self.weights, self.inputs, self.outputs, self.grads = (
            {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
            for part in ("weights/", "inputs/", "outputs/", "grads/")
        )
        self.unseen = set(self.outputs)
        assert self.kind in KINDS, f"no kind of case that this test knows: {self.kind}"
        unknown = set(self.options) - set(ENCODER_OPTIONS) - OTHER_OPTIONS - set(FIXED_OPTIONS)
        assert not unknown, f"options that this test does not know: {sorted(unknown)}"
        wrong = {name for name, value in FIXED_OPTIONS.items() if self.options.get(name, value) != value}
        assert not wrong, f"values that this test does not know: {sorted(wrong)}"

    def encoder_config(self) -> RobertaConfig:
        """A plain RobertaConfig where transformers has the network, else one of ours."""
        fields: dict[str, Any] = {
            ours: self.options[option] for option, ours in ENCODER_OPTIONS.items() if option in self.options
        }
        plain = (fields.pop("pre_layer_norm", False), fields.pop("embedding_layer_norm", True)) == (False, True)
        padded = (
            bool((self.outputs["replaced_ids"] == self.options["pad_id"])[self.real].any()) if self.pretrains else False
        )
        fields |= {
            "max_position_embeddings": self.options["max_positions"] + self.options["pad_id"] + 1,
            "type_vocab_size": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if plain and not padded:
            return RobertaConfig(**fields)
        return OriginalConfig(
            **fields,
            pre_layer_norm=self.options.get("pre_layer_norm", False),
            embedding_layer_norm=self.options.get("embedding_layer_norm", True),
        )

    @property
    def pretrains(self) -> bool:
        return "target_ids" in self.inputs

    @property
    def real(self) -> torch.Tensor:
        ids = self.inputs["target_ids" if self.pretrains else "input_ids"]
        return ids != self.options["pad_id"]

    @property
    def masked(self) -> torch.Tensor:
        return self.inputs["masked_ids"] == self.options["mask_id"]

    def batch(self) -> dict[str, torch.Tensor]:
        """The inputs as MaskingCollator makes them, and the draws."""
        targets = torch.where(self.masked, self.inputs["target_ids"], -100)
        return {
            "input_ids": self.inputs["masked_ids"],
            "attention_mask": self.real.long(),
            "labels": targets,
            "sampled_ids": self.inputs["sampled_ids"],
        }


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.json"))
