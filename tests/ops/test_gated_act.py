"""gated_act and its backward: against float64 and torch's own error, layouts, kinks, determinism, tracing, errors."""

import emulated
import pytest
import torch
from torch.nn import functional

import ppnet.extension as extension
from ppnet.ops import gated_act, gated_act_backward, gated_act_backward_ref, gated_act_ref
from ppnet.ops.gated_act import ACTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-53}
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def torch_act(x, act):
    if act == "relu2":
        return functional.relu(x).square()
    return {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "relu": functional.relu,
    }[act](x)


def exact_act(x, act):
    """In float64; torch's own gelu is 0 below -8.3."""
    return x * torch.special.erfc(-x * 0.5**0.5) / 2 if act == "gelu" else torch_act(x, act)


def composed(up, gate, z, act):
    """What a model would write, rounding after every operation."""
    h = torch_act(up, act) if gate is None else torch_act(gate, act) * up
    return h if z is None else h * z.to(h.dtype)


def inputs(rows, k, dtype, gated=True, scaled=True):
    up, gate = (torch.randn(rows, k) * 3).to(dtype), (torch.randn(rows, k) * 3).to(dtype)
    return up, gate if gated else None, torch.randn(k) if scaled else None


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def gradients(function, up, gate, z, act, dh):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (up, gate, z)]
    function(*leaves, act).backward(dh)
    return [None if t is None else t.grad for t in leaves]


def assert_no_worse(result, torchs, exact, dtype, scale=0.0):
    """The largest error is at most twice torch's, and one rounding of the result.

    scale: size of the factors of few elements: torch's error may be 0 by luck, a few roundings of them are no bar.
    """
    error, bar = (result.double() - exact).abs(), (torchs.double() - exact).abs()
    assert result.shape == exact.shape
    bar = 2 * bar.max() + 2.0**-22 * scale + EPS[dtype] * 1.01 * exact.abs()
    assert (error <= bar).all(), ((error - bar).max().item(), error.max().item())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # from switching oneDNN off
