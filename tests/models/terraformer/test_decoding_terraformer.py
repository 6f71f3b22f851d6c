"""Compiled decoding of Terraformer's decoders: two streams behind a source, and one stream with cross attention."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient.models.terraformer.modeling_terraformer import (
    TerraformerForCausalLM,
    TerraformerForConditionalGeneration,
)
from hf_efficient.modules.decoding import OP_NAME, LayerDecoder
from hf_efficient.modules.few_rows import KERNEL
from hf_efficient.modules.quantization import SparseQuantizationConfig, quantized_layers
from hf_efficient.ops.backend import last_backend, select, use_backend
from hf_efficient.ops.kernel_loader import find_variant
from tests.helpers.families import TinyFamily


pytestmark = pytest.mark.skipif(find_variant(KERNEL, "cpu") is None, reason="the kernel for decoding is not built")

FAMILY = TinyFamily(
    "terraformer",
    sizes={
        "vocab_size": 42,
        "hidden_size": 24,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "max_position_embeddings": 96,
        "dropout": 0.0,
        "eos_token_id": None,
    },
    variants={},
    first_id=1,
)
QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
FF = {"ff_sparsity": 5, "ff_rank": 3}
SRU = {"ff_sru_layers": 2, "ff_sru_units": 5}
CROSS = {"decoder_type": "cross_attention", "attentions_per_layer": 1}
QUERY = {"cross_query_type": "multiplicative_conv", "cross_query_sparsity": 6}
OUTPUT = {"cross_output_type": "multiplicative_conv", "cross_output_sparsity": 4, "attention_window": 4}
KINDS = {
    "joined": {},
    "joined-all": {**FF, **QKV, **SRU},
    "one-attention": {"attentions_per_layer": 1, "num_decoder_layers": 3, **QKV},
    "three-attentions": {"attentions_per_layer": 3, **QKV},
    "recurrences": SRU,
    "concatenated-rms": {"stream_output": "concatenate", "layer_norm_center": False, **SRU},
    "multiplicative": {"attention_type": "multiplicative", "attention_sparsity": 8, "attention_bias": True},
    "no-biases": {"attention_bias": False},
    "average-of-streams": {"encoder_keeps_streams": False},
    "cross": CROSS,
    "cross-all": {**CROSS, **FF, **QKV, **SRU},
    "cross-query": {**CROSS, **QKV, **QUERY, "cross_output_type": "none"},
    "cross-query-alone": {**CROSS, **QUERY},
    "cross-both": {**CROSS, **QUERY, **OUTPUT, **SRU},
    "cross-none": {**CROSS, "cross_query_type": "none", "cross_output_type": "none"},
}
SOME = {name: KINDS[name] for name in ("joined", "joined-all", "cross", "cross-both")}

every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
some_kinds = pytest.mark.parametrize("fields", SOME.values(), ids=SOME)


def make_model(dtype=torch.float32, **fields):
    return FAMILY.make_model(TerraformerForConditionalGeneration, dtype=dtype, **fields)


def new_cache(model):
    return EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2)))


def decode(model, source, target, prefill=1, backend="auto", cache=None, mask=None, target_mask=None):
    """Logits of a first call of the target and of single steps, and the cache."""
    cache = new_cache(model) if cache is None else cache
    start = cache.get_seq_length()
    ends = [start + prefill, *range(start + prefill + 1, start + target.shape[1] + 1)]
    logits, begin = [], start
    with use_backend(backend):
        encoded = model.model.encoder(source, mask)
        for end in ends:
            covers = {} if target_mask is None else {"decoder_attention_mask": target_mask[:, :end]}
            ids = target[:, begin - start : end - start]
            outputs = model(None, mask, ids, encoder_outputs=encoded, cache=cache, **covers)
            logits.append(outputs.logits)
            begin = end
    assert last_backend(OP_NAME) == ("cpu" if backend == "auto" else "reference")
    return torch.cat(logits, 1), cache


def assert_same_caches(found, expected, tolerance=2e-5):
    for name in ("self_attention_cache", "cross_attention_cache"):
        for one, other in zip(getattr(found, name).layers, getattr(expected, name).layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(one.values, other.values, atol=tolerance, rtol=tolerance)
            if hasattr(other, "conv_states") and other.has_previous_state[0]:
                torch.testing.assert_close(one.conv_states[0], other.conv_states[0], atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_kind
def test_steps_equal_the_layers_as_they_are_written(fields, dtype):
    model, source, target = make_model(dtype, **fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 9)
    found, cache = decode(model, source, target)
    expected, eager = decode(model, source, target, backend="reference")
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found, model(source, None, target).logits, atol=2e-5, rtol=2e-5)
        assert_same_caches(cache, eager)
    else:  # which unit of a block is chosen may differ at a few tokens
        whole = copy.deepcopy(model).float()(source, None, target).logits
        error, eager_error = ((one.float() - whole).abs().mean(-1).median() for one in (found, expected))
        assert error < 1.3 * eager_error + 0.0015
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    assert {layer.keys.dtype for layer in layers} == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
@every_kind
def test_quantised_layers(fields, weights, tmp_path):
    """In steps as in a whole text, with the target's keys in 16 bits; units that are chosen may differ by rounding."""
    make_model(**fields).save_pretrained(tmp_path / "float")
    config = SparseQuantizationConfig(weights)
    model = TerraformerForConditionalGeneration.from_pretrained(tmp_path / "float", quantization_config=config)
    assert len(list(quantized_layers(model))) > 10
    source, target = FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 9)
    found, cache = decode(model, source, target)
    expected, _ = decode(model, source, target, backend="reference")
    error = (found - expected).norm() / expected.norm()
    assert error < (0.5 if "ff_sparsity" in fields else 0.03)
    assert {layer.keys.dtype for layer in cache.self_attention_cache.layers} == {torch.float16}
    model.save_pretrained(tmp_path / "quantised")
    again = TerraformerForConditionalGeneration.from_pretrained(tmp_path / "quantised")
    assert torch.equal(decode(again, source, target)[0], found)
    texts = [one.generate(source, max_new_tokens=5, do_sample=False) for one in (model, again)]
    assert torch.equal(*texts)


