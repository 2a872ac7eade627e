"""gated_mlp: against dense autograd times the gates, kept units, layouts, memory, tracing, checkpointing, errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ppnet.ops import gated_act_ref, gated_mlp, gated_mlp_ref, linear_path

NAMES = ["x", "up", "down", "gate", "up_bias", "gate_bias", "down_bias", "z"]


def case(d, f, dtype=torch.float32, gated=True, biased=True, shape=(2, 5), transposed=False):
    """Inputs by name; transposed: weights in the other memory order (down as nn.Linear's weight seen by its units)."""

    def matrix():
        t = torch.randn(f, d).to(dtype) / d**0.5
        return t.t().contiguous().t() if transposed else t

    def bias(n):
        return torch.randn(n).to(dtype) if biased else None

    inputs = dict(x=torch.randn(*shape, d).to(dtype), up=matrix(), down=matrix(), gate=matrix() if gated else None)
    inputs |= dict(up_bias=bias(f), gate_bias=bias(f) if gated else None, down_bias=bias(d), idx=None, z=None)
    return inputs


def with_units(inputs, idx, scaled=True):
    f = inputs["up"].shape[0] if idx is None else len(idx)
    wide = torch.float64 if inputs["x"].dtype == torch.float64 else torch.float32
    return inputs | dict(idx=idx, z=torch.randn(f, dtype=wide) if scaled else None)


def leaves_of(inputs, dtype=None, names=NAMES):
    leaves = {}
    for name, t in inputs.items():
        if t is not None and t.is_floating_point():
            t = t.detach() if dtype is None else t.detach().to(dtype)
            t = t.requires_grad_(name in names)
        leaves[name] = t
    return leaves


def run(function, inputs, act, dy):
    y = function(**inputs, act=act)
    y.backward(dy.to(y.dtype))
    return y.detach(), {name: t.grad for name, t in inputs.items() if name in NAMES and t is not None}


def dense(x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act):
    """Every neuron computed, times its gate: 0 where it is dropped."""
    f = up.shape[0]
    full = torch.ones(f, dtype=x.dtype) if z is None else z
    if idx is not None:
        full = torch.zeros(f, dtype=x.dtype).index_copy(0, idx, full if z is not None else full[: len(idx)])
    u = torch.nn.functional.linear(x, up, up_bias)
    g = None if gate is None else torch.nn.functional.linear(x, gate, gate_bias)
    return torch.nn.functional.linear(gated_act_ref(u, g, None, act) * full, down.t(), down_bias)


def units(f):
    yield None
    for k in (0, 1, f // 2 | 1, f):
        yield torch.randperm(f)[:k]


@pytest.mark.parametrize("gated, biased", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_equals_dense_times_gates(gated, biased, transposed, act):
    for idx in units(11):
        for scaled in (True, False):
            inputs = with_units(case(7, 11, torch.float64, gated, biased, transposed=transposed), idx, scaled)
            dy = torch.randn(2, 5, 7).double()
            y, grads = run(gated_mlp, leaves_of(inputs), act, dy)
            expected, expected_grads = run(dense, leaves_of(inputs), act, dy)
            torch.testing.assert_close(y, expected)
            assert grads.keys() == expected_grads.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected_grads[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t, d, f", [(1, 7, 172), (64, 172, 301), (300, 256, 700)])
def test_no_worse_than_torch(t, d, f, dtype, threads):
    for path in ("torch", "onednn"):
        with linear_path(path):
            inputs = with_units(case(d, f, dtype, shape=(t,), transposed=path == "torch"), torch.randperm(f)[: f // 2])
            dy = torch.randn(t, d).to(dtype)
            ours, theirs = (run(fn, leaves_of(inputs), "silu", dy) for fn in (gated_mlp, gated_mlp_ref))
            exact = run(dense, leaves_of(inputs, torch.float64), "silu", dy.double())
            results = zip(*([r[0], *r[1].values()] for r in (ours, theirs, exact)), strict=True)
            for name, (o, s, e) in zip(["y", *ours[1]], results, strict=True):
                error, bar = ((r.double() - e).square().mean().sqrt() for r in (o, s))
                eps = 2.0**-9 if o.dtype == torch.bfloat16 else 2.0**-24
                assert error <= 2 * bar + eps * e.square().mean().sqrt(), name


@pytest.mark.parametrize(
    "needed", [["z"], ["x"], ["up", "z"], ["down"], ["gate", "down_bias"], ["up_bias"], ["x", "gate_bias"]]
)
def test_only_what_needs_a_gradient(needed):
    for idx in (None, torch.tensor([5, 0, 9])):
        inputs = with_units(case(7, 11, torch.float64), idx)
        dy = torch.randn(2, 5, 7).double()
        _, grads = run(gated_mlp, leaves_of(inputs, names=needed), "silu", dy)
        _, expected = run(dense, leaves_of(inputs, names=needed), "silu", dy)
        for name in NAMES:
            assert (grads[name] is None) == (name not in needed)
            if name in needed:
                torch.testing.assert_close(grads[name], expected[name])


def test_gradients_keep_the_memory_order_of_weights():
    for idx in (None, torch.tensor([5, 0, 9])):
        inputs = leaves_of(with_units(case(7, 11), idx) | {"down": torch.randn(7, 11).t()})
        _, grads = run(gated_mlp, inputs, "silu", torch.randn(2, 5, 7))
        assert grads["down"].stride() == (1, 11) and grads["up"].stride() == (7, 1)


def test_gradcheck():
    inputs = leaves_of(with_units(case(3, 5, torch.float64, shape=(4,)), torch.tensor([4, 1, 2])))
    names = [name for name in NAMES if inputs[name] is not None]

    def function(*tensors):
        return gated_mlp(**(inputs | dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


def test_no_units_give_the_bias():
    inputs = with_units(case(7, 11), torch.empty(0, dtype=torch.int64))
    assert torch.equal(gated_mlp(**inputs), inputs["down_bias"].expand(2, 5, 7))
    assert not gated_mlp(**(inputs | {"down_bias": None})).any()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 3, 4)])
def test_leading_axes(shape):
    inputs = with_units(case(7, 11, torch.float64, shape=shape), torch.tensor([3, 8]))
    dy = torch.randn(*shape, 7).double()
    y, grads = run(gated_mlp, leaves_of(inputs), "relu", dy)
    expected, expected_grads = run(gated_mlp_ref, leaves_of(inputs), "relu", dy)
    torch.testing.assert_close(y, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("all_units", [True, False])
def test_opcheck(gated, all_units):
    inputs = with_units(case(7, 11, gated=gated, biased=gated), None if all_units else torch.tensor([3, 0, 8]))
    inputs["down"] = torch.randn(7, 11).t()
    args = list(leaves_of(inputs).values())
    torch.library.opcheck(torch.ops.ppnet.gated_mlp.default, (*args, "silu"))
    x, *rest = inputs.values()
    _, u, g = torch.ops.ppnet.gated_mlp(x, *rest, "silu")
    needs = [inputs[name] is not None for name in NAMES]
    for needed in (needs, [False] * 7 + [True]):
        args = (torch.randn_like(x), x, u, g if gated else None, *rest, "silu", needed)
        torch.library.opcheck(torch.ops.ppnet.gated_mlp_backward.default, args)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph_and_autocast(autocast):
    inputs = with_units(case(7, 11), torch.tensor([3, 0, 8, 9]))
    dy = torch.randn(2, 5, 7)

    def ours(**kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return gated_mlp(**kwargs)

    def torchs(**kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return gated_mlp_ref(**kwargs)

    y, grads = run(torchs, leaves_of(inputs), "silu", dy)
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)):
        result, result_grads = run(function, leaves_of(inputs), "silu", dy)
        assert result.dtype == y.dtype
        tolerance = dict(rtol=3e-2, atol=3e-2) if autocast else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result, y, **tolerance)
        for name, grad in result_grads.items():
            assert grad.dtype == inputs[name].dtype
            torch.testing.assert_close(grad, grads[name], **tolerance)


def test_checkpointing():
    inputs = with_units(case(7, 11), torch.tensor([3, 0, 8, 9]))
    dy = torch.randn(2, 5, 7)
    plain = run(gated_mlp, leaves_of(inputs), "silu", dy)
    again = run(lambda **kw: checkpoint(gated_mlp, **kw, use_reentrant=False), leaves_of(inputs), "silu", dy)
    assert torch.equal(plain[0], again[0])
    for name, grad in plain[1].items():
        assert torch.equal(grad, again[1][name])


def test_saves_pre_activations_alone():
    inputs = leaves_of(with_units(case(64, 256, shape=(100,)), torch.randperm(256)[:50]))
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_mlp(**inputs)
    own = {t.data_ptr() for t in inputs.values() if t is not None}
    new = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert new == [(100, 50), (100, 50)]


def test_export():
    inputs = with_units(case(7, 11), torch.tensor([3, 0, 8, 9]))
    weights = {name: t for name, t in inputs.items() if name != "x"}

    class Module(torch.nn.Module):
        def forward(self, x):
            return gated_mlp(x, **weights)

    program = torch.export.export(Module(), (inputs["x"],), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    x = torch.randn(2, 9, 7)
    torch.testing.assert_close(program.module()(x), gated_mlp(x, **weights))


ERRORS = [
    (dict(up=torch.zeros(11, 6)), r"up has shape \(11, 6\); for x of \(2, 5, 7\) it must be \(F, D\)"),
    (dict(down=torch.zeros(7, 11)), r"down has shape \(7, 11\); it must be \(F, D\) with F = 11"),
    (dict(gate=torch.zeros(11, 8)), r"gate has shape \(11, 8\); it must be that of up, \(11, 7\)"),
    (dict(gate=None), "gate_bias is given, but gate is None"),
    (dict(up_bias=torch.zeros(7)), r"up_bias has shape \(7,\); it must be \(11,\)"),
    (dict(down_bias=torch.zeros(11)), r"down_bias has shape \(11,\); it must be \(7,\)"),
    (dict(down=torch.zeros(11, 7).half()), r"down has dtype torch.float16; without autocast it must be x's"),
    (dict(z=torch.zeros(4)), "z has shape|size of tensor"),
]


@pytest.mark.parametrize("change, message", ERRORS)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match=message):
        gated_mlp(**(with_units(case(7, 11), torch.tensor([3, 0, 8])) | change))
