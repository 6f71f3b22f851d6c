"""Compiled decoding: it equals the layers as they are written, stands aside where it must, and keeps its hands off what
a cache has shown."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.modules.decoding import OP_NAME
from hf_efficient.modules.few_rows import KERNEL, MOST_ROWS
from hf_efficient.modules.few_rows import OP_NAME as PRODUCTS_NAME
from hf_efficient.modules.quantization import SparseQuantizationConfig
from hf_efficient.ops.backend import last_backend, select, use_backend
from hf_efficient.ops.kernel_loader import find_variant
from tests.helpers.attention import replace_attention
from tests.helpers.comparison import relative_error
from tests.helpers.families import SCALING_TRANSFORMER, in_chunks


pytestmark = pytest.mark.skipif(find_variant(KERNEL, "cpu") is None, reason="the kernel for decoding is not built")

QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
FF = {"ff_sparsity": 5, "ff_rank": 3}
KINDS = {
    "dense": {},
    "dense-rms": {"layer_norm_center": False, "hidden_act": "gelu_new"},
    "dense-gelu-pytorch-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "dense-gelu-fast": {"hidden_act": "gelu_fast"},
    "dense-swish": {"hidden_act": "swish"},
    "ff": FF,
    "ff-options": {**FF, "ff_multiply_by_controller": True, "ff_inner_bias": True, "hidden_act": "gelu"},
    "qkv": QKV,
    "shared-qk": {**QKV, "attention_share_qk": True, "attention_window": 4, "attention_kernel_width": 5},
    "output": {**QKV, "attention_output": "multiplicative", "num_attention_heads": 1, "layer_norm_center": False},
    "window-1": {**QKV, "attention_window": 1},
    "recurrences": {"ff_sru_layers": 2, "ff_sru_units": 5, "hidden_act": "silu"},
    "recurrences-sparse": {**FF, **QKV, "ff_sru_layers": 1, "layer_norm_center": False},
    "multiplicative": {"attention_type": "multiplicative", "attention_sparsity": 8},
    "all": {**FF, **QKV, "lm_head_type": "multiplicative", "loss_sparsity": 3},
}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 0.02}

every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
with_and_without_states = pytest.mark.parametrize("fields", [{}, {**FF, **QKV}], ids=["dense", "ff-qkv"])


def make_model(dtype=torch.float32, **fields):
    return SCALING_TRANSFORMER.make_model(ScalingTransformerForCausalLM, dtype=dtype, **fields)


def decode(model, ids, prefill, backend="auto", cache=None, **inputs):
    """Logits of a prefill and of single steps, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    lengths = [prefill, *([1] * (ids.shape[1] - prefill))]
    with use_backend(backend):
        logits = in_chunks(model, ids, lengths, cache, **inputs)
    assert last_backend(OP_NAME) == ("cpu" if backend == "auto" else "reference")
    return logits, cache


def assert_same_cache(found, expected, tolerance=2e-5):
    for one, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(one.values, other.values, atol=tolerance, rtol=tolerance)
        if hasattr(one, "conv_states"):
            torch.testing.assert_close(one.conv_states[0], other.conv_states[0], atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@every_kind
def test_steps_equal_the_layers_as_they_are_written(fields, dtype):
    model, ids, tolerance = make_model(dtype, **fields), SCALING_TRANSFORMER.make_ids(2, 9), TOLERANCES[dtype]
    found, cache = decode(model, ids, 4)
    expected, eager = decode(model, ids, 4, "reference")
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        assert_same_cache(cache, eager)
    else:  # which unit of a block is chosen may differ
        whole = copy.deepcopy(model).float()(ids).logits
        error = (found.float() - whole).abs().mean()
        assert error < 1.3 * (expected.float() - whole).abs().mean() + 0.01 * tolerance
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    assert cache.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
@every_kind
def test_quantised_layers(fields, weights, tmp_path):
    """In steps as in a whole text, with keys and values in 16 bits; units that are chosen may differ by rounding."""
    make_model(**fields).save_pretrained(tmp_path)
    config = SparseQuantizationConfig(weights)
    model = ScalingTransformerForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    ids = SCALING_TRANSFORMER.make_ids(2, 9)
    found, cache = decode(model, ids, 4)
    expected, _ = decode(model, ids, 4, "reference")
    error = (found - expected).norm() / expected.norm()
    assert error < (0.5 if "ff_sparsity" in fields else 0.02)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float16}
    with use_backend("reference"):  # layers as they are written go on from them
        assert model(ids[:, :2], cache=cache).logits.isfinite().all()
    assert model.to(torch.bfloat16)(ids[:, :1], cache=decode(model, ids, 4)[1]).logits.isfinite().all()


