"""The CUDA kernels of the decoding operators, emulated and on a GPU: against float64, to the bit where that is due."""

import emulated
import pytest
import torch
from accuracy import assert_as_accurate

from ppnet.ops import (
    gated_mlp_decode,
    gated_mlp_decode_ref,
    linear_decode,
    linear_decode_ref,
    linear_t_decode,
    linear_t_decode_ref,
    linears_decode,
    rms_norm,
    rms_norm_ref,
    rotary,
    rotary_ref,
)
from ppnet.ops.gated_act import ACTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(f, d, dtype, device, layout="aligned"):
    """(f, d): rows of whole 16 bytes, rows 4 bytes apart from that, or rows that begin anywhere."""
    apart, begin = {"aligned": (-(-d // 8) * 8 + 8, 8), "words": (-(-d // 8) * 8 + 2, 2), "odd": (d + 3, 1)}[layout]
    full = torch.full((f, apart + begin), torch.nan, device=device).to(dtype)
    view = full[:, begin : begin + d]
    return view.copy_(torch.randn(f, d, device=device) / max(d, 1) ** 0.5)


def selections(n, device):
    yield None
    for k in sorted({0, 1, n // 2 | 1} & set(range(n + 1))):
        yield torch.randperm(n, device=device)[:k]
    yield torch.randint(n, (n + 3,), device=device)  # rows may repeat


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(operator, reference, *arguments, **options):
    ours = operator(*arguments, **options)
    exact = reference(*map(wide, arguments), **{name: wide(value) for name, value in options.items()})
    sizes = [value.double().abs() if isinstance(value, torch.Tensor) else value for value in arguments]
    magnitude = None
    if operator in (linear_decode, linear_t_decode):
        magnitude = reference(*sizes, **{name: wide(value) for name, value in options.items()}).abs()
    assert_as_accurate(ours, reference(*arguments, **options), exact, magnitude)
    return ours


SHAPES = [(1, 1, "odd"), (7, 172, "aligned"), (7, 172, "words"), (33, 7, "odd"), (40, 517, "aligned"), (9, 1090, "odd")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, layout", SHAPES)
def test_linear_decode(n, d, layout, dtype, device):
    weight = matrix(n, d, dtype, device, layout)
    bias = torch.randn(n, device=device).to(dtype)
    for tokens, b, idx in zip((0, 1, 2, 3, 8), (bias, None, bias, None, bias), selections(n, device), strict=False):
        x = torch.randn(tokens, d, device=device).to(dtype)
        check(linear_decode, linear_decode_ref, x, weight, b, idx=idx)
        check(linear_decode, linear_decode_ref, matrix(tokens, d, dtype, device, "odd"), weight, b, idx=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, layout", [*SHAPES, (530, 70, "aligned"), (200, 33, "words")])
def test_linear_t_decode(n, d, layout, dtype, device):
    weight = matrix(n, d, dtype, device, layout)
    bias = torch.randn(d, device=device).to(dtype)
    for tokens, b, idx in zip((0, 1, 2, 3, 8), (bias, None, bias, None, bias), selections(n, device), strict=False):
        k = n if idx is None else len(idx)
        x = torch.randn(k, tokens, device=device).to(dtype).t()  # not contiguous
        z = None if b is None else torch.rand(k, device=device)
        check(linear_t_decode, linear_t_decode_ref, x, weight, b, idx=idx, z=z)
        check(linear_t_decode, linear_t_decode_ref, torch.randn(tokens, n, device=device).to(dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_wider_than_shared_memory(dtype, device):
    """Tiles of 96 KB."""
    for tokens in (3, 8):
        d = 7000 if dtype == torch.float32 else 13000
        x = torch.randn(tokens, d, device=device).to(dtype)
        check(linear_decode, linear_decode_ref, x, matrix(2, d, dtype, device), idx=torch.tensor([1], device=device))


@pytest.mark.parametrize("rows", [[], [0], [1, 30, 5], [0, 7, 0, 17], [1] * 60])
def test_several_layers_are_one_after_the_other(rows, device):
    """To the bit; 60 layers are more than one launch takes."""
    for dtype in DTYPES:
        weights = [matrix(n, 172, dtype, device) for n in rows]
        bias = [torch.randn(n, device=device).to(dtype) if i % 2 else None for i, n in enumerate(rows)]
        idx = [torch.randperm(n, device=device)[: n // 2 | 1] if i % 2 == 0 and n else None for i, n in enumerate(rows)]
        for tokens in (0, 1, 3):
            x = torch.randn(tokens, 172, device=device).to(dtype)
            together = linears_decode(x, weights, bias, idx=idx)
            alone = [linear_decode(x, w, b, idx=i) for w, b, i in zip(weights, bias, idx, strict=True)]
            assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def mlp(f, d, dtype, device, layout="aligned", glu=True, bias=False):
    arguments = {name: matrix(f, d, dtype, device, layout) for name in ("up", "down")}
    arguments["gate"] = matrix(f, d, dtype, device, layout) if glu else None
    if bias:
        arguments["up_bias"] = torch.randn(f, device=device).to(dtype)
        arguments["down_bias"] = torch.randn(d, device=device).to(dtype)
        if glu:
            arguments["gate_bias"] = torch.randn(f, device=device).to(dtype)
    return arguments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f, d, layout", [*SHAPES, (45, 300, "words"), (75, 33, "odd")])
def test_gated_mlp_decode(f, d, layout, dtype, device):
    for tokens, idx in zip((0, 1, 2, 3, 8), selections(f, device), strict=False):
        x = torch.randn(tokens, d, device=device).to(dtype)
        check(gated_mlp_decode, gated_mlp_decode_ref, x, **mlp(f, d, dtype, device, layout))
        z = torch.randn(f if idx is None else len(idx), device=device)
        arguments = mlp(f, d, dtype, device, layout, bias=True)
        check(gated_mlp_decode, gated_mlp_decode_ref, x, **arguments, idx=idx, z=z)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("glu", [True, False])
def test_activations(act, glu, device):
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 4, 5):
            x = 10 * torch.randn(tokens, 64, device=device).to(dtype)
            idx = torch.randperm(40, device=device)[:21]
            arguments = mlp(40, 64, dtype, device, glu=glu, bias=True)
            z = torch.rand(21, device=device)
            check(gated_mlp_decode, gated_mlp_decode_ref, x, **arguments, idx=idx, z=z, act=act)


@pytest.mark.parametrize("tokens, width", [(1, 8200), (2, 8200), (1, 16500), (4, 4000), (3, 4100), (1, 33000)])
def test_wide_mlp(tokens, width, device):
    """Threads hold one, two or four vectors of a row; beyond that the operator is made of linear layers."""
    for glu in (True, False):
        x = torch.randn(tokens, width, device=device).bfloat16()
        arguments = mlp(6, width, torch.bfloat16, device, glu=glu)
        idx = torch.tensor([5, 0, 3], device=device)
        check(gated_mlp_decode, gated_mlp_decode_ref, x, **arguments, idx=idx)


@pytest.mark.parametrize("tokens", [1, 8])
def test_dropped_neurons_are_not_read(tokens, device):
    arguments = mlp(50, 40, torch.float32, device)
    for name in ("up", "down", "gate"):
        arguments[name][::2] = float("nan")
    kept = torch.arange(1, 50, 2, device=device)
    assert not gated_mlp_decode(torch.randn(tokens, 40, device=device), **arguments, idx=kept).isnan().any()


@pytest.mark.parametrize("shape", [(3, 1), (5, 7), (2, 3, 128), (2, 1100), (1, 4096), (0, 8), (3, 0), (6,)])
def test_rms_norm(shape, device):
    for dtype in DTYPES:
        weight = torch.randn(shape[-1], device=device).to(dtype)
        x = torch.randn(shape, device=device).to(dtype)
        apart = matrix(1, shape[-1], dtype, device, "odd")[0]  # begins anywhere
        for value in (x, apart, x.transpose(0, -1).contiguous().transpose(0, -1)):
            check(rms_norm, rms_norm_ref, value, weight, 1e-5)
        if x.numel():
            assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.clone(), weight, 1e-5))


@pytest.mark.parametrize("width", [0, 2, 14, 64, 128])
@pytest.mark.parametrize("batch, heads, groups, tokens", [(1, 4, 2, 1), (2, 3, 1, 5), (2, 0, 2, 1), (0, 1, 1, 1)])
def test_rotary(batch, heads, groups, tokens, width, device):
    for dtype in DTYPES:
        query = torch.randn(batch, tokens, heads, width, device=device).to(dtype).transpose(1, 2)
        key = torch.randn(batch, groups, tokens, width + 1, device=device).to(dtype)[..., 1:]
        for shared in (True, False):
            cos, sin = torch.randn(2, 1 if shared else batch, tokens, width, device=device).to(dtype)
            ours, own = rotary(query, key, cos, sin), rotary_ref(query, key, cos, sin)
            exact = rotary_ref(*(t.double() for t in (query, key, cos, sin)))
            for i in range(2):
                assert ours[i].shape == own[i].shape
                assert_as_accurate(ours[i], own[i], exact[i])


@emulated.needs_emulator
def test_results_do_not_depend_on_the_order_of_threads():
    x, arguments = torch.randn(2, 172), mlp(70, 172, torch.float32, "cpu", bias=True)
    results = []
    for seed in emulated.ORDERS:
        with emulated.emulated(seed):
            results.append(
                [
                    gated_mlp_decode(x, **arguments),
                    linear_decode(x, arguments["up"]),
                    linear_t_decode(x[:, :70], arguments["up"]),
                    gated_mlp_decode(x.repeat(4, 1), **arguments),
                ]
            )
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@emulated.needs_emulator
@pytest.mark.parametrize("idx", [[0, 9], [-1, 0]])
def test_emulated_idx_out_of_range(idx):
    x, weight, idx = torch.zeros(1, 6), torch.zeros(9, 6), torch.tensor(idx)
    with emulated.emulated():
        for tokens in (1, 8):
            many = x.expand(tokens, 6)
            with pytest.raises(RuntimeError, match=r"linears_kernel.*idx out of range"):
                linear_decode(many, weight, idx=idx)
            with pytest.raises(RuntimeError, match=r"linear_t_kernel.*idx out of range"):
                linear_t_decode(many[:, :2], weight, idx=idx)
            with pytest.raises(RuntimeError, match=r"gated_mlp_decode: .*idx out of range"):
                gated_mlp_decode(many, weight, weight, weight, idx=idx)


X, W = torch.randn(2, 6), torch.randn(4, 6)
WRONG = [
    lambda: linear_decode(torch.randn(9, 6), W),
    lambda: linear_decode(X, W.bfloat16()),
    lambda: linear_decode(X[:, :5], W),
    lambda: linear_decode(X, torch.randn(6, 4).t()),
    lambda: linear_decode(X, W, torch.randn(5)),
    lambda: linear_decode(X, W, None, idx=torch.tensor([0], dtype=torch.int32)),
    lambda: linears_decode(X, [W, W], [None]),
    lambda: linears_decode(X, [W, W.half()]),
    lambda: linear_t_decode(torch.randn(1, 2), W, idx=torch.tensor([0, 1]), z=torch.rand(3)),
    lambda: linear_t_decode(torch.randn(1, 4), W, idx=torch.tensor([0, 1])),
    lambda: gated_mlp_decode(X, W, torch.randn(6, 4).t()),
    lambda: gated_mlp_decode(X, W, W, act="tanh"),
    lambda: gated_mlp_decode(X, W, W, gate_bias=torch.randn(4)),
    lambda: rms_norm(X, torch.randn(5), 1e-5),
    lambda: rms_norm(X.double(), torch.randn(6).double(), 1e-5),
    lambda: rotary(*torch.randn(4, 1, 1, 1, 4)),
    lambda: rotary(torch.randn(1, 1, 1, 3), torch.randn(1, 1, 1, 3), *torch.randn(2, 1, 1, 3)),
]


@emulated.needs_emulator
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_those_of_the_cpu(wrong):
    with pytest.raises(RuntimeError) as own:
        wrong()
    with emulated.emulated(), pytest.raises(RuntimeError) as ours:
        wrong()
    assert str(ours.value) == str(own.value)
