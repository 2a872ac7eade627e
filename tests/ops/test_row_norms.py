"""row_norms: norms and gradients against float64, determinism, tracing, errors."""

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppnet.extension as extension
from ppnet.ops.row_norms import row_norms, row_norms_backward_ref, row_norms_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def matrices(f, d, dtype):
    """A weight of each layout with f units of d features, and the dim of the units; views, so that strides count."""
    size = 2 * max(f, d) + 5
    big = torch.randn(size, size).to(dtype)
    weight = [
        big[:f, :d].contiguous(),
        big[:d, :f].contiguous(),
        big[0, :f].contiguous(),
        big[1 : f + 1, 2 : d + 2],  # row-major view
        big[1 : d + 1, 2 : f + 2],
        big[2 : d + 2, 1 : f + 1].t(),  # column-major view
        big[2 : f + 2, 1 : d + 1].t(),
        big[: 2 * f : 2, : 2 * d : 2],  # neither axis contiguous
        big[: 2 * f : 2, 3],
    ]
    return weight, [0, 1, 0, 0, 1, 0, 1, 0, 0]


def scales(weight, d, dtype):
    """No scale, and one, in turns over the matrices; (F,) takes none."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(d, dtype=wide) if w.dim() == 2 and i % 3 else None for i, w in enumerate(weight)]


def assert_as_exact_as(ours, torchs, exact, scale):
    """The error is at most twice torch's, or a rounding of the result or of the largest term it is summed from."""
    if ours.numel() == 0:
        return
    # Where all is float64, the exact result is no more exact than torch's.
    floor = (64 if ours.dtype == torch.float64 else 4) * torch.finfo(ours.dtype).eps * scale
    assert ((ours.double() - exact).abs() <= 2 * (torchs.double() - exact).abs().max() + floor).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f, d", [(1, 1), (7, 172), (172, 7), (300, 517), (5, 0), (0, 5)])
def test_norms_and_gradients_against_float64(f, d, dtype, kernels):
    weight, dim = matrices(f, d, dtype)
    scale = scales(weight, d, dtype)
    results = []
    for run, cast in ((row_norms, None), (row_norms_ref, None), (row_norms_ref, torch.float64)):
        leaves = [w.detach().to(cast or dtype).requires_grad_() for w in weight]
        factors = [None if s is None else s.detach().to(cast or s.dtype).requires_grad_() for s in scale]
        norms = run(leaves, factors, dim)
        generator = torch.Generator().manual_seed(3)
        torch.autograd.backward(norms, [torch.randn(n.shape, generator=generator).to(n.dtype) for n in norms])
        results.append((norms, [w.grad for w in leaves], [None if s is None else s.grad for s in factors]))
    (ours, dw, ds), (torchs, dw_torch, ds_torch), (exact, dw_exact, ds_exact) = results
    generator = torch.Generator().manual_seed(3)
    grad = [torch.randn(n.shape, generator=generator).double() for n in exact]
    for i, w in enumerate(weight):
        assert ours[i].shape == (f,) and ours[i].dtype == torchs[i].dtype
        assert dw[i].shape == w.shape and dw[i].dtype == dtype
        assert_as_exact_as(ours[i].detach(), torchs[i].detach(), exact[i].detach(), exact[i].detach())
        assert_as_exact_as(dw[i], dw_torch[i], dw_exact[i], dw_exact[i].abs())
        if scale[i] is not None and d > 0:
            assert ds[i].dtype == scale[i].dtype
            unit = (grad[i] / exact[i].detach()).abs()
            terms = w.double().square() * (unit[:, None] if dim[i] == 0 else unit)
            assert_as_exact_as(ds[i], ds_torch[i], ds_exact[i], (scale[i] * terms.sum(dim[i])).abs().double())


