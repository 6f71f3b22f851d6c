"""Gradient checkpointing: a layer that is run again takes the same kernels as the first time.

Reentrant checkpointing runs each layer first without and then with grad. Kernels round in different ways, so a form of
attention or of the recurrence that is chosen by grad mode would give gradients of another function than that of the
loss.
"""

from collections import Counter

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForMaskedLM

from hf_efficient import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    SruppConfig,
    SruppForCausalLM,
    TerraformerConfig,
    TerraformerForConditionalGeneration,
    TupeConfig,
    TupeForMaskedLM,
)
from hf_efficient.objectives.meta_controller import MetaControllerObjective, MetaControllerObjectiveConfig
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig
from hf_efficient.ops import sru
from tests.objectives.encoders import CONFIGS, make_batch, make_encoder


KERNELS = ("scaled_dot_product", "aten::_softmax", "aten::softmax")


@pytest.fixture
def kernels_of(monkeypatch):
    """`kernels_of(function)`: how often it ran each form of attention and of the recurrence, by name."""
    recurrences: list[str] = []
    run = sru._run

    def recording(name, form, *arguments):
        recurrences.append(form)
        return run(name, form, *arguments)

    monkeypatch.setattr(sru, "_run", recording)

    def count(function) -> Counter:
        recurrences.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function()
        names = [event.name for event in profile.events() if any(kernel in event.name for kernel in KERNELS)]
        return Counter(name for name in [*names, *recurrences] if "backward" not in name)

    return count


def discriminator(objective, config, **options):
    def make(encoder, **changes):
        fields = {"encoder_config": make_encoder(encoder, **changes).config.to_dict(), **options}
        return objective(config(**fields))

    return make


def masked_lm(encoder, **changes):
    config = CONFIGS[encoder]()
    config.update(changes)
    return MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config))


OBJECTIVES = {
    "mlm": masked_lm,
    "replaced_token": discriminator(ReplacedTokenObjective, ReplacedTokenObjectiveConfig),
    "meta_controller": discriminator(
        MetaControllerObjective, MetaControllerObjectiveConfig, nota_token_id=5, num_candidates=4
    ),
}
DROPOUT = {"tupe": "attention_probs_dropout_prob", "srupp": "attention_dropout"}


def assert_recomputed_alike(model, batch, kernels_of, reentrant):
    outputs = []
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    first = kernels_of(lambda: outputs.append(model(**batch)))
    again = kernels_of(lambda: outputs[0].loss.backward())
    assert sum(first.values()) >= 2
    assert again == first


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("encoder", ["tupe", "srupp"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective, encoder, dropout, reentrant, kernels_of):
    model = OBJECTIVES[objective](encoder, **{DROPOUT[encoder]: dropout})
    batch = make_batch()
    if objective == "mlm":  # which samples nothing
        del batch["sample_seeds"]
    assert_recomputed_alike(model, batch, kernels_of, reentrant)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", ["tupe", "srupp", "scaling_transformer", "terraformer", "terraformer-cross"])
def test_models(family, attention, length, reentrant, kernels_of):
    sizes = {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    if family == "tupe":
        dropout = {"attention_probs_dropout_prob": 0.0}
        model = TupeForMaskedLM(
            TupeConfig(**sizes, intermediate_size=40, max_position_embeddings=70, **dropout, **chosen)
        )
    elif family == "srupp":
        model = SruppForCausalLM(SruppConfig(**sizes, projection_size=12, attention_every_n_layers=1, **chosen))
    elif family.startswith("terraformer"):
        del sizes["num_hidden_layers"]
        sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 1, "intermediate_size": 40, "ff_sru_layers": 1}
        cross = {"decoder_type": "cross_attention", "attentions_per_layer": 1} if "cross" in family else {}
        model = TerraformerForConditionalGeneration(TerraformerConfig(**sizes, **cross, **chosen))
    else:
        # Its sparse feed-forward has softmaxes of its own; what that chooses again is tested with the model.
        sparse = {"attention_type": "multiplicative_conv", "attention_sparsity": 6, "ff_sru_layers": 1}
        config = ScalingTransformerConfig(**sizes, **sparse, intermediate_size=40, **chosen)
        model = ScalingTransformerForCausalLM(config)
    ids = torch.randint(5, 30, (2, length))
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    mask[1, 1 + length // 2 :] = 0
    assert_recomputed_alike(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, kernels_of, reentrant)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen-bias"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("encoder", ["tupe", "srupp"])
def test_a_whole_encoder_inside_a_checkpoint_of_the_user(encoder, reentrant, frozen, kernels_of):
    model, batch = make_encoder(encoder).train(), make_batch()
    if frozen and encoder == "tupe":
        model.position_bias.requires_grad_(False)
    embedded = torch.randn(*batch["input_ids"].shape, 24, requires_grad=True)
    outputs = []

    def forward():
        run = lambda x: model(inputs_embeds=x, attention_mask=batch["attention_mask"]).last_hidden_state  # noqa: E731
        outputs.append(checkpoint(run, embedded, use_reentrant=reentrant))

    first = kernels_of(forward)
    again = kernels_of(lambda: outputs[0].sum().backward())
    assert sum(first.values()) >= 2
    assert again == first