PADDINGS = {"left": [0, 0, 0, 1, 1, 1, 1], "right": [1, 1, 1, 1, 1, 0, 0]}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", PADDINGS.values(), ids=PADDINGS)
@some_kinds
def test_unequal_sources_and_a_padded_first_call(fields, row, attention):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 8)
    model.set_attn_implementation(attention)
    mask = torch.tensor([row, [1] * 7])
    target_mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
    found, _ = decode(model, source, target, 3, mask=mask, target_mask=target_mask)
    expected, _ = decode(model, source, target, 3, "reference", mask=mask, target_mask=target_mask)
    torch.testing.assert_close(found[target_mask.bool()], expected[target_mask.bool()], atol=2e-5, rtol=2e-5)
    for index in range(2):
        kept, real = mask[index].bool(), target_mask[index].bool()
        alone = model(source[index : index + 1, kept], None, target[index : index + 1, real]).logits[0]
        torch.testing.assert_close(found[index, real], alone, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 8])
@some_kinds
def test_batches_and_long_sources(fields, batch):
    model, source, target = make_model(**fields), FAMILY.make_ids(batch, 70), FAMILY.make_ids(batch, 5)
    found, _ = decode(model, source, target, 2)
    torch.testing.assert_close(found, model(source, None, target).logits, atol=5e-5, rtol=5e-5)


@torch.no_grad()
@some_kinds
def test_keys_of_the_source_are_neither_copied_nor_written(fields):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 9)
    _, cache = decode(model, source, target[:, :3], 2)
    layers = cache.cross_attention_cache.layers
    held = [(layer.keys, layer.values, layer.keys.clone(), layer.values.clone()) for layer in layers]
    decode(model, source, target[:, 3:], cache=cache)
    for layer, (keys, values, old_keys, old_values) in zip(layers, held, strict=True):
        assert layer.keys is keys
        assert layer.values is values
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)


def leave(cache):
    """Nothing, so that the next step goes on from where the last one was."""


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def replace_keys_of_the_source(cache):
    for layer in cache.cross_attention_cache.layers:
        layer.keys = torch.ones_like(layer.keys)


def lay_keys_of_the_source_across(cache):
    for layer in cache.cross_attention_cache.layers:
        layer.keys = layer.keys.transpose(2, 3).contiguous().transpose(2, 3)


def replace_states(cache):
    for layer in cache.self_attention_cache.layers:
        if getattr(layer, "conv_states", {}):
            layer.conv_states = {0: torch.ones_like(layer.conv_states[0])}


