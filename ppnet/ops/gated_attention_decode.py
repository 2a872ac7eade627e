"""gated_attention_decode: attention of a few new tokens over a KV cache, reading only the kept KV groups.

    out[b, h, t] = gate[g] · Σ_s p[s] · value[b, groups[g], s]
    p = softmax_s(scale · ⟨query[b, h, t], key[b, groups[g], s]⟩ + mask[b, h, t, s])

with g = h // (H / G). A query that may attend to nothing gives 0 (torch's SDPA gives NaN or, from 2.5 on, 0).
"""

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain, same_device

define(
    "gated_attention_decode(Tensor query, Tensor key, Tensor value, Tensor? groups, Tensor? gate, Tensor? mask,"
    " Tensor? lengths, float scale, int window) -> Tensor"
)

GPU_WIDTH = 256  # the largest Dh of the CUDA kernels

# The packet torch.ops.ppnet.gated_attention_decode looks its overload up at every call.
_gated_attention_decode = torch.ops.ppnet.gated_attention_decode.default


def gated_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    groups: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of T new tokens (made for 1 to 8) over a cache of S positions that already holds theirs.

    query: (B, H, T, Dh) float32, bfloat16 or float16. key, value: (B, Hkv, S, Dh) of query's dtype; any strides with a
    contiguous last axis: a preallocated cache or a transposed view is read in place.
    groups: (G,) int64, the KV heads of the cache that are used, in the order of query's heads (H is a multiple of G);
    None: all. gate: (G,) float32, factors of the groups' outputs.
    mask: bool (true: attend) or floating (added to the scores), broadcastable to (B, H, T, S). -inf and the lowest
    finite value of the mask's dtype mean "do not attend": such positions of key and value may hold anything, NaN
    included, and are not read where no query attends to them.
    lengths: (B,) int64, valid positions of each sequence, the new tokens included; None: S. Without a mask the new
    tokens are causal among themselves: token t attends to positions up to lengths - T + t.
    scale: None is 1/sqrt(Dh). window: token t attends to the last `window` positions up to its own, lengths - T + t.

    Returns (B, H, T, Dh) of query's dtype, laid out as (B, T, H, Dh). Computed in float32, rounded once; independent of
    the number of threads. Working memory, kept for the next call: B · H · T · ceil(S / 512) · (Dh + 2) floats, and per
    thread 72 KB and H / G · T · (Dh + 512) floats; Dh counts as the next multiple of 32.
    On a GPU Dh is at most 256, wrong groups and lengths stop the kernel with a device-side assertion, and the working
    memory is a tensor of up to 128 parts of the positions: B · H · T · (Dh + 2) floats each. 16-bit caches whose rows
    start at 16 bytes are multiplied on tensor cores, with weights of the precision of float32.
    Under autocast a query of another dtype is cast to the cache's. Not differentiable (`gated_attention` is): raises
    RuntimeError where a gradient would be recorded. Errors (RuntimeError) name the argument and its value.
    """
    try:
        if query.dim() != 4 or key.dim() != 4:
            name, t, axes = ("query", query, "H, T") if query.dim() != 4 else ("key", key, "Hkv, S")
            raise RuntimeError(f"gated_attention_decode: {name} has shape {tuple(t.shape)}; it must be (B, {axes}, Dh)")
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise RuntimeError(
                "gated_attention_decode: query, key or value requires a gradient, and this operator has none; "
                "call it under torch.no_grad(), or train with gated_attention"
            )
        if query.dtype != key.dtype and query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
            query = query.to(key.dtype)
        return _gated_attention_decode(
            query,
            key,
            value,
            groups,
            gate,
            mask,
            lengths,
            max(query.shape[-1], 1) ** -0.5 if scale is None else scale,
            0 if window is None else window,
        )
    except Exception as error:
        explain(error, gated_attention_decode, locals())
        raise


def gated_attention_decode_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    groups: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """gated_attention_decode in plain torch, in float32 (float64 for a float64 query)."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if groups is not None:
        key, value = key.index_select(1, groups), value.index_select(1, groups)
    (batch, heads, tokens, width), kept, keys = query.shape, key.shape[1], key.shape[2]
    if kept == 0:
        return query.new_empty(query.shape)
    scale = max(width, 1) ** -0.5 if scale is None else scale
    attend, bias = attended(query, keys, mask, lengths, window or 0)
    # NaN behind the mask must not reach a product.
    used = attend.any(2).any(1)[:, None, :, None] if attend.shape[1] == 1 else None
    if used is not None:
        key, value = torch.where(used, key, 0), torch.where(used, value, 0)
    grouped = query.to(wide).reshape(batch, kept, heads // kept, tokens, width)
    scores = (grouped @ key.to(wide)[:, :, None].transpose(-1, -2)).reshape(batch, heads, tokens, keys) * scale
    scores = scores if bias is None else scores + bias.to(wide)
    scores = torch.where(attend, scores, -torch.inf)
    weights = torch.where(attend.any(-1, keepdim=True), scores, 0).softmax(-1)
    weights = torch.where(attend, weights, 0).reshape(batch, kept, heads // kept, tokens, keys)
    out = weights @ value.to(wide)[:, :, None]
    if gate is not None:
        out = out * gate.to(wide)[:, None, None, None]
    return out.reshape(query.shape).to(query.dtype)


def attended(
    query: Tensor, keys: int, mask: Tensor | None, lengths: Tensor | None, window: int
) -> tuple[Tensor, Tensor | None]:
    """Which positions each query attends to, broadcastable to (B, H, T, S), and the bias of the scores or None."""
    batch, _, tokens, _ = query.shape
    position = torch.arange(keys, device=query.device)
    ends = torch.full((batch,), keys, device=query.device) if lengths is None else lengths
    own = ends[:, None] - tokens + torch.arange(tokens, device=query.device)  # (B, T)
    last = own if mask is None else (ends - 1)[:, None]
    attend = position <= last[..., None]
    if window:
        attend = attend & (position > own[..., None] - window)
    attend = attend[:, None]  # (B, 1, T, S)
    if mask is None:
        return attend, None
    if mask.dtype == torch.bool:
        return attend & mask, None
    return attend & ~(mask <= torch.finfo(mask.dtype).min), mask


@torch.library.impl(LIBRARY, "gated_attention_decode", "CompositeExplicitAutograd")
def _gated_attention_decode_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """Runs where there is no compiled kernel: without the extension, or on a device it was not built for."""
    out = gated_attention_decode_ref(
        query, key, value, groups=groups, gate=gate, mask=mask, lengths=lengths, scale=scale, window=window
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.register_fake("ppnet::gated_attention_decode", lib=LIBRARY)
def _gated_attention_decode_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    optional = {"groups": groups, "gate": gate, "mask": mask, "lengths": lengths}
    same_device("gated_attention_decode", query=query, key=key, value=value, **optional)
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2)
