"""The op `layers` with two streams, a source in front, cross attention and recurrences, against plain products in
float64, with nothing but torch."""

import math
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the `kernels` library is imported

import pytest
import torch
from kernel_testing.loading import load_for_tests


kernel = load_for_tests(Path(__file__).resolve().parents[1], "cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, HEADS, SIZE = 2, 3, 5
WIDTH = HEADS * SIZE
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def matrix(outputs, inputs):
    return torch.randn(outputs, inputs) / math.sqrt(inputs)


def keys_of(tokens, dtype=torch.float32, rows=ROWS):
    return torch.randn(rows, HEADS, tokens, SIZE).to(dtype)


def room(held, places):
    """Room for keys or values that is NaN behind what is filled."""
    tensor = torch.full((*held.shape[:2], places, held.shape[3]), float("nan"), dtype=held.dtype)
    tensor[:, :, : held.shape[2]] = held
    return tensor


def normalized(x, weight, bias):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), 1e-5)


def attended(query, keys, values, mask=None):
    """Softmax attention of `(rows, width)` over `(rows, heads, tokens, size)`."""
    scores = torch.einsum("bhd,bhtd->bht", query.unflatten(-1, (HEADS, SIZE)), keys.double()) / math.sqrt(SIZE)
    scores = scores if mask is None else scores + mask.double().unsqueeze(1)
    return torch.einsum("bht,bhtd->bhd", scores.softmax(-1), values.double()).flatten(1)


class Attention:
    """A dense attention with `filled` tokens, and keys of a source before them if there are some."""

    def __init__(self, filled=3, source=None, dtype=torch.float32, source_dtype=torch.float32, source_rows=ROWS):
        self.norm, self.matrices = [*torch.randn(2, WIDTH)], [matrix(WIDTH, WIDTH) for _ in range(4)]
        self.weights = [*self.norm, *self.matrices]
        kind = 0 if source is None else 2
        self.settings = [kind, len(self.weights), 9, HEADS, 1, 0, 0, 0, 1, 1, 1, 1]
        self.filled = filled
        self.held = [keys_of(filled, dtype) for _ in range(2)]
        self.rooms = [room(held, filled + 2) for held in self.held]
        self.source = [] if source is None else [keys_of(source, source_dtype, source_rows) for _ in range(2)]

    def expected(self, x, mask=None):
        x = normalized(x, *self.norm)
        query, key, value = (x @ one.double().mT for one in self.matrices[:3])
        seen = []
        for place, (held, new) in enumerate(zip(self.held, (key, value), strict=True)):
            parts = [self.source[place].double().expand(ROWS, -1, -1, -1)] if self.source else []
            new = (
                new.to(held.dtype)
                .double()
                .unflatten(-1, (HEADS, 1, SIZE))
                .transpose(1, 2)
                .reshape(ROWS, HEADS, 1, SIZE)
            )
            seen.append(torch.cat([*parts, held.double(), new], dim=2))
        return attended(query, *seen, mask) @ self.matrices[3].double().mT


class FeedForward:
    """A dense feed-forward layer with ReLU, and a branch of recurrences if it has layers."""

    def __init__(self, layers=0, units=4):
        self.layers, self.units = layers, units
        self.weights = [*torch.randn(2, WIDTH), matrix(7, WIDTH), torch.randn(7), matrix(WIDTH, 7), torch.randn(WIDTH)]
        count = len(self.weights)
        if layers:
            sizes = [(units, WIDTH), *[(3 * units, units)] * layers, (WIDTH, units)]
            self.weights += [*torch.randn(2, WIDTH)]
            self.weights += [part for size in sizes for part in (matrix(*size), torch.randn(size[0]))]
        self.branch = self.weights[count:]
        self.settings = [1, len(self.weights), 7, 1, 0, 0, 0, 1, 1, layers]

    def expected(self, x, state=None):
        """Output, and the states after it."""
        norm, (up, inner, down, bias) = self.weights[:2], [one.double() for one in self.weights[2:6]]
        found = (normalized(x, *norm) @ up.mT + inner).relu() @ down.mT + bias
        if not self.layers:
            return found, None
        maps = [one.double() for one in self.branch[2:]]
        hidden, states = normalized(x, *self.branch[:2]) @ maps[0].mT + maps[1], []
        for place, c in enumerate(state.double().split(self.units, -1)):
            candidate, *gates = (hidden @ maps[2 + 2 * place].mT + maps[3 + 2 * place]).split(self.units, -1)
            forget, output = (gate.sigmoid() for gate in gates)
            states.append(forget * c + (1 - forget) * candidate)
            hidden = output * states[-1] + (1 - output) * math.sqrt(3) * hidden
        return found + hidden @ maps[-2].mT + maps[-1], torch.cat(states, -1)


