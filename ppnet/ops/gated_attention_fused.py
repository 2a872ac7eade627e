"""gated_attention in one kernel on NVIDIA GPUs: what `gated_attention(..., path="fused")` calls.

    out[b, h, t] = gate[k] · Σ_s softmax_s(scale · ⟨query[b, h, t], key[b, groups[k], s]⟩ + mask[b, h, t, s])
                           · value[b, groups[k], s]

with k = h // (H / G), and lse[b, h, t] the logarithm of the softmax's sum. Flash style on mma.sync
(csrc/cuda/gated_attention.cu), for bfloat16 and float16, Dh a multiple of 8 up to 256 (64, 96, 128 and 256 waste
nothing). Scores and sums are float32, weights are rounded to query's dtype for the product with value, the gate
multiplies the float32 sum. Without the kernel plain torch computes the same in float32, every score at once.
"""

import torch
from torch import Tensor

from ppnet.ops.gated_attention_gemm import attended, empty_by_token, wide
from ppnet.ops.library import LIBRARY, define

_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? groups, Tensor? mask, Tensor? used, bool is_causal,"
    " float scale, int window"
)
define(f"gated_attention_fused({_SCHEMA}) -> (Tensor out, Tensor lse)")
define(
    f"gated_attention_fused_backward(Tensor dout, {_SCHEMA}, Tensor out, Tensor lse)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgate)"
)


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    groups: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
) -> Tensor:
    """Calls the operator with gated_attention's arguments, checked.

    A mask of keys alone becomes `used`, (B, S); of others it is what some query attends to: the rest is not read.
    """
    used = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.float() if mask.dtype == torch.float64 else mask
        used = _used(mask, query.shape[2], key.shape[2], is_causal, window).expand(query.shape[0], key.shape[2])
        if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
            mask = None
    gate = None if gate is None else gate.to(wide(query))
    return torch.ops.ppnet.gated_attention_fused(query, key, value, gate, groups, mask, used, is_causal, scale, window)[
        0
    ]


def fits_fused(query: Tensor) -> bool:
    """Whether the kernel takes this dtype and width."""
    width = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and 0 < width <= 256 and width % 8 == 0


def _used(mask: Tensor, tokens: int, keys: int, is_causal: bool, window: int) -> Tensor:
    """(B or 1, S or 1): keys that some query of the sequence attends to."""
    attend = attended(mask)
    if mask.shape[2] > 1 and (is_causal or window):
        attend = attend & _allowed(tokens, keys, is_causal, window, mask.device)
    return attend.any(2).any(1)


