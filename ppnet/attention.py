"""Attention as transformers calls it, by ppnet's operators where they apply and by SDPA elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.modes import certainly, transformed
from ppnet.ops.gated_attention import gated_attention
from ppnet.ops.gated_attention_decode import GPU_WIDTH, gated_attention_decode
from ppnet.ops.linear_decode import DTYPES, MOST_TOKENS, has_kernels

# Names in transformers' registry of attention functions: for training alone (wrapped models, whose dense evaluation is
# to stay their own to the bit), and for generation too (accelerated models).
TRAINING, DECODING = "ppnet_training", "ppnet"
# Arguments of transformers' attention functions that change what is computed.
SPECIAL = ("position_bias", "softcap", "cache", "s_aux")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    decode: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of T new tokens over S positions.

    Args:
        query: ``(B, H, T, Dh)``. key, value: ``(B, Hkv, S, Dh)``. attention_mask: ``(B, 1, T, S)`` or None.
        decode: whether passes without gradients use the operators too.

    Returns:
        ``(B, T, H, Dh)``, and None for the weights.
    """
    tokens, context = query.shape[2], key.shape[2]
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    wanted = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = tokens > 1 and attention_mask is None and wanted
    special = bool(kwargs) and any(kwargs.get(name) is not None for name in SPECIAL)
    # The dtypes differ under autocast with a cache, which SDPA refuses as well.
    plain = not dropout and not special and query.dtype == key.dtype == value.dtype and not transformed()
    ruled = causal or tokens == 1 or attention_mask is not None
    few = not learns and certainly(tokens <= MOST_TOKENS) and ruled and query.dtype in DTYPES
    # Prompts and training have kernels of torch's own on a GPU.
    here = query.is_cpu or (few and has_kernels(query) and query.shape[-1] <= GPU_WIDTH)
    if not here or not plain or not (learns or decode) or (causal and context != tokens):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if few:
        out = gated_attention_decode(query, key, value, mask=attention_mask, scale=scaling)
    else:
        out = gated_attention(query, key, value, mask=attention_mask, is_causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Makes both names known to transformers; any model may then use them, as it may use SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for name in (TRAINING, DECODING):
        AttentionInterface.register(name, partial(attention_forward, decode=name == DECODING))
        AttentionMaskInterface.register(name, sdpa_mask)


def use_attention(model: Any, name: str) -> str | None:
    """Switches a model to `TRAINING` or `DECODING`.

    Returns:
        What it had, to switch back to; None where it was something else than SDPA, which then stays.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if before == DECODING:  # a model that was made from the config of an accelerated one
        before = "sdpa"
    if before not in ("sdpa", TRAINING):
        return None
    register_attention()
    model.set_attn_implementation(name)
    return before