MULTIPLICATIVE = {"lm_head_type": "multiplicative", "loss_sparsity": 2}
# Fields of an output layer, and the module in it that holds a large matrix.
HEADS = {
    "dense": ({}, "lm_head"),
    "multiplicative": (MULTIPLICATIVE, "lm_head"),
    "mixed": ({**MULTIPLICATIVE, "lm_head_sparse_probability": 0.5}, "lm_head.sparse"),
    "low-rank": ({"lm_head_type": "low_rank", "lm_head_rank": 64}, "lm_head.out_proj"),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("fields", "name"), HEADS.values(), ids=HEADS)
def test_large_output_layers(fields, name, dtype):
    """They are multiplied by compiled code for a few rows, and as they are written otherwise."""
    limit = 1e-5 if dtype == torch.float32 else 1e-2  # each side rounds to 8 bits, at other places
    fields = {"hidden_size": 64, "vocab_size": 9000, "intermediate_size": 65, **fields}
    model, ids = make_model(dtype, **fields), SCALING_TRANSFORMER.make_ids(2, 9)
    found = model(ids[:, :3]).logits
    assert last_backend(PRODUCTS_NAME) == "cpu"
    expected = model(ids).logits[:, :3]
    assert relative_error(found, expected) < limit
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
    assert relative_error(model(ids[:, :3]).logits, 2 * expected) < limit
    assert last_backend(PRODUCTS_NAME) == "reference"
    handle.remove()
    model.set_output_embeddings(nn.Linear(64, 7).eval().to(dtype))
    assert model(ids[:, :3]).logits.shape == (2, 3, 7)


@torch.no_grad()
@pytest.mark.parametrize("batch", range(1, MOST_ROWS + 1))
@with_and_without_states
def test_every_batch(fields, batch):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(batch, 7)
    found, _ = decode(model, ids, 3)
    for row in range(batch):
        torch.testing.assert_close(found[row], model(ids[row : row + 1]).logits[0], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@with_and_without_states
def test_padded_prefill(fields, side, attention):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 10)
    model.set_attn_implementation(attention)
    row = {"left": [0, 0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0, 0], "inside": [1, 0, 0, 1, 0, 1]}[side]
    mask = torch.tensor([[*row, 1, 1, 1, 1], [1] * 10])
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
        logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits)
    assert last_backend(OP_NAME) == "cpu"
    logits = torch.cat(logits, 1)
    for index, kept in enumerate(mask.bool()):
        whole = model(ids[index : index + 1, kept]).logits[0]
        torch.testing.assert_close(logits[index, kept], whole, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_mask_of_four_dimensions():
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(2, 6)
    allowed = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]])[:, None, None]
    found = {}
    for backend in ("auto", "reference"):
        _, cache = decode(model, ids[:, :5], 4, backend)
        with use_backend(backend):
            found[backend] = model(ids[:, 5:], attention_mask=allowed, cache=cache).logits
    torch.testing.assert_close(found["auto"], found["reference"], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("after", [0, 4], ids=["from-the-start", "after-the-prefill"])
@with_and_without_states
def test_nan_in_a_weight_gives_nan_as_eager_does(fields, after):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 6)
    model.set_attn_implementation("eager")  # that of torch on a CPU takes a score of NaN for one that is hidden
    for name, parameter in model.model.layers[1].named_parameters():
        found, kept = {}, parameter.clone()
        for backend in ("auto", "reference"):
            cache = decode(model, ids[:, : after + 1], after, backend)[1] if after else None
            parameter.view(-1)[0] = torch.nan
            found[backend], _ = decode(model, ids[:, after + 1 :] if after else ids, 1, backend, cache)
            parameter.copy_(kept)
        assert torch.equal(found["auto"].isnan(), found["reference"].isnan()), name
        assert "attention" not in name or found["auto"].isnan().all(), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_keys_and_values_beyond_float16_stay_finite(name, tmp_path):
    """Of the prefill, in float32, and of steps: both are kept in float16."""
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(2, 9)
    getattr(model.model.layers[0].attention, name).weight *= 1e9
    model.save_pretrained(tmp_path)
    config = SparseQuantizationConfig("int8")
    model = ScalingTransformerForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    logits, cache = decode(model, ids, 4)
    assert logits.isfinite().all()
    layer = cache.layers[0]
    kept = layer.keys if name == "k_proj" else layer.values
    assert kept.dtype == torch.float16
    assert (kept.abs().amax((1, 3)) == torch.finfo(torch.float16).max).all()


