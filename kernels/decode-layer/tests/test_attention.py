"""The op `attention` against plain products in float64, with nothing but torch; see test_decode_layer.py."""

import math
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the `kernels` library is imported

import pytest
import torch
from kernel_testing.loading import load_for_tests


kernel = load_for_tests(Path(__file__).resolve().parents[1], "cpu")

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Keys around the number that is worked on together, and around four of them.
FILLED = (0, 1, 2, 3, 62, 63, 64, 65, 130)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normalized(x, weight, bias):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), 1e-5)


def attended(query, keys, values, mask):
    """Softmax attention of `(rows, heads, size)` over `(rows, heads, tokens, size)`."""
    scores = torch.einsum("bhd,bhtd->bht", query, keys) / math.sqrt(query.shape[-1])
    scores = scores if mask is None else scores + mask.double().unsqueeze(1)
    return torch.einsum("bht,bhtd->bhd", scores.softmax(-1), values).flatten(1)


def room(rows, heads, capacity, size, filled, dtype):
    """Room for keys or values that is NaN behind what is filled."""
    tensor = torch.full((rows, heads, capacity, size), float("nan"), dtype=dtype)
    tensor[:, :, :filled] = torch.randn(rows, heads, filled, size)
    return tensor


@pytest.mark.kernels_ci
@pytest.mark.parametrize("masked", [False, True], ids=["all-seen", "masked"])
@pytest.mark.parametrize("size", [1, 5, 16, 33, 63, 64, 125])
@every_dtype
def test_dense_attention_equals_plain_products(dtype, size, masked):
    rows, heads = 3, 2
    width = heads * size
    norm = [torch.randn(width), torch.randn(width)]
    matrices = [torch.randn(width, width) / math.sqrt(width) for _ in range(4)]
    bias = torch.randn(width)
    weights = [*norm, matrices[0], bias, *matrices[1:]]
    for filled in FILLED:
        keys, values = (room(rows, heads, filled + 3, size, filled, dtype) for _ in range(2))
        mask = None
        if masked:
            mask = torch.where(torch.rand(rows, filled + 1) < 0.3, -torch.inf, torch.randn(rows, filled + 1))
            mask[:, -1] = 0.0
        before, hidden = (keys.clone(), values.clone()), torch.randn(rows, width)
        expected = hidden.double()
        x = normalized(expected, *norm)
        query, key, value = (x @ matrix.double().mT for matrix in matrices[:3])
        query = query + bias.double()
        kernel.attention(hidden, keys, values, None, mask, weights, [heads, 1, 0, 0, 0, 2, 1, 1, 1], 1e-5, filled)
        for tensor, old, new in zip((keys, values), before, (key, value), strict=True):
            assert torch.equal(tensor[:, :, :filled], old[:, :, :filled])
            assert tensor[:, :, filled + 1 :].isnan().all()
            added = tensor[:, :, filled].flatten(1).double()
            torch.testing.assert_close(added, new, atol=DTYPES[dtype], rtol=DTYPES[dtype])
        seen = [tensor[:, :, : filled + 1].double() for tensor in (keys, values)]
        expected = expected + attended(query.unflatten(-1, (heads, size)), *seen, mask) @ matrices[3].double().mT
        torch.testing.assert_close(hidden.double(), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("shares_key", [False, True], ids=["own-key", "shared-key"])
@every_dtype
def test_convolutions_equal_plain_ones(dtype, shares_key):
    rows, heads, modules, window, kernel_width = 2, 3, 4, 3, 5
    width, size, filled = 24, 6, 7
    gating, projection = torch.randn(modules, width), torch.randn(width, size) / math.sqrt(width)
    norm, bias = [torch.randn(width).to(dtype), torch.randn(width).to(dtype)], torch.randn(size).to(dtype)
    shared = [tensor.to(dtype) for tensor in (gating, projection)]
    convolutions = [0.3 * torch.randn(size, size, window, kernel_width) for _ in range(1 if shares_key else 2)]
    convolutions = [conv.to(dtype) for conv in [*convolutions, 0.3 * torch.randn(size, size, window, 1)]]
    weights = [*norm, *shared, *(tensor for conv in convolutions for tensor in (conv, bias))]
    settings = [heads, 1, window, kernel_width, modules, 3, 1, 0 if shares_key else 1, 1, 0]
    keys, values = (room(rows, heads, 9, width // heads, filled, torch.float32) for _ in range(2))
    hidden, state = torch.randn(rows, width), torch.randn(rows, (window - 1) * width)
    expected = hidden.double()
    x = normalized(expected, *norm)
    token = ((x.unsqueeze(1) * shared[0].double()) @ shared[1].double()).flatten(1)
    seen = torch.cat([state.double(), token], 1)
    images = seen.view(rows, window, modules, size).permute(0, 3, 1, 2)

    def convolved(conv):
        beside = conv.shape[-1] // 2
        found = torch.nn.functional.conv2d(images, conv.double(), bias.double(), padding=(0, beside))
        return found.squeeze(2).mT.reshape(rows, heads, width // heads)

    query, value = convolved(convolutions[0]), convolved(convolutions[-1])
    key = query if shares_key else convolved(convolutions[1])
    kernel.attention(hidden, keys, values, state, None, weights, settings, 1e-5, filled)
    torch.testing.assert_close(keys[:, :, filled].double(), key, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(values[:, :, filled].double(), value, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(state.double(), seen[:, width:], atol=5e-5, rtol=5e-5)
    held = [tensor[:, :, : filled + 1].double() for tensor in (keys, values)]
    torch.testing.assert_close(hidden.double(), expected + attended(query, *held, None), atol=1e-4, rtol=1e-4)


@pytest.mark.kernels_ci
def test_scores_of_any_size_and_rows_that_see_nothing():
    """Large scores overflow nothing; keys of which nothing is seen count for nothing; no key at all gives zeros."""
    width, filled = 8, 70
    weights = [torch.ones(width), *(torch.eye(width) for _ in range(3))]
    settings = [1, 0, 0, 0, 0, 1, 1, 1, 0]
    keys, values = torch.randn(2, 1, 80, width), torch.randn(2, 1, 80, width)
    keys[:, :, :filled] *= 1e4
    mask = torch.zeros(2, filled + 1)
    mask[1] = -torch.inf
    values[1, :, :filled] = 3e38
    hidden = torch.randn(2, width)
    before = hidden.clone()
    kernel.attention(hidden, keys, values, None, mask, weights, settings, 1e-5, filled)
    assert torch.equal(hidden[1], before[1])
    x = torch.nn.functional.rms_norm(before[:1].double(), (width,), eps=1e-5)
    seen = [tensor[:1, :, : filled + 1].double() for tensor in (keys, values)]
    expected = before[:1].double() + attended(x.unsqueeze(1), *seen, None)
    torch.testing.assert_close(hidden[:1].double(), expected, atol=1e-4, rtol=1e-4)


NAN = float("nan")


def nan_in_the_input(hidden, keys, values, mask):
    hidden[0, 0] = NAN


def nan_in_all_keys(hidden, keys, values, mask):
    keys[0] = NAN


def nan_in_the_only_key_seen_of_its_tile(hidden, keys, values, mask):
    mask[0, :-1] = -torch.inf
    mask[0, 0] = 0.0
    keys[0, 0, 0, 0] = NAN


def nan_under_the_mask(hidden, keys, values, mask):
    mask[0, :-1] = -torch.inf
    keys[0, 1, 1, 0] = NAN


def nan_in_a_value(hidden, keys, values, mask):
    values[0, 1, 0, 0] = NAN


def nan_in_the_mask(hidden, keys, values, mask):
    mask[0, 0] = NAN


NANS = (
    nan_in_the_input,
    nan_in_all_keys,
    nan_in_the_only_key_seen_of_its_tile,
    nan_under_the_mask,
    nan_in_a_value,
    nan_in_the_mask,
)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("place", NANS, ids=lambda place: place.__name__)
@every_dtype
def test_nan_is_handed_on(dtype, place):
    """To all of its row, as softmax does it, and to no other."""
    size, width = 5, 10
    weights = [torch.ones(width), *(torch.randn(width, width) for _ in range(4))]
    for filled in (2, 3, 63, 64, 130):
        keys, values = (room(2, 2, filled + 1, size, filled, dtype) for _ in range(2))
        hidden, mask = torch.randn(2, width), torch.zeros(2, filled + 1)
        found = []
        for change in (lambda *tensors: None, place):
            tensors = hidden.clone(), keys.clone(), values.clone(), mask.clone()
            change(*tensors)
            kernel.attention(*tensors[:3], None, tensors[3], weights, [2, 0, 0, 0, 0, 1, 1, 1, 1], 1e-5, filled)
            found.append(tensors[0])
        assert found[0].isfinite().all()
        assert found[1][0].isnan().all()
        assert torch.equal(found[1][1], found[0][1])


@pytest.mark.kernels_ci
@every_dtype
def test_keys_and_values_beyond_float16(dtype):
    """Finite ones become its largest number; infinite ones and NaN stay."""
    given = torch.tensor([1e5, -1e5, 65519.0, torch.inf, -torch.inf, NAN, 1.0])
    width = len(given)
    weights = [torch.ones(width), *([torch.zeros(width, width), given] * 3)]
    keys, values = (torch.zeros(1, 1, 2, width, dtype=dtype) for _ in range(2))
    kernel.attention(torch.randn(1, width), keys, values, None, None, weights, [1, 0, 0, 0, 0, 2, 2, 2, 0], 1e-5, 1)
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        given = torch.tensor([most, -most, most, torch.inf, -torch.inf, NAN, 1.0])
    for tensor in (keys, values):
        torch.testing.assert_close(tensor[0, 0, 1], given.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert not tensor[0, 0, 0].any()


def make_layers(depth, width, filled):
    """Arguments of `layers` for dense layers, but for `hidden`."""
    rooms = [[room(2, 3, filled + 2, width // 3, filled, torch.float32) for _ in range(depth)] for _ in range(2)]
    weights, settings = [], []
    for _ in range(depth):
        attention = [torch.randn(width), *(torch.randn(width, width) / math.sqrt(width) for _ in range(4))]
        feed_forward = [*torch.randn(2, width), torch.randn(5, width), torch.randn(width, 5)]
        weights += attention + feed_forward
        settings += [0, len(attention), 9, 3, 0, 0, 0, 0, 1, 1, 1, 1]
        settings += [1, len(feed_forward), 6, 1, 0, 1, 0, 0, 0]
    return [*rooms, [], None, weights, settings, [1e-5, 1e-6] * depth, [filled] * depth]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_layers_equal_one_after_the_other(depth):
    arguments = make_layers(depth, 15, 4)
    found, expected = (torch.randn(2, 15, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    copies = [[tensor.clone() for tensor in rooms] for rooms in arguments[:2]]
    kernel.layers(found, *arguments)
    weights = arguments[4]
    for i in range(depth):
        attention, feed_forward = weights[9 * i : 9 * i + 5], weights[9 * i + 5 : 9 * i + 9]
        keys, values = copies[0][i], copies[1][i]
        kernel.attention(expected, keys, values, None, None, attention, [3, 0, 0, 0, 0, 1, 1, 1, 1], 1e-5, 4)
        kernel.feed_forward(expected, feed_forward, [1, 0, 1, 0, 0, 0], 1e-6)
        for one, other in zip((arguments[0][i], arguments[1][i]), (keys, values), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found, expected)


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda values: values[:1], "values ends within a layer"),
        (2, lambda states: [torch.zeros(2, 15)], "states holds 1 entries, and 0 were read"),
        (4, lambda weights: weights[:-1], "weights ends within a layer"),
        (4, lambda weights: [*weights, torch.zeros(1)], "weights holds 19 entries, and 18 were read"),
        (5, lambda settings: settings[:-1], "settings ends within a layer"),
        (5, lambda settings: [6, *settings[1:]], "A part is of kind 0 to 5, not 6"),
        (6, lambda epsilons: epsilons[:-1], "epsilons ends within a layer"),
        (7, lambda filled: [4, 6], "keys must have shape .2, 3, more than 6, 5."),
    ],
)
def test_layers_that_do_not_fit_change_nothing(place, change, message):
    arguments, hidden = make_layers(2, 15, 4), torch.randn(2, 15)
    before = hidden.clone()
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        kernel.layers(hidden, *arguments)
    assert torch.equal(hidden, before)
    assert arguments[0][0][:, :, 4:].isnan().all()


def call(**changes):
    width = 6
    arguments = {
        "hidden": torch.zeros(2, width),
        "keys": torch.zeros(2, 3, 5, 2),
        "values": torch.zeros(2, 3, 5, 2),
        "state": None,
        "mask": None,
        "weights": [torch.ones(width), *(torch.zeros(width, width) for _ in range(3))],
        "settings": [3, 0, 0, 0, 0, 1, 1, 1, 0],
        "epsilon": 1e-5,
        "filled": 4,
    }
    kernel.attention(*{**arguments, **changes}.values())


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filled": 5}, "keys must have shape .2, 3, more than 5, 2."),
        ({"values": torch.zeros(2, 3, 5, 3)}, "values must have shape"),
        ({"values": torch.zeros(2, 3, 5, 2).half()}, "keys and values must have the same dtype, not Float and Half"),
        ({"keys": torch.zeros(2, 3, 5, 2).bfloat16()}, "keys and values must have the same dtype, not BFloat16 and"),
        ({"hidden": torch.zeros(2, 0)}, "hidden must have at least one number a row"),
        ({"keys": torch.zeros(2, 3, 5, 2, dtype=torch.int8)}, "keys must be float32"),
        ({"keys": torch.zeros(2, 3, 2, 5).mT}, "keys must be contiguous in its last two"),
        ({"mask": torch.zeros(2, 4)}, "mask must have shape .2, 5."),
        ({"hidden": torch.zeros(2, 6, dtype=torch.bfloat16)}, "hidden must be float32"),
        ({"settings": [4, 0, 0, 0, 0, 1, 1, 1, 0]}, "Heads must divide the width"),
        ({"settings": [3, 0, 0]}, "settings must hold 9 or 10 numbers"),
        ({"settings": [3, 0, 0, 0, 0, 1, 1, 1, 1]}, "The list of weights ends before"),
        ({"settings": [3, 0, 0, 0, 0, 1, 1, 0, 0]}, "Only the output projection may be absent"),
        ({"weights": [torch.ones(6), *(torch.zeros(6, 6) for _ in range(4))]}, "There are 5 weights"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    call()
    with pytest.raises(RuntimeError, match=message):
        call(**changes)


INT4 = torch.zeros(2, 1, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.float16)
INT8 = torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2)
FLOATS = torch.zeros(2, 6), torch.zeros(6, 3)
KERNEL = (torch.zeros(3, 3, 2, 3),)
NO_INT4 = "gating and projection must have two dimensions, in float32, bfloat16, float16 or int8"


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    ("layer", "modules", "message"),
    [
        ((*INT4, FLOATS[1]), 2, NO_INT4),
        ((FLOATS[0], *INT4), 2, NO_INT4),
        ((*INT4, *INT4), 2, NO_INT4),
        ((*INT8, FLOATS[1]), 2, "gating and projection must both be int8, or neither"),
        ((FLOATS[0], *INT8), 2, "gating and projection must both be int8, or neither"),
        (FLOATS, 3, "A multiplicative layer must have 3 modules and 6 outputs, not 2 and 6"),
        (
            (FLOATS[0], torch.zeros(6, 5)),
            2,
            r"must have 2 modules and 6 outputs, not 2 and 10|bias must hold 10 numbers",
        ),
        ((FLOATS[0], torch.zeros(5, 3)), 2, "projection must have shape .6, 3., not .5, 3."),
    ],
    ids=["gating-int4", "projection-int4", "int4", "gating-int8", "projection-int8", "modules", "outputs", "inputs"],
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_a_multiplicative_layer_of_other_formats_and_sizes_is_refused(layer, modules, message, has_bias):
    bias = [torch.zeros(6)] * has_bias
    matrices = [torch.zeros(6, 6)] * 2

    def call_with(layer, modules):
        weights = [torch.ones(6), *layer, *bias, *matrices]
        call(weights=weights, settings=[3, 0, 0, 0, modules, 3 + has_bias, 1, 1, 0])

    call_with(FLOATS, 2)
    with pytest.raises(RuntimeError, match=message):
        call_with(layer, modules)


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_width": 2}, "window must be at least 1 and width an odd number, not 2 and 2"),
        ({"kernel_width": 0}, "window must be at least 1 and width an odd number, not 2 and 0"),
        ({"window": 0}, "window must be at least 1 and width an odd number, not 0 and 3"),
        ({"window": -1}, "window must be at least 1 and width an odd number, not -1 and 3"),
        ({"kernel": (torch.zeros(3, 1, 16, dtype=torch.uint8), torch.zeros(3, 1).half())}, "or int8"),
        ({"kernel": (torch.zeros(4, 3, 2, 3),)}, "kernel must have shape .3, 3, 2, 3., not .4, 3, 2, 3."),
        ({"kernel": (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4))}, "kernel must have shape .3, 32., not .4"),
        ({"kernel": (torch.zeros(3, 3, 3, 2).mT,)}, "A kernel of floating-point numbers must be contiguous"),
        ({"modules": 3}, "A multiplicative layer must have 3 modules and 6 outputs, not 2 and 6"),
        ({"kinds": [3, 0, 1, 1, 0]}, "Only the key's convolution and the output projection may be absent"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_convolution_that_does_not_fit_is_refused(changes, message):
    def call_with(kernel=KERNEL, kernel_width=3, window=2, modules=2, kinds=(3, 1, 1, 1, 0)):
        bias, value = torch.zeros(3), torch.zeros(3, 3, 2, 1)
        weights = [torch.ones(6), *FLOATS, *[*kernel, bias] * (kinds[1] + kinds[2]), value, bias]
        settings = [3, 0, window, kernel_width, modules, *kinds]
        call(state=torch.zeros(2, 6), weights=weights, settings=settings)

    call_with()
    with pytest.raises(RuntimeError, match=message):
        call_with(**changes)
