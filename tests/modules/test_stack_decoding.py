"""What a decoding step takes up from the one before it, when it must not, and that it keeps no weights alive."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.modules.decoding import LayerDecoder
from hf_efficient.modules.few_rows import KERNEL
from hf_efficient.modules.key_room import KeyRoom
from hf_efficient.modules.quantization import SparseQuantizationConfig
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.kernel_loader import find_variant
from tests.helpers.families import SCALING_TRANSFORMER


pytestmark = pytest.mark.skipif(find_variant(KERNEL, "cpu") is None, reason="the kernel for decoding is not built")

SPARSE = {"attention_type": "multiplicative_conv", "attention_sparsity": 6, "ff_sparsity": 5, "ff_rank": 3}


def make_model(**fields):
    return SCALING_TRANSFORMER.make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **fields)


@pytest.fixture
def asked(monkeypatch):
    """Layers that were asked whether they are ready, one entry a layer and a step."""
    layers, prepare = [], LayerDecoder.prepare

    def note(self, weights, layer, *args):
        layers.append(layer.layer_idx)
        return prepare(self, weights, layer, *args)

    monkeypatch.setattr(LayerDecoder, "prepare", note)
    return layers


def nothing(model, cache):
    return model


def shorten(model, cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
    return model


def reorder(model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return model


def fill_a_room(model, cache):
    for layer in cache.layers:
        KeyRoom.shown_by(layer).places = layer.keys.shape[2]
    return model


def exchange_layers_of_the_cache(model, cache):
    cache.layers.reverse()
    return model


def replace_keys(model, cache):
    for layer in cache.layers:
        layer.keys = torch.ones_like(layer.keys)
    return model


def replace_values(model, cache):
    for layer in cache.layers:
        layer.values = torch.ones_like(layer.values)
    return model


def replace_states(model, cache):
    for layer in cache.layers:
        layer.conv_states = {0: torch.ones_like(layer.conv_states[0])}
    return model


def step_as_written(model, cache):
    with use_backend("reference"):
        model(SCALING_TRANSFORMER.make_ids(2, 1), cache=cache)
    return model


def take_another_model(model, cache):
    torch.manual_seed(5)
    return type(model)(model.config).eval()


KINDS = {"dense": {}, "ff-qkv": SPARSE}
TOUCHES = [
    nothing,
    shorten,
    reorder,
    fill_a_room,
    exchange_layers_of_the_cache,
    replace_keys,
    replace_values,
    step_as_written,
    take_another_model,
]
CASES = [(name, touch) for name in KINDS for touch in TOUCHES] + [("ff-qkv", replace_states)]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "touch"), CASES)
def test_layers_are_asked_again_only_after_a_change(kind, touch, asked):
    model, ids, results = make_model(**KINDS[kind]), SCALING_TRANSFORMER.make_ids(2, 12), []
    for backend in ("auto", "reference"):
        cache = DynamicCache(config=model.config)
        with use_backend(backend):
            model(ids[:, :4], cache=cache)
            for place in range(4, 8):
                model(ids[:, place : place + 1], cache=cache)
            if backend == "auto":
                assert asked == list(range(len(model.model.layers)))
                asked.clear()
            if backend == "auto" or touch is not fill_a_room:
                model_then = touch(model, cache)
            results.append([model_then(ids[:, place : place + 1], cache=cache).logits for place in range(8, 12)])
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)
    if touch is nothing:
        assert asked == []
    else:
        assert set(asked) == set(range(len(model.model.layers)))


@torch.no_grad()
def test_rooms_of_unequal_length_are_asked_again(asked):
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(1, 9)
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], cache=cache)
    model(ids[:, 4:5], cache=cache)
    KeyRoom.shown_by(cache.layers[1]).show(cache.layers[1])
    asked.clear()
    model(ids[:, 5:6], cache=cache)
    assert asked == list(range(len(model.model.layers)))
    assert [layer.keys.shape[2] for layer in cache.layers[:2]] == [6, 7]


@torch.no_grad()
def test_replaced_weights_are_released_at_once():
    model, ids = make_model(hidden_size=48, **SPARSE), SCALING_TRANSFORMER.make_ids(1, 6)
    cache = DynamicCache(config=model.config)

    def decode_and_watch():
        model(ids[:, :4], cache=cache)
        model(ids[:, 4:5], cache=cache)
        feed_forward = model.model.layers[0].feed_forward.sparse
        return [weakref.ref(tensor) for tensor in (*feed_forward.parameters(), *feed_forward.buffers())]

    floats = decode_and_watch()
    model.quantize_layers(SparseQuantizationConfig("int8"))
    gc.collect()
    assert floats
    assert [one() for one in floats] == [None] * len(floats)
    codes = decode_and_watch()
    model.dequantize_layers(None)
    gc.collect()
    assert codes
    assert [one() for one in codes] == [None] * len(codes)