@torch.no_grad()
@with_and_without_states
def test_hidden_states_are_those_of_each_layer(fields):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 6)
    _, cache = decode(model, ids[:, :5], 4)
    step = model(ids[:, 5:], cache=cache, output_hidden_states=True)
    assert last_backend(OP_NAME) == "cpu"
    whole = model(ids, output_hidden_states=True)
    for found, expected in zip(step.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(found, expected[:, 5:], atol=2e-5, rtol=2e-5)
    model.set_attn_implementation("eager")  # which gives weights
    assert model(ids[:, :1], cache=cache, output_attentions=True).attentions[1].shape == (2, 4, 1, 7)
    assert last_backend(OP_NAME) == "reference"
    model(ids[:, :1], cache=cache)  # the library's hooks stay, and see nothing
    assert last_backend(OP_NAME) == "cpu"


@torch.no_grad()
@with_and_without_states
def test_either_form_goes_on_from_the_other(fields):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 12)
    cache, logits = DynamicCache(config=model.config), []
    for step, length in enumerate([3, 1, 1, 1, 2, 1, 1, 1, 1]):
        with use_backend("auto" if step % 3 else "reference"):
            start = cache.get_seq_length()
            logits.append(model(ids[:, start : start + length], cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@with_and_without_states
def test_what_a_cache_has_shown_is_never_overwritten(fields):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 12)
    cache = decode(model, ids[:, :8], 4)[1]
    if fields:
        cache.activate_past_recording()
    held = [(layer.keys, layer.values) for layer in cache.layers]
    values = [(keys.clone(), values.clone()) for keys, values in held]
    twin, branch = copy.copy(cache.layers[0]), copy.deepcopy(cache)
    decode(model, ids[:, 8:], 1, cache=cache)
    if fields:
        cache.crop(0)
    cache.layers[0] = twin  # a copy that shares tensors goes on by itself
    for layer in cache.layers[1:]:
        layer.keys, layer.values = layer.keys[:, :, :8], layer.values[:, :, :8]
    with use_backend("auto"):
        model(ids[:, 8:9], cache=cache)
        model(ids[:, 9:10], cache=branch)
    for (keys, found_values), (old_keys, old_values) in zip(held, values, strict=True):
        assert torch.equal(keys, old_keys)
        assert torch.equal(found_values, old_values)


@torch.no_grad()
@with_and_without_states
def test_crop_goes_back(fields):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(1, 11)
    cache = decode(model, ids[:, :5], 3)[1]
    if fields:
        cache.activate_past_recording()
    decode(model, SCALING_TRANSFORMER.make_ids(1, 4), 1, cache=cache)
    cache.crop(-4)
    logits, _ = decode(model, ids[:, 5:], 1, cache=cache)
    torch.testing.assert_close(logits, model(ids).logits[:, 5:], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@with_and_without_states
@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "copy", "reset"])
def test_rows_that_change(fields, change):
    """What happens to a cache between two steps, as beams and copies of it want it."""
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 8)
    if change in ("repeat", "select") and fields:
        pytest.skip("transformers does it for keys and values alone")
    found = {}
    for backend in ("auto", "reference"):
        cache = decode(model, ids, 4, backend)[1]
        order = torch.tensor([1, 0])
        if change == "reorder":
            cache.reorder_cache(order)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        elif change == "copy":
            cache = copy.deepcopy(cache)
        else:
            cache.reset()
        rows = {"repeat": 4, "select": 1}.get(change, 2)
        found[backend] = decode(model, SCALING_TRANSFORMER.make_ids(rows, 5), 2, backend, cache)[0]
    torch.testing.assert_close(found["auto"], found["reference"], atol=2e-5, rtol=2e-5)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "several": {"do_sample": True, "num_return_sequences": 4},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@with_and_without_states
def test_generate(fields, way):
    model = make_model(**fields)
    ids = SCALING_TRANSFORMER.make_ids(1 if "prompt_lookup_num_tokens" in way else 2, 6)
    texts = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        with use_backend(backend):
            texts[backend] = model.generate(ids, max_new_tokens=12, **{"do_sample": False, **way})
    assert torch.equal(texts["auto"], texts["reference"])


@with_and_without_states
def test_assisted_generation_and_a_cache_for_two_texts(fields):
    model, draft = make_model(**fields), make_model(num_hidden_layers=1, **fields)
    ids = SCALING_TRANSFORMER.make_ids(1, 6)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert last_backend(OP_NAME) == "cpu"
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=draft), greedy)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, cache=cache)
    assert torch.equal(model.generate(first, max_new_tokens=7, do_sample=False, cache=cache), greedy)


