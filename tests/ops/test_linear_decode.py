"""linear_decode and linear_t_decode against float64: every width, selection, instruction set; errors and tracing."""

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

import ppnet.extension as extension
from ppnet.ops import linear_decode, linear_decode_ref, linear_t_decode, linear_t_decode_ref, linears_decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 172), (172, 7), (300, 517), (65, 4096), (2100, 33)]  # rows, elements of a row
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def selections(n):
    yield None
    for k in sorted({0, 1, n // 2 | 1, n} & set(range(n + 1))):
        yield torch.randperm(n)[:k]
    yield torch.randint(n, (n + 3,))  # rows may repeat


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(operator, reference, x, weight, bias=None, **options):
    """The operator against its reference in float64, and the reference in the same dtype."""
    wide = double(x, weight, bias)
    options64 = {
        name: value.double() if name == "z" and value is not None else value for name, value in options.items()
    }
    exact = reference(*wide, **options64)
    magnitude = reference(*(None if t is None else t.abs() for t in wide), **options64)
    assert_as_accurate(
        operator(x, weight, bias, **options), reference(x, weight, bias, **options), exact, magnitude.abs()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d", SHAPES)
def test_linear_decode(n, d, dtype, isa):
    weight = (torch.randn(n, 2 * d + 3).to(dtype))[:, 1 : d + 1]  # rows of a larger matrix, misaligned
    bias = torch.randn(n).to(dtype)
    for tokens in (0, 1, 2, 3, 8):
        x = torch.randn(tokens, d).to(dtype)
        for idx in selections(n):
            for b in (None, bias):
                check(linear_decode, linear_decode_ref, x, weight, b, idx=idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d", SHAPES)
def test_linear_t_decode(n, d, dtype, isa):
    weight = (torch.randn(n, 2 * d + 3).to(dtype))[:, 1 : d + 1]
    bias = torch.randn(d).to(dtype)
    for tokens in (0, 1, 2, 3, 8):
        for idx in selections(n):
            k = n if idx is None else len(idx)
            x = torch.randn(k, tokens).to(dtype).t()  # not contiguous
            for b, z in ((None, None), (bias, torch.rand(k))):
                check(linear_t_decode, linear_t_decode_ref, x, weight, b, idx=idx, z=z)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(1, 70), st.integers(1, 200), st.sampled_from(DTYPES), st.data())
def test_any_shape_and_selection(tokens, n, d, dtype, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(n, d, generator=generator).to(dtype)
    idx = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=torch.int64)
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    check(linear_decode, linear_decode_ref, x, weight, idx=idx)
    x = torch.randn(tokens, len(idx), generator=generator).to(dtype)
    check(linear_t_decode, linear_t_decode_ref, x, weight, idx=idx)


def test_not_a_number_reaches_its_outputs_only(isa):
    weight, x = torch.randn(40, 33), torch.randn(2, 33)
    weight[5, 7] = float("nan")
    assert linear_decode(x, weight).isnan().nonzero()[:, 1].unique().tolist() == [5]
    assert linear_t_decode(x[:, :1].expand(2, 40), weight).isnan().nonzero()[:, 1].unique().tolist() == [7]
    kept = torch.tensor([k for k in range(40) if k != 5])
    assert not linear_t_decode(x[:, :1].expand(2, 39), weight, idx=kept).isnan().any()


def test_tracing_compile_and_autocast():
    x, weight, idx, z = torch.randn(2, 48), torch.randn(30, 48), torch.tensor([4, 2, 29]), torch.rand(3)
    torch.library.opcheck(torch.ops.ppnet.linear_decode, (x, weight, torch.randn(30), idx))
    torch.library.opcheck(torch.ops.ppnet.linear_t_decode, (x[:, :3], weight, None, idx, z))

    def both(x, weight):
        return linear_t_decode(linear_decode(x, weight, idx=idx), weight, idx=idx, z=z)

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x, weight), both(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = both(x, weight)
    rounded = weight.bfloat16()
    assert torch.equal(out, linear_t_decode(linear_decode(x.bfloat16(), rounded, idx=idx), rounded, idx=idx, z=z))
    with pytest.raises(RuntimeError, match=r"not differentiable.*torch\.nn\.functional\.linear"):
        linear_decode(x.requires_grad_(), weight)


X, W = torch.randn(2, 6), torch.randn(4, 6)


@compiled
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.randn(9, 6), W), r"x has shape \(9, 6\); it must be \(T, width\) with at most 8 tokens"),
        ((X[0], W), r"x has shape \(6,\)"),
        ((X.double(), W.double()), "x has dtype Double; allowed are Float, BFloat16 and Half"),
        ((X, W.bfloat16()), r"weight has dtype BFloat16; it must be Float \(the dtype of x\)"),
        ((X[:, :5], W), r"x has shape \(2, 5\); it must be \(T, D\), D that of the weight = \(any, 6\)"),
        ((X, W[0]), r"weight has shape \(6,\); it must have two axes"),
        (
            (torch.randn(2, 4), W.t()),
            r"weight of shape \(6, 4\) has strides \(1, 6\); its rows must be contiguous.*accelerate",
        ),
        ((X, W, torch.randn(5)), r"bias has shape \(5,\); it must be one entry per output = \(4,\)"),
        ((X, W, None, torch.tensor([4])), r"idx\[0\] is 4; allowed are 0 \.\. 3"),
        ((X, W, None, torch.tensor([0, -1])), r"idx\[1\] is -1"),
        ((X, W, None, torch.tensor([0], dtype=torch.int32)), "idx has dtype Int; it must be Long"),
        ((X, W, None, torch.tensor([[0]])), r"idx has shape \(1, 1\)"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    x, weight, bias, idx = (*arguments, None, None)[:4]
    with pytest.raises(RuntimeError, match=f"linear_decode: {message}"):
        linear_decode(x, weight, bias, idx=idx)


@compiled
def test_errors_of_linear_t_decode():
    with pytest.raises(RuntimeError, match=r"linear_t_decode: z has shape \(3,\); it must be \(K,\) = \(2,\)"):
        linear_t_decode(torch.randn(1, 2), W, idx=torch.tensor([0, 1]), z=torch.rand(3))
    with pytest.raises(RuntimeError, match="z has dtype BFloat16; it must be Float"):
        linear_t_decode(torch.randn(1, 4), W, z=torch.rand(4).bfloat16())
    with pytest.raises(RuntimeError, match=r"x has shape \(1, 4\); it must be \(T, K\), K the entries of idx"):
        linear_t_decode(torch.randn(1, 4), W, idx=torch.tensor([0, 1]))


# --- several layers at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[], [5], [1, 300, 65], [0, 7, 0, 172], [2048, 512, 512]])
def test_several_layers_are_one_after_the_other(rows, dtype, isa, threads):
    """To the bit: each row is summed in the same order, whatever it shares a pass with."""
    weights = [torch.randn(n, 172).to(dtype) for n in rows]
    for tokens in (0, 1, 3, 8):
        x = torch.randn(tokens, 172).to(dtype)
        for with_bias, part in ((False, False), (True, False), (True, True)):
            bias = [torch.randn(n).to(dtype) if with_bias and i % 2 else None for i, n in enumerate(rows)]
            idx = [torch.randperm(n)[: n // 2 | 1] if part and i % 2 == 0 and n else None for i, n in enumerate(rows)]
            together = linears_decode(x, weights, bias, idx=idx)
            alone = [linear_decode(x, w, b, idx=i) for w, b, i in zip(weights, bias, idx, strict=True)]
            assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_tracing_compile_and_autocast_of_several_layers():
    x, weights, idx = torch.randn(2, 48), [torch.randn(30, 48), torch.randn(7, 48)], torch.tensor([4, 2, 29])
    torch.library.opcheck(torch.ops.ppnet.linears_decode, (x, weights, [torch.randn(30), None], [idx, None]))
    traced = torch.compile(lambda x: linears_decode(x, weights, idx=[idx, None]), fullgraph=True, backend="aot_eager")
    for one, other in zip(traced(x), linears_decode(x, weights, idx=[idx, None]), strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = linears_decode(x, weights)
    for one, weight in zip(halves, weights, strict=True):
        assert torch.equal(one, linear_decode(x.bfloat16(), weight.bfloat16()))


@compiled
@pytest.mark.parametrize(
    "bias, idx, message",
    [
        ([None], None, "bias has 1 entries, but weight has 2"),
        (None, [None] * 3, "idx has 3 entries, but weight has 2"),
        ([None, torch.randn(5)], None, r"bias\[1\] has shape \(5,\); it must be one entry per output = \(4,\)"),
        (None, [None, torch.tensor([4])], r"idx\[1\]\[0\] is 4; allowed are 0 \.\. 3"),
    ],
)
def test_errors_of_several_layers(bias, idx, message):
    with pytest.raises(RuntimeError, match=f"linears_decode: {message}"):
        linears_decode(X, [W, W], bias, idx=idx)
    with pytest.raises(RuntimeError, match=r"linears_decode: weight\[1\] has dtype Half"):
        linears_decode(X, [W, W.half()])
