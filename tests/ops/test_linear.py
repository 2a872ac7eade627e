"""linear: the same contract as F.linear on both paths, gradients, layouts, autocast, tracing, reproducibility."""

import copy

import pytest
import torch
from torch.nn import functional

from ppnet.ops import linear, linear_choice, linear_path, linear_ref, measure_linear
from ppnet.ops import linear as linear_function
from ppnet.ops.linear import HAS_ONEDNN, MIN_FLOP

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="needs oneDNN")
LARGE = (300, 400, 500)  # T, D, F beyond MIN_FLOP
assert 2 * LARGE[0] * LARGE[1] * LARGE[2] >= MIN_FLOP


@pytest.fixture(params=["torch", "onednn"])
def path(request):
    with linear_path(request.param):
        yield request.param


def case(t, d, f, dtype=torch.float32, bias=True):
    return torch.randn(t, d).to(dtype), torch.randn(f, d).to(dtype), torch.randn(f).to(dtype) if bias else None


def run(function, x, weight, bias, dy):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [LARGE, (1, 7, 172), (7, 172, 1), (512, 513, 131)])
@pytest.mark.parametrize("bias", [True, False])
def test_against_float64(shape, dtype, bias, path, threads):
    x, weight, b = case(*shape, dtype, bias)
    dy = torch.randn(shape[0], shape[2]).to(dtype)
    ours, theirs = run(linear, x, weight, b, dy), run(functional.linear, x, weight, b, dy)
    exact = run(linear_ref, *(None if t is None else t.double() for t in (x, weight, b)), dy.double())
    eps = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-24
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert o.dtype == dtype and o.shape == e.shape
        # Root mean squares: the largest error of so many sums in another order is a matter of luck.
        error, bar = ((r.double() - e).square().mean().sqrt() for r in (o, t))
        assert error <= 2 * bar + (eps + 2.0**-22) * e.square().mean().sqrt()


def test_layouts(path):
    t, d, f = LARGE
    x, weight, bias = case(t, d, f)
    expected = functional.linear(x, weight, bias)
    wide = torch.randn(t, d + 3)
    wide[:, 1 : d + 1] = x
    for a in (x, x.t().contiguous().t(), wide[:, 1 : d + 1]):
        for w in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :d]):
            torch.testing.assert_close(linear(a, w, bias), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        linear(x.view(3, t // 3, d), weight), functional.linear(x.view(3, t // 3, d), weight), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(linear(x[0], weight), functional.linear(x[0], weight), rtol=1e-4, atol=1e-3)
    for empty in (x[:0], x[:0].view(2, 0, d)):
        assert linear(empty, weight).shape == (*empty.shape[:-1], f)
    assert torch.equal(linear(x[:, :0], weight[:, :0], bias), bias.expand(t, f))


@needs_onednn
def test_small_products_are_torchs():
    x, weight, bias = case(5, 6, 7)
    with linear_path("onednn"):
        assert linear(x, weight.requires_grad_(), bias).grad_fn.name() == "AddmmBackward0"
        large = linear(*(t.requires_grad_() for t in case(*LARGE)))
        assert large.grad_fn.name() != "AddmmBackward0"
    with linear_path("torch"):
        assert linear(*(t.requires_grad_() for t in case(*LARGE))).grad_fn.name() == "AddmmBackward0"


def test_choice_is_the_processors_and_can_be_pinned():
    first = linear_choice()
    assert first["path"] in ("torch", "onednn") and first["because"]
    assert linear_choice() == first
    assert linear_choice(torch.float64)["path"] == "torch"
    with linear_path("torch"):
        assert linear_choice()["path"] == "torch" and "pinned" in linear_choice()["because"]
    assert linear_choice() == first
    with pytest.raises(ValueError, match=r"path is 'mkl'; allowed are auto, torch, onednn"), linear_path("mkl"):
        pass


@needs_onednn
def test_measurement_changes_no_choice():
    before = linear_choice()
    ratios = measure_linear(64, 64, 64, rounds=1)
    assert set(ratios) == {"forward", "dx", "dw"} and all(r > 0 for r in ratios.values())
    assert linear_choice() == before


def test_repeats_bit_for_bit(path, threads):
    x, weight, bias = case(*LARGE)
    dy = torch.randn(LARGE[0], LARGE[2])
    first = run(linear, x, weight, bias, dy)
    for a, b in zip(first, run(linear, *(copy.deepcopy(t) for t in (x, weight, bias)), dy.clone()), strict=True):
        assert torch.equal(a, b)


@needs_onednn
def test_opcheck_and_second_order():
    x, weight, bias = (t.requires_grad_() for t in case(4, 5, 6))
    torch.library.opcheck(torch.ops.ppnet.linear.default, (x, weight, bias))
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(torch.ops.ppnet.linear, doubles)
    assert torch.autograd.gradgradcheck(torch.ops.ppnet.linear, doubles)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_and_autocast(path, autocast):
    x, weight, bias = case(*LARGE)
    dy = torch.randn(LARGE[0], LARGE[2])

    def loss(a, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return linear_function(a, w, b)

    def torchs(a, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return functional.linear(a, w, b)

    dy = dy.bfloat16() if autocast else dy
    expected = run(torchs, x, weight, bias, dy)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        for a, b in zip(run(function, x, weight, bias, dy), expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-4, atol=0.3 if autocast else 1e-3)


@pytest.mark.parametrize("bad", ["weight", "bias", "dtype"])
def test_errors_are_torchs(bad, path):
    x, weight, bias = case(*LARGE)
    if bad == "weight":
        weight = weight[:, 1:]
    elif bad == "bias":
        bias = bias[1:]
    else:
        weight = weight.double()
    with pytest.raises(RuntimeError) as expected:
        functional.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as error:
        linear(x, weight, bias)
    assert str(error.value) == str(expected.value)


def test_export_with_any_number_of_rows(path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(LARGE[1], LARGE[2])

        def forward(self, x):
            return linear_function(x, self.inner.weight, self.inner.bias)

    module, x = Module(), torch.randn(LARGE[0], LARGE[1])
    rows = torch.export.Dim("rows")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
    for n in (3, LARGE[0]):
        torch.testing.assert_close(program.module()(x[:n]), module(x[:n]), rtol=1e-4, atol=1e-4)