def _allowed(tokens: int, keys: int, is_causal: bool, window: int, device: torch.device) -> Tensor:
    """(T, S): what the causal rule and the window let attend."""
    position = torch.arange(keys, device=device)
    own = torch.arange(keys - tokens, keys, device=device)[:, None]
    allowed = torch.ones((tokens, keys), dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed & (position <= own)
    return allowed & (position > own - window) if window else allowed


# --- the operators, where there is no kernel --------------------------------------------------------------------------


class _Softmax:
    """Key, value (B, H, S, Dh), gate (H, 1, 1), weights (B, H, T, S) and their lse, all in float32 or wider."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        groups: Tensor | None,
        mask: Tensor | None,
        used: Tensor | None,
        is_causal: bool,
        scale: float,
        window: int,
    ) -> None:
        dtype, tokens, keys = wide(query), query.shape[2], key.shape[2]
        if window:  # keys before every window
            seen = torch.arange(keys, device=key.device) > keys - tokens - window
            used = seen.expand(key.shape[0], keys) if used is None else used & seen
        kept = torch.arange(key.shape[1], device=key.device) if groups is None else groups
        self.kept, self.repeat = kept, query.shape[1] // max(1, len(kept))
        self.query, self.key, self.value = query.to(dtype), self._per_head(key, used), self._per_head(value, used)
        factors = torch.ones(len(kept), device=query.device) if gate is None else gate
        self.gate = factors.to(dtype).repeat_interleave(self.repeat)[:, None, None]
        attend = _allowed(tokens, keys, is_causal, window, query.device)
        scores = self.query @ self.key.transpose(-1, -2) * scale
        if mask is not None:
            attend = attend & attended(mask)
            scores = scores if mask.dtype == torch.bool else scores + mask.to(dtype)
        attend = attend if used is None else attend & used[:, None, None]
        scores = torch.where(attend, scores, -torch.inf)
        self.lse = scores.logsumexp(-1)
        self.weights = (scores - torch.where(self.lse == -torch.inf, 0, self.lse)[..., None]).exp()

    def _per_head(self, t: Tensor, used: Tensor | None) -> Tensor:
        t = t if used is None else torch.where(used[:, None, :, None], t, 0)
        return t[:, self.kept].repeat_interleave(self.repeat, 1).to(torch.promote_types(t.dtype, torch.float32))

    def per_group(self, gradient: Tensor, of: Tensor) -> Tensor:
        """The sum over the heads of every group, of `of`'s shape and dtype."""
        summed = gradient.unflatten(1, (len(self.kept), -1)).sum(2) if len(self.kept) else gradient[:, :0]
        return torch.zeros_like(of, dtype=gradient.dtype).index_add(1, self.kept, summed).to(of.dtype)


@torch.library.impl(LIBRARY, "gated_attention_fused", "CompositeExplicitAutograd")
def _forward(query: Tensor, *rest) -> tuple[Tensor, Tensor]:
    softmax = _Softmax(query, *rest)
    return empty_by_token(query).copy_(softmax.weights @ softmax.value * softmax.gate), softmax.lse


@torch.library.impl(LIBRARY, "gated_attention_fused_backward", "CompositeExplicitAutograd")
def _backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, *rest):
    arguments = rest[:-2]  # without out and lse
    softmax = _Softmax(query, key, value, gate, *arguments)
    scale, dout = arguments[-2], dout.to(softmax.query.dtype)
    dweights = dout @ softmax.value.transpose(-1, -2)
    through = (softmax.weights * dweights).sum(-1, keepdim=True)
    dscores = softmax.gate * softmax.weights * (dweights - through) * scale
    dgate = query.new_zeros(0, dtype=torch.float32) if gate is None else torch.zeros_like(gate)
    if gate is not None and len(gate):
        dgate += through.sum((0, 2, 3)).unflatten(0, (len(gate), -1)).sum(1)
    return (
        empty_by_token(query).copy_(dscores @ softmax.key),
        softmax.per_group(dscores.transpose(-1, -2) @ softmax.query, key),
        softmax.per_group(softmax.weights.transpose(-1, -2) @ dout * softmax.gate, value),
        dgate,
    )


@torch.library.register_fake("ppnet::gated_attention_fused", lib=LIBRARY)
def _forward_fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_by_token(query), query.new_empty(query.shape[:3], dtype=wide(query))


@torch.library.register_fake("ppnet::gated_attention_fused_backward", lib=LIBRARY)
def _backward_fake(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = query.new_empty(0, dtype=torch.float32) if gate is None else torch.empty_like(gate)
    return empty_by_token(query), torch.empty_like(key), torch.empty_like(value), dgate


def _save_for_gradient(ctx, inputs, output) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, dout, _dlse):
    *inputs, out, lse = ctx.saved_tensors
    *gradients, dgate = torch.ops.ppnet.gated_attention_fused_backward(
        dout, *inputs, ctx.is_causal, ctx.scale, ctx.window, out, lse
    )
    gate = inputs[3]
    return *gradients, None if gate is None else dgate, None, None, None, None, None, None


torch.library.register_autograd(
    "ppnet::gated_attention_fused", _gradient, setup_context=_save_for_gradient, lib=LIBRARY
)
