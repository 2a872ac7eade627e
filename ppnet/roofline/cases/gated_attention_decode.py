"""gated_attention_decode against torch's attention, one new token, over caches that no processor cache holds.

Bytes are the kept groups' keys and values. transformers calls SDPA on repeated keys and values, and its eager attention
two products around a softmax; at keep < 1 they read a cache that holds the kept groups alone, as a compacted model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ppnet.ops.gated_attention_decode import gated_attention_decode
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick

Cache = tuple[Tensor, Tensor]


def _repeated(t: Tensor, times: int) -> Tensor:
    """(B, Hkv, S, Dh) to (B, H, S, Dh), as transformers' repeat_kv."""
    batch, heads, keys, width = t.shape
    return t[:, :, None].expand(batch, heads, times, keys, width).reshape(batch, heads * times, keys, width)


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    times = query.shape[1] // key.shape[1]
    scores = query @ _repeated(key, times).transpose(2, 3) * query.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ _repeated(value, times)


def _providers(
    heads: int, kv: int, width: int, keys: int, keep: float, dtype: torch.dtype, device: torch.device
) -> Providers:
    kept = max(1, int(keep * kv))
    groups = torch.arange(0, kv, kv // kept, device=device)[:kept]
    times = heads // kv
    touched = 2 * kept * keys * width * dtype.itemsize
    torch.manual_seed(0)
    query = torch.randn(1, heads, 1, width, device=device).to(dtype)
    caches: list[Cache] = copies(
        lambda: (
            torch.randn(1, kv, keys, width, device=device).to(dtype),
            torch.randn(1, kv, keys, width, device=device).to(dtype),
        ),
        touched,
        device,
    )
    whole = kept == kv
    used = query if whole else query.view(1, kv, times, 1, width)[:, groups].flatten(1, 2)
    compact: list[Cache] = caches if whole else [(k[:, groups], v[:, groups]) for k, v in caches]
    chosen = None if whole else groups
    providers: Providers = {
        "ppnet": each(caches, lambda c: gated_attention_decode(used, *c, groups=chosen)),
        "SDPA": each(compact, lambda c: scaled_dot_product_attention(used, c[0], c[1], enable_gqa=times > 1)),
        "eager": each(compact, lambda c: _eager(used, *c)),
    }
    if times > 1:
        providers["SDPA, repeated"] = each(
            compact,
            lambda c: scaled_dot_product_attention(used, _repeated(c[0], times), _repeated(c[1], times)),
        )
    if not whole:
        providers["dense"] = each(caches, lambda c: gated_attention_decode(query, *c))
    return providers


@operator("gated_attention_decode")
def decode(size: Size, device: torch.device) -> Iterator[Case]:
    both = (torch.bfloat16, torch.float32)
    for dtype in pick(size, full=both, quick=(torch.bfloat16,), tiny=both):
        for heads, kv in pick(size, full=((32, 32), (32, 8)), tiny=((4, 4), (8, 4))):
            for width in pick(size, full=(64, 128), quick=(128,), tiny=(16,)):
                for keys in pick(size, full=(16, 128, 512, 1024, 8192), quick=(128, 4096), tiny=(40,)):
                    for keep in (1.0, 0.5, 0.25) if keys >= 1024 or size == "tiny" else (1.0,):
                        kept = max(1, int(keep * kv))

                        yield Case(
                            "gated_attention_decode",
                            f"{'MHA' if heads == kv else 'GQA'} {heads}/{kv}, {keys} positions, keep {keep:g}",
                            dtype,
                            {"heads": heads, "kv_heads": kv, "width": width, "keys": keys},
                            keep,
                            2 * kept * keys * width * dtype.itemsize,
                            4 * kept * (heads // kv) * keys * width,
                            "read",
                            partial(_providers, heads, kv, width, keys, keep, dtype, device),
                            0.02 if dtype == torch.bfloat16 else 1e-4,
                        )
