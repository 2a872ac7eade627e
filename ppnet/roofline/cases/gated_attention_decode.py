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
REPEATABLE = 2 << 30  # bytes of a cache above which its keys and values are not repeated per head any more


def _repeated(t: Tensor, times: int) -> Tensor:
    """(B, Hkv, S, Dh) to (B, H, S, Dh), as transformers' repeat_kv."""
    batch, heads, keys, width = t.shape
    return t[:, :, None].expand(batch, heads, times, keys, width).reshape(batch, heads * times, keys, width)


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    times = query.shape[1] // key.shape[1]
    scores = query @ _repeated(key, times).transpose(2, 3) * query.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ _repeated(value, times)


def _providers(
    batch: int, heads: int, kv: int, width: int, keys: int, keep: float, dtype: torch.dtype, device: torch.device
) -> Providers:
    kept = max(1, int(keep * kv))
    groups = torch.arange(0, kv, kv // kept, device=device)[:kept]
    times = heads // kv
    touched = 2 * batch * kept * keys * width * dtype.itemsize
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, width, device=device).to(dtype)
    caches: list[Cache] = copies(
        lambda: (
            torch.randn(batch, kv, keys, width, device=device).to(dtype),
            torch.randn(batch, kv, keys, width, device=device).to(dtype),
        ),
        touched,
        device,
    )
    whole = kept == kv
    used = query if whole else query.view(batch, kv, times, 1, width)[:, groups].flatten(1, 2)
    compact: list[Cache] = caches if whole else [(k[:, groups], v[:, groups]) for k, v in caches]
    chosen = None if whole else groups
    providers: Providers = {
        "ppnet": each(caches, lambda c: gated_attention_decode(used, *c, groups=chosen)),
        "SDPA": each(compact, lambda c: scaled_dot_product_attention(used, c[0], c[1], enable_gqa=times > 1)),
    }
    repeatable = times == 1 or touched <= REPEATABLE
    if repeatable:
        providers["eager"] = each(compact, lambda c: _eager(used, *c))
    if times > 1 and repeatable:
        providers["SDPA, repeated"] = each(
            compact,
            lambda c: scaled_dot_product_attention(used, _repeated(c[0], times), _repeated(c[1], times)),
        )
    if not whole:
        providers["dense"] = each(caches, lambda c: gated_attention_decode(query, *c))
    return providers


Sweep = Iterator[tuple[torch.dtype, int, int, int, int, int, tuple[float, ...]]]


def _on_cpu(size: Size) -> Sweep:
    """(dtype, heads, KV heads, width, positions, sequences, kept parts)."""
    both = (torch.bfloat16, torch.float32)
    for dtype in pick(size, full=both, quick=(torch.bfloat16,), tiny=both):
        for heads, kv in pick(size, full=((32, 32), (32, 8)), tiny=((4, 4), (8, 4))):
            for width in pick(size, full=(64, 128), quick=(128,), tiny=(16,)):
                for keys in pick(size, full=(16, 128, 512, 1024, 8192), quick=(128, 4096), tiny=(40,)):
                    some = keys >= 1024 or size == "tiny"
                    yield dtype, heads, kv, width, keys, 1, (1.0, 0.5, 0.25) if some else (1.0,)


def _on_gpu(size: Size) -> Sweep:
    """As `_on_cpu`: what servers hold, up to 64 sequences of 32,768 positions."""
    for heads, kv in pick(size, full=((32, 8), (32, 32)), quick=((32, 8),), tiny=((8, 4),)):
        for keys in pick(size, full=(1024, 8192, 32768), tiny=(40,)):
            for batch in pick(size, full=(1, 8, 64), tiny=(1, 3)):
                if kv * keys * batch > 8 * 32768 * 64:
                    continue  # two such caches and their compacted copies fill a GPU
                some = (keys, batch) == (8192, 8) or size == "tiny"
                yield (
                    torch.bfloat16,
                    heads,
                    kv,
                    pick(size, full=128, tiny=16),
                    keys,
                    batch,
                    (1.0, 0.5) if some else (1.0,),
                )


@operator("gated_attention_decode")
def decode(size: Size, device: torch.device) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    for dtype, heads, kv, width, keys, batch, keeps in (_on_gpu if on_gpu else _on_cpu)(size):
        for keep in keeps:
            kept = max(1, int(keep * kv))
            positions = f"{keys} positions, batch {batch}" if on_gpu else f"{keys} positions"
            shape = {"heads": heads, "kv_heads": kv, "width": width, "keys": keys}
            yield Case(
                "gated_attention_decode",
                f"{'MHA' if heads == kv else 'GQA'} {heads}/{kv}, {positions}, keep {keep:g}",
                dtype,
                {**shape, "batch": batch} if on_gpu else shape,
                keep,
                2 * batch * kept * keys * width * dtype.itemsize,
                4 * batch * kept * (heads // kv) * keys * width,
                "read",
                partial(_providers, batch, heads, kv, width, keys, keep, dtype, device),
                0.02 if dtype == torch.bfloat16 else 1e-4,
            )
