"""rotary against float64 and transformers' function: shapes, layouts, dtypes, instruction sets; errors and tracing."""

import pytest
import torch
from accuracy import assert_as_accurate
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import ppnet.extension as extension
from ppnet.ops import rotary, rotary_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def angles(*shape, dtype=torch.float32):
    turns = 100 * torch.rand(*shape[:-1], shape[-1] // 2)
    turns = torch.cat([turns, turns], -1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, heads, groups, tokens, width", [
    (1, 1, 1, 1, 2), (2, 7, 1, 3, 14), (1, 32, 8, 1, 64), (2, 4, 4, 65, 128), (3, 2, 0, 5, 96), (2, 3, 3, 0, 8),
])  # fmt: skip
def test_against_float64(batch, heads, groups, tokens, width, dtype, isa, threads):
    query = torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)  # as a projection gives them
    key = torch.randn(batch, groups, tokens, width).to(dtype)
    for sequences in {1, batch}:
        both = angles(sequences, tokens, width, dtype=dtype)
        ours, own = rotary(query, key, *both), rotary_ref(query, key, *both)
        exact = rotary_ref(query.double(), key.double(), *(a.double() for a in both))
        for each in zip(ours, own, exact, strict=True):
            assert_as_accurate(*each)


def test_as_transformers_and_layout(isa):
    query, key, (cos, sin) = torch.randn(2, 6, 5, 32), torch.randn(2, 2, 5, 32), angles(2, 5, 32)
    for ours, own in zip(rotary(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-6)
        assert ours.transpose(1, 2).is_contiguous()


def test_any_layout(isa):
    query, key, (cos, sin) = torch.randn(2, 6, 5, 64), torch.randn(5, 3, 2, 64), angles(2, 5, 64)
    expected = rotary(query[..., ::2].contiguous(), key.transpose(0, 2)[..., 32:].contiguous(),
                      cos[..., 32:].contiguous(), sin[..., :32].contiguous())  # fmt: skip
    strided = rotary(query[..., ::2], key.transpose(0, 2)[..., 32:], cos[..., 32:], sin[..., :32])
    for one, other in zip(strided, expected, strict=True):
        assert torch.equal(one, other)


def test_tracing_compile_and_gradients():
    arguments = (torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), *angles(1, 3, 16))
    torch.library.opcheck(torch.ops.ppnet.rotary, arguments)
    traced = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    for one, other in zip(traced(*arguments), rotary(*arguments), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match=r"rotary: not differentiable.*apply_rotary_pos_emb"):
        rotary(arguments[0].requires_grad_(), *arguments[1:])


Q, K, (COS, SIN) = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), angles(2, 3, 16)


@compiled
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Q[0], K, COS, SIN), r"query has shape \(4, 3, 16\); it must be \(B, H, T, Dh\)"),
        (
            (Q[..., :15], K[..., :15], COS[..., :15], SIN[..., :15]),
            r"query has shape \(2, 4, 3, 15\); its last axis, Dh, must be even",
        ),
        ((Q.double(), K, COS, SIN), "query has dtype Double; allowed are Float, BFloat16 and Half"),
        ((Q, K.half(), COS, SIN), r"key has dtype Half; it must be Float \(that of query\)"),
        ((Q, K[:1], COS, SIN), r"key has shape \(1, 2, 3, 16\); it must be \(B, Hkv, T, Dh\) .* = \(2, any, 3, 16\)"),
        ((Q, K, COS[:, :2], SIN), r"cos has shape \(2, 2, 16\); it must be \(B or 1, T, Dh\) = \(2, 3, 16\)"),
        ((Q, K, COS, SIN[0]), r"sin has shape \(3, 16\); it must be \(B or 1, T, Dh\)"),
        ((Q, K, COS, SIN[:1]), r"sin has shape \(1, 3, 16\); it must be that of cos, \(2, 3, 16\)"),
        ((Q, K, COS.half(), SIN), r"cos has dtype Half; it must be Float"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(RuntimeError, match=f"rotary: {message}"):
        rotary(*arguments)