def call(hidden, parts, states=(), mask=None, second=None, cross_mask=None, epsilons=None):
    attentions = [part for part in parts if isinstance(part, Attention)]
    sources = [part.source for part in parts if getattr(part, "source", None)]
    count = sum(1 + bool(getattr(part, "layers", 0)) for part in parts)
    kernel.layers(
        hidden, [part.rooms[0] for part in attentions], [part.rooms[1] for part in attentions], list(states), mask,
        [weight for part in parts for weight in part.weights], [number for part in parts for number in part.settings],
        [1e-5] * count if epsilons is None else epsilons, [part.filled for part in attentions], second,
        [keys for keys, _ in sources], [values for _, values in sources], cross_mask,
    )  # fmt: skip


def assert_near(found, expected, tolerance=5e-5):
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("attentions", [0, 1, 2, 3])
def test_two_streams(attentions):
    parts = [*(Attention() for _ in range(attentions)), FeedForward(), *(Attention() for _ in range(attentions))]
    first, second = torch.randn(2, ROWS, WIDTH)
    expected = [first.double(), second.double()]
    for part in parts:
        added = part.expected(expected[1])
        expected = [expected[1], expected[0] + (added[0] if isinstance(added, tuple) else added)]
    call(first, parts, second=second)
    for found, other in zip((first, second), expected, strict=True):
        assert_near(found, other)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("masked", [False, True], ids=["all-seen", "masked"])
@pytest.mark.parametrize("source_dtype", DTYPES, ids=lambda dtype: f"source-{str(dtype).removeprefix('torch.')}")
@every_dtype
def test_keys_of_a_source_stand_in_front(dtype, source_dtype, masked):
    """Of any length and of a dtype of their own; they are not written."""
    for source in (0, 1, 3, 63, 64, 65, 130):
        for filled in (0, 1, 64):
            part = Attention(filled, source, dtype, source_dtype)
            kept = [tensor.clone() for tensor in part.source]
            mask = None
            if masked:
                mask = torch.randn(ROWS, source + filled + 1)
                mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, -torch.inf)
                mask[:, -1] = 0.0
            hidden = torch.randn(ROWS, WIDTH)
            expected = hidden.double() + part.expected(hidden.double(), mask)
            call(hidden, [part], mask=mask)
            assert_near(hidden, expected, 5e-5 if dtype == torch.float32 else 2e-2)
            assert all(map(torch.equal, part.source, kept))


@pytest.mark.kernels_ci
def test_a_source_may_be_strided_and_shared_by_all_rows():
    part = Attention(2, 70, source_rows=1)
    whole = [torch.randn(ROWS, HEADS, 90, SIZE) for _ in range(2)]
    hidden = torch.randn(ROWS, WIDTH)
    expected = hidden.double() + part.expected(hidden.double())
    call(hidden, [part])
    assert_near(hidden, expected)
    part = Attention(2, 70)
    part.source = [tensor[:, :, 7:77] for tensor in whole]
    hidden = torch.randn(ROWS, WIDTH)
    expected = hidden.double() + part.expected(hidden.double())
    call(hidden, [part])
    assert_near(hidden, expected)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("where", ["source", "target"])
def test_nan_in_a_key_reaches_its_row_alone(where):
    part = Attention(66, 66)
    (part.source if where == "source" else part.rooms)[0][0, :, 1] = torch.nan
    hidden = torch.randn(ROWS, WIDTH)
    call(hidden, [part])
    assert hidden[0].isnan().all()
    assert hidden[1].isfinite().all()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("streams", [1, 2])
def test_recurrences_beside_a_feed_forward(layers, streams):
    """Their state may be part of a wider one."""
    part = FeedForward(layers)
    wide = torch.randn(ROWS, 3 + layers * part.units + 2, 1)
    kept, state = wide.clone(), wide[:, 3:-2]
    first, second = torch.randn(2, ROWS, WIDTH)
    x = second if streams == 2 else first
    added, after = part.expected(x.double(), state[..., 0])
    expected = first.double() + added, second.double()
    call(first, [part], [state], second=second if streams == 2 else None)
    found = (second, first) if streams == 2 else (first, second)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)
    assert_near(state[..., 0], after)
    assert torch.equal(wide[:, :3], kept[:, :3])
    assert torch.equal(wide[:, -2:], kept[:, -2:])