def test_infinities_and_nan(act, dtype, kernels):
    """As torch has them; its oneDNN kernel of gelu gives NaN for infinity."""
    at_minus = 0.0 if act.startswith("relu") else torch.nan
    special = {torch.inf: torch.inf, -torch.inf: at_minus, torch.nan: torch.nan}
    x = torch.tensor(list(special) * 23)[:67].to(dtype)  # whole vectors and a part of one
    expected = torch.tensor(list(special.values()) * 23)[:67].to(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(torch_act(x, act), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gated_act(x, act=act), expected, rtol=0, atol=0, equal_nan=True)
    gated = gated_act(torch.full_like(x, 2.0), x, act=act)
    if kernels != "torch":
        torch.testing.assert_close(gated, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows, k", [(1, 1), (3, 7), (70, 172), (5, 2100)])
def test_against_float64(rows, k, act, dtype, kernels):
    for gated in (True, False):
        for scaled in (True, False):
            up, gate, z = inputs(rows, k, dtype, gated, scaled)
            dh = torch.randn(rows, k).to(dtype)
            scale = 100.0 if rows * k < 50 else 0.0
            exact = composed(*wide(up, gate, z), act)
            result = gated_act(up, gate, z, act)
            assert result.dtype == dtype
            assert_no_worse(result, composed(up, gate, z, act), exact, dtype, scale)
            ours = gradients(gated_act, up, gate, z, act, dh)
            theirs = gradients(composed, up, gate, z, act, dh)
            exact = gradients(composed, *wide(up, gate, z), act, dh.double())
            for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
                if o is None:
                    continue
                if i < 2:
                    assert o.dtype == dtype
                    assert_no_worse(o, t, e, dtype, scale)
                else:  # torch's error in dz may be 0 by luck: a few roundings of the products are no bar either
                    assert o.dtype == torch.float32
                    h = composed(*wide(up, gate), None, act)
                    floor = 2.0**-21 * (dh.double() * h).abs().sum(0) + 2.0**-40  # float64's tanh cancels
                    assert ((o.double() - e).abs() <= 2 * (t.double() - e).abs().max() + floor).all()


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_every_bf16_number(act, kernels):
    """Short polynomials and tables: in both tails, too, their error is at most that of the rounding. Elsewhere the
    slope passes 0."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() < 30].reshape(2, -1)
    leaf = x.double().requires_grad_()
    exact = exact_act(leaf, act)
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    one = torch.ones_like(x)
    results = gated_act(x, act=act), gated_act_backward(one, x, None, None, act)[0], gated_act(one, x, act=act)
    floor = torch.where(x.abs() < 3, 2.0**-11, 2.0**-20).double()
    for result, right in zip(results, (exact, slope, exact), strict=True):
        assert ((result.double() - right).abs() <= 2.0**-8 * right.abs() + floor).all()


@pytest.mark.parametrize("act", ACTS)
def test_reference_is_what_torch_computes(act):
    up, gate, z = wide(*inputs(9, 31, torch.float32))
    dh = torch.randn(9, 31).double()
    for g in (gate, None):
        torch.testing.assert_close(gated_act_ref(up, g, z, act), composed(up, g, z, act))
        expected = gradients(composed, up, g, z, act, dh)
        for r, e in zip(gated_act_backward_ref(dh, up, g, z, act), expected, strict=True):
            if e is not None:
                torch.testing.assert_close(r, e)


@pytest.mark.parametrize("act", ACTS)
def test_float64(act, kernels):
    up, gate, z = wide(*inputs(40, 37, torch.float32))
    dh = torch.randn(40, 37).double()
    torch.testing.assert_close(gated_act(up, gate, z, act), composed(up, gate, z, act), rtol=1e-13, atol=1e-13)
    expected = gradients(composed, up, gate, z, act, dh)
    for o, e in zip(gated_act_backward(dh, up, gate, z, act), expected, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ACTS)
def test_tails(act, kernels):
    """Every float32 magnitude: the error within ranges of the input, where torch's own erf cancels."""
    for low, high in ((-90, -13), (-13, -5), (-5, -3), (-3, -1), (-1, -0.1), (-0.1, 0.1), (0.1, 1), (1, 5), (5, 90)):
        x = torch.linspace(low, high, 20001)
        assert_no_worse(gated_act(x, act=act), torch_act(x, act), exact_act(x.double(), act), torch.float32)
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        torch_act(leaf, act).sum().backward()
        exact_act(exact, act).sum().backward()
        slope = gated_act_backward(torch.ones_like(x), x, None, None, act)[0]
        assert_no_worse(slope, leaf.grad, exact.grad, torch.float32)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_and_kinks(act, dtype, kernels):
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e4, -3e4, float("inf"), float("nan"), -float("inf")]).to(dtype)
    x = x.repeat(5)  # beyond one vector
    h, ref = gated_act(x, act=act), torch_act(x.float(), act).to(dtype)
    slope = gated_act_backward(torch.ones_like(x), x, None, None, act)[0]
    slope_ref = gated_act_backward_ref(torch.ones_like(x), x, None, None, act)[0]
    finite = x.isfinite()
    torch.testing.assert_close(h[finite], ref[finite], rtol=1e-3, atol=1e-30)
    torch.testing.assert_close(slope[finite], slope_ref[finite], rtol=1e-3, atol=1e-6)
    assert h[x.isnan()].isnan().all() and slope[x.isnan()].isnan().all()
    assert (h[x == float("inf")] == float("inf")).all()
    assert not h[x == -float("inf")].nan_to_num(0.0).any()  # 0, or torch's NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype, kernels):
    """Halves of one GEMM output, more leading axes, broadcast and transposed tensors: the result is that of a copy."""
    both = torch.randn(6, 5, 2 * 83).to(dtype)
    views = [
        (both[..., :83], both[..., 83:]),
        (both[:, 2, :83], both[:, 3, 83:]),
        (both[:, ::2, 1:84], both[:, 1::2, :83][:, :1].expand(6, 3, 83)),
        (both.transpose(0, 1)[..., :83], both.transpose(0, 1)[..., 83:]),
        (both[0].t()[:83], both[1].t()[:83]),
        (both[0, 0, 1:84], both[1, 0, :83]),
        (both[..., :1], both[..., 1:2]),
        (both[..., ::3], both[..., ::3]),
    ]
    for up, gate in views:
        z = torch.randn(up.shape[-1])
        dh = torch.randn(up.shape).to(dtype)
        for g in (gate, None):
            copy = None if g is None else g.contiguous()
            h = gated_act(up, g, z)
            assert h.is_contiguous() and torch.equal(h, gated_act(up.contiguous(), copy, z))
            results = gated_act_backward(dh, up, g, z, "silu")
            for a, b in zip(results, gated_act_backward(dh, up.contiguous(), copy, z, "silu"), strict=True):
                assert torch.equal(a, b)
        loss = gated_act(up.detach().requires_grad_(), gate, z).sum()  # dh has stride 0
        loss.backward()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (0,)])
