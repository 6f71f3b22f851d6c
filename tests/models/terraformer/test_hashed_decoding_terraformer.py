"""Compiled decoding of Terraformer's attention by hashing, against the layers as they are written in float64."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from hf_efficient.models.terraformer.modeling_terraformer import (
    TerraformerForCausalLM,
    TerraformerForConditionalGeneration,
)
from hf_efficient.modules.decoding import OP_NAME
from hf_efficient.modules.few_rows import KERNEL
from hf_efficient.modules.lsh_layers import LshAttention
from hf_efficient.modules.quantization import SparseQuantizationConfig
from hf_efficient.ops.backend import last_backend, select, use_backend
from hf_efficient.ops.kernel_loader import find_variant
from tests.helpers.families import TERRAFORMER


pytestmark = pytest.mark.skipif(find_variant(KERNEL, "cpu") is None, reason="the kernel for decoding is not built")

SIZES = {"hidden_size": 36, "num_encoder_layers": 1, "max_position_embeddings": 150, "eos_token_id": None}
CONV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
LSH = {"decoder_long_attention": "lsh", "lsh_chunk_length": 4, "lsh_buckets": [4, 6]}  # 16 of the keys
MIXED = {**LSH, "decoder_long_attention": "mixed"}
KINDS = {
    "dense": LSH,
    "shared": {**LSH, "attention_share_qk": True},
    "conv": {**LSH, **CONV, "ff_sparsity": 5, "ff_rank": 3, "ff_sru_layers": 2, "ff_sru_units": 5},
    "conv-shared": {**LSH, **CONV, "attention_share_qk": True},
    "more-rounds": {**LSH, "lsh_eval_rounds": 3, "lsh_chunks_before": 0, "lsh_buckets": [10]},
    "one-round": {**LSH, "lsh_rounds": 1, "attentions_per_layer": 1},
    "mixed-long": {**MIXED, "lsh_full_length": 9},
    "mixed-short": {**MIXED, "lsh_full_length": 140},
}
SOME = {name: KINDS[name] for name in ("dense", "conv", "mixed-long")}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
some_kinds = pytest.mark.parametrize("fields", SOME.values(), ids=SOME)
SOURCE = 75


def make_model(dtype=torch.float32, cls=TerraformerForConditionalGeneration, **fields):
    return TERRAFORMER.make_model(cls, dtype=dtype, **{**SIZES, **fields})


def new_cache(model):
    return EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2)))


def steps(model, target, encoded, cache, mask=None):
    found = [
        model(None, mask, target[:, place : place + 1], encoder_outputs=encoded, cache=cache).logits
        for place in range(target.shape[1])
    ]
    return torch.cat(found, 1)


def decode(model, source, target, backend="auto", mask=None, cache=None):
    """Logits of steps, and their cache."""
    cache = new_cache(model) if cache is None else cache
    with use_backend(backend):
        found = steps(model, target, model.model.encoder(source, mask), cache, mask)
    assert last_backend(OP_NAME) == ("cpu" if backend == "auto" else "reference")
    return found, cache


def expected_of(model, *arguments, **options):
    """Of the same weights in float64, whose layers run as they are written."""
    return decode(copy.deepcopy(model).double(), *arguments, backend="reference", **options)


def assert_near(found, expected, tolerance=5e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@every_kind
def test_steps_equal_those_of_the_layers_in_float64(fields, batch):
    model, source, target = make_model(**fields), TERRAFORMER.make_ids(batch, SOURCE), TERRAFORMER.make_ids(batch, 37)
    found, cache = decode(model, source, target)
    expected, eager = expected_of(model, source, target)
    assert_near(found, expected)
    for one, other in zip(cache.self_attention_cache.layers, eager.self_attention_cache.layers, strict=True):
        assert_near(one.keys, other.keys)  # with the buckets behind them
        assert_near(one.values, other.values)


@torch.no_grad()
def test_all_keys_would_give_something_else():
    model, source, target = make_model(**LSH), TERRAFORMER.make_ids(1, SOURCE), TERRAFORMER.make_ids(1, 5)
    found, _ = decode(model, source, target)
    for module in model.modules():
        if isinstance(module, LshAttention):
            module.chunk_length = 200
    seen, _ = decode(model, source, target)  # settings that change are told to compiled code
    assert not torch.allclose(found, seen, atol=1e-2)
    assert_near(seen, expected_of(model, source, target)[0])


PADDINGS = {"left": [0] * 40 + [1] * (SOURCE - 40), "right": [1] * 6 + [0] * (SOURCE - 6)}


@torch.no_grad()
@pytest.mark.parametrize("row", PADDINGS.values(), ids=PADDINGS)
@every_kind
def test_unequal_sources(fields, row):
    """Of which a short one attends to all keys where attention is mixed."""
    model, source, target = make_model(**fields), TERRAFORMER.make_ids(2, SOURCE), TERRAFORMER.make_ids(2, 19)
    mask = torch.tensor([row, [1] * SOURCE])
    found, _ = decode(model, source, target, mask=mask)
    expected, _ = expected_of(model, source, target, mask=mask)
    assert_near(found, expected)
    for index in range(2):
        own = source[index : index + 1, mask[index].bool()], target[index : index + 1]
        # In float32 a token may hash otherwise than in float64, by compiled code and as written alike.
        assert_near(decode(model, *own)[0], decode(model, *own, backend="reference")[0])
        assert_near(expected_of(model, *own)[0], expected[index : index + 1], 1e-10)


def leave(cache):
    """Nothing."""


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def crop(cache):
    cache.crop(-3)


def write_into_keys_of_the_source(cache):
    for layer in cache.cross_attention_cache.layers:
        layer.keys[:, :, :30] = layer.keys[:, :, -30:].clone()


def write_into_keys_of_the_target(cache):
    for layer in cache.self_attention_cache.layers:
        layer.keys[:, :, 1:4] = layer.keys[:, :, 7:10].clone()


TOUCHES = (leave, reorder, crop, write_into_keys_of_the_source, write_into_keys_of_the_target)


@torch.no_grad()
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("fields", [KINDS["dense"], KINDS["mixed-long"]], ids=["dense", "mixed-long"])
def test_a_cache_that_changes_between_steps(fields, touch):
    model, source, target = make_model(**fields), TERRAFORMER.make_ids(2, SOURCE), TERRAFORMER.make_ids(2, 30)
    results = []
    for run in (decode, expected_of):
        _, cache = run(model, source, target[:, :20])
        touch(cache)
        results.append(run(model, source, target[:, 20:], cache=cache)[0])
    assert_near(*results)


@torch.no_grad()
def test_room_grows_and_steps_as_written_may_come_between():
    model, source, target = make_model(**LSH), TERRAFORMER.make_ids(1, SOURCE), TERRAFORMER.make_ids(1, 140)
    found, cache = decode(model, source, target[:, :90])  # beyond the first 64 places
    middle, _ = decode(model, source, target[:, 90:95], "reference", cache=cache)
    rest, _ = decode(model, source, target[:, 95:], cache=cache)
    assert_near(torch.cat([found, middle, rest], 1), expected_of(model, source, target)[0])


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@some_kinds
def test_generate(fields, way):
    model = make_model(**fields)
    source = TERRAFORMER.make_ids(1 if "prompt_lookup_num_tokens" in way else 2, SOURCE)
    mask = torch.ones_like(source)
    mask[0, 50:] = 0
    texts = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        with use_backend(backend):
            settings = {"do_sample": False, "max_new_tokens": 12, **way}
            texts.append(model.generate(source, attention_mask=mask, **settings))
    assert torch.equal(*texts)


@pytest.mark.parametrize("fields", [KINDS["dense"], KINDS["conv"]], ids=["dense", "conv"])
def test_assisted_generation(fields):
    model, source = make_model(**fields), TERRAFORMER.make_ids(1, SOURCE)
    draft = make_model(**{**fields, "num_decoder_layers": 1})
    greedy = model.generate(source, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(source, max_new_tokens=12, do_sample=False, assistant_model=draft), greedy)


@torch.no_grad()
def test_all_layers_run_in_one_call(monkeypatch):
    model, source, target = make_model(**LSH), TERRAFORMER.make_ids(1, SOURCE), TERRAFORMER.make_ids(1, 4)
    kernel, calls = select(OP_NAME, torch.device("cpu")), []
    run = kernel.layers
    monkeypatch.setattr(
        kernel, "layers", lambda hidden, keys, *rest: (calls.append(len(keys)), run(hidden, keys, *rest))
    )
    decode(model, source, target)
    assert calls == [4] * 3  # the first token finds no cache


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bits(dtype):
    model, source, target = make_model(dtype, **LSH), TERRAFORMER.make_ids(2, SOURCE), TERRAFORMER.make_ids(2, 20)
    whole, _ = expected_of(model, source, target)
    errors = [
        (decode(model, source, target, backend)[0].double() - whole).abs().mean(-1).median()
        for backend in ("auto", "reference")
    ]
    assert errors[0] < 1.3 * errors[1] + 0.0015


@torch.no_grad()
def test_quantised_layers_hold_keys_with_their_buckets_in_16_bits(tmp_path):
    make_model(**LSH).save_pretrained(tmp_path)
    config = SparseQuantizationConfig("int8")
    model = TerraformerForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config).eval()
    source, target = TERRAFORMER.make_ids(2, SOURCE), TERRAFORMER.make_ids(2, 12)
    found, cache = decode(model, source, target)
    expected, eager = decode(model, source, target, "reference")
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.03
    for one, other in zip(cache.self_attention_cache.layers, eager.self_attention_cache.layers, strict=True):
        assert one.keys.dtype == torch.float16
        assert (one.keys[..., 9:] == other.keys[..., 9:]).float().mean() > 0.9  # digits and flags, unless on an edge


@torch.no_grad()
@pytest.mark.parametrize("fields", [KINDS["dense"], KINDS["conv-shared"]], ids=["dense", "conv-shared"])
def test_the_decoder_as_a_language_model(fields):
    """Behind padding, without a source."""
    fields = {**fields, "is_encoder_decoder": False, "num_encoder_layers": 0}
    model = make_model(cls=TerraformerForCausalLM, **fields)
    ids, mask, results = TERRAFORMER.make_ids(2, 60), torch.ones(2, 60, dtype=torch.long), []
    mask[0, :25] = 0
    for one, backend in ((model, "auto"), (copy.deepcopy(model).double(), "reference")):
        cache = DynamicCache(config=model.config)
        with use_backend(backend):
            one(ids[:, :40], attention_mask=mask[:, :40], cache=cache)
            logits = [
                one(ids[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache).logits for end in range(41, 61)
            ]
        assert last_backend(OP_NAME) == ("cpu" if backend == "auto" else "reference")
        results.append(torch.cat(logits, 1))
    assert_near(*results)


@torch.no_grad()
def test_another_layout_runs_as_written():
    fields = {**LSH, "is_encoder_decoder": False, "num_encoder_layers": 0}
    model = make_model(cls=TerraformerForCausalLM, **fields)
    ids = TERRAFORMER.make_ids(1, 30)
    for layout, backend in (("packed", "cpu"), ("original", "reference"), ("packed", "cpu")):
        model.config.lsh_layout = layout
        cache = DynamicCache(config=model.config)
        model(ids[:, :29], cache=cache)
        model(ids[:, 29:], cache=cache)
        assert last_backend(OP_NAME) == backend
