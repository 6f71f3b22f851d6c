"""Replays the cases recorded from the original TUPE code: outputs, and every gradient by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient.models.tupe.configuration_tupe import TupeConfig
from hf_efficient.models.tupe.convert_tupe import convert_state_dict, restore_state_dict
from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForPreTraining,
    TupeForSequenceClassification,
    TupeLayer,
    TupeModel,
)
from hf_efficient.ops.position_bias import relative_position_bucket
from tests.helpers.comparison import assert_allclose


CASES = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent)) / "tupe" / "cases"
ATTENTION = ["eager", "sdpa", None]  # None: chosen per device and mode

pytestmark = pytest.mark.golden

# Fields of a case that say how it was recorded; all others must be fields of TupeConfig.
DESCRIPTION = {"kind", "activation", "dropout"}


class Case:
    def __init__(self, name: str):
        description = json.loads((CASES / f"{name}.json").read_text())
        self.name, self.fields = name, description["config"]
        tensors = load_file(CASES / f"{name}.safetensors")
        self.weights, self.inputs, self.outputs, self.grads = (
            {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
            for part in ("weights.", "input.", "output.", "grad.")
        )
        self.kind = self.fields.get("kind") or self._kind()

    def _kind(self) -> str:
        if set(self.outputs) == {"y"}:
            return "layer"
        if set(self.outputs) == {"rp_bucket"}:
            return "buckets"
        if "last_hidden" in self.outputs:
            return "encoder"
        raise ValueError(f"{self.name}: no kind of case that this test knows; outputs {sorted(self.outputs)}")

    def config(self, **overrides) -> TupeConfig:
        assert self.fields.get("activation", "gelu (erf)") == "gelu (erf)"
        fields = {key: value for key, value in self.fields.items() if key not in DESCRIPTION and value is not None}
        names = {"rel_pos_bins": "relative_attention_num_buckets", "normalize_before": "normalize_before"}
        fields = {TupeConfig.attribute_map.get(key, names.get(key, key)): value for key, value in fields.items()}
        assert set(fields) <= set(TupeConfig.__dataclass_fields__) | {"num_labels"}, f"unknown option in {self.name}"
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        return TupeConfig(**{**no_dropout, "cls_token_id": None, **fields, **overrides})


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.json"))


def compare_gradients(case: Case, model: torch.nn.Module, config: TupeConfig, prefix: str = ""):
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {
        name.removeprefix(prefix): grad
        for name, grad in convert_state_dict(
            {prefix + name: grad for name, grad in case.grads.items() if not name.startswith("input.")}, config
        ).items()
    }
    assert set(ours) == set(expected), f"gradients: {sorted(set(ours) ^ set(expected))}"
    for name, grad in expected.items():
        assert_allclose(f"gradient of {name}", ours[name], grad, atol=2e-4, rtol=1e-4)


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]):
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys), missing
    return model.eval()


def check_buckets(case: Case, attention):
    length = case.fields["max_positions"]
    places = torch.arange(length)
    ours = relative_position_bucket(
        places[None, :] - places[:, None], case.fields["rel_pos_bins"], case.fields["max_rel_pos"]
    )
    ours[:, 0], ours[0, :] = case.fields["rel_pos_bins"], case.fields["rel_pos_bins"] // 2
    assert torch.equal(ours.to(torch.int32), case.outputs["rp_bucket"])


def check_layer(case: Case, attention):
    config = case.config()
    config._attn_implementation = attention or "tupe_auto"
    layer = TupeLayer(config, layer_idx=0).eval()
    weights = convert_state_dict({f"layers.0.{name}": tensor for name, tensor in case.weights.items()}, config)
    layer.load_state_dict({name.removeprefix("layers.0."): tensor for name, tensor in weights.items()})
    hidden = case.inputs["x"].transpose(0, 1).requires_grad_()
    bias = case.inputs["attn_bias"].requires_grad_()
    real = ~case.inputs["padding_mask"].bool()
    output = layer(hidden, bias[None], real[:, None, None, :])
    cotangent = case.inputs["cotangent"].transpose(0, 1)
    assert_allclose("y", output[real], case.outputs["y"].transpose(0, 1)[real], atol=2e-5)
    (output * cotangent * real[..., None]).sum().backward()
    compare_gradients(case, layer, config, prefix="layers.0.")
    assert_allclose("gradient of x", hidden.grad, case.grads["input.x"].transpose(0, 1), atol=2e-4, rtol=1e-4)
    assert_allclose("gradient of attn_bias", bias.grad, case.grads["input.attn_bias"], atol=2e-4, rtol=1e-4)


def check_encoder(case: Case, attention):
    config = case.config()
    model = load(
        TupeModel._from_config(config, attn_implementation=attention), convert_state_dict(case.weights, config)
    )
    ids = case.inputs["input_ids"].long()
    real = ids != config.pad_token_id
    outputs = model(ids, attention_mask=real.long(), output_hidden_states=True)
    assert_allclose("last_hidden", outputs.last_hidden_state[real], case.outputs["last_hidden"][real], atol=2e-5)
    assert_allclose("sentence", outputs.last_hidden_state[:, 0], case.outputs["sentence"], atol=2e-5)
    recorded = case.outputs["hidden_states"]
    assert len(outputs.hidden_states) == len(recorded)
    # The original records a pre-norm encoder's last state before the final norm; transformers records it after.
    for index in range(len(recorded) - (1 if config.normalize_before else 0)):
        assert_allclose(f"hidden_states[{index}]", outputs.hidden_states[index][real], recorded[index][real], atol=2e-5)
    assert_allclose("attn_bias", model.position_bias(ids.shape[1]), case.outputs["attn_bias"], atol=2e-5)
    (outputs.last_hidden_state * case.inputs["cotangent"] * real[..., None]).sum().backward()
    compare_gradients(case, model, config)
    with torch.no_grad():  # the fused path, with the bias and the mask merged, twice because the bias is then cached
        for _ in range(2):
            assert_allclose(
                "no_grad", model(ids, real.long()).last_hidden_state[real], case.outputs["last_hidden"][real], 2e-5
            )


def check_mlm(case: Case, attention):
    config = case.config()
    ids, labels = case.inputs["input_ids"].long(), case.inputs["labels"].long()
    labels = torch.where(labels == config.pad_token_id, -100, labels)
    real = (ids != config.pad_token_id).long()
    sparse = case.outputs["logits"].dim() == 2
    model_class = TupeForPreTraining if sparse else TupeForMaskedLM
    model = load(
        model_class._from_config(config, attn_implementation=attention), convert_state_dict(case.weights, config)
    )
    outputs = model(ids, attention_mask=real, labels=labels, num_items_in_batch=1)
    keep = slice(None) if sparse else real.bool()
    assert_allclose("logits", outputs.logits[keep], case.outputs["logits"][keep], atol=5e-5)
    assert_allclose("loss", outputs.loss.reshape(1), case.outputs["loss"], atol=2e-4, rtol=1e-5)
    assert_allclose(
        "features", model.model(ids, real).last_hidden_state[real.bool()], case.outputs["features"][real.bool()], 2e-5
    )
    outputs.loss.backward()
    compare_gradients(case, model, config)


def check_classification(case: Case, attention):
    problem = {"cls": "single_label_classification", "reg": "regression"}[case.kind]
    config = case.config(problem_type=problem)
    weights = convert_state_dict(case.weights, config)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head.")}
    model = load(TupeForSequenceClassification._from_config(config, attn_implementation=attention), weights)
    ids, labels = case.inputs["input_ids"].long(), case.inputs["labels"]
    real = ids != config.pad_token_id
    labels = labels.long() if case.kind == "cls" else labels
    outputs = model(ids, attention_mask=real.long(), labels=labels, num_items_in_batch=1)
    assert_allclose("logits", outputs.logits, case.outputs["logits"], atol=5e-5)
    assert_allclose("loss", outputs.loss.reshape(1), case.outputs["loss"], atol=2e-4, rtol=1e-5)
    assert_allclose(
        "features", model.model(ids, real.long()).last_hidden_state[real], case.outputs["features"][real], 2e-5
    )
    outputs.loss.backward()
    compare_gradients(case, model, config)


CHECKS = {
    "buckets": check_buckets,
    "layer": check_layer,
    "encoder": check_encoder,
    "mlm": check_mlm,
    "cls": check_classification,
    "reg": check_classification,
}


@pytest.mark.parametrize("attention", ATTENTION, ids=lambda name: name or "auto")
@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"tupe-{name}")
def test_case(name: str, attention):
    case = Case(name)
    CHECKS[case.kind](case, attention)


@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"tupe-{name}")
def test_restore_inverts_convert(name: str):
    case = Case(name)
    if case.kind in ("buckets", "layer"):
        case.weights = {f"layers.0.{key}": tensor for key, tensor in case.weights.items()}
    config = TupeConfig(hidden_size=case.fields.get("hidden_size", 8), num_attention_heads=1)
    restored = restore_state_dict(convert_state_dict(case.weights, config), config)
    assert set(restored) == set(case.weights)
    for key, tensor in case.weights.items():
        assert torch.equal(restored[key], tensor), key
        assert restored[key].dtype == tensor.dtype


def test_there_are_cases():
    assert case_names(), f"no golden cases in {CASES}"
