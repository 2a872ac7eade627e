"""qkv_decode and attend_mlp_decode: a decoder layer for a few new tokens in two calls, around the cache's update.

    qkv_decode          n = rms_norm(x);   q, k, v = rotary(n Wqᵀ), rotary(n Wkᵀ), n Wvᵀ    (q and k normed, if asked)
    attend_mlp_decode   r = x + attention(q, K, V) Wo;   y = r + mlp(rms_norm(r))

For layers as Llama's: RMSNorm before each sub-layer, residuals around them. They are `rms_norm`, `linears_decode`,
`rotary`, `gated_attention_decode`, `linear_t_decode` and `gated_mlp_decode` one after the other, called from C++: in a
step whose weights have just gone through the caches, each call from Python costs more than a small layer's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppnet.ops.gated_attention_decode import gated_attention_decode_ref
from ppnet.ops.gated_mlp_decode import gated_mlp_decode_ref
from ppnet.ops.library import LIBRARY, define, explain, follow_autocast, refuse_gradient, same_device, same_lengths
from ppnet.ops.linear_decode import linear_t_decode_ref
from ppnet.ops.linears_decode import linears_decode_ref
from ppnet.ops.rms_norm import rms_norm_ref
from ppnet.ops.rotary import rotary_ref

define(
    "qkv_decode(Tensor x, Tensor norm, float eps, Tensor[] weight, Tensor?[] bias, Tensor?[] idx, Tensor? q_norm,"
    " Tensor? k_norm, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)"
)
define(
    "attend_mlp_decode(Tensor residual, Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, Tensor out,"
    " Tensor? out_bias, Tensor? out_idx, Tensor? out_z, Tensor norm, float eps, Tensor up, Tensor down, Tensor? gate,"
    " Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, Tensor? idx, Tensor? z, str act) -> Tensor"
)

# The packets torch.ops.ppnet.<name> look their overload up at every call.
_qkv_decode = torch.ops.ppnet.qkv_decode.default
_attend_mlp_decode = torch.ops.ppnet.attend_mlp_decode.default
_NAMES = [argument.name for argument in _attend_mlp_decode._schema.arguments]


def qkv_decode(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    *,
    idx: Sequence[Tensor | None] = (None, None, None),
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a decoder layer, from what comes into it.

    Args:
        x: ``(B, T, D)``, B T <= 8, float32, bfloat16 or float16; contiguous in place.
        norm: ``(D,)`` of x's dtype, weight of the RMSNorm before the attention. eps: of all norms.
        weight: of q, k and v, ``(N_i, D)`` each, rows contiguous. bias: ``(N_i,)`` or None each.
        cos, sin: ``(B, T, Dh)`` or ``(1, T, Dh)`` of x's dtype, Dh even.
        idx: ``(K_i,)`` int64 rows of each weight, whole heads of Dh; None: all.
        q_norm, k_norm: ``(Dh,)`` weights of RMSNorms of each query's and key's head, or None.

    Returns:
        query ``(B, K_0 / Dh, T, Dh)``, key and value ``(B, K_1 / Dh, T, Dh)``, laid out as ``(B, T, H, Dh)``. Rounded
        to x's dtype after the norms, the products and the embedding, as the model's own modules do. Independent of the
        number of threads. Not differentiable. Working memory: x normed, query and key once more (twice with q_norm and
        k_norm), what has to be made contiguous, and that of `linears_decode`.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        refuse_gradient("qkv_decode", "the model's own modules", x, norm, *weight, *bias, q_norm, k_norm, cos, sin)
        return _qkv_decode(x, norm, eps, weight, bias, idx, q_norm, k_norm, cos, sin)
    except Exception as error:
        explain(error, qkv_decode, locals())
        raise


def qkv_decode_ref(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    *,
    idx: Sequence[Tensor | None] = (None, None, None),
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv_decode in plain torch."""
    batch, tokens, _ = x.shape
    same_lengths("qkv_decode", weight=weight, bias=bias, idx=idx)
    outputs = linears_decode_ref(rms_norm_ref(x, norm, eps).flatten(0, 1), weight, bias, idx=idx)
    query, key, value = (y.reshape(batch, tokens, y.shape[1] // cos.shape[2], cos.shape[2]) for y in outputs)
    query = query if q_norm is None else rms_norm_ref(query, q_norm, eps)
    key = key if k_norm is None else rms_norm_ref(key, k_norm, eps)
    return (*rotary_ref(query.transpose(1, 2), key.transpose(1, 2), cos, sin), value.transpose(1, 2))


def attend_mlp_decode(
    residual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    eps: float,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    out_bias: Tensor | None = None,
    out_idx: Tensor | None = None,
    out_z: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    idx: Tensor | None = None,
    z: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """Attention over the cache, its output projection and the MLP sub-layer, with both residuals.

    Args:
        residual: ``(B, T, D)``, B T <= 8, float32, bfloat16 or float16: what came into the layer; contiguous in place.
        query: ``(B, H, T, Dh)``. key, value: ``(B, Hkv, S, Dh)``, the new tokens included. mask, scale: all as
            `gated_attention_decode` takes them; without a mask the new tokens are causal among themselves.
        out: ``(D, F)`` of the output projection, as `nn.Linear` holds it, stored unit by unit (its columns contiguous).
            out_bias: ``(D,)``. out_idx: ``(H Dh,)`` int64 columns that the heads are; None: all. out_z: ``(H Dh,)``
            float32 factors of the heads.
        norm: ``(D,)`` weight of the RMSNorm before the MLP. eps: its own.
        up, gate: ``(N, D)``; down: ``(D, N)``, stored unit by unit. The biases, idx, z and act are those of
            `gated_mlp_decode`.

    Returns:
        ``(B, T, D)`` of residual's dtype. Rounded after the attention, after each residual is added, and after the
        norm; in between as the operators it is made of. Independent of the number of threads. Not differentiable.
        Working memory: the heads' outputs ``(B, T, H Dh)``, ``(B, T, D)`` twice, what has to be made contiguous, and
        the largest of what `gated_attention_decode`, `linear_t_decode` and `gated_mlp_decode` take.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        tensors = (residual, query, key, value, out, out_bias, norm, up, down, gate, up_bias, gate_bias, down_bias)
        refuse_gradient("attend_mlp_decode", "the model's own modules", *tensors, out_z, z)
        return _attend_mlp_decode(
            residual,
            query,
            key,
            value,
            mask,
            max(query.shape[-1], 1) ** -0.5 if scale is None else scale,
            out,
            out_bias,
            out_idx,
            out_z,
            norm,
            eps,
            up,
            down,
            gate,
            up_bias,
            gate_bias,
            down_bias,
            idx,
            z,
            act,
        )
    except Exception as error:
        explain(error, attend_mlp_decode, locals())
        raise


def attend_mlp_decode_ref(
    residual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    eps: float,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    out_bias: Tensor | None = None,
    out_idx: Tensor | None = None,
    out_z: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    idx: Tensor | None = None,
    z: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """attend_mlp_decode in plain torch."""
    heads = gated_attention_decode_ref(query, key, value, mask=mask, scale=scale).transpose(1, 2).flatten(2)
    attended = linear_t_decode_ref(heads.flatten(0, 1), out.t(), out_bias, idx=out_idx, z=out_z)
    x = residual + attended.view(residual.shape)
    normed = rms_norm_ref(x, norm, eps).flatten(0, 1)
    y = gated_mlp_decode_ref(
        normed, up, down.t(), gate, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, idx=idx, z=z, act=act
    )
    return x + y.view(residual.shape)


@torch.library.impl(LIBRARY, "qkv_decode", "CompositeExplicitAutograd")
def _qkv_decode_torch(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    idx: Sequence[Tensor | None],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, ...]:
    results = qkv_decode_ref(x, norm, eps, weight, bias, cos, sin, idx=idx, q_norm=q_norm, k_norm=k_norm)
    return tuple(y.transpose(1, 2).contiguous().transpose(1, 2) for y in results)


@torch.library.impl(LIBRARY, "attend_mlp_decode", "CompositeExplicitAutograd")
def _attend_mlp_decode_torch(
    residual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    out_bias: Tensor | None,
    out_idx: Tensor | None,
    out_z: Tensor | None,
    norm: Tensor,
    eps: float,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    *mlp: Tensor | str | None,
) -> Tensor:
    named: dict[str, Any] = dict(zip(("up_bias", "gate_bias", "down_bias", "idx", "z", "act"), mlp, strict=True))
    named |= {"mask": mask, "scale": scale, "out_bias": out_bias, "out_idx": out_idx, "out_z": out_z}
    return attend_mlp_decode_ref(residual, query, key, value, out, norm, eps, up, down, gate, **named).contiguous()


@torch.library.register_fake("ppnet::qkv_decode", lib=LIBRARY)
def _qkv_decode_fake(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    idx: Sequence[Tensor | None],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, ...]:
    same_lengths("qkv_decode", weight=weight, bias=bias, idx=idx)
    present = {"bias": [b for b in bias if b is not None], "idx": [i for i in idx if i is not None]}
    same_device("qkv_decode", x=x, norm=norm, weight=weight, **present, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin)
    batch, tokens, _ = x.shape
    width = cos.shape[2]
    rows = [w.shape[0] if i is None else i.shape[0] for w, i in zip(weight, idx, strict=True)]
    return tuple(x.new_empty(batch, tokens, n // width, width).transpose(1, 2) for n in rows)


@torch.library.register_fake("ppnet::attend_mlp_decode", lib=LIBRARY)
def _attend_mlp_decode_fake(residual: Tensor, *rest: Tensor | float | str | None) -> Tensor:
    named = zip(_NAMES, (residual, *rest), strict=True)
    same_device("attend_mlp_decode", **{name: value for name, value in named if isinstance(value, Tensor)})
    return residual.new_empty(residual.shape)


follow_autocast("qkv_decode")
follow_autocast("attend_mlp_decode", keep=(4, 9, 19))
