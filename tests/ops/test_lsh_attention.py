"""LSH attention and its decoding against loops over keys, for rows alone and in a batch, in both layouts."""

import math

import pytest
import torch
from torch import nn

from hf_efficient.ops import lsh_attention as op
from hf_efficient.ops.lsh_attention import lsh_attention, lsh_decode
from hf_efficient.ops.lsh_attention_naive import hash_buckets_naive, lsh_attention_naive, lsh_decode_naive
from hf_efficient.ops.lsh_hashing import bucket_factors, draw_rotations, hash_buckets
from tests.helpers.comparison import assert_close, assert_equal
from tests.helpers.derivatives import check_first_derivatives, check_second_derivatives


FACTORS = [4, 6]
# Length, chunk length, chunks before and after.
SIZES = {
    "length-1": (1, 4, 1, 0),
    "chunk-1": (7, 1, 2, 1),
    "chunk-longer": (5, 9, 1, 1),
    "two-chunks-seen-once": (8, 4, 1, 1),
    "own-chunk-alone": (10, 3, 0, 0),
    "odd": (17, 4, 1, 0),
}


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def hashed(query_key, rounds=2, seed=5):
    rotations = draw_rotations(seed, query_key.shape[-1], rounds, FACTORS, query_key.shape[1])
    return hash_buckets(query_key, rotations, FACTORS)


def make_inputs(length, batch=2, heads=2, rounds=2, dtype=torch.float64):
    query_key, value = normal(batch, heads, length, 5, dtype=dtype), normal(batch, heads, length, 3, dtype=dtype)
    return query_key, value, hashed(query_key, rounds)


