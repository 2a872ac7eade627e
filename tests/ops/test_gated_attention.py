"""gated_attention: both paths against float64, every gradient, masks, windows, gates, garbage behind masks, tracing."""

import importlib

import pytest
import torch
from any_input import place

import ppnet.ops.gated_attention_gemm as blocks
from ppnet.ops.gated_attention import attention_path, gated_attention, gated_attention_ref

SHAPES = [  # B, H, Hkv, T, S, Dh
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 7, 7, 16),
    (2, 8, 2, 172, 172, 64),
    (1, 6, 3, 300, 333, 80),
    (2, 4, 4, 50, 9, 16),
]
RULES = [{}, {"is_causal": True}, {"is_causal": True, "window": 20}, {"window": 5, "scale": 0.2}]


# The package holds the function of this name, so that `import ... as` would give that.
module = importlib.import_module("ppnet.ops.gated_attention")


@pytest.fixture(params=["gemm", "sdpa"])
def path(request, monkeypatch):
    """Each path, whatever the processor and the shapes."""
    monkeypatch.setattr(module, "attention_path", lambda *_: request.param)
    return request.param


def tensors(shape, dtype, seed=0):
    batch, heads, kv_heads, tokens, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, heads, tokens, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width)
    query, key, value = (torch.randn(n, generator=generator).to(dtype) for n in sizes)
    gate = torch.tensor([0.0, 1.0, 0.5, -1.0])[:kv_heads].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [query, key, value, gate], torch.randn(sizes[0], generator=generator).to(dtype)