def test_inference_mode_and_no_grad_in_turn():
    model, ids = make_model(**FF, **QKV), SCALING_TRANSFORMER.make_ids(2, 12)
    cache, logits = DynamicCache(config=model.config), []
    for step, length in enumerate([3, 1, 1, 1, 1, 1, 1, 1, 1, 1]):
        with torch.inference_mode() if step % 2 else torch.no_grad():
            start = cache.get_seq_length()
            logits.append(model(ids[:, start : start + length], cache=cache).logits.clone())
            assert last_backend(OP_NAME) == ("cpu" if step else "reference")
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=2e-5, rtol=2e-5)


def record_layers(model):
    return {"output_hidden_states": True}


def listen_to_a_layer(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: 2 * output)
    return {}


def replace_the_forward_of_a_layer(model):
    layer = model.model.layers[0]
    layer.forward = lambda *args, **kwargs: 2 * type(layer).forward(layer, *args, **kwargs)
    return {}


def replace_the_class_of_a_layer(model):
    layer = model.model.layers[0]

    class Doubled(type(layer)):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    layer.__class__ = Doubled
    return {}


def hook_a_module(model):
    listen(model)
    return {}


# What is done to a model of two layers, and numbers of layers in each call of compiled code that it then makes.
CALLS_OF_LAYERS = {
    "plain": (lambda model: {}, [2]),
    "hidden-states": (record_layers, [1, 1]),
    "hook": (listen_to_a_layer, [1, 1]),
    "forward": (replace_the_forward_of_a_layer, [1, 1]),
    "class": (replace_the_class_of_a_layer, [1, 1]),
    "a-layer-as-written": (hook_a_module, [1]),
}


@torch.no_grad()
@pytest.mark.parametrize(("change", "depths"), CALLS_OF_LAYERS.values(), ids=CALLS_OF_LAYERS)
@with_and_without_states
def test_all_layers_run_in_one_call_unless_one_is_looked_at(fields, change, depths, monkeypatch):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 6)
    kernel, calls = select(OP_NAME, torch.device("cpu")), []
    run = kernel.layers
    monkeypatch.setattr(
        kernel, "layers", lambda hidden, keys, *rest: (calls.append(len(keys)), run(hidden, keys, *rest))
    )
    decode(model, ids, 4)  # the model's lists of weights are there when it changes
    calls.clear()
    inputs = change(model)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    found = model(ids[:, 5:], cache=cache, **inputs).logits
    assert calls == depths
    torch.testing.assert_close(found, model(ids).logits[:, 5:], atol=5e-5, rtol=5e-5)


@torch.no_grad()
def test_a_model_that_lost_a_layer():
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(2, 6)
    decode(model, ids, 4)
    model.model.layers = model.model.layers[:1]
    model.model.layer_types = model.model.layer_types[:1]
    model.config.num_hidden_layers = 1
    found, _ = decode(model, ids, 4)
    torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=2e-5)


def listen(model):
    return model.model.layers[1].attention.register_forward_hook(lambda module, args, output: None)


def listen_before(model):
    return model.model.layers[1].feed_forward.norm.register_forward_pre_hook(lambda module, args: None)


def replace_forward(model):
    projection = model.model.layers[1].attention.v_proj
    projection.forward = lambda x: nn.Linear.forward(projection, x)


def observe(model):
    model.model.layers[1].feed_forward.sparse.observer = lambda winners, passes: None


def train_one(model):
    model.model.layers[1].dropout.train()


REASONS = {
    "hook": ({}, listen),
    "pre-hook": ({}, listen_before),
    "forward": ({}, replace_forward),
    "observer": (FF, observe),
    "training": ({}, train_one),
    "float64": ({}, lambda model: model.double()),
    "concatenated": ({**QKV, "attention_value_input": "concatenated"}, lambda model: None),
}


@torch.no_grad()
@pytest.mark.parametrize(("fields", "change"), REASONS.values(), ids=REASONS)
def test_what_a_layer_stands_aside_for(fields, change):
    model, ids = make_model(**fields), SCALING_TRANSFORMER.make_ids(2, 6)
    change(model)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    model(ids[:, 5:], cache=cache)
    assert last_backend(OP_NAME) == "reference"


CALLS = {
    "two-tokens": (2, 2, {}),
    "many-rows": (MOST_ROWS + 1, 1, {}),
    "padding": (2, 1, {"attention_mask": torch.tensor([[1], [0]])}),
    "attentions": (2, 1, {"output_attentions": True}),
}