@emulated.needs_emulator
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_launches_many_tensors(dtype):
    """45 weights are more than one launch takes, and their results are those of one by one, in any order of threads."""
    weight, dim = matrices(40, 264, dtype)
    weight.append(torch.randn(700, 3).to(dtype))  # narrow: all threads of a block take rows
    dim.append(1)
    scale = [torch.randn(w.shape[1 - d], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
             if w.dim() == 2 and i % 2 else None for i, (w, d) in enumerate(zip(weight, dim, strict=True))]  # fmt: skip
    count = 5 * len(weight)
    norms = row_norms_ref(weight, scale, dim)
    grad = [torch.randn_like(n) for n in norms]
    empty = [torch.empty(0, dtype=n.dtype) if s is None else s for n, s in zip(norms, scale, strict=True)]
    right = row_norms_backward_ref(
        *([t.double() for t in list_] for list_ in (grad, norms, weight)),
        [None if s is None else s.double() for s in scale],
        dim,
    )
    backward = torch.ops.ppnet.row_norms_backward
    expected = None
    for seed in emulated.ORDERS:
        with emulated.emulated(seed):
            ours = row_norms(weight * 5, scale * 5, dim * 5)
            dw, ds = backward(grad * 5, norms * 5, weight * 5, empty * 5, dim * 5, True, True)
            dw_alone = backward(grad, norms, weight, empty, dim, True, False)[0]
            ds_alone = backward(grad, norms, weight, empty, dim, False, True)[1]
            assert all(torch.equal(a, b) for a, b in zip(dw_alone, dw, strict=False))
            assert all(torch.equal(a, b) for a, b in zip(ds_alone, ds, strict=False))
        results = [*ours, *dw, *ds]
        expected = results if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for i in range(count):
        j = i % len(weight)
        torch.testing.assert_close(ours[i], norms[j], rtol=1e-5, atol=0)
        assert dw[i].stride() == dw[j].stride()
        torch.testing.assert_close(dw[i].double(), right[0][j], rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(ds[i].double(), right[1][j], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f, d", [(1, 1), (7, 172), (172, 7), (300, 517), (2048, 4100), (5, 0), (0, 5)])
def test_gpu(f, d, dtype):
    weight, dim = matrices(f, d, dtype)
    scale = [None if s is None else s.cuda() for s in scales(weight, d, dtype)]
    results = []
    for run, cast in ((row_norms, dtype), (row_norms_ref, torch.float64)):
        leaves = [w.cuda().to(cast).requires_grad_() for w in weight]
        wide = torch.float64 if cast == torch.float64 else torch.float32
        factors = [None if s is None else s.detach().to(wide).requires_grad_() for s in scale]
        norms = run(leaves, factors, dim)
        torch.autograd.backward(norms, [torch.ones_like(n) for n in norms])
        results.append([norms, [w.grad for w in leaves], [s.grad for s in factors if s is not None]])
    for ours, right in zip(*results, strict=True):
        for a, b in zip(ours, right, strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.double(), b.double(), rtol=max(4 * eps, 1e-12), atol=1e-5)


def test_zero_rows_have_zero_gradients(kernels):
    weight = torch.randn(9, 70)
    weight[[0, 4, 8]] = 0
    for w, dim in ((weight, 0), (weight.t().contiguous(), 1), (weight[:, 3].contiguous(), 0)):
        leaf = w.clone().requires_grad_()
        scale = torch.rand(70).requires_grad_() if w.dim() == 2 else None
        (norm,) = row_norms([leaf], [scale], [dim])
        norm.sum().backward()
        assert not norm[[0, 4, 8]].any()
        assert not leaf.grad.index_select(dim, torch.tensor([0, 4, 8])).any()
        assert leaf.grad.isfinite().all() and (scale is None or scale.grad.isfinite().all())


def test_a_vector_gives_absolute_values(kernels):
    w = torch.tensor([0.0, -0.0, 1e-38, -3e38, float("inf"), -2.5, float("nan")])
    (norm,) = row_norms([w], [None], [0])
    assert torch.equal(norm[:-1], w[:-1].abs()) and norm[-1].isnan()
    assert not norm[:2].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_unit(dtype, kernels):
    weight = torch.randn(6, 100).to(dtype)
    weight[1, 7], weight[4, 99] = float("nan"), float("inf")
    for w, dim in ((weight, 0), (weight.t().contiguous(), 1)):
        (norm,) = row_norms([w], [None], [dim])
        assert norm.isnan().tolist() == [False, True, False, False, False, False]
        assert norm.isinf().tolist() == [False, False, False, False, True, False]


def test_results_do_not_depend_on_threads_or_company(isa):
    shapes = [(2100, 700), (700, 2100), (1031, 5003)]
    weight = [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        for dim in (0, 1):
            leaves = [w.clone().requires_grad_() for w in weight]
            scale = [torch.linspace(0.5, 2, w.shape[1 - dim]).requires_grad_() for w in weight]
            if len(results) < 4:
                norms = row_norms(leaves, scale, [dim] * len(leaves))
            else:
                norms = [row_norms([w], [s], [dim])[0] for w, s in zip(leaves, scale, strict=True)]
            sum(n.sum() for n in norms).backward()
            results.append([*norms, *(w.grad for w in leaves), *(s.grad for s in scale)])
    torch.set_num_threads(2)
    for i, first in enumerate(results[:2]):
        for other in (results[i + 2], results[i + 4]):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_large_gradients_are_streamed_exactly(isa):
    """Beyond the size of the last-level cache the gradient is written around it."""
    for w, dim in ((torch.randn(2100, 5120), 0), (torch.randn(2100, 5120), 1)):
        leaf = w.requires_grad_()
        (norm,) = row_norms([leaf], [None], [dim])
        norm.sum().backward()
        torch.testing.assert_close(
            leaf.grad, w.detach() / torch.linalg.vector_norm(w.detach(), dim=1 - dim, keepdim=True)
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data):
    f, d = data.draw(st.integers(0, 90)), data.draw(st.integers(0, 90))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight, dim = matrices(f, d, dtype)
    scale = scales(weight, d, dtype)
    for ours, expected in zip(row_norms(weight, scale, dim), row_norms_ref(weight, scale, dim), strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradcheck():
    weight = [torch.randn(5, 3).double().requires_grad_(), torch.randn(4, 6).double().requires_grad_()]
    scale = [torch.rand(3).double().requires_grad_(), torch.rand(4).double().requires_grad_()]
    bias = torch.randn(7).double().requires_grad_()

    def norms(a, b, c, x, y):
        return tuple(row_norms([a, b, c], [x, y, None], [0, 1, 0]))

    assert torch.autograd.gradcheck(norms, (*weight, bias, *scale))


def test_gradient_of_scale_alone():
    weight, scale = torch.randn(6, 4), torch.ones(4, requires_grad=True)
    unused = torch.randn(3, 4, requires_grad=True)
    norms = row_norms([weight, unused], [scale, None], [0, 0])
    norms[0].sum().backward()
    torch.testing.assert_close(scale.grad, (weight.square() / weight.norm(dim=1, keepdim=True)).sum(0))
    assert unused.grad is None or not unused.grad.any()


def test_no_tensors():
    assert row_norms([], [], []) == []


@pytest.mark.parametrize("name", ["row_norms", "row_norms_backward"])
def test_opcheck(name):
    weight, dim = matrices(9, 4, torch.float32)
    weight = [w.detach().clone(memory_format=torch.preserve_format) for w in weight]
    scale = [torch.empty(0) if s is None else s for s in scales(weight, 4, torch.float32)]
    if name == "row_norms":
        args = ([w.requires_grad_() for w in weight], [s.requires_grad_() for s in scale], dim)
        torch.library.opcheck(torch.ops.ppnet.row_norms.default, args)
        return
    norm = torch.ops.ppnet.row_norms(weight, scale, dim)
    for needs in ((True, True), (True, False), (False, True)):
        args = ([torch.randn(9) for _ in norm], norm, weight, scale, dim, *needs)
        torch.library.opcheck(torch.ops.ppnet.row_norms_backward.default, args)


def test_compile_fullgraph():
    def loss(w, v, s):
        return sum(n.square().sum() for n in row_norms([w, v], [s, None], [0, 1]))

    inputs = [torch.randn(8, 5), torch.randn(5, 8), torch.rand(5)]
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        run(*leaves).backward()
        results.append([t.grad for t in leaves])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_autocast_leaves_dtypes_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert row_norms([torch.randn(4, 4)], [torch.ones(4)], [0])[0].dtype == torch.float32


ERRORS = [
    (dict(weight=[torch.zeros(4, 3, dtype=torch.int64)]), r"weight\[0\] has dtype Long; allowed are Float"),
    (dict(weight=[torch.zeros(4, 3, 2)]), r"weight\[0\] has shape \(4, 3, 2\); allowed are 1-D and 2-D"),
    (dict(dim=[2]), r"dim\[0\] is 2 for weight\[0\] of shape \(4, 3\); allowed are 0 \.\. 1"),
    (dict(dim=[]), r"dim has 0 entries, but weight has 1"),
    (dict(input_scale=[torch.ones(4)]), r"input_scale\[0\] has shape \(4,\); it must be .* = \(3,\)"),
    (dict(input_scale=[torch.ones(3).double()]), r"input_scale\[0\] has dtype Double; it must be Float"),
    (dict(weight=[torch.zeros(4)]), r"input_scale\[0\] has shape \(3,\), but weight\[0\] is 1-D"),
]


@compiled
@pytest.mark.parametrize("change, message", ERRORS)
def test_errors(change, message):
    args = dict(weight=[torch.zeros(4, 3)], input_scale=[torch.ones(3)], dim=[0]) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ppnet.row_norms(**args)
