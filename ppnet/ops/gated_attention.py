"""gated_attention: attention for training and prefill, with GQA, masks, windows and gates of KV groups.

    out[b, h, t] = gate[g] · Σ_s softmax_s(scale · ⟨query[b, h, t], key[b, g, s]⟩ + mask[b, h, t, s]) · value[b, g, s]

with g = h // (H / Hkv). Two paths compute it, chosen by `attention_path` from shapes, dtype and processor alone:
"sdpa" is torch's flash attention for the CPU; "gemm" is two batched matrix products (three more in the backward) with a
softmax between, a block of queries at a time. `attention_path` says why. A third one is for NVIDIA GPUs and chosen by
the caller alone: "fused", one kernel of our own (gated_attention_fused.py).
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ppnet.ops.gated_attention_fused import fits_fused, fused
from ppnet.ops.gated_attention_gemm import Rules, attended, empty_by_token, gemm, gemm_backward, wide
from ppnet.ops.library import LIBRARY, define, explain_types, same_device

_SCHEMA = "Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, int window"
define(f"gated_attention({_SCHEMA}) -> (Tensor out, Tensor lse)")
define(
    f"gated_attention_backward(Tensor dout, {_SCHEMA}, Tensor out, Tensor lse)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue)"
)
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# T · S · Dh from which the blocks gain more than their calls cost.
_GEMM_WORK = 1 << 22
_GEMM_WORK_CAUSAL = 1 << 24


def attention_path(query: Tensor, key: Tensor, is_causal: bool = False) -> str:
    """ "gemm" or "sdpa": how gated_attention computes these shapes on this processor; the same at every run.

    "gemm" for bfloat16 on a processor with AVX512-BF16 and no AMX, from T · S · Dh = 4 Mi on (causal: 16 Mi): there
    oneDNN's products use the processor's bf16 units, and those inside torch's flash attention do not. On 2 cores, 16
    heads of 64 to 128, S of 512 to 1024, it took 62 to 83 % of the time forward, and 60 to 110 % with the backward.
    It rounds scores to bfloat16, as transformers' eager attention does. "sdpa" for everything else: blocks of float32
    products took up to 1.8 times as long, flash attention itself uses AMX, and on GPUs torch's SDPA chooses among its
    kernels. "fused" is never chosen here: no GPU has measured it yet.
    """
    bf16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not bf16 or not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "sdpa"
    work = query.shape[-2] * key.shape[-2] * query.shape[-1]
    return "gemm" if work >= (_GEMM_WORK_CAUSAL if is_causal else _GEMM_WORK) else "sdpa"


@explain_types
def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    groups: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Attention of T queries over S keys; differentiable in query, key, value and gate.

    query: (B, H, T, Dh); key, value: (B, Hkv, S, Dh), H a multiple of Hkv, one floating dtype, any strides.
    gate: (Hkv,), factors of the groups' outputs. It is folded into value (one more rounding of value where it is not
    0 or 1), so that its gradient, ⟨dvalue, value⟩, is exact at gate = 0 and costs no pass over the output.
    groups: (G,) int64, the KV heads that are used, in the order of query's heads (H is a multiple of G, gate is (G,));
    None: all. Their key and value are gathered, but "fused" reads them where they are.
    mask: bool (true: attend) or floating (added to the scores; not differentiated), broadcastable to (B, H, T, S). -inf
    and the lowest finite value of the mask's dtype mean "do not attend"; keys and values that no query of a sequence
    attends to may hold anything, NaN included.
    is_causal: query t attends to positions up to its own, S - T + t: aligned to the end, as a cache needs it (torch's
    SDPA aligns to the start where T != S). window: and to positions after its own - window. Both combine with a mask.
    scale: None is 1/sqrt(Dh).

    Returns (B, H, T, Dh) of query's dtype, laid out as (B, T, H, Dh). A query that may attend to nothing gives 0.
    The backward recomputes: query, key, value, mask, the output and B · H · T floats are kept.
    Workspace: with a gate a copy of value; with a mask, or a window shorter than S, copies of key and value and of what
    may be attended to, as bool. "gemm": 2 blocks of scores (3 in the backward) of up to 256 queries of each head, at
    most 4 Mi scores unless 32 queries of one group are more, and one sequence's query; in the backward also its dout,
    and its dkey and dvalue in float32, one of them twice. "sdpa", where mask, window or T != S need a bias: the bias,
    and three bools as large; per thread a float32 block of 256 queries by 512 keys and their outputs (2 blocks in the
    backward); in the backward copies of the gradients. A copy of what is not contiguous along Dh.
    path: None, what attention_path says; or "fused": one kernel on NVIDIA GPUs, for bfloat16 and float16 and Dh a
    multiple of 8 up to 256 (other dtypes and widths go the way of None; without the kernel plain torch computes the
    same in float32, all scores at once). It applies the gate to the float32 sums. Workspace: copies of what has rows
    that are not aligned to 16 bytes; bools of the mask's size for masks that differ between queries or heads (masks of
    keys alone cost nothing, and what they hide is not read); in the backward 2 floats
    per query and head, and one per 64 or 128 of them with a gate.
    Under autocast query, key and value are cast to its dtype.
    Errors (RuntimeError) name the argument and its value.
    """
    _check(query, key, value, gate, mask, window, groups)
    if path not in (None, "fused"):
        raise RuntimeError(f'gated_attention: path is "{path}"; allowed are "fused" and None')
    device = query.device.type
    if _is_cast(query):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    scale = _default_scale(query) if scale is None else scale
    if path == "fused" and fits_fused(query):
        return fused(query, key, value, gate, groups, mask, is_causal, scale, window or 0)
    if groups is not None:
        key, value = key.index_select(1, groups), value.index_select(1, groups)
    if gate is not None:
        value = (value * gate[:, None, None]).to(value.dtype)
    if device == "cuda":
        return _scaled_dot_product(query, key, value, Rules(mask, is_causal, scale, window or 0))
    return torch.ops.ppnet.gated_attention(query, key, value, mask, is_causal, scale, window or 0)[0]


