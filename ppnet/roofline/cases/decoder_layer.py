"""qkv_decode and attend_mlp_decode of one token in a layer as Llama 3's of 8 billion weights, with 512 positions in the
cache, against ppnet's single operators and against torch's modules' functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from ppnet import ops
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick

EPS = 1e-5
BOTH = (torch.bfloat16, torch.float32)


def _sizes(size: Size) -> tuple[int, int, int, int, int, int]:
    """Width of the model, heads, KV heads, width of a head, neurons, positions."""
    return pick(size, full=(4096, 32, 8, 128, 14336, 512), tiny=(40, 4, 2, 10, 24, 9))


def _drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)


def _single_qkv(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor]) -> list[Tensor]:
    outputs = ops.linears_decode(ops.rms_norm(x, norm, EPS).flatten(0, 1), weights)
    query, key, value = (y.view(*x.shape[:2], -1, cos.shape[2]).transpose(1, 2) for y in outputs)
    return [*ops.rotary(query, key, cos, sin), value]


def _torch_qkv(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor]) -> list[Tensor]:
    normed = ops.rms_norm_ref(x, norm, EPS)
    query, key, value = (linear(normed, w).view(*x.shape[:2], -1, cos.shape[2]).transpose(1, 2) for w in weights)
    return [*ops.rotary_ref(query, key, cos, sin), value]


@operator("qkv_decode")
def projections(size: Size, device: torch.device) -> Iterator[Case]:
    features, heads, groups, width, _, _ = _sizes(size)
    rows = [n * width for n in (heads, groups, groups)]
    for dtype in pick(size, full=BOTH, quick=BOTH[:1], tiny=BOTH):
        moved = sum(rows) * features * dtype.itemsize

        def setup(dtype=dtype, moved=moved) -> Providers:
            drawn = _drawn(device, dtype)
            x, norm, angle = drawn(1, 1, features), drawn(features), drawn(1, 1, width)
            arguments = (x, norm, angle.cos(), angle.sin())
            sets = copies(lambda: [drawn(n, features) / features**0.5 for n in rows], moved, device)
            return {
                "ppnet": each(sets, lambda w: list(ops.qkv_decode(x, norm, EPS, w, [None] * 3, *arguments[2:]))),
                "single operators": each(sets, partial(_single_qkv, *arguments)),
                "torch": each(sets, partial(_torch_qkv, *arguments)),
            }

        shape = {"width": features, "heads": heads, "groups": groups, "tokens": 1}
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        flops = 2 * sum(rows) * features
        yield Case("qkv_decode", "1 token", dtype, shape, 1.0, moved, flops, "read", setup, tolerance)


Half = tuple[Tensor, Tensor, Tensor, Tensor]  # out and down as nn.Linear holds them, stored unit by unit; up and gate


def _single_half(x: Tensor, query: Tensor, key: Tensor, value: Tensor, norm: Tensor, half: Half) -> Tensor:
    out, down, up, gate = half
    heads = ops.gated_attention_decode(query, key, value).transpose(1, 2).flatten(2)
    r = x + ops.linear_t_decode(heads[0], out.t())
    return r + ops.gated_mlp_decode(ops.rms_norm(r, norm, EPS)[0], up, down.t(), gate)


def _torch_half(x: Tensor, query: Tensor, key: Tensor, value: Tensor, norm: Tensor, half: Half) -> Tensor:
    out, down, up, gate = half
    heads = scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).flatten(2)
    r = x + linear(heads, out)
    normed = ops.rms_norm_ref(r, norm, EPS)
    return r + linear(silu(linear(normed, gate)) * linear(normed, up), down)


@operator("attend_mlp_decode")
def half(size: Size, device: torch.device) -> Iterator[Case]:
    features, heads, groups, width, neurons, keys = _sizes(size)
    for dtype in pick(size, full=BOTH, quick=BOTH[:1], tiny=BOTH):
        elements = heads * width * features + 3 * neurons * features
        moved = elements * dtype.itemsize

        def setup(dtype=dtype, moved=moved) -> Providers:
            drawn = _drawn(device, dtype)
            x, norm, query = drawn(1, 1, features), drawn(features), drawn(1, heads, 1, width)
            key, value = drawn(1, groups, keys, width), drawn(1, groups, keys, width)

            def weights() -> list[Tensor]:  # rows of units
                return [drawn(heads * width, features) / features**0.5] + [
                    drawn(neurons, features) / features**0.5 for _ in range(3)
                ]

            stored = copies(weights, moved, device)
            by_unit = [(out.t(), down.t(), up, gate) for out, down, up, gate in stored]
            plain = [(out.t().contiguous(), down.t().contiguous(), up, gate) for out, down, up, gate in stored]

            def ours(half: Half) -> Tensor:
                out, down, up, gate = half
                return ops.attend_mlp_decode(x, query, key, value, out, norm, EPS, up, down, gate)

            return {
                "ppnet": each(by_unit, ours),
                "single operators": each(by_unit, partial(_single_half, x, query, key, value, norm)),
                "torch": each(plain, partial(_torch_half, x, query, key, value, norm)),
            }

        shape = {"width": features, "heads": heads, "groups": groups, "neurons": neurons, "positions": keys}
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        yield Case("attend_mlp_decode", "1 token", dtype, shape, 1.0, moved, 2 * elements, "read", setup, tolerance)
