"""gated_attention_decode: against float64, masks, groups, strides, garbage behind masks, tracing, errors."""

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppnet.extension as extension
from ppnet.ops.gated_attention_decode import gated_attention_decode, gated_attention_decode_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def cache(batch, heads, kv_heads, tokens, keys, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, heads, tokens, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def wide_mask(mask, dtype):
    """A mask in a wider dtype, where the lowest value of its own is no longer the lowest."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return torch.where(mask <= torch.finfo(mask.dtype).min, -torch.inf, mask.to(dtype))


def check(query, key, value, mask=None, **kwargs):
    """At most twice the error of float32 arithmetic in torch, and one rounding of the output."""
    out = gated_attention_decode(query, key, value, mask=mask, **kwargs)
    assert out.dtype == query.dtype and out.shape == query.shape
    if out.numel() == 0:
        return out
    expected, plain = (
        gated_attention_decode_ref(
            query.to(wide), key.to(wide), value.to(wide), mask=wide_mask(mask, wide), **kwargs
        ).double()
        for wide in (torch.float64, torch.float32)
    )
    floor = 8 * torch.finfo(torch.float32).eps * value.abs().max().double() + 1e-7
    rounding = 0.505 * torch.finfo(query.dtype).eps * expected.abs()
    assert ((out.double() - expected).abs() <= 2 * (plain - expected).abs().max() + floor + rounding).all()
    return out


SHAPES = [  # B, H, Hkv, T, S, Dh
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 3, 7, 172),
    (1, 8, 2, 1, 300, 64),
    (2, 32, 4, 8, 172, 80),
    (3, 6, 2, 2, 600, 7),
    (1, 4, 4, 1, 1025, 128),
    (1, 40, 1, 2, 257, 96),
]


def masks(batch, heads, tokens, keys, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand((batch, heads, tokens, keys), generator=generator) > 0.4
    padded = torch.arange(keys) >= torch.arange(batch)[:, None] * (keys // 2)
    lowest = torch.finfo(dtype).min
    return {
        "none": None,
        "bool": keep[:, :1],
        "per head": keep,
        "left padding": padded[:, None, None].expand(batch, 1, tokens, keys),
        "bias": torch.randn((batch, 1, 1, keys), generator=generator).expand(batch, 1, tokens, keys),
        "lowest": torch.where(keep[:, :1], 0.0, lowest).to(dtype),
        "keys alone": torch.where(keep[0, 0, 0], 0.5, -torch.inf).double(),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, isa):
    batch, heads, kv_heads, tokens, keys, _ = shape
    query, key, value = cache(*shape, dtype)
    lengths = torch.arange(batch) * (keys // 3) % (keys + 1)
    gate = torch.linspace(-1, 1.5, kv_heads)
    for mask in masks(batch, heads, tokens, keys, dtype).values():
        for extra in ({}, {"lengths": lengths}, {"window": 100}, {"lengths": lengths, "window": 3, "scale": 0.3}):
            check(query, key, value, mask=mask, gate=gate, **extra)


# Heads of 64, 128 and 256 dims and what lies between; several tiles of query rows; rows that start at no 16 bytes;
# more positions than one block takes.
EMULATED_SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 3, 7, 172),
    (1, 8, 2, 1, 40, 64),
    (1, 6, 1, 3, 33, 80),
    (2, 2, 1, 1, 330, 128),
    (1, 2, 2, 2, 19, 256),
    (1, 2, 1, 1, 70, 7),
    (1, 3, 1, 1, 90, 40),
]


@emulated.needs_emulator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", emulated.SEEDS)
@pytest.mark.parametrize("shape", EMULATED_SHAPES)
def test_emulated_against_float64(shape, seed, dtype):
    batch, heads, kv_heads, tokens, keys, _ = shape
    query, key, value = cache(*shape, dtype)
    lengths = torch.arange(batch) * (keys // 3) % (keys + 1)
    gate = torch.linspace(-1, 1.5, kv_heads)
    with emulated.emulated(seed):
        for mask in masks(batch, heads, tokens, keys, dtype).values():
            check(query, key, value, mask=mask, gate=gate)
            check(query, key, value, mask=mask, gate=gate, lengths=lengths, window=3, scale=0.3)


@emulated.needs_emulator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 176])
def test_emulated_reads_misaligned_caches(width, dtype):
    """Rows that start at no 16 bytes go another way; the results do not depend on the order of threads."""
    query, key, value = cache(2, 4, 2, 2, 21, width, dtype)
    shifted = []
    for t in (key, value):
        big = torch.full((2, 2, 23, width + 5), torch.nan, dtype=dtype)
        big[:, :, 1:22, 3 : width + 3] = t
        shifted.append(big[:, :, 1:22, 3 : width + 3])
    with emulated.emulated():
        check(query, key, value)
        expected = check(query, *shifted)
    for seed in emulated.ORDERS[1:]:
        with emulated.emulated(seed):
            assert torch.equal(gated_attention_decode(query, *shifted), expected)


@emulated.needs_emulator
@pytest.mark.parametrize("seed", emulated.SEEDS)
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(groups=torch.tensor([0, 2])), "groups out of range"),
        (dict(groups=torch.tensor([-1, 0])), "groups out of range"),
        (dict(lengths=torch.tensor([10])), "lengths out of range"),
        (dict(lengths=torch.tensor([-1])), "lengths out of range"),
    ],
)
def test_emulated_indices_out_of_range(change, message, seed):
    query, key, value = cache(1, 4, 2, 1, 9, 8, torch.bfloat16)
    with (
        emulated.emulated(seed),
        pytest.raises(RuntimeError, match=f"decode_tensor_kernel.*assertion failed: .*{message}"),
    ):
        gated_attention_decode(query, key, value, **change)


@emulated.needs_emulator
def test_emulated_refuses_wide_heads():
    query, key, value = cache(1, 1, 1, 1, 2, 257, torch.float32)
    with (
        emulated.emulated(),
        pytest.raises(RuntimeError, match="query has a head dim of 257; on a GPU allowed are up to 256"),
    ):
        gated_attention_decode(query, key, value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMULATED_SHAPES, (4, 32, 8, 1, 5000, 128), (1, 64, 8, 1, 9000, 256)])
def test_gpu(shape, dtype):
    batch, heads, kv_heads, tokens, keys, _ = shape
    query, key, value = (t.cuda() for t in cache(*shape, dtype))
    lengths = torch.arange(batch, device="cuda") * (keys // 3) % (keys + 1)
    gate = torch.linspace(-1, 1.5, kv_heads, device="cuda")
    for mask in masks(batch, heads, tokens, keys, dtype).values():
        mask = None if mask is None else mask.cuda()
        for extra in ({}, {"lengths": lengths}, {"window": 100}, {"lengths": lengths, "window": 3, "scale": 0.3}):
            out = check(query, key, value, mask=mask, gate=gate, **extra)
            assert torch.equal(gated_attention_decode(query, key, value, mask=mask, gate=gate, **extra), out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_under_a_graph():
    """Shapes and pointers fixed, lengths and the cache free."""
    query, key, value = (t.cuda() for t in cache(2, 8, 4, 1, 3000, 128, torch.bfloat16))
    lengths = torch.tensor([100, 3000], device="cuda")
    groups = torch.tensor([3, 1], device="cuda")
    gated_attention_decode(query[:, :4], key, value, groups=groups, lengths=lengths)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gated_attention_decode(query[:, :4], key, value, groups=groups, lengths=lengths)
    lengths.copy_(torch.tensor([2999, 7], device="cuda"))
    key.mul_(0.5)
    graph.replay()
    assert torch.equal(out, gated_attention_decode(query[:, :4], key, value, groups=groups, lengths=lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [[], [2], [4, 0, 3], [0, 1, 2, 3, 4]])
def test_groups(groups, dtype, kernels):
    query, key, value = cache(2, 3 * len(groups), 5, 2, 172, 64, dtype)
    out = check(query, key, value, groups=torch.tensor(groups, dtype=torch.int64), gate=torch.rand(len(groups)))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_sdpa(dtype):
    query, key, value = cache(2, 8, 2, 1, 333, 64, dtype)
    out = gated_attention_decode(query, key, value)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True), rtol=0.02, atol=4e-3
    )


def test_strided_caches(kernels):
    query, key, value = cache(2, 8, 4, 2, 300, 64, torch.bfloat16)
    expected = gated_attention_decode(query, key, value)
    by_position = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value)]
    preallocated = [torch.full((2, 6, 512, 96), torch.nan, dtype=t.dtype) for t in (key, value)]
    for big, t in zip(preallocated, (key, value), strict=True):
        big[:, 1:5, 7:307, 11:75] = t
    views = [big[:, 1:5, 7:307, 11:75] for big in preallocated]
    strided_query = query.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(gated_attention_decode(query, *by_position), expected)
    assert torch.equal(gated_attention_decode(query, *views), expected)
    assert torch.equal(gated_attention_decode(strided_query, *by_position), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_garbage_behind_the_mask(dtype, kernels):
    """A preallocated cache holds anything beyond its length; so does padding."""
    size = 330 if kernels == "cuda" else 700
    query, key, value = cache(2, 6, 2, 3, size, 64, dtype)
    lengths = torch.tensor([170, size - 50])
    keep = (torch.arange(size) < lengths[:, None]) & (torch.arange(size) >= 40)
    expected = gated_attention_decode(query, key, value, mask=keep[:, None, None])
    by_length = gated_attention_decode(query, key, value, lengths=lengths)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        k, v = (torch.where(keep[:, None, :, None], t, garbage) for t in (key, value))
        assert torch.equal(gated_attention_decode(query, k, v, mask=keep[:, None, None]), expected)
        k, v = (
            torch.where((torch.arange(size) < lengths[:, None])[:, None, :, None], t, garbage) for t in (key, value)
        )
        assert torch.equal(gated_attention_decode(query, k, v, lengths=lengths), by_length)


def test_value_masked_for_some_queries_only(kernels):
    """The last new token attends to its own NaN; the tokens before it must not see it."""
    query, key, value = cache(1, 4, 2, 4, 301, 64, torch.float32)
    expected = gated_attention_decode(query, key, value)
    value[:, :, -1] = torch.nan
    out = gated_attention_decode(query, key, value)
    assert torch.equal(out[:, :, :3], expected[:, :, :3]) and out[:, :, 3].isnan().all()


def test_nan_that_is_attended_to_is_kept(kernels):
    query, key, value = cache(1, 2, 2, 1, 40, 32, torch.float32)
    key[0, 0, 5, 3] = torch.nan
    out = gated_attention_decode(query, key, value)
    assert out[0, 0].isnan().all() and not out[0, 1].isnan().any()
    only = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    only[..., 5] = True
    assert gated_attention_decode(query, key, value, mask=only)[0, 0].isnan().all()


def test_nothing_to_attend_to_gives_zero(kernels):
    query, key, value = cache(2, 2, 2, 2, 300, 16, torch.bfloat16)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1] = False
    out = gated_attention_decode(query, key * torch.nan, value * torch.nan, mask=mask)
    assert out[0].isnan().all() and torch.equal(out[1], torch.zeros_like(out[1]))
    assert not gated_attention_decode(query, key, value, lengths=torch.tensor([0, 0])).any()
    assert not gated_attention_decode(query, key[:, :, :0], value[:, :, :0]).any()


@pytest.mark.parametrize("sizes", [(0, 2, 2, 1, 5, 8), (1, 2, 2, 0, 5, 8), (1, 2, 2, 1, 5, 0), (1, 0, 2, 1, 5, 8)])
def test_empty(sizes):
    query, key, value = cache(*sizes, torch.float32)
    assert gated_attention_decode(query, key, value, scale=1.0).shape == query.shape


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data):
    kv_heads, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    keys, width = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 140))
    dtype = data.draw(st.sampled_from(DTYPES))
    query, key, value = cache(batch, kv_heads * group, kv_heads, tokens, keys, width, dtype, keys)
    mask = data.draw(st.sampled_from(list(masks(batch, kv_heads * group, tokens, keys, dtype).values())))
    lengths = data.draw(st.none() | st.lists(st.integers(0, keys), min_size=batch, max_size=batch).map(torch.tensor))
    check(query, key, value, mask=mask, lengths=lengths, window=data.draw(st.none() | st.integers(1, keys)))


def test_autocast_casts_the_query_to_the_cache():
    query, key, value = cache(1, 2, 2, 1, 9, 8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated_attention_decode(query.float(), key, value).dtype == torch.bfloat16


def test_opcheck():
    query, key, value = cache(2, 4, 2, 2, 30, 8, torch.float32)
    mask = torch.rand(2, 1, 2, 30) > 0.5
    args = (query, key, value, torch.tensor([1, 0]), torch.rand(2), mask, torch.tensor([30, 20]), 0.3, 7)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ppnet.gated_attention_decode.default, args, test_utils=tests)


def test_compile_and_export():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return gated_attention_decode(query, key, value, mask=mask).transpose(1, 2).flatten(2)

    inputs = (*cache(1, 4, 2, 1, 50, 8, torch.float32), torch.rand(1, 1, 1, 50) > 0.5)
    with torch.no_grad():
        expected = Attend()(*inputs)
        compiled_module = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled_module(*inputs), expected)
        assert torch.equal(torch.export.export(Attend(), inputs).module()(*inputs), expected)


def test_refuses_gradients():
    query, key, value = cache(1, 2, 2, 1, 9, 8, torch.float32)
    with pytest.raises(RuntimeError, match="train with gated_attention"):
        gated_attention_decode(query.requires_grad_(), key, value)


ERRORS = [
    (dict(query=torch.zeros(2, 4, 1, 8, dtype=torch.float64)), r"query has dtype Double; allowed are Float"),
    (dict(query=torch.zeros(4, 1, 8)), r"query has shape \(4, 1, 8\); it must be \(B, H, T, Dh\)"),
    (dict(key=torch.zeros(2, 2, 9, 8).half()), r"key has dtype Half; it must be Float"),
    (dict(key=torch.zeros(2, 2, 9, 7)), r"key has shape \(2, 2, 9, 7\); it must be \(B, Hkv, S, Dh\)"),
    (dict(value=torch.zeros(2, 2, 5, 8)), r"value has shape \(2, 2, 5, 8\); it must be the shape of key"),
    (dict(key=torch.zeros(2, 2, 8, 9).transpose(2, 3)), r"key has stride 9 along its last axis"),
    (dict(groups=torch.tensor([0, 2])), r"groups\[1\] is 2; allowed are 0 \.\. 1"),
    (dict(groups=torch.tensor([0, 1, 0])), r"query has 4 heads for 3 KV groups"),
    (dict(groups=torch.tensor([0], dtype=torch.int32)), r"groups has dtype Int; it must be Long"),
    (dict(gate=torch.ones(3)), r"gate has shape \(3,\); it must be \(G,\) = \(2,\)"),
    (dict(gate=torch.ones(2).double()), r"gate has dtype Double; it must be Float"),
    (dict(mask=torch.zeros(2, 1, 1, 8)), r"mask has shape \(2, 1, 1, 8\); it must broadcast to .* = \(2, 4, 1, 9\)"),
    (dict(mask=torch.zeros(9, dtype=torch.int64)), r"mask has dtype Long; allowed are Bool"),
    (dict(lengths=torch.tensor([3, 10])), r"lengths\[1\] is 10; allowed are 0 \.\. 9"),
    (dict(lengths=torch.tensor([3])), r"lengths has shape \(1,\); it must be \(B,\) = \(2,\)"),
    (dict(window=-1), r"window is -1"),
]


@compiled
@pytest.mark.parametrize("change, message", ERRORS)
def test_errors(change, message):
    args = dict(query=torch.zeros(2, 4, 1, 8), key=torch.zeros(2, 2, 9, 8), value=torch.zeros(2, 2, 9, 8)) | change
    with pytest.raises(RuntimeError, match=message):
        gated_attention_decode(**args)
