"""gather_rows and scatter_rows: exact copies, rounding and dots against float64, gradients, tracing, errors."""

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppnet.extension as extension
from ppnet.ops import gather_rows, gather_rows_ref, scatter_rows, scatter_rows_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def matrices(f, d, dtype, device="cpu"):
    """One tensor of each layout with f units, and the dim they lie along; views of larger tensors, so strides count."""
    big = torch.randn(2 * max(f, d) + 3, 2 * max(f, d) + 5, device=device).to(dtype)
    src = [
        big[:f, :d].contiguous(),
        big[:d, :f].contiguous(),
        big[0, :f].contiguous(),
        big[1 : f + 1, 2 : d + 2],  # row-major view
        big[1 : d + 1, 2 : f + 2],
        big[2 : d + 2, 1 : f + 1].t(),  # column-major view
        big[2 : f + 2, 1 : d + 1].t(),
        big[: 2 * f : 2, : 2 * d : 2],  # neither axis contiguous
        big[: 2 * f : 2, 3],  # strided bias
    ]
    return src, [0, 1, 0, 0, 1, 0, 1, 0, 0]


def indices(f, device="cpu"):
    """K = 0, 1, an odd number and all; increasing and in any order."""
    for k in sorted({0, min(1, f), f // 2 | 1 if f > 2 else f, f}):
        order = torch.randperm(f, device=device)[:k]
        yield order
        yield order.sort().values


def column(scale, t, dim):
    return scale[:, None] if t.dim() == 2 and dim == 0 else scale


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("f, d", [(1, 1), (7, 172), (172, 7), (300, 129)])
def test_copies_are_exact(f, d, dtype, kernels):
    src, dim = matrices(f, d, dtype)
    n = len(src)
    for idx in indices(f):
        out = gather_rows(src, [idx] * n, [None] * n, dim)
        full, dot = scatter_rows(out, [idx] * n, [None] * n, dim, [f] * n, [None] * n)
        for s, o, x, y, axis in zip(src, out, full, dot, dim, strict=True):
            assert o.dtype == dtype and torch.equal(o, s.index_select(axis, idx))
            assert torch.equal(x, torch.zeros_like(s).index_copy(axis, idx, o))
            assert y.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f, d", [(7, 172), (300, 517)])
def test_scaled_and_dot_against_float64(f, d, dtype, kernels):
    src, dim = matrices(f, d, dtype)
    n = len(src)
    for idx in indices(f):
        scale = torch.randn(len(idx))
        out = gather_rows(src, [idx] * n, [scale] * n, dim)
        for o, r in zip(out, gather_rows_ref(src, [idx] * n, [scale] * n, dim), strict=True):
            assert torch.equal(o, r)  # one product, rounded once: nothing may differ
        grad = [torch.randn_like(s.index_select(axis, idx)) for s, axis in zip(src, dim, strict=True)]
        full, dot = scatter_rows(grad, [idx] * n, [scale] * n, dim, [f] * n, src)
        full_ref, dot_ref = scatter_rows_ref(grad, [idx] * n, [scale] * n, dim, [f] * n, src)
        for i, axis in enumerate(dim):
            assert torch.equal(full[i], full_ref[i])
            product = grad[i].double() * src[i].index_select(axis, idx).double()
            exact = product if product.dim() == 1 else product.sum(1 - axis)
            # The rounding of the inputs' products alone, so that an exact result of torch's is no bar.
            floor = 2.0**-23 * (product.abs() if product.dim() == 1 else product.abs().sum(1 - axis))
            error = (dot[i].double() - exact).abs()
            assert dot[i].dtype == torch.float32
            assert (error <= 2 * (dot_ref[i].double() - exact).abs() + floor).all()


def test_special_values_and_rounding(kernels):
    values = torch.tensor(
        [
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
            float("nan"),
            1e-40,
            65504.0,
            65519.0,
            65520.0,
            6e-8,
            3e-8,
            2.98e-8,
            1.0009766,
            3.3895314e38,
        ]
    )
    for dtype in DTYPES:
        every_half = torch.arange(-32768, 32767, dtype=torch.int16).view(torch.float16)
        src = torch.cat([values.to(dtype), every_half.to(dtype)])
        idx = torch.arange(len(src))
        for factor in (1.0, 0.3337, -1e-3, 300.0):
            scale = torch.full((len(src),), factor)
            for shaped in (src, src[: len(src) // 3 * 3].view(-1, 3)):
                n = len(shaped)
                (out,) = gather_rows([shaped], [idx[:n]], [scale[:n]], [0])
                (ref,) = gather_rows_ref([shaped], [idx[:n]], [scale[:n]], [0])
                assert torch.equal(out.isnan(), ref.isnan())
                assert torch.equal(out.nan_to_num(7.0), ref.nan_to_num(7.0))


def test_large_output_is_streamed_exactly(isa):
    """Beyond the size of the last-level cache the kernels write around it; odd widths leave no row aligned."""
    src = torch.randn(9001, 1501)
    idx = torch.randperm(9001)[:8999].sort().values
    scale = torch.rand(8999)
    assert torch.equal(gather_rows([src], [idx], [None], [0])[0], src.index_select(0, idx))
    wide = src.t().contiguous()
    (out,) = gather_rows([wide], [idx], [scale], [1])
    assert torch.equal(out, wide.index_select(1, idx) * scale)
    full, _ = scatter_rows([out], [idx], [None], [1], [9001], [None])
    assert torch.equal(full[0], torch.zeros_like(wide).index_copy(1, idx, out))


@pytest.mark.parametrize("dim", [0, 1])
def test_large_scatter_is_streamed_exactly(dim, isa):
    """With a scale and a dot, in any order of idx; bf16 rows of an odd width."""
    units, width = 9001, 2003
    weight = torch.randn((units, width) if dim == 0 else (width, units)).bfloat16()
    idx = torch.randperm(units)[:4501]
    scale = torch.randn(4501)
    grad = gather_rows([weight], [idx], [None], [dim])[0]
    (full,), (dot,) = scatter_rows([grad], [idx], [scale], [dim], [units], [weight])
    (full_ref,), _ = scatter_rows_ref([grad], [idx], [scale], [dim], [units], [None])
    assert torch.equal(full, full_ref)
    torch.testing.assert_close(dot, grad.float().square().sum(1 - dim), rtol=1e-5, atol=0)


def test_size_zero_asks_for_the_dot_alone():
    src, dim = matrices(20, 11, torch.float32)
    n = len(src)
    idx = torch.tensor([3, 0, 19])
    grad = gather_rows(src, [idx] * n, [None] * n, dim)
    out, dot = scatter_rows(grad, [idx] * n, [None] * n, dim, [0] * n, src)
    _, expected = scatter_rows_ref(grad, [idx] * n, [None] * n, dim, [20] * n, src)
    for o, d, e in zip(out, dot, expected, strict=True):
        assert o.numel() == 0
        torch.testing.assert_close(d, e)


def test_no_tensors():
    assert gather_rows([], [], [], []) == []
    assert scatter_rows([], [], [], [], [], []) == ([], [])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scatter_inverts_gather(data):
    f, d = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 90))
    k = data.draw(st.integers(0, f))
    dtype = data.draw(st.sampled_from(DTYPES))
    idx = torch.tensor(data.draw(st.permutations(range(f)))[:k], dtype=torch.int64)
    src, dim = matrices(f, d, dtype)
    n = len(src)
    out = gather_rows(src, [idx] * n, [None] * n, dim)
    full, dot = scatter_rows(out, [idx] * n, [None] * n, dim, [f] * n, src)
    again = gather_rows(full, [idx] * n, [None] * n, dim)
    for s, o, x, a, y, axis in zip(src, out, full, again, dot, dim, strict=True):
        assert torch.equal(o, a)
        assert x.shape == s.shape
        assert torch.count_nonzero(x) == torch.count_nonzero(o)
        squares = o.float() ** 2 if o.dim() == 1 else (o.float() ** 2).sum(1 - axis)
        torch.testing.assert_close(y, squares, rtol=1e-4, atol=1e-5)


def test_gradients_of_src_and_scale(kernels):
    idx = [torch.tensor([4, 0, 2]), torch.tensor([1, 3]), torch.tensor([0, 2, 3, 4])]
    src = [torch.randn(5, 3), torch.randn(4, 5), torch.randn(5)]
    src = [s.double().requires_grad_() for s in src]
    scale = [torch.randn(3).double().requires_grad_(), None, torch.randn(4).double().requires_grad_()]

    def gather(a, b, c, x, y):
        return tuple(gather_rows([a, b, c], idx, [x, None, y], [0, 1, 0]))

    assert torch.autograd.gradcheck(gather, (*src, scale[0], scale[2]))


def test_gradient_of_scale_alone_and_of_unused_outputs():
    weight, idx = torch.randn(6, 4), torch.tensor([5, 1])
    scale = torch.ones(2, requires_grad=True)
    unused = torch.randn(6, 4, requires_grad=True)
    out = gather_rows([weight, unused], [idx, idx], [scale, None], [0, 0])
    out[0].sum().backward()
    torch.testing.assert_close(scale.grad, weight[idx].sum(1))
    assert unused.grad is None or not unused.grad.any()


@pytest.mark.parametrize("name", ["gather_rows", "scatter_rows"])
def test_opcheck(name):
    src, dim = matrices(9, 4, torch.float32)
    src = [s.detach().clone(memory_format=torch.preserve_format) for s in src]
    n = len(src)
    idx = [torch.tensor([7, 2, 5])] * n
    scale = [torch.rand(3) if i % 2 else torch.empty(0) for i in range(n)]
    if name == "gather_rows":
        args = ([s.requires_grad_() for s in src], idx, [z.requires_grad_() for z in scale], dim)
    else:
        grad = gather_rows(src, idx, [None] * n, dim)
        args = (grad, idx, scale, dim, [9] * n, [s if i % 3 else torch.empty(0) for i, s in enumerate(src)])
    torch.library.opcheck(getattr(torch.ops.ppnet, name).default, args)


def test_compile_fullgraph():
    def loss(up, down, scale, idx):
        u, d = gather_rows([up, down], [idx, idx], [None, scale], [0, 1])
        return (u @ u.t() + d.t() @ d).sum()

    idx = torch.tensor([6, 1, 3])
    inputs = [torch.randn(8, 5), torch.randn(5, 8), torch.rand(3)]
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        run(*leaves, idx).backward()
        results.append([t.grad for t in leaves])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_autocast_leaves_dtypes_alone():
    src, idx = torch.randn(4, 4), torch.tensor([1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gather_rows([src], [idx], [torch.ones(1)], [0])[0].dtype == torch.float32


GATHER_ERRORS = [
    (dict(idx=[torch.tensor([0, 4])]), r"idx\[0\]\[1\] is 4; allowed are 0 \.\. 3"),
    (dict(idx=[torch.tensor([-1, 0])]), r"idx\[0\]\[0\] is -1"),
    (dict(idx=[torch.tensor([0], dtype=torch.int32)]), r"idx\[0\] has dtype Int; it must be Long"),
    (dict(idx=[torch.zeros(1, 1, dtype=torch.int64)]), r"idx\[0\] has shape \(1, 1\); it must be \(K,\)"),
    (dict(idx=[]), r"idx has 0 entries, but src has 1"),
    (dict(src=[torch.zeros(4, 3, dtype=torch.int64)]), r"src\[0\] has dtype Long; allowed are Float"),
    (dict(src=[torch.zeros(4, 3, 2)]), r"src\[0\] has shape \(4, 3, 2\); allowed are 1-D and 2-D"),
    (dict(dim=[2]), r"dim\[0\] is 2 for src\[0\] of shape \(4, 3\); allowed are 0 \.\. 1"),
    (dict(scale=[torch.ones(3)]), r"scale\[0\] has shape \(3,\); it must be \(K,\) = \(2,\)"),
    (dict(scale=[torch.ones(2, dtype=torch.float16)]), r"scale\[0\] has dtype Half; it must be Float"),
]


@compiled
@pytest.mark.parametrize("change, message", GATHER_ERRORS)
def test_gather_errors(change, message):
    args = dict(src=[torch.zeros(4, 3)], idx=[torch.tensor([0, 1])], scale=[torch.ones(2)], dim=[0]) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ppnet.gather_rows(**args)


SCATTER_ERRORS = [
    (dict(idx=[torch.tensor([2, 2])]), r"idx\[0\] has 2 at positions 0 and 1; its values must be unique"),
    (dict(idx=[torch.tensor([0, 1, 2])]), r"grad\[0\] has size 2 along dim 0, but idx\[0\] has 3 entries"),
    (dict(size=[1]), r"idx\[0\]\[1\] is 1; allowed are 0 \.\. 0"),
    (dict(size=[-4]), r"size\[0\] is -4"),
    (dict(weight=[torch.zeros(4, 2)]), r"weight\[0\] has shape \(4, 2\); it must be that of grad\[0\] = \(2, 3\)"),
    (dict(weight=[torch.zeros(4, 3).half()]), r"weight\[0\] has dtype Half, but grad\[0\] has Float"),
]


@compiled
@pytest.mark.parametrize("change, message", SCATTER_ERRORS)
def test_scatter_errors(change, message):
    args = (
        dict(
            grad=[torch.zeros(2, 3)],
            idx=[torch.tensor([0, 1])],
            scale=[torch.empty(0)],
            dim=[0],
            size=[4],
            weight=[torch.empty(0)],
        )
        | change
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ppnet.scatter_rows(**args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not extension.cuda_available(), reason="the CUDA kernels were not built")
def test_launcher_without_driver_says_so():
    assert "driver" in extension.build_info()["cuda"]


@emulated.needs_emulator
@pytest.mark.parametrize("seed", emulated.SEEDS)
@pytest.mark.parametrize("idx", [[0, 9], [-1, 0]])
def test_emulated_idx_out_of_range(idx, seed):
    src, idx = [torch.zeros(9, 3)], [torch.tensor(idx)]
    with emulated.emulated(seed):
        with pytest.raises(RuntimeError, match=r"gather_rows_kernel<float>.*assertion failed: .* idx out of range"):
            gather_rows(src, idx, [None], [0])
        with pytest.raises(RuntimeError, match=r"slot_kernel.* idx out of range"):
            scatter_rows([torch.zeros(2, 3)], idx, [None], [0], [9], [None])
        with pytest.raises(RuntimeError, match=r"slot_kernel.* idx is not unique"):
            scatter_rows([torch.zeros(2, 3)], [torch.tensor([4, 4])], [None], [0], [9], [None])


@emulated.needs_emulator
@pytest.mark.parametrize("seed", emulated.SEEDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_emulated_launches_many_tensors(dtype, seed):
    """45 tensors are more than one launch takes; the results equal those of the CPU kernels."""
    src, dim = matrices(7, 172, dtype)
    src, dim, n = src * 5, dim * 5, 45
    for idx in indices(7):
        scale = torch.randn(len(idx), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for z in (None, scale):
            out = gather_rows(src, [idx] * n, [z] * n, dim)
            full, dot = scatter_rows(out, [idx] * n, [z] * n, dim, [7] * n, src)
            with emulated.emulated(seed):
                out_cuda = gather_rows(src, [idx] * n, [z] * n, dim)
                full_cuda, dot_cuda = scatter_rows(out, [idx] * n, [z] * n, dim, [7] * n, src)
                none_cuda, alone_cuda = scatter_rows(out, [idx] * n, [z] * n, dim, [0] * n, src)
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(out, out_cuda, strict=True))
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(full, full_cuda, strict=True))
            assert all(t.numel() == 0 for t in none_cuda)
            for a, b, c in zip(dot, dot_cuda, alone_cuda, strict=True):
                assert torch.equal(b, c)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("f, d", [(1, 1), (7, 172), (172, 7), (300, 4099)])
def test_gpu(f, d, dtype):
    src, dim = matrices(f, d, dtype, "cuda")
    n = len(src)
    for idx in indices(f, "cuda"):
        scale = torch.randn(len(idx), device="cuda", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for z in (None, scale):
            out = gather_rows(src * 5, [idx] * n * 5, [z] * n * 5, dim * 5)  # 45 tensors: more than one launch
            for o, r in zip(out, gather_rows_ref(src * 5, [idx] * n * 5, [z] * n * 5, dim * 5), strict=True):
                assert torch.equal(o, r)
            full, dot = scatter_rows(out[:n], [idx] * n, [z] * n, dim, [f] * n, src)
            full_ref, dot_ref = scatter_rows_ref(out[:n], [idx] * n, [z] * n, dim, [f] * n, src)
            for i in range(n):
                assert torch.equal(full[i], full_ref[i])
                torch.testing.assert_close(dot[i], dot_ref[i], rtol=1e-4, atol=1e-4)