@torch.no_grad()
@pytest.mark.parametrize(("rows", "length", "inputs"), CALLS.values(), ids=CALLS)
def test_calls_that_run_as_written(rows, length, inputs):
    model, ids = make_model(**QKV), SCALING_TRANSFORMER.make_ids(rows, 4 + length)
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], cache=cache)
    model(ids[:, 4:], cache=cache, **inputs)
    assert last_backend(OP_NAME) == "reference"


def test_gradients_autocast_and_other_caches_run_as_written():
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(2, 5)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
    model(ids[:, 4:], cache=copy.deepcopy(cache)).logits.sum().backward()
    assert last_backend(OP_NAME) == "reference"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, 4:], cache=copy.deepcopy(cache))
        assert last_backend(OP_NAME) == "reference"
    with torch.no_grad():
        model(ids[:, 4:], cache=cache)
        assert last_backend(OP_NAME) == "cpu"
        static = StaticCache(config=model.config, max_cache_len=9)
        model(ids[:, :4], cache=static)
        model(ids[:, 4:], cache=static)
        assert last_backend(OP_NAME) == "reference"


def double(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def load(model):
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def replace_module(model):
    attention = model.model.layers[0].attention
    attention.q_proj = nn.Linear(24, 24, bias=False).eval()


def replace_parameter(model):
    model.model.layers[0].feed_forward.norm.weight = nn.Parameter(torch.full((24,), 3.0))


def exchange_layers(model):
    model.model.layers[0].attention, model.model.layers[1].attention_norm = (
        copy.deepcopy(model.model.layers[1].attention),
        nn.LayerNorm(24).eval(),
    )
    model.model.layers[0].attention.layer_idx = 0


def change_epsilon(model):
    for layer in model.model.layers:
        layer.feed_forward.norm.eps = 2.0


@torch.no_grad()
@pytest.mark.parametrize("change", [double, load, replace_module, replace_parameter, exchange_layers, change_epsilon])
def test_changed_weights_are_seen(change):
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(2, 8)
    before, _ = decode(model, ids, 3)
    change(model)
    found, _ = decode(model, ids, 3)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)


@torch.no_grad()
def test_another_attention_under_the_same_name_is_called(monkeypatch):
    model, ids, calls = make_model(), SCALING_TRANSFORMER.make_ids(2, 6), []
    decode(model, ids, 4)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    replace_attention(monkeypatch, "sdpa", lambda *args, **kwargs: (calls.append(1), sdpa(*args, **kwargs))[1])
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    model(ids[:, 5:], cache=cache)
    assert (len(calls), last_backend(OP_NAME)) == (4, "reference")


@torch.no_grad()
def test_another_scaling_runs_as_written():
    model, ids = make_model(), SCALING_TRANSFORMER.make_ids(2, 6)
    decode(model, ids, 4)
    for layer in model.model.layers:
        layer.attention.scaling = 3.0
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    found = model(ids[:, 5:], cache=cache).logits
    assert last_backend(OP_NAME) == "reference"
    torch.testing.assert_close(found, model(ids).logits[:, 5:], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_threads_that_share_a_model():
    model, ids = make_model(**QKV), SCALING_TRANSFORMER.make_ids(1, 8)
    expected = model(ids).logits

    def run(_):
        with torch.no_grad():  # which is each thread's own
            return in_chunks(model, ids, [4, 1, 1, 1, 1], DynamicCache(config=model.config))

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(24)):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_another_dtype_copies_and_pickles(tmp_path):
    model, ids = make_model(**QKV), SCALING_TRANSFORMER.make_ids(2, 8)
    expected, _ = decode(model, ids, 3)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    model.to(torch.bfloat16)
    assert decode(model, ids, 3)[0].dtype == torch.bfloat16
    assert torch.equal(decode(twin, ids, 3)[0], expected)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(decode(loaded, ids, 3)[0], expected)
    model.to(torch.float32)
    torch.testing.assert_close(decode(model, ids, 3)[0], expected, atol=0.2, rtol=0.2)


@torch.no_grad()
def test_a_long_text_moves_to_larger_rooms():
    model, ids = make_model(max_position_embeddings=300, **QKV), SCALING_TRANSFORMER.make_ids(1, 290)
    logits, cache = decode(model, ids, 1)
    torch.testing.assert_close(logits, model(ids).logits, atol=5e-5, rtol=5e-5)
    storage = cache.layers[0].keys.untyped_storage().nbytes()
    assert storage <= 4 * 2 * 290 * 24


@torch.no_grad()
def test_many_texts_leave_no_memory():
    model, ids = make_model(**QKV), SCALING_TRANSFORMER.make_ids(1, 6)

    def tensors():
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    model.generate(ids, max_new_tokens=4, do_sample=False)
    before = tensors()
    for _ in range(5):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert tensors() <= before
