"""The estimate of a step's memory beside what the step allocates, and what is said where that is not free."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config, T5ForConditionalGeneration

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.trainer.memory_estimate import GIB, cache_bytes, estimate_step, free_memory, shortage
from tests.helpers.families import CROSS, TERRAFORMER, TERRAFORMER_LM


SIZES = {
    **{"vocab_size": 600, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4},
    **{"num_encoder_layers": 2, "num_decoder_layers": 2, "max_position_embeddings": 1024, "attentions_per_layer": 1},
}
ORDINARY = {"reversible": False}
SPARSE = {"ff_sparsity": 8, "ff_rank": 8, "attention_type": "multiplicative_conv", "attention_sparsity": 8}
LSH = {"encoder_long_attention": "lsh", "decoder_long_attention": "lsh"}
KINDS = {
    "ordinary": (ORDINARY, {}),
    "ordinary, no dropout": ({**ORDINARY, "dropout": 0.0}, {}),
    "ordinary, two attentions": ({**ORDINARY, "attentions_per_layer": 2}, {}),
    "ordinary, bf16": (ORDINARY, {"half_precision": True}),
    "reversible": ({}, {}),
    "reversible, sparse": (SPARSE, {}),
    "reversible, hashing": (LSH, {}),
    "sparse": ({**ORDINARY, **SPARSE}, {}),
    "checkpointed": ({}, {"gradient_checkpointing": True}),
    "cross attention": (CROSS, {}),
    "many ids": ({"vocab_size": 9000}, {}),
}
BATCH, SOURCE, TARGET = 2, 190, 63


def peak_of(run) -> int:
    """Bytes by which tensors exceed what there was before, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_takes_about_what_is_estimated(kind):
    fields, options = KINDS[kind]
    torch.manual_seed(0)
    model = TerraformerForConditionalGeneration(TerraformerConfig(**{**SIZES, **fields})).train()
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    source, labels = torch.randint(2, 600, (BATCH, SOURCE)), torch.randint(2, 600, (BATCH, TARGET))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("half_precision", False)):
            loss = model(source, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimiser's numbers
    estimate = estimate_step(model, BATCH, SOURCE, TARGET, **options)
    measured = peak_of(step) + estimate.weights + estimate.optimizer
    assert 0.5 < estimate.total / measured < 2, (estimate, measured)


def test_lengths_layers_and_optimisers_count_as_the_formula_says():
    model = TerraformerForConditionalGeneration(TerraformerConfig(**SIZES, reversible=False, dropout=0.0))
    once, twice = estimate_step(model, 2, 100, 50), estimate_step(model, 4, 100, 50)
    assert (twice.kept, twice.layer, twice.logits) == (2 * once.kept, 2 * once.layer, 2 * once.logits)
    assert once.weights == once.gradients == 4 * model.num_parameters() == once.optimizer / 2
    assert estimate_step(model, 2, 100, 50, optimizer="adafactor").optimizer == 0
    assert estimate_step(model, 2, 100, 50, half_precision=True).kept == once.kept / 2
    deeper = TerraformerForConditionalGeneration(TerraformerConfig(**{**SIZES, "num_decoder_layers": 5}))
    shallow = TerraformerForConditionalGeneration(TerraformerConfig(**SIZES))
    assert estimate_step(deeper, 2, 100, 50).kept == estimate_step(shallow, 2, 100, 50).kept


def test_encoder_decoders_of_transformers_are_estimated_too():
    model = T5ForConditionalGeneration(T5Config(d_model=24, d_ff=30, num_layers=2, num_heads=3, d_kv=8, vocab_size=40))
    estimate = estimate_step(model, 2, 9, 5)
    assert estimate.weights == 4 * model.num_parameters()
    assert estimate.total > 4 * estimate.weights


def test_a_language_model_is_refused():
    with pytest.raises(ValueError, match="TerraformerForCausalLM is no encoder-decoder"):
        estimate_step(TERRAFORMER_LM.make_model(TERRAFORMER_LM.causal_lm, attentions_per_layer=1), 1, 5, 5)


@pytest.mark.parametrize("kind", ["dense", "cross"])
def test_the_cache_of_generation_holds_what_is_estimated(kind):
    model = TERRAFORMER.make_model(TERRAFORMER.head("ForConditionalGeneration"), **TERRAFORMER.variants[kind])
    source, target = TERRAFORMER.make_ids(3, 17), TERRAFORMER.make_ids(3, 6)
    with torch.no_grad():
        cache = model(source, decoder_input_ids=target, use_cache=True).cache
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    held = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(model, 3, 17, 6) == held


def test_a_shortage_says_what_to_do():
    estimate = estimate_step(TerraformerForConditionalGeneration(TerraformerConfig(**SIZES)), 2, 100, 50)
    assert shortage(estimate, estimate.total) is None
    assert shortage(estimate, None) is None
    assert shortage(estimate, estimate.total - 1, held=estimate.weights) is None
    said = shortage(estimate, estimate.total - 1)
    assert "Lower --per_device_train_batch_size" in said
    assert f"about {estimate.total / GIB:.2g} GiB" in said
    assert "\n" not in said


def test_free_memory_is_that_of_the_machine():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
    assert free_memory(torch.device("meta")) is None