def gated_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """gated_attention in plain torch, as transformers' eager attention computes it: products in query's dtype."""
    if groups is not None:
        key, value = key.index_select(1, groups), value.index_select(1, groups)
    repeat = query.shape[1] // max(1, key.shape[1])
    if gate is not None:
        value = (value * gate[:, None, None]).to(value.dtype)
    rules = Rules(mask, is_causal, _default_scale(query) if scale is None else scale, window or 0)
    attend = _attend(query, key, rules)
    used = attend.expand(query.shape[0], -1, query.shape[2], -1).any(2).any(1)[:, None, :, None]
    key, value = (torch.where(used, t, 0).repeat_interleave(repeat, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * rules.scale
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    alive = attend.any(-1, keepdim=True)
    weights = torch.where(alive, torch.where(attend, scores, -torch.inf), 0).softmax(-1, dtype=wide(query))
    return torch.where(alive, weights, 0).to(query.dtype) @ value


def _is_cast(query: Tensor) -> bool:
    """Whether autocast casts query, and key and value with it."""
    device = query.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64


def _default_scale(query: Tensor) -> float:
    return max(query.shape[-1], 1) ** -0.5


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    window: int | None,
    groups: Tensor | None,
) -> None:
    same_device("gated_attention", query=query, key=key, value=value, gate=gate, mask=mask, groups=groups)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4 or not t.is_floating_point():
            raise RuntimeError(
                f"gated_attention: {name} has shape {tuple(t.shape)} and dtype {t.dtype}; "
                f"it must be (B, {'H, T' if name == 'query' else 'Hkv, S'}, Dh) and floating"
            )
    (batch, heads, tokens, width), kv_heads, keys = query.shape, key.shape[1], key.shape[2]
    for name, t in (("key", key), ("value", value)):
        if t.shape != (batch, kv_heads, keys, width) or (t.dtype != query.dtype and not _is_cast(query)):
            raise RuntimeError(
                f"gated_attention: {name} has shape {tuple(t.shape)} and dtype {t.dtype}; it must be (B, Hkv, S, Dh) = "
                f"{(batch, kv_heads, keys, width)} and {query.dtype}, as query {tuple(query.shape)}"
            )
    if groups is not None:
        if groups.dim() != 1 or groups.dtype != torch.int64:
            raise RuntimeError(
                f"gated_attention: groups has shape {tuple(groups.shape)} and dtype {groups.dtype}; "
                "it must be (G,) int64"
            )
        kv_heads = len(groups)
    if heads % max(1, kv_heads) or (kv_heads == 0 and heads):
        what = "key's" if groups is None else "the groups'"
        raise RuntimeError(f"gated_attention: query has {heads} heads, which is no multiple of {what} {kv_heads}")
    if gate is not None and (gate.shape != (kv_heads,) or not gate.is_floating_point()):
        raise RuntimeError(
            f"gated_attention: gate has shape {tuple(gate.shape)} and dtype {gate.dtype}; it must be "
            f"{'(Hkv,)' if groups is None else '(G,)'} = ({kv_heads},) and floating"
        )
    if window is not None and window < 1:
        raise RuntimeError(f"gated_attention: window is {window}; allowed are positions >= 1, or None")
    if mask is None:
        return
    full = (batch, heads, tokens, keys)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(
            f"gated_attention: mask has dtype {mask.dtype}; allowed are bool (true: attend) and floating"
        )
    if mask.dim() > 4 or any(n not in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise RuntimeError(
            f"gated_attention: mask has shape {tuple(mask.shape)}; it must broadcast to (B, H, T, S) = {full}"
        )


# --- which positions --------------------------------------------------------------------------------------------------


def _attend(query: Tensor, key: Tensor, rules: Rules) -> Tensor:
    """Which positions each query attends to: bool, (1, 1, T, S) or as large as the mask."""
    tokens, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys, device=query.device)
    own = torch.arange(keys - tokens, keys, device=query.device)[:, None]
    attend = torch.ones((1, 1, tokens, keys), dtype=torch.bool, device=query.device)
    if rules.is_causal:
        attend = attend & (position <= own)
    if rules.window:
        attend = attend & (position > own - rules.window)
    return attend if rules.mask is None else attend & attended(rules.mask)


def _without_garbage(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """key and value with 0 where no query of the sequence attends: 0 · NaN would reach the products."""
    if rules.mask is None:
        unseen = key.shape[2] - query.shape[2] - rules.window + 1 if rules.window else 0
        if unseen <= 0:
            return key, value
        used = torch.arange(key.shape[2], device=key.device)[:, None] >= unseen
    else:
        mask, ruled = rules.mask[(None,) * (4 - rules.mask.dim())], rules.is_causal or rules.window
        attend = _attend(query, key, replace(rules, mask=mask)) if ruled else attended(mask)
        used = attend.any(2).any(1)[:, None, :, None]
    return torch.where(used, key, 0), torch.where(used, value, 0)


# --- torch's own choice, on devices that it has kernels for -----------------------------------------------------------


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """torch's SDPA, which differentiates itself: flash attention where no bias is needed."""
    key, value = _without_garbage(query, key, value, rules)
    mask, square, alive = rules.mask, query.shape[2] == key.shape[2], None
    causal = rules.is_causal and square and not rules.window and mask is None
    bias = None
    if mask is not None or rules.window or (rules.is_causal and not causal):
        attend = _attend(query, key, rules)
        alive = attend.any(-1, keepdim=True)
        bias = attend | ~alive  # a query that attends to nothing would give NaN: it gets 0 below
        if mask is not None and mask.dtype != torch.bool:
            bias = torch.where(attend, mask.to(query.dtype), torch.where(bias, 0, -torch.inf).to(query.dtype))
    out = scaled_dot_product_attention(
        query, key, value, bias, 0.0, causal, scale=rules.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    out = out if alive is None else torch.where(alive, out, 0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# --- torch's flash attention ------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """torch's kernels for the CPU take the last axis for contiguous, and read other memory where it is not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _flash_mask(query: Tensor, key: Tensor, rules: Rules) -> Tensor | None:
    """What the flash kernel's own causal rule does not cover, as a bias of query's dtype."""
    mask = rules.mask
    if mask is None and not rules.window and not (rules.is_causal and query.shape[2] != key.shape[2]):
        return None
    attend = _attend(query, key, rules)
    bias = torch.zeros((), dtype=query.dtype) if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
    return torch.where(attend, bias, -torch.inf)


# --- the operators ----------------------------------------------------------------------------------------------------


@torch.library.impl(LIBRARY, "gated_attention", "CompositeExplicitAutograd")
def _gated_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    rules, lse = Rules(mask, is_causal, scale, window), query.new_zeros(query.shape[:3], dtype=wide(query))
    if query.numel() == 0 or key.numel() == 0:
        return empty_by_token(query).zero_(), lse
    key, value = _without_garbage(query, key, value, rules)
    if attention_path(query, key, is_causal) == "gemm":
        return gemm(query, key, value, rules), lse
    bias = _flash_mask(query, key, rules)
    query, key, value = _rows(query), _rows(key), _rows(value)
    out, lse = _FLASH(query, key, value, 0.0, is_causal and bias is None, attn_mask=bias, scale=scale)
    by_token = out.transpose(1, 2).is_contiguous()
    return (out if by_token else empty_by_token(query).copy_(out)), lse.contiguous()


@torch.library.impl(LIBRARY, "gated_attention_backward", "CompositeExplicitAutograd")
def _gated_attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        return empty_by_token(query).zero_(), torch.zeros_like(key), torch.zeros_like(value)
    rules, dkey, dvalue = Rules(mask, is_causal, scale, window), torch.empty_like(key), torch.empty_like(value)
    key, value = _without_garbage(query, key, value, rules)
    if attention_path(query, key, is_causal) == "gemm":
        return gemm_backward(dout, query, key, value, rules, dkey, dvalue)
    bias = _flash_mask(query, key, rules)
    gradients = _FLASH_BACKWARD(
        *map(_rows, (dout, query, key, value)), out, lse, 0.0, is_causal and bias is None, attn_mask=bias, scale=scale
    )
    return empty_by_token(query).copy_(gradients[0]), dkey.copy_(gradients[1]), dvalue.copy_(gradients[2])


@torch.library.register_fake("ppnet::gated_attention", lib=LIBRARY)
def _gated_attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_by_token(query), query.new_empty(query.shape[:3], dtype=wide(query))


@torch.library.register_fake("ppnet::gated_attention_backward", lib=LIBRARY)
def _gated_attention_backward_fake(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_by_token(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_gradient(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _gradient(ctx, dout, _dlse):
    query, key, value, mask, out, lse = ctx.saved_tensors
    gradients = torch.ops.ppnet.gated_attention_backward(
        dout, query, key, value, mask, ctx.is_causal, ctx.scale, ctx.window, out, lse
    )
    return *gradients, None, None, None, None


torch.library.register_autograd("ppnet::gated_attention", _gradient, setup_context=_save_for_gradient, lib=LIBRARY)