class CrossAttention:
    """Attention to a source with maps of a kind each: `"none"`, `"dense"`, `"multiplicative"` or `"windowed"`."""

    modules, window, kernel_width = 5, 3, 3

    def __init__(self, source, query, output, dtype=torch.float32):
        self.source = [keys_of(source, dtype) for _ in range(2)]
        self.norm, self.maps, kinds = [*torch.randn(2, WIDTH)], [], []
        for kind in (query, output):
            weights, setting = self._map(kind)
            self.maps.append((kind, weights))
            kinds += setting
        self.weights = [*self.norm, *(weight for _, weights in self.maps for weight in weights)]
        self.settings = [3, len(self.weights), 10, HEADS, 1, self.window, self.kernel_width, *kinds]
        self.states = [torch.randn(ROWS, 2 * WIDTH) for kind in (query, output) if kind == "windowed"]

    def _map(self, kind):
        if kind == "none":
            return [], [0, 0, 0]
        if kind == "dense":
            return [matrix(WIDTH, WIDTH), torch.randn(WIDTH)], [0, 2, 0]
        size = WIDTH // self.modules
        weights = [torch.randn(self.modules, WIDTH), matrix(WIDTH, size)]
        if kind == "multiplicative":
            return weights, [self.modules, 3, 0]
        conv = 0.3 * torch.randn(size, size, self.window, self.kernel_width)
        return [*weights, conv, torch.randn(size)], [self.modules, 3, 1]

    def _mapped(self, place, x, states):
        kind, weights = self.maps[place]
        weights = [weight.double() for weight in weights]
        if kind == "none":
            return x
        if kind == "dense":
            return x @ weights[0].mT + weights[1]
        token = ((x.unsqueeze(1) * weights[0]) @ weights[1]).flatten(1)
        if kind == "multiplicative":
            return token
        seen = torch.cat([states.pop(0).double(), token], 1)
        self.after.append(seen[:, WIDTH:])
        images = seen.view(ROWS, self.window, self.modules, -1).permute(0, 3, 1, 2)
        found = torch.nn.functional.conv2d(images, weights[2], weights[3], padding=(0, self.kernel_width // 2))
        return found.squeeze(2).mT.flatten(1)

    def expected(self, x, mask=None):
        states, self.after = list(self.states), []
        query = self._mapped(0, normalized(x, *self.norm), states)
        return self._mapped(1, attended(query, *self.source, mask), states)


MAPS = ("none", "dense", "multiplicative", "windowed")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("masked", [False, True], ids=["all-seen", "masked"])
@pytest.mark.parametrize("output", MAPS, ids=lambda kind: f"output-{kind}")
@pytest.mark.parametrize("query", MAPS, ids=lambda kind: f"query-{kind}")
def test_cross_attention(query, output, masked):
    for source, dtype in zip((1, 64, 131), DTYPES, strict=True):
        part = CrossAttention(source, query, output, dtype)
        mask = torch.randn(ROWS, source) if masked else None
        hidden = torch.randn(ROWS, WIDTH)
        expected = hidden.double() + part.expected(hidden.double(), mask)
        kept = [tensor.clone() for tensor in part.source]
        call(hidden, [part], part.states, cross_mask=mask)
        assert_near(hidden, expected, 1e-4)
        assert all(map(torch.equal, part.source, kept))
        for state, after in zip(part.states, part.after, strict=True):
            assert_near(state, after)


@pytest.mark.kernels_ci
def test_a_layer_of_three_parts():
    parts = [Attention(), CrossAttention(4, "windowed", "none"), FeedForward(2)]
    hidden, recurrent = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 8)
    expected = hidden.double()
    expected = expected + parts[0].expected(expected)
    expected = expected + parts[1].expected(expected)
    added, after = parts[2].expected(expected, recurrent)
    call(hidden, parts, [*parts[1].states, recurrent])
    assert_near(hidden, expected + added, 1e-4)
    assert_near(recurrent, after)


def source_of(**changes):
    def change(part, arguments):
        part.source = [changes.get("keys", part.source[0]), changes.get("values", part.source[1])]

    return change


def given(**changes):
    return lambda part, arguments: arguments.update(changes)


def settings_of(part_settings):
    def change(part, arguments):
        part.settings = part_settings

    return change


def overlapping(part, arguments):
    both = torch.randn(2 * ROWS * WIDTH)
    arguments["hidden"], arguments["second"] = both[:30].view(2, 15), both[15:45].view(2, 15)


BEHIND = {
    "source-heads": (source_of(keys=torch.zeros(2, 2, 4, 5)), "keys of a source must have shape .2 or 1, 3, as many"),
    "source-rows": (source_of(keys=torch.zeros(3, 3, 4, 5)), "keys of a source must have shape .2 or 1, 3, as many"),
    "source-values": (source_of(values=torch.zeros(2, 3, 5, 5)), "values of a source must have shape"),
    "source-dtype": (source_of(keys=torch.zeros(2, 3, 4, 5).half()), "keys and values of a source must have the same"),
    "source-int8": (source_of(keys=torch.zeros(2, 3, 4, 5, dtype=torch.int8)), "keys of a source must be float32, bf"),
    "source-strides": (source_of(keys=torch.zeros(2, 3, 5, 4).mT), "keys of a source must be contiguous in its last"),
    "source-dimensions": (source_of(keys=torch.zeros(2, 3, 20)), "keys of a source must have shape"),
    "mask": (given(mask=torch.zeros(2, 4)), "mask must have shape .2, 8."),
    "second-shape": (given(second=torch.zeros(2, 14)), "second must have shape .2, 15."),
    "second-dtype": (given(second=torch.zeros(2, 15).half()), "second must be float32"),
    "second-overlaps": (overlapping, "hidden and second must not overlap"),
    "no-source": (settings_of([0, 6, 9, HEADS, 1, 0, 0, 0, 1, 1, 1, 1]), "source_keys holds 1 entries, and 0 were"),
}


def refused(part, change, message, **arguments):
    hidden = torch.randn(ROWS, WIDTH)
    arguments = {"hidden": hidden, "parts": [FeedForward(), part], **arguments}
    change(part, arguments)
    before = arguments["hidden"].clone()
    with pytest.raises(RuntimeError, match=message):
        call(**arguments)
    assert torch.equal(arguments["hidden"], before)


@pytest.mark.kernels_ci
@pytest.mark.parametrize(("change", "message"), BEHIND.values(), ids=BEHIND)
def test_a_source_and_a_stream_that_do_not_fit_change_nothing(change, message):
    refused(Attention(3, 4), change, message)


CROSS = {
    "settings": (settings_of([3, 4, 3, HEADS, 1, 0]), "settings of cross attention must hold 10 numbers, not 3"),
    "heads": (settings_of([3, 2, 10, 4, 1, 3, 3, 0, 0, 0, 0, 0, 0]), "Heads must divide the width"),
    "conv-alone": (settings_of([3, 4, 10, HEADS, 1, 3, 3, 5, 0, 1, 0, 0, 0]), "kernel must have shape|needs a map"),
    "no-state": (given(states=[]), "states ends within a layer"),
    "state-shape": (given(states=[torch.zeros(2, 15)] * 2), "A state must have shape .2, 30."),
    "state-dtype": (given(states=[torch.zeros(2, 30).double()] * 2), "A state must be float32"),
    "state-strides": (given(states=[torch.zeros(30, 2).mT] * 2), "A state must be contiguous in each row"),
    "state-overlaps": (given(states=[torch.zeros(1, 30).expand(2, 30)] * 2), "Rows of A state must not overlap"),
    "mask": (given(cross_mask=torch.zeros(2, 5)), "cross_mask must have shape .2, 4."),
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize(("change", "message"), CROSS.values(), ids=CROSS)
def test_cross_attention_that_does_not_fit_changes_nothing(change, message):
    part = CrossAttention(4, "windowed", "windowed")
    refused(part, change, message, states=part.states)


BRANCH = {
    "no-state": (given(states=[]), "states ends within a layer"),
    "state-shape": (given(states=[torch.zeros(2, 4)]), "A state must have shape .2, 8."),
    "epsilons": (given(epsilons=[1e-5] * 2), "epsilons ends within a layer"),
    "negative": (settings_of([1, 16, 7, 1, 0, 0, 0, 1, 1, -1]), "The number of SRUs must not be negative"),
    "too-few": (
        settings_of([1, 16, 7, 1, 0, 0, 0, 1, 1, 1]),
        "the branch's last map must have shape .15, 4.|There are",
    ),
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize(("change", "message"), BRANCH.values(), ids=BRANCH)
def test_a_branch_that_does_not_fit_changes_nothing(change, message):
    refused(FeedForward(2), change, message, states=[torch.zeros(2, 8)])


@pytest.mark.kernels_ci
def test_a_feed_forward_alone_takes_no_branch():
    part = FeedForward(1)
    with pytest.raises(RuntimeError, match="A branch of recurrences has a state: call `layers`"):
        kernel.feed_forward(torch.randn(ROWS, WIDTH), part.weights, part.settings[3:], 1e-5)
