"""LoRA: an adapter begins as the model without it, is trained, saved, loaded and merged."""

import pytest
import torch

from hf_efficient import auto
from tests.helpers.comparison import assert_close
from tests.helpers.families import ALL_SPARSE, FAMILIES, subjects


peft = pytest.importorskip("peft")

# Settings of LoRA, the learning rate and number of steps, and to which part the loss falls by them.
CASES = {
    "srupp": {
        "": ("ForCausalLM", {}, {"r": 2, "target_modules": ["down_proj", "out_proj", "v_proj"]}, (0.05, 12, 0.8))
    },
    "scaling_transformer": {
        "sparse": ("ForCausalLM", ALL_SPARSE, {"r": 2, "target_modules": "all-linear"}, (0.05, 8, 1.0)),
    },
    "terraformer": {
        "sparse": ("ForConditionalGeneration", ALL_SPARSE, {"r": 2, "target_modules": "all-linear"}, (0.05, 8, 1.0)),
    },
    "tupe": {
        "": (
            "ForSequenceClassification",
            {"num_labels": 3},
            {"r": 4, "target_modules": "all-linear"},
            (0.01, 15, 0.5),
        )
    },
}


def adapt(family, case):
    ending, fields, lora, _ = case
    task = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}.get(ending, "SEQ_CLS")
    base = family.make_model(family.head(ending), dtype=torch.float32, **fields)
    return peft.get_peft_model(base, peft.LoraConfig(task_type=task, **lora))


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("family", "case"), subjects(CASES))
def test_an_adapter_is_trained_saved_loaded_and_merged(family, case, tmp_path):
    ending, fields, _, (learning_rate, steps, share) = case
    make_base = lambda: family.make_model(family.head(ending), dtype=torch.float32, **fields)  # noqa: E731
    ids, model = family.make_ids(4, 7), adapt(family, case)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if ending == "ForConditionalGeneration":
        inputs["decoder_input_ids"] = ids
    by_token = ending != "ForSequenceClassification"
    labels = ids.masked_fill(mask == 0, -100) if by_token else torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        assert_close("logits before training", model.eval()(**inputs).logits, make_base()(**inputs).logits, 1e-6)
    # In evaluation, where a sparse layer draws nothing.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < share * losses[0]
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make_base(), tmp_path).eval()
        assert_close("logits of the adapter that was saved", again(**inputs).logits, expected, 1e-5)
        merged = again.merge_and_unload()
        assert isinstance(merged, family.head(ending))
        assert_close("logits after merging", merged(**inputs).logits, expected, 1e-5)
        if ending == "ForCausalLM":
            assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (4, 10)


@pytest.mark.parametrize(("family", "variant"), subjects({name: family.variants for name, family in FAMILIES.items()}))
def test_a_config_without_targets_adapts_linear_layers(family, variant):
    """Of every kind of model, whatever of it is sparse; one without a linear layer is refused by PEFT, by name."""
    ending = {"tupe": "ForMaskedLM", "terraformer": "ForConditionalGeneration"}.get(family.name, "ForCausalLM")
    base = family.make_model(family.head(ending), dtype=torch.float32, **variant)
    targets, output = family.family.lora_targets, base.get_output_embeddings()
    expected = {
        name
        for name, layer in base.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and (layer is not output if targets == "all-linear" else name.rpartition(".")[2] in targets)
    }
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2))
    found = {name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in trained_names(adapted)}
    assert {name for name in found if ".lora_B" not in name} == expected
    assert expected


def test_targets_are_known_to_peft():
    table = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for name, family in auto.FAMILIES.items():
        assert table[name] == (family.lora_targets if family.lora_targets == "all-linear" else [*family.lora_targets])


@pytest.mark.parametrize(("family", "case"), subjects({"scaling_transformer": CASES["scaling_transformer"]}))
def test_sparse_layers_take_no_adapter(family, case):
    """They are no linear ones; the recurrences beside them are."""
    trained = trained_names(adapt(family, case))
    assert all(".sru." in name for name in trained)
    assert len(trained) == 2 * 2 * 3


@pytest.mark.parametrize(("family", "case"), subjects({"tupe": CASES["tupe"]}))
def test_all_linear_layers_of_tupe_take_one(family, case):
    trained = trained_names(adapt(family, case))
    for layer in ("position_bias.query", "position_bias.key", "layers.1.self_attn.q_proj", "layers.0.mlp.fc2"):
        assert any(layer in name for name in trained), layer
