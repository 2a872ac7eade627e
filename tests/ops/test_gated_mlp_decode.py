"""gated_mlp_decode: against float64 for every activation, selection and instruction set; errors, tracing."""

import pytest
import torch
from accuracy import assert_as_accurate

import ppnet.extension as extension
from ppnet.ops import gated_mlp_decode, gated_mlp_decode_ref
from ppnet.ops.gated_act import ACTS

compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def mlp(f, d, dtype, glu=True, bias=False):
    """Arguments of an MLP; matrices are views, so that strides count."""

    def matrix():
        return (torch.randn(f, d + 9) / d**0.5).to(dtype)[:, 3 : d + 3]

    arguments = {"up": matrix(), "down": matrix(), "gate": matrix() if glu else None}
    if bias:
        arguments |= {"up_bias": torch.randn(f).to(dtype), "down_bias": torch.randn(d).to(dtype)}
        arguments |= {"gate_bias": torch.randn(f).to(dtype)} if glu else {}
    return arguments


def check(x, arguments, idx, z, act):
    def in_double(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    exact = gated_mlp_decode_ref(
        x.double(), **{k: in_double(v) for k, v in arguments.items()}, idx=idx, z=in_double(z), act=act
    )
    own = gated_mlp_decode_ref(x, **arguments, idx=idx, z=z, act=act)
    assert_as_accurate(gated_mlp_decode(x, **arguments, idx=idx, z=z, act=act), own, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("f, d", [(1, 1), (7, 172), (172, 7), (517, 300), (1100, 33)])
def test_against_float64(f, d, dtype, isa):
    for tokens in (0, 1, 2, 3, 5, 8):
        x = torch.randn(tokens, d).to(dtype)
        check(x, mlp(f, d, dtype), None, None, "silu")
        for k in sorted({0, 1, f // 2 | 1, f} & set(range(f + 1))):
            check(x, mlp(f, d, dtype, bias=True), torch.randperm(f)[:k], torch.randn(k), "silu")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("glu", [True, False])
def test_activations(act, glu, isa):
    for dtype in (torch.float32, torch.bfloat16):
        x = 3 * torch.randn(3, 64).to(dtype)
        check(x, mlp(90, 64, dtype, glu=glu, bias=True), torch.randperm(90)[:41], torch.rand(41), act)


def test_no_neurons_leave_the_bias():
    arguments = mlp(9, 6, torch.float32, bias=True)
    out = gated_mlp_decode(torch.randn(2, 6), **arguments, idx=torch.empty(0, dtype=torch.int64))
    assert torch.equal(out, arguments["down_bias"].expand(2, 6))


@compiled
def test_dropped_neurons_are_not_read(isa):
    """Whatever the weights of a neuron that is not kept hold, not a number included."""
    arguments = mlp(50, 40, torch.float32)
    for name in ("up", "down", "gate"):
        arguments[name][::2] = float("nan")
    kept = torch.arange(1, 50, 2)
    assert not gated_mlp_decode(torch.randn(1, 40), **arguments, idx=kept).isnan().any()


def test_tracing_compile_export_and_autocast():
    x, arguments, idx, z = torch.randn(2, 48), mlp(30, 48, torch.float32), torch.tensor([4, 2, 29]), torch.rand(3)
    positional = (x, arguments["up"], arguments["down"], arguments["gate"], None, None, None, idx, z, "silu")
    torch.library.opcheck(torch.ops.ppnet.gated_mlp_decode, positional)

    class Mlp(torch.nn.Module):
        def forward(self, x):
            return gated_mlp_decode(x, **arguments, idx=idx, z=z)

    expected = Mlp()(x)
    assert torch.equal(torch.compile(Mlp(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Mlp(), (x,)).module()(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Mlp()(x)
    rounded = {name: value.bfloat16() for name, value in arguments.items()}
    assert torch.equal(out, gated_mlp_decode(x.bfloat16(), **rounded, idx=idx, z=z))
    with pytest.raises(RuntimeError, match=r"not differentiable.*gated_mlp"):
        gated_mlp_decode(x.requires_grad_(), **arguments)


@compiled
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(9, 6)}, r"x has shape \(9, 6\)"),
        ({"x": torch.randn(2, 5)}, r"x has shape \(2, 5\); it must be \(T, D\), D that of up = \(any, 6\)"),
        ({"down": torch.randn(6, 4).t()}, r"down of shape \(4, 6\) has strides .*unit by unit"),
        ({"down": torch.randn(6, 4)}, r"down has shape \(6, 4\); it must be \(F, D\), as up = \(4, 6\)"),
        ({"gate": torch.randn(4, 6).bfloat16()}, "gate has dtype BFloat16; it must be Float"),
        ({"gate_bias": torch.randn(4), "gate": None}, "gate_bias is given, but gate is not"),
        ({"up_bias": torch.randn(3)}, r"up_bias has shape \(3,\)"),
        ({"down_bias": torch.randn(4)}, r"down_bias has shape \(4,\)"),
        ({"idx": torch.tensor([1, 4])}, r"idx\[1\] is 4; allowed are 0 \.\. 3"),
        ({"z": torch.rand(3)}, r"z has shape \(3,\); it must be \(K,\) = \(4,\)"),
        ({"act": "tanh"}, 'act is "tanh"; allowed are silu, gelu, gelu_tanh, relu and relu2'),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {"x": torch.randn(2, 6), **mlp(4, 6, torch.float32), **changes}
    with pytest.raises(RuntimeError, match=f"gated_mlp_decode: {message}"):
        gated_mlp_decode(**arguments)
