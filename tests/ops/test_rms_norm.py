"""rms_norm against float64 and transformers' module: every width, dtype, instruction set; errors and tracing."""

import pytest
import torch
from accuracy import assert_as_accurate
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ppnet.extension as extension
from ppnet.ops import rms_norm, rms_norm_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 172), (2, 5, 64), (700, 513), (2, 1, 4096), (0, 8), (3, 0)])
def test_against_float64(shape, dtype, isa, threads):
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    ours, own = rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6)
    assert_as_accurate(ours, own, rms_norm_ref(x.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_module_but_for_the_order_of_the_sum(dtype, isa):
    module = LlamaRMSNorm(300, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    module, x = module.to(dtype), torch.randn(50, 300).to(dtype)
    with torch.no_grad():
        own, ours = module(x), rms_norm(x, module.weight, 1e-5)
    # The sums' last places, or, in 16 bits, the next value where they fall on two sides of a rounding.
    assert ((ours - own).abs() <= 4 * torch.finfo(dtype).eps * own.abs()).all()
    if dtype != torch.float32:
        assert (ours == own).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_values(dtype, isa):
    x, weight = torch.randn(9, 6, 80).to(dtype), torch.randn(80).to(dtype)
    for view in (x.transpose(0, 1), x[::2, 1:], x[..., ::2], x.expand(2, 9, 6, 80)):
        scale = weight[::2] if view.shape[-1] == 40 else weight
        assert torch.equal(rms_norm(view, scale, 1e-6), rms_norm(view.contiguous(), scale.contiguous(), 1e-6))
    assert rms_norm(torch.zeros(2, 80, dtype=dtype), weight, 1e-6).eq(0).all()
    spoiled = x.clone()
    spoiled[3, 2, 5] = float("nan")
    bad = rms_norm(spoiled, weight, 1e-6).isnan()
    assert bad[3, 2].all() and bad.sum() == 80


def test_tracing_compile_and_gradients():
    x, weight = torch.randn(2, 48), torch.randn(48)
    torch.library.opcheck(torch.ops.ppnet.rms_norm, (x, weight, 1e-6))
    traced = torch.compile(lambda x: rms_norm(x, weight, 1e-6), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x), rms_norm(x, weight, 1e-6))
    with pytest.raises(RuntimeError, match=r"rms_norm: not differentiable.*torch\.nn\.functional\.rms_norm"):
        rms_norm(x.requires_grad_(), weight, 1e-6)


@compiled
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.randn(2, 6).double(), torch.randn(6).double()), "x has dtype Double; allowed are Float"),
        ((torch.tensor(1.0), torch.randn(1)), r"x has shape \(\); it must be \(\.\.\., D\)"),
        ((torch.randn(2, 6), torch.randn(5)), r"weight has shape \(5,\); it must be \(D,\), D that of x = \(6,\)"),
        ((torch.randn(2, 6), torch.randn(6).half()), r"weight has dtype Half; it must be Float \(that of x\)"),
        ((torch.ones(2, 6, dtype=torch.int64), torch.ones(6)), "x has dtype Long"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(RuntimeError, match=f"rms_norm: {message}"):
        rms_norm(*arguments, 1e-6)