@torch.no_grad()
@pytest.mark.parametrize(
    "touch", [leave, reorder, replace_keys_of_the_source, lay_keys_of_the_source_across, replace_states]
)
@some_kinds
def test_a_cache_that_changes_between_steps(fields, touch, monkeypatch):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 9)
    asked, prepare = [], LayerDecoder.prepare
    monkeypatch.setattr(LayerDecoder, "prepare", lambda self, *args: (asked.append(1), prepare(self, *args))[1])
    results = []
    for backend in ("auto", "reference"):
        _, cache = decode(model, source, target[:, :5], 2, backend)
        asked.clear()
        touch(cache)
        encoded = model.model.encoder(source)
        with use_backend(backend):
            results.append(
                [
                    model(None, None, target[:, place : place + 1], encoder_outputs=encoded, cache=cache).logits
                    for place in range(5, 9)
                ]
            )
        if backend == "auto":
            has_states = any(hasattr(layer, "conv_states") for layer in cache.self_attention_cache.layers)
            assert bool(asked) == (has_states if touch is replace_states else touch is not leave)
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@some_kinds
def test_crop_goes_back(fields):
    model, source, target = make_model(**fields), FAMILY.make_ids(1, 7), FAMILY.make_ids(1, 9)
    cache = decode(model, source, target[:, :4], 2)[1]
    if any(hasattr(layer, "conv_states") for layer in cache.self_attention_cache.layers):
        cache.self_attention_cache.activate_past_recording()
    decode(model, source, FAMILY.make_ids(1, 3), cache=cache)
    cache.crop(-3)
    found, _ = decode(model, source, target[:, 4:], cache=cache)
    torch.testing.assert_close(found, model(source, None, target).logits[:, 4:], atol=2e-5, rtol=2e-5)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@some_kinds
def test_generate(fields, way):
    model = make_model(**fields)
    source = FAMILY.make_ids(1 if "prompt_lookup_num_tokens" in way else 2, 7)
    mask = torch.ones_like(source)
    mask[0, 5:] = 0
    texts = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        with use_backend(backend):
            settings = {"do_sample": False, "max_new_tokens": 12, **way}
            texts[backend] = model.generate(source, attention_mask=mask, **settings)
    assert torch.equal(texts["auto"], texts["reference"])
    if not way:
        assert last_backend(OP_NAME) == "reference"
        model.generate(source, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert last_backend(OP_NAME) == "cpu"


@some_kinds
def test_assisted_generation(fields):
    model = make_model(**fields)
    draft = make_model(**{**fields, "num_decoder_layers": 1})
    source = FAMILY.make_ids(1, 7)
    greedy = model.generate(source, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(source, max_new_tokens=12, do_sample=False, assistant_model=draft), greedy)


def calls_of_layers(model, monkeypatch):
    """Numbers of attentions in each call of compiled code from now on."""
    kernel, calls = select(OP_NAME, torch.device("cpu")), []
    run = kernel.layers
    monkeypatch.setattr(
        kernel, "layers", lambda hidden, keys, *rest: (calls.append(len(keys)), run(hidden, keys, *rest))
    )
    return calls


def double(module, args, output):
    return tuple(2 * one for one in output) if isinstance(output, tuple) else 2 * output


# What is done to a model of two layers, and numbers of layers in each call of compiled code that it then makes.
CHANGES = {
    "plain": (lambda model: None, [2]),
    "hook-of-a-layer": (lambda model: model.model.decoder.layers[1].register_forward_hook(double), [1, 1]),
    "hook-of-a-norm": (lambda model: model.model.decoder.layers[1].parts()[0][0].register_forward_hook(double), [1]),
    "training-module": (lambda model: model.model.decoder.layers[0].parts()[-1][0].train(), [1]),
}


@torch.no_grad()
@pytest.mark.parametrize(("change", "depths"), CHANGES.values(), ids=CHANGES)
@some_kinds
def test_all_layers_run_in_one_call_unless_one_is_looked_at(fields, change, depths, monkeypatch):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 5)
    decode(model, source, target)  # the model's lists of weights are there when it changes
    change(model)
    calls, cache = calls_of_layers(model, monkeypatch), new_cache(model)
    model(source, None, target[:, :4], cache=cache)
    found = model(source, None, target[:, 4:], cache=cache).logits
    each = model.config.attentions_per_layer
    assert calls == [each * depth for depth in depths]
    with use_backend("reference"):
        torch.testing.assert_close(found, model(source, None, target).logits[:, 4:], atol=5e-5, rtol=5e-5)


@torch.no_grad()
@some_kinds
def test_hidden_states_are_those_of_each_layer(fields):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 6)
    _, cache = decode(model, source, target[:, :5], 2)
    step = model(source, None, target[:, 5:], cache=cache, output_hidden_states=True)
    assert last_backend(OP_NAME) == "cpu"
    whole = model(source, None, target, output_hidden_states=True)
    for found, expected in zip(step.decoder_hidden_states, whole.decoder_hidden_states, strict=True):
        torch.testing.assert_close(found, expected[:, -1:], atol=2e-5, rtol=2e-5)