def masks(shape, dtype):
    batch, heads, _, tokens, keys, _ = shape
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand((batch, heads, tokens, keys), generator=generator) > 0.3
    padded = torch.arange(keys) >= torch.arange(batch)[:, None] * (keys // 2)
    return {
        "none": None,
        "per head": keep,
        "left padding": padded[:, None, None].expand(batch, 1, tokens, keys),
        "bias": torch.randn((batch, 1, tokens, keys), generator=generator).to(dtype),
        "lowest": torch.where(keep[:, :1], 0.0, torch.finfo(dtype).min).to(dtype),
        "keys alone": keep[0, 0, 0],
    }


def with_gradients(attention, leaves, dout, dtype, mask, **rule):
    leaves = [t.to(dtype if t.dim() == 4 else torch.promote_types(dtype, torch.float32)) for t in leaves]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    if mask is not None and mask.dtype != torch.bool:
        mask = torch.where(mask <= torch.finfo(mask.dtype).min, -torch.inf, mask.to(dtype))
    query, key, value, gate = leaves
    out = attention(query, key, value, gate=gate, mask=mask, **rule)
    return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_against_float64(shape, dtype, path):
    leaves, dout = tensors(shape, dtype)
    for name, mask in masks(shape, dtype).items():
        for rule in RULES:
            ours = with_gradients(gated_attention, leaves, dout, dtype, mask, **rule)
            torchs = with_gradients(gated_attention_ref, leaves, dout, dtype, mask, **rule)
            exact = with_gradients(gated_attention_ref, leaves, dout, torch.float64, mask, **rule)
            for what, a, b, x in zip(("out", "dquery", "dkey", "dvalue", "dgate"), ours, torchs, exact, strict=True):
                assert a.shape == x.shape and a.dtype == b.dtype
                error, bar = (a.double() - x).abs().max(), (b.double() - x).abs().max()
                # torch's flash attention has its own exponential, and sums dvalue in bfloat16.
                floor = (2 if dtype == torch.bfloat16 else 32) * torch.finfo(dtype).eps * x.abs().max() + 2e-6
                assert error <= 2 * bar + floor, (what, name, rule, error, bar)


def test_gradcheck(path):
    (query, key, value, gate), _ = tensors((1, 4, 2, 5, 6, 4), torch.float64)
    gate[0] = 0.0  # exact there too
    leaves = [t.requires_grad_() for t in (query, key, value, gate)]
    mask = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    for options in ({"mask": mask}, {"is_causal": True}, {"window": 2}):
        assert torch.autograd.gradcheck(
            lambda q, k, v, g, options=options: gated_attention(q, k, v, gate=g, **options), leaves
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_behind_the_mask(dtype, garbage, path):
    leaves, dout = tensors((2, 4, 2, 40, 70, 16), dtype)
    keep = (torch.arange(70) >= torch.tensor([[3], [11]])) & (torch.arange(70) < 60)
    mask = keep[:, None, None].expand(2, 1, 40, 70)
    expected = with_gradients(gated_attention, leaves, dout, dtype, mask)
    for i in (1, 2):
        leaves[i] = torch.where(keep[:, None, :, None], leaves[i], garbage)
    ours = with_gradients(gated_attention, leaves, dout, dtype, mask)
    for a, b in zip(ours[:4], expected[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [{"window": 9}, {"window": 9, "is_causal": True}, {"is_causal": True, "mask": True}])
def test_garbage_that_rules_hide(rule, path):
    """Before every window; and where what a mask allows to some queries is after each of them."""
    leaves, dout = tensors((1, 4, 2, 20, 70, 16), torch.float32)
    hidden = torch.arange(70) < 70 - 20 - 9 + 1
    mask = None
    if rule.get("mask"):
        hidden = torch.arange(70) == 69
        mask = torch.ones(20, 70, dtype=torch.bool)
        mask[-1, -1] = False
    rule = {name: value for name, value in rule.items() if name != "mask"}
    expected = with_gradients(gated_attention, leaves, dout, torch.float32, mask, **rule)
    for i in (1, 2):
        leaves[i] = torch.where(hidden[:, None], torch.nan, leaves[i])
    for a, b in zip(
        with_gradients(gated_attention, leaves, dout, torch.float32, mask, **rule)[:4], expected[:4], strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["stepped", "transposed", "expanded"])
def test_any_layout_of_the_last_axis(layout, path):
    """torch's kernels for the CPU take it for contiguous."""
    leaves, dout = tensors((2, 4, 2, 9, 11, 16), torch.float32)
    leaves[:3], dout = [place(t, layout) for t in leaves[:3]], place(dout, layout)
    expected = with_gradients(gated_attention, [t.contiguous() for t in leaves], dout.contiguous(), torch.float32, None)
    query, key, value, gate = (t.detach().requires_grad_() for t in leaves)
    out = gated_attention(query, key, value, gate=gate)
    for a, b in zip([out, *torch.autograd.grad(out, (query, key, value, gate), dout)], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_attend_to_gives_zero(path):
    leaves, dout = tensors((2, 2, 2, 9, 9, 16), torch.bfloat16)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :4] = False
    results = with_gradients(gated_attention, leaves, dout, torch.bfloat16, mask)
    assert not results[0][1, :, :4].any() and not results[1][1, :, :4].any()
    assert not any(t.isnan().any() for t in results)


def test_layouts_and_runs_agree(path):
    leaves, dout = tensors((2, 6, 2, 33, 33, 16), torch.bfloat16)
    expected = with_gradients(gated_attention, leaves, dout, torch.bfloat16, None, is_causal=True)
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for t in leaves]
    for inputs in (leaves, by_token):
        again = with_gradients(gated_attention, inputs, dout, torch.bfloat16, None, is_causal=True)
        for a, b in zip(again[:4], expected[:4], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(again[4], expected[4])  # autograd sums it in the order of value's memory
    assert expected[0].transpose(1, 2).is_contiguous()


def test_many_blocks(monkeypatch, path):
    """Blocks of few heads and of few queries."""
    leaves, dout = tensors((2, 4, 2, 200, 200, 16), torch.float32)
    expected = with_gradients(gated_attention, leaves, dout, torch.float32, None, is_causal=True, window=70)
    for scores in (1, 1 << 14):
        monkeypatch.setattr(blocks, "_BLOCK_SCORES", scores)
        for a, b in zip(
            with_gradients(gated_attention, leaves, dout, torch.float32, None, is_causal=True, window=70),
            expected,
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 8), (1, 2, 2, 0, 3, 8), (1, 2, 2, 3, 0, 8), (1, 0, 0, 3, 3, 8)])
def test_empty(shape, path):
    leaves, dout = tensors(shape, torch.float32)
    results = with_gradients(gated_attention, leaves, dout, torch.float32, None)
    assert results[0].shape == leaves[0].shape and not any(t.any() for t in results)


def test_path_is_a_rule():
    query, key = torch.zeros(1, 2, 512, 64), torch.zeros(1, 2, 512, 64)
    assert attention_path(query, key) == "sdpa"
    fast = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    assert attention_path(query.bfloat16(), key.bfloat16(), True) == ("gemm" if fast else "sdpa")
    assert attention_path(query[:, :, :4].bfloat16(), key.bfloat16()) == "sdpa"


def test_autocast():
    (query, key, value, gate), _ = tensors((1, 2, 2, 9, 9, 8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated_attention(query, key.bfloat16(), value, gate=gate).dtype == torch.bfloat16


def test_opcheck(path):
    (query, key, value, _), _ = tensors((2, 4, 2, 9, 11, 8), torch.float32)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    mask = torch.rand(2, 1, 9, 11) > 0.3
    torch.library.opcheck(torch.ops.ppnet.gated_attention.default, (*leaves, mask, True, 0.3, 4))


def test_compile_and_export(path):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, gate):
            out = gated_attention(query, key, value, gate=gate, is_causal=True, window=30)
            return out.transpose(1, 2).flatten(2)

    leaves, _ = tensors((2, 4, 2, 50, 50, 16), torch.float32)
    results = []
    for run in (Attend(), torch.compile(Attend(), fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in leaves]
        run(*inputs).square().sum().backward()
        results.append([t.grad for t in inputs])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)
    exported = torch.export.export(Attend(), tuple(leaves)).module()
    assert torch.equal(exported(*leaves), Attend()(*leaves))


ERRORS = [
    (dict(query=torch.zeros(4, 3, 8)), r"query has shape \(4, 3, 8\)"),
    (dict(query=torch.zeros(2, 3, 5, 8)), r"query has 3 heads, which is no multiple of key's 2"),
    (dict(value=torch.zeros(2, 2, 6, 8)), r"value has shape \(2, 2, 6, 8\)"),
    (dict(key=torch.zeros(2, 2, 7, 8).half()), r"key has shape .* and dtype torch.float16; it must be"),
    (dict(gate=torch.ones(4)), r"gate has shape \(4,\) and dtype torch.float32; it must be \(Hkv,\) = \(2,\)"),
    (dict(window=0), r"window is 0; allowed are positions >= 1"),
    (dict(mask=torch.zeros(5, 6)), r"mask has shape \(5, 6\); it must broadcast to \(B, H, T, S\) = \(2, 4, 5, 7\)"),
    (dict(mask=torch.zeros(5, 7, dtype=torch.int64)), r"mask has dtype torch.int64"),
]


@pytest.mark.parametrize("change, message", ERRORS)
def test_errors(change, message):
    args = dict(query=torch.zeros(2, 4, 5, 8), key=torch.zeros(2, 2, 7, 8), value=torch.zeros(2, 2, 7, 8)) | change
    with pytest.raises(RuntimeError, match=message):
        gated_attention(**args)