def masks(length, batch=2):
    """By kind; the first row is padded, the second is not, but with `scattered` and `empty`."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    pads, middle = length // 3, length // 2
    rows = {"left": slice(0, pads), "right": slice(length - pads, length), "inside": slice(middle, middle + pads)}
    found = {"none": None}
    for kind, where in rows.items():
        found[kind] = mask.clone()
        found[kind][0, where] = False
    found["scattered"] = torch.rand(batch, length) > 0.5
    found["empty"] = mask.clone()
    found["empty"][0] = False
    return found


@pytest.mark.parametrize("padding", ["none", "left", "right", "inside", "scattered", "empty"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("layout", ["packed", "original"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_the_loops(size, layout, causal, padding):
    length, chunk_length, before, after = SIZES[size]
    query_key, value, buckets = make_inputs(length, batch=2, heads=1)
    query_key.requires_grad_()
    value.requires_grad_()
    keep = (torch.rand(chunk_length, chunk_length * (before + 1 + after)) > 0.3).double() / 0.7
    form = {"chunk_length": chunk_length, "chunks_before": before, "chunks_after": after, "causal": causal}
    form |= {"mask": masks(length)[padding], "dropout_mask": keep, "layout": layout}
    found, expected = (f(query_key, value, buckets, **form) for f in (lsh_attention, lsh_attention_naive))
    # Padding of the original layout sees one another through a penalty that leaves 7 digits of a float64.
    tolerance = 1e-5 if layout == "original" and padding != "none" else 1e-10
    assert_close("output", found, expected, tolerance)
    cotangent = torch.randn_like(found)
    grads = [torch.autograd.grad(output, (query_key, value), cotangent) for output in (found, expected)]
    names = ("query_key", "value")
    assert_close("gradient", *(dict(zip(names, grad, strict=True)) for grad in grads), tolerance)


@pytest.mark.parametrize("limit", [1, 150, 2000])
def test_pieces_change_nothing(limit, monkeypatch):
    """One chunk of one head at a time, a few, and some heads at once; of 3 heads in 2 rows."""
    query_key, value, buckets = make_inputs(23, heads=3)
    form = {"chunk_length": 4, "chunks_after": 1, "causal": False, "mask": masks(23)["inside"]}
    results = []
    for count in (10**9, limit):
        monkeypatch.setitem(op.PIECE_LOGITS, "cpu", count)
        leaves = [tensor.clone().requires_grad_() for tensor in (query_key, value)]
        output = lsh_attention(*leaves, buckets, **form)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert_close("pieces", results[1], results[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_a_row_alone_is_the_row_in_a_batch_with_nan_in_its_padding(side, causal, dtype):
    lengths, size = [1, 5, 12, 63, 64], 70
    form = {"chunk_length": 8, "chunks_after": 0 if causal else 1, "causal": causal}
    rows, mask = [], torch.zeros(len(lengths), size, dtype=torch.bool)
    query_key, value = (torch.full((len(lengths), 2, size, width), math.nan, dtype=dtype) for width in (6, 4))
    for row, length in enumerate(lengths):
        places = {
            "left": torch.arange(size - length, size),
            "right": torch.arange(length),
            "scattered": torch.randperm(size)[:length].sort().values,
        }[side]
        mask[row, places] = True
        query_key[row, :, places], value[row, :, places] = (normal(2, length, width, dtype=dtype) for width in (6, 4))
        rows.append(places)
    query_key.requires_grad_()
    value.requires_grad_()
    buckets = hashed(query_key)
    batch = lsh_attention(query_key, value, buckets, mask=mask, **form)
    cotangent = normal(*batch.shape, dtype=dtype)
    grads = torch.autograd.grad(batch, (query_key, value), cotangent)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for row, places in enumerate(rows):
        leaves = [x[row : row + 1, :, places].detach().requires_grad_() for x in (query_key, value)]
        alone = lsh_attention(*leaves, hashed(leaves[0]), **form)
        expected = [alone, *torch.autograd.grad(alone, leaves, cotangent[row : row + 1, :, places])]
        found = [x[row : row + 1, :, places] for x in (batch, *grads)]
        assert_close(f"{len(places)} tokens", found, expected, tolerance)
    for name, tensor in zip(("output", "query_key", "value"), (batch, *grads), strict=True):
        at_padding = tensor.transpose(1, 2)[~mask]
        assert_equal(f"{name} at padding", at_padding, torch.zeros_like(at_padding))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_padding_comes_behind_the_last_bucket_of_any_type(dtype):
    """Also where the bucket's number is the largest that the type holds."""
    numbers = torch.Generator().manual_seed(4)
    query_key, value = (torch.randn(1, 2, 23, 5, generator=numbers, dtype=torch.float64) for _ in range(2))
    last = min(torch.iinfo(dtype).max, 32767)
    buckets = torch.where(torch.rand(1, 2, 2, 23, generator=numbers) < 0.5, last, last - 1).to(dtype)
    mask = torch.arange(23)[None] >= 9
    together = lsh_attention(query_key, value, buckets, chunk_length=3, chunks_before=1, causal=True, mask=mask)
    own = query_key[:, :, 9:], value[:, :, 9:], buckets[..., 9:]
    assert_close("alone", together[:, :, 9:], lsh_attention(*own, chunk_length=3, chunks_before=1, causal=True), 1e-12)


def test_one_chunk_is_attention_among_all_tokens():
    query_key, value, buckets = make_inputs(11, rounds=3)
    keys = nn.functional.rms_norm(query_key, (5,), eps=1e-6) / math.sqrt(5)
    logits = query_key @ keys.transpose(2, 3) - 1e5 * torch.eye(11)
    logits = logits - 1e9 * torch.ones(11, 11).triu(1)
    found = lsh_attention(query_key, value, buckets, chunk_length=11, causal=True)
    assert_close("output", found, logits.softmax(-1) @ value, 1e-12)