BETWEEN = {
    "forgetting": {"forget_every": 1, "num_decoder_layers": 3},
    "half-width": {"half_width_layers": 1, "num_decoder_layers": 3, **SRU},
    "double-width": {"double_width_after": 0, **QKV},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", BETWEEN.values(), ids=BETWEEN)
def test_layers_with_something_between_run_one_by_one(fields, monkeypatch):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 6)
    calls = calls_of_layers(model, monkeypatch)
    found, _ = decode(model, source, target, 5)
    assert calls == [2] * model.config.num_decoder_layers
    torch.testing.assert_close(found, model(source, None, target).logits, atol=2e-5, rtol=2e-5)


def change_all(module, name, value):
    """Set an attribute of a module of each layer."""

    def change(model):
        for layer in model.model.decoder.layers:
            setattr(layer.get_submodule(module), name, value)

    return change


MANY_BUCKETS = {"decoder_long_attention": "lsh", "lsh_chunk_length": 4, "lsh_buckets": [256, 130]}
REASONS = {
    "many-buckets": (MANY_BUCKETS, lambda model: None),  # more than 16 bits hold
    "head-size": ({"head_dim": 5}, lambda model: None),
    "by-module": ({**QKV, "attention_value_input": "by_module"}, lambda model: None),
    "convolved-output": ({**QKV, "attention_output": "conv"}, lambda model: None),
    "float64": ({}, lambda model: model.double()),
    "scaling": (CROSS, change_all("cross_attention", "scaling", 3.0)),
    "query": (CROSS, change_all("cross_attention", "q_proj", nn.Identity())),
    "branch": (SRU, change_all("feed_forward.sru", "norm", nn.Identity())),
}


@torch.no_grad()
@pytest.mark.parametrize(("fields", "change"), REASONS.values(), ids=REASONS)
def test_what_layers_stand_aside_for(fields, change):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 6)
    change(model)
    cache = new_cache(model)
    model(source, None, target[:, :5], cache=cache)
    model(source, None, target[:, 5:], cache=cache)
    assert last_backend(OP_NAME) == "reference"


@some_kinds
def test_gradients_static_caches_and_other_lengths_run_as_written(fields):
    model, source, target = make_model(**fields), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 6)
    cache = new_cache(model)
    with torch.no_grad():
        model(source, None, target[:, :4], cache=cache)
    model(source, None, target[:, 4:5], cache=copy.deepcopy(cache)).logits.sum().backward()
    assert last_backend(OP_NAME) == "reference"
    with torch.no_grad():
        model(source, None, target[:, 4:6], cache=copy.deepcopy(cache))
        assert last_backend(OP_NAME) == "reference"
        model(source, None, target[:, 4:5], cache=cache)
        assert last_backend(OP_NAME) == "cpu"
        static = EncoderDecoderCache(
            StaticCache(config=model.config, max_cache_len=9), StaticCache(config=model.config, max_cache_len=7)
        )
        model(source, None, target[:, :4], cache=static)
        found = model(source, None, target[:, 4:5], cache=static).logits
        assert last_backend(OP_NAME) == "reference"
        torch.testing.assert_close(found, model(source, None, target[:, :5]).logits[:, 4:], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_copies_of_a_model_and_of_its_cache():
    model, source, target = make_model(**KINDS["joined-all"]), FAMILY.make_ids(2, 7), FAMILY.make_ids(2, 9)
    expected, _ = decode(model, source, target)
    _, cache = decode(model, source, target[:, :5])
    twin, branch = copy.deepcopy(model), copy.deepcopy(cache)
    for parameter in model.parameters():
        parameter.zero_()
    found, _ = decode(twin, source, target[:, 5:], cache=branch)
    torch.testing.assert_close(found, expected[:, 5:], atol=2e-5, rtol=2e-5)


CAUSAL = {
    "plain": {},
    "all": {**FF, **QKV, **SRU, "stream_output": "concatenate"},
    "reformer": {"attentions_per_layer": 1, "stream_output": "concatenate", "attention_bias": False},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", CAUSAL.values(), ids=CAUSAL)
def test_the_decoder_as_a_language_model(fields):
    fields = {"is_encoder_decoder": False, "num_encoder_layers": 0, **fields}
    model = FAMILY.make_model(TerraformerForCausalLM, dtype=torch.float32, **fields)
    ids, cache = FAMILY.make_ids(2, 9), DynamicCache(config=model.config)
    mask = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    logits = [model(ids[:, :4], attention_mask=mask[:, :4], cache=cache).logits]
    logits += [model(ids[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache).logits for end in range(5, 10)]
    assert last_backend(OP_NAME) == "cpu"
    found = torch.cat(logits, 1)
    torch.testing.assert_close(found[0, 2:], model(ids[:1, 2:]).logits[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found[1], model(ids[1:]).logits[0], atol=2e-5, rtol=2e-5)