def test_empty(shape, kernels):
    up = torch.randn(shape)
    z = torch.randn(shape[-1])
    assert gated_act(up, up, z).shape == shape
    dup, dgate, dz = gated_act_backward(up, up, up, z, "gelu")
    assert dup.shape == shape and dgate.shape == shape
    assert torch.equal(dz, torch.zeros(shape[-1]))


def test_only_what_is_needed_is_computed():
    up, gate, z = inputs(70, 50, torch.float32)
    dh = torch.randn_like(up)
    whole = gated_act_backward(dh, up, gate, z, "silu")
    for need in range(8):
        needs = [bool(need & bit) for bit in (1, 2, 4)]
        for part, all_of_it, needed in zip(
            gated_act_backward(dh, up, gate, z, "silu", *needs), whole, needs, strict=True
        ):
            assert torch.equal(part, all_of_it) if needed else part.numel() == 0
    assert gated_act_backward(dh, up, None, z, "silu")[1].numel() == 0
    frozen = gated_act(up, gate, z.requires_grad_())
    frozen.backward(dh)
    assert torch.equal(z.grad, whole[2]) and up.grad is None


@emulated.needs_emulator
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows, k", [(700, 9), (131, 40), (40, 4100), (2100, 1)])
def test_emulated_sums_over_many_rows(rows, k, dtype):
    """Narrow and wide blocks, several blocks of rows; the same in every order of the threads and on views."""
    both = (torch.randn(rows, 2 * k) * 2).to(dtype)
    up, gate, dh = both[:, :k], both[:, k:], torch.randn(rows, k).to(dtype)
    z = torch.randn(k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    exact = gated_act_backward_ref(dh.double(), up.double(), gate.double(), z.double(), "gelu")
    results = []
    for seed in emulated.ORDERS:
        with emulated.emulated(seed):
            results.append(gated_act_backward(dh, up, gate, z, "gelu"))
            only = gated_act_backward(dh, up, gate, z, "gelu", False, False, True)
            assert torch.equal(only[2], results[-1][2]) and only[0].numel() == only[1].numel() == 0
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    dup, dgate, dz = results[0]
    size = (dh.double() * z.double() * up.double()).abs().max()  # the slope passes 0
    floor = (2.0**-17 if dtype.itemsize == 2 else 64 * EPS[dtype]) * max(size, 1)
    for ours, right in ((dup, exact[0]), (dgate, exact[1])):
        assert ((ours.double() - right).abs() <= 0.55 * torch.finfo(dtype).eps * right.abs() + floor).all()
    terms = (dh.double() * gated_act_ref(up.double(), gate.double(), None, "gelu")).abs().sum(0)
    assert ((dz.double() - exact[2]).abs() <= (2.0**-16 if dtype.itemsize == 2 else 16 * EPS[dz.dtype]) * terms).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows, k", [(1, 1), (70, 172), (5, 2100), (3000, 4104), (9000, 7)])
def test_gpu(rows, k, act, dtype):
    """Against float64; on a GPU the short exponentials and divisions are what the emulator cannot show."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for gated in (True, False):
        up, gate, z = (None if t is None else t.cuda() for t in inputs(rows, k, dtype, gated))
        dh, z = torch.randn(rows, k, device="cuda").to(dtype), z.to(sums)
        exact = gated_act_ref(*wide(up, gate, z), act)
        floor = 2.0**-17 if dtype.itemsize == 2 else 64 * EPS[dtype]  # of the largest product: slopes pass 0

        def close(ours, right, size):
            assert ((ours.double() - right).abs() <= 0.55 * torch.finfo(dtype).eps * right.abs() + floor * size).all()  # noqa: B023

        close(gated_act(up, gate, z, act), exact, exact.abs().max())
        results = gated_act_backward(dh, up, gate, z, act)
        expected = gated_act_backward_ref(dh.double(), *wide(up, gate, z), act)
        for ours, right in zip(results[:2], expected[:2], strict=True):
            if ours.numel():
                close(ours, right, max(1, (dh.double() * z * up * (1 if gate is None else 10)).abs().max()))
        terms = (dh.double() * gated_act_ref(*wide(up, gate, None), act)).abs().sum(0)
        bound = 2e-4 if dtype.itemsize == 2 else 64 * EPS[sums]
        assert ((results[2].double() - expected[2]).abs() <= bound * terms + floor).all()
        again = gated_act_backward(dh, up, gate, z, act)
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("rows", [31, 64, 1000])
def test_dz_does_not_depend_on_threads(rows, isa):
    up, gate, z = inputs(rows, 2500, torch.float32)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(gated_act_backward(up, up, gate, z, "silu"))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_large_output_is_streamed_exactly(isa):
    """Beyond the size of the last-level cache the kernels write around it; odd widths leave no row aligned."""
    for dtype in (torch.float32, torch.bfloat16):
        up = torch.randn(9001, 1501 if dtype == torch.float32 else 3001).to(dtype)
        z, last = torch.rand(up.shape[1]), up[-50:]
        assert torch.equal(gated_act(up, up, z)[-50:], gated_act(last, last, z))
        dup, dgate, _ = gated_act_backward(up, up, up, z, "silu")
        for a, b in zip((dup, dgate), gated_act_backward(last, last, last, z, "silu"), strict=False):
            assert torch.equal(a[-50:], b)


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act):
    up, gate, z = (t.requires_grad_() for t in wide(*inputs(4, 5, torch.float32)))
    assert torch.autograd.gradcheck(lambda *t: gated_act(*t, act), (up, gate, z))
    assert torch.autograd.gradcheck(lambda u, f: gated_act(u, None, f, act), (up, z))


@pytest.mark.parametrize("gated, scaled", [(True, True), (False, True), (True, False)])
def test_opcheck(gated, scaled):
    up, gate, z = inputs(5, 9, torch.float32, gated, scaled)
    leaves = [None if t is None else t.requires_grad_() for t in (up, gate, z)]
    torch.library.opcheck(torch.ops.ppnet.gated_act.default, (*leaves, "gelu"))
    detached = [None if t is None else t.detach() for t in leaves]
    for needs in ((True, True, True), (False, True, False)):
        args = (torch.randn(5, 9), *detached, "gelu", *needs)
        torch.library.opcheck(torch.ops.ppnet.gated_act_backward.default, args)


def test_compile_fullgraph():
    def loss(up, gate, z):
        return gated_act(up, gate, z, "relu2").square().sum()

    tensors = inputs(6, 11, torch.float32)
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        run(*leaves).backward()
        results.append([t.grad for t in leaves])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_autocast_leaves_dtypes_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated_act(torch.randn(3, 4)).dtype == torch.float32


ERRORS = [
    (dict(act="swish"), r'act is "swish"; allowed are silu, gelu'),
    (dict(up=torch.zeros(3, 4, dtype=torch.int64)), "up has dtype Long; allowed are Float"),
    (dict(up=torch.tensor(1.0)), r"up has shape \(\); it must be \(\.\.\., K\)"),
    (dict(gate=torch.zeros(3, 5)), r"gate has shape \(3, 5\); it must be that of up = \(3, 4\)"),
    (dict(gate=torch.zeros(3, 4).half()), "gate has dtype Half; it must be Float"),
    (dict(z=torch.zeros(3)), r"z has shape \(3,\); it must be \(K,\) = \(4,\)"),
    (dict(z=torch.zeros(4).double()), "z has dtype Double; it must be Float"),
]


@compiled
@pytest.mark.parametrize("change, message", ERRORS)
def test_errors(change, message):
    args = dict(up=torch.zeros(3, 4), gate=None, z=None, act="silu") | change
    with pytest.raises(RuntimeError, match=message):
        gated_act(**args)


@compiled
def test_backward_errors():
    up = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=r"gated_act_backward: dh has shape \(3, 5\); it must be that of up"):
        gated_act_backward(torch.zeros(3, 5), up, None, None, "silu")