@pytest.mark.parametrize("layout", ["packed", "original"])
def test_tokens_that_see_themselves_alone_lose_no_digits(layout):
    """By logits near -1e5, in which float32 has steps of 0.008."""
    query_key, value, _ = make_inputs(6, rounds=4, dtype=torch.float32)
    buckets = torch.arange(6).expand(2, 2, 4, 6)
    found = lsh_attention(query_key, value, buckets, chunk_length=1, chunks_before=0, causal=True, layout=layout)
    assert_close("output", found, value, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_and_autocast(dtype):
    query_key, value, buckets = (x.to(dtype) if x.is_floating_point() else x for x in make_inputs(33))
    query_key.requires_grad_()
    expected = lsh_attention(query_key.float(), value.float(), buckets, chunk_length=8, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal("buckets", hashed(query_key), hashed(query_key.float()))
        found = lsh_attention(query_key, value, buckets, chunk_length=8, causal=True)
    assert_equal("output", found, expected.to(dtype))
    found.float().sum().backward()
    assert query_key.grad.dtype == dtype


def test_no_rows_give_no_rows():
    query_key, value, buckets = (x[:0] for x in make_inputs(5))
    query_key.requires_grad_()
    output = lsh_attention(query_key, value, buckets, chunk_length=2, causal=True)
    output.sum().backward()
    assert output.shape == (0, 2, 5, 3)
    assert query_key.grad.shape == query_key.shape
    assert lsh_decode(query_key[:, :, -1:], query_key, value, buckets, chunk_length=2).shape == (0, 2, 1, 3)


def test_derivatives():
    query_key, value, buckets = make_inputs(9)
    form = {"chunk_length": 3, "chunks_after": 1, "causal": False, "mask": masks(9)["left"]}

    def output(point):
        return lsh_attention(point["query_key"], point["value"], buckets, **form)

    point = {"query_key": query_key, "value": value}
    check_first_derivatives(output, point)
    check_second_derivatives(lambda moved: output(moved).square().sum(), point)
    leaves = [tensor.clone().requires_grad_() for tensor in (query_key, value)]
    assert torch.autograd.gradcheck(lambda *x: lsh_attention(*x, buckets, **form), leaves)
    batched = torch.func.vmap(lambda q, v, b: lsh_attention(q, v, b, chunk_length=3, causal=True))
    doubled = batched(*(torch.stack([x, x.flip(0)]) for x in (query_key, value, buckets)))
    expected = lsh_attention(query_key, value, buckets, chunk_length=3, causal=True)
    assert_close("vmap", doubled, torch.stack([expected, expected.flip(0)]), 1e-12)


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("rotations", draw_rotations(0, 5, 2, FACTORS, 2))

    def forward(self, query_key, value, mask):
        buckets = hash_buckets(query_key, self.rotations, FACTORS)
        output = lsh_attention(query_key, value, buckets, chunk_length=4, causal=True, mask=mask)
        new = query_key[:, :, -1:].clone()
        return output, lsh_decode(new, query_key, value, buckets, chunk_length=2, mask=mask)


def test_compile_export_and_opcheck():
    layer = _Layer().eval()
    query_key, value, buckets = make_inputs(21, dtype=torch.float32)
    mask = masks(21)["left"]
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close("compiled", compiled(query_key, value, mask), layer(query_key, value, mask))
    length = torch.export.Dim("length", min=2, max=1000)
    shapes = {"query_key": {2: length}, "value": {2: length}, "mask": {1: length}}
    program = torch.export.export(layer, (query_key, value, mask), dynamic_shapes=shapes).module()
    for size in (2, 8, 63):
        other = (*make_inputs(size, dtype=torch.float32)[:2], masks(size)["right"])
        assert_close(f"exported, {size}", program(*other), layer(*other))
    arguments = (query_key.requires_grad_(), value.requires_grad_(), buckets, mask, None, 4, 1, 0, True, "packed")
    torch.library.opcheck(op._op, arguments)


@pytest.mark.parametrize("padding", ["none", "left", "scattered"])
@pytest.mark.parametrize("layout", ["packed", "original"])
@pytest.mark.parametrize(("slots", "new"), [(1, 1), (13, 1), (40, 5), (7, 7)])
@pytest.mark.parametrize(("chunk_length", "before"), [(1, 1), (2, 0), (4, 1)])
def test_decoding_equals_the_loops(chunk_length, before, slots, new, layout, padding):
    keys, values, buckets = make_inputs(slots)
    form = {"chunk_length": chunk_length, "chunks_before": before, "layout": layout, "mask": masks(slots)[padding]}
    if layout == "original":
        form["memory_length"] = slots + (slots % 2)
    query = keys[:, :, slots - new :]
    expected = lsh_decode_naive(query, keys, values, buckets, **form)
    assert_close("output", lsh_decode(query, keys, values, buckets, **form), expected, 1e-12)


def test_several_new_tokens_are_decoded_one_after_the_other(monkeypatch):
    """In pieces too, with room behind them, from a view of heads, and with anything in padding and empty slots."""
    keys, values, buckets = make_inputs(30)
    mask = masks(30)["left"]
    expected = [
        lsh_decode(x[:, :, -1:], x, v, b, chunk_length=3, mask=m)
        for x, v, b, m in (
            (keys[:, :, :end], values[:, :, :end], buckets[..., :end], mask[:, :end]) for end in range(24, 31)
        )
    ]
    room = [nn.functional.pad(x, (0, 0, 0, 6), value=math.nan).transpose(1, 2).contiguous() for x in (keys, values)]
    for x in room:
        x[:, :30][~mask] = math.nan
    held = [x.transpose(1, 2) for x in room]
    held += [nn.functional.pad(buckets, (0, 6), value=3)]
    form = {"chunk_length": 3, "mask": nn.functional.pad(mask, (0, 6), value=True)}
    for limit in (1, 10**9):
        monkeypatch.setitem(op.PIECE_LOGITS, "cpu", limit)
        for position in (23, torch.tensor(23)):
            found = lsh_decode(keys[:, :, 23:], *held, position=position, **form)
            assert_close(f"pieces of {limit}", found, torch.cat(expected, 2), 1e-12)


def test_the_layouts_of_decoding_differ_by_two_places():
    """A query that shares a bucket with no one sees the latest tokens; the original wastes one place on the query and
    one on the slot behind it."""
    keys, values = normal(1, 1, 20, 5), torch.eye(20, dtype=torch.float64)[None, None]
    buckets = torch.ones(1, 1, 1, 20, dtype=torch.int32)
    buckets[..., -1] = 2
    seen = {}
    for layout in ("packed", "original"):
        output = lsh_decode(keys[:, :, -1:], keys, values, buckets, chunk_length=3, layout=layout)
        seen[layout] = output.flatten().nonzero().flatten().tolist()
    assert seen == {"packed": [13, 14, 15, 16, 17, 18], "original": [15, 16, 17, 18]}


@pytest.mark.parametrize("factors", [[2], [8], [4, 6], [2, 4, 2]], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=["shared", "by-head", "by-row"])
def test_hashing_equals_the_loops(leading, factors):
    vectors = normal(2, 3, 9, 5)
    vectors[0, 0, 0] = 0.0  # lies in the first bucket
    rotations = normal(*leading, 5, 2, sum(factors) // 2)
    found = hash_buckets(vectors, rotations, factors)
    assert_equal("buckets", found, hash_buckets_naive(vectors, rotations, factors))
    assert not found[0, 0, :, 0].any()
    assert found.max() < math.prod(factors)


def test_rotations_are_a_fixed_function_of_their_seed():
    rotations = draw_rotations(7, 64, 4, [16, 16], heads=8)
    state = torch.get_rng_state()
    assert_equal("again", draw_rotations(7, 64, 4, [16, 16], heads=8), rotations)
    assert_equal("fewer rounds", draw_rotations(7, 64, 2, [16, 16], heads=8), rotations[:, :, :2])
    assert_equal("generator", torch.get_rng_state(), state)
    first = rotations[0, 0, 0, :3].double()  # of no processor's own, but for the last digits of a logarithm
    expected = torch.tensor([0.9181767, -0.5420005, -1.3100792], dtype=torch.float64)
    assert_close("values", first, expected, 1e-6)
    for other in (draw_rotations(8, 64, 4, [16, 16], 8), draw_rotations(7, 64, 4, [16, 16], 8, layer=1)):
        assert (other * rotations).mean().abs() < 0.02
    assert abs(rotations.mean()) < 0.02
    assert abs(rotations.std() - 1) < 0.02
    assert draw_rotations(-1, 64, 4, [16, 16]).shape == (64, 4, 16)


@pytest.mark.parametrize(
    ("max_length", "chunk_length", "expected"),
    [(1, 1, [2]), (63, 64 - 1, [2]), (100, 32, [6]), (8192, 128, [128]), (16384, 128, [16, 16]), (130, 2, [16, 8])],
)
def test_bucket_factors(max_length, chunk_length, expected):
    """By the original's rule; the product may be less than twice the number of chunks."""
    assert bucket_factors(max_length, chunk_length) == expected


def test_what_does_not_fit():
    query_key, value, buckets = make_inputs(6)
    good = {"chunk_length": 2, "causal": True}
    for changes, message in (
        ({"layout": "sorted"}, "layout must be one of packed, original"),
        ({"chunk_length": 0}, "chunk_length must be at least 1"),
        ({"chunks_after": -1}, "at least 0; got 2, 1 and -1"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must be boolean of shape \(2, 6\)"),
        ({"mask": torch.ones(2, 6)}, "mask must be boolean"),
        ({"dropout_mask": torch.ones(2, 2)}, r"dropout_mask must have shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lsh_attention(query_key, value, buckets, **{**good, **changes})
    for tensors, message in (
        ((query_key[:, :, :0], value, buckets), "at least one token"),
        ((query_key, value[:, :1], buckets), r"Values must have shape \(2, 2, 6, value_size\)"),
        ((query_key, value.float(), buckets), "one floating-point dtype"),
        ((query_key, value, buckets[..., :5]), r"buckets must have shape \(2, 2, rounds, 6\)"),
        ((query_key, value, buckets.float()), "buckets must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            lsh_attention(*tensors, **good)
    with pytest.raises(ValueError, match="which hold the new tokens too"):
        lsh_decode(query_key, query_key[:, :, :5], value[:, :, :5], buckets[..., :5], chunk_length=2)
    with pytest.raises(ValueError, match="2 new tokens from slot 5 do not fit into 6 slots"):
        lsh_decode(query_key[:, :, :2], query_key, value, buckets, chunk_length=2, position=5)
    with pytest.raises(ValueError, match=r"must be even and positive.*got \[4, 3\]"):
        draw_rotations(0, 8, 2, [4, 3])
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        draw_rotations(0, 8, 0, [4])
    with pytest.raises(ValueError, match=r"rotations must have shape \(5, rounds, 3\).*got \(5, 2, 4\)"):
        hash_buckets(query_key, torch.zeros(5, 2, 4), [6])
    with pytest.raises(ValueError, match="Chunks of 128 tokens are longer than the longest text, of 100"):
        bucket_factors(100, 128)


@pytest.mark.parametrize("buckets_count", [2, 7, 200])
@pytest.mark.parametrize("slots", [1, 17, 63, 500])
def test_one_token_without_padding(slots, buckets_count):
    """Few buckets, in which more tokens share one than there are places for, and many, where the latest fill them."""
    numbers = torch.Generator().manual_seed(slots)
    query, keys, values = (
        torch.randn(2, 3, length, size, generator=numbers, dtype=torch.float64)
        for length, size in ((1, 5), (slots, 5), (slots, 4))
    )
    buckets = torch.randint(0, buckets_count, (2, 3, 2, slots), generator=numbers, dtype=torch.int16)
    options = {"chunk_length": 4, "chunks_before": 1, "position": max(0, slots - 2)}
    with torch.no_grad():
        found = lsh_decode(query, keys, values, buckets, **options)
    torch.testing.assert_close(found, lsh_decode_naive(query, keys, values, buckets, **options), rtol=1e-9, atol=1e-9)
