"""gated_attention against torch's SDPA: prefill (forward alone) and training (with the backward), 16 heads.

Flops are the products' multiply-adds: 4 · T · S · Dh per head forward, 10 more in the backward; half where causal.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ppnet.ops.gated_attention import attention_path, gated_attention
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _providers(
    shape: tuple[int, int, int], causal: bool, train: bool, dtype: torch.dtype, device: torch.device
) -> Providers:
    torch.manual_seed(0)
    heads, tokens, width = shape

    def make() -> Inputs:
        leaves = [torch.randn(1, heads, tokens, width, device=device).to(dtype).requires_grad_(train) for _ in range(3)]
        return leaves[0], leaves[1], leaves[2], torch.randn(1, heads, tokens, width, device=device).to(dtype)

    inputs = copies(make, 4 * heads * tokens * width * dtype.itemsize, device)

    def run(attention, one: Inputs) -> list[Tensor]:
        query, key, value, dout = one
        if not train:
            with torch.no_grad():
                return [attention(query, key, value, is_causal=causal)]
        with torch.enable_grad():
            out = attention(query, key, value, is_causal=causal)
            return [out.detach(), *torch.autograd.grad(out, (query, key, value), dout)]

    providers = {
        "ppnet": each(inputs, lambda one: run(gated_attention, one)),
        "SDPA": each(inputs, lambda one: run(scaled_dot_product_attention, one)),
    }
    if device.type == "cuda" and dtype != torch.float32:
        providers["ppnet, fused"] = each(inputs, lambda one: run(partial(gated_attention, path="fused"), one))
    return providers


@operator("gated_attention")
def attention(size: Size, device: torch.device) -> Iterator[Case]:
    both = (torch.bfloat16, torch.float32)
    for dtype in pick(size, full=both, quick=(torch.bfloat16,), tiny=both):
        for width in pick(size, full=(64, 128), quick=(128,), tiny=(16,)):
            for tokens in pick(size, full=(512, 1024, 2048), quick=(1024,), tiny=(40,)):
                for causal in (False, True):
                    for train in (False, True):
                        heads = pick(size, full=16, tiny=2)
                        like = torch.empty(1, heads, tokens, width, dtype=dtype, device=device)
                        flops = (14 if train else 4) * heads * tokens * tokens * width / (2 if causal else 1)

                        yield Case(
                            "gated_attention",
                            f"{'training' if train else 'prefill'}{', causal' if causal else ''}, {tokens} tokens, "
                            f"path {attention_path(like, like, causal)}",
                            dtype,
                            {"heads": heads, "width": width, "tokens": tokens},
                            1.0,
                            (12 if train else 4) * heads * tokens * width * dtype.itemsize,
                            flops,
                            "copy",
                            partial(_providers, (heads, tokens, width), causal, train, dtype, device),
                            0.03 if dtype == torch.bfloat16 else 1e-4,
                        )
