"""linear_decode and linear_t_decode: a linear layer for a few tokens, over the kept rows of its weight.

    linear_decode    y[t, k] = ⟨x[t], W[idx[k]]⟩ + bias[idx[k]]        units are outputs: q, k, v, gate, up, the head
    linear_t_decode  y[t]    = Σ_k x[t, k] z[k] W[idx[k]] + bias       units are inputs: o, down, stored unit by unit

With 1 to 8 tokens the time is that of reading the kept rows once. Nothing is copied: rows are found through idx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppnet.extension import cuda_runs
from ppnet.ops.library import LIBRARY, define, explain, follow_autocast, refuse_gradient, same_device

# What the decode operators take.
MOST_TOKENS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(x: Tensor) -> bool:
    """Whether the decode operators take tensors where x lies: without kernels a GPU's own products are faster."""
    return x.is_cpu or (x.is_cuda and cuda_runs(x.device.index))


define("linear_decode(Tensor x, Tensor weight, Tensor? bias, Tensor? idx) -> Tensor")
define("linear_t_decode(Tensor x, Tensor weight, Tensor? bias, Tensor? idx, Tensor? z) -> Tensor")

# The packets torch.ops.ppnet.<name> look their overload up at every call.
_linear_decode = torch.ops.ppnet.linear_decode.default
_linear_t_decode = torch.ops.ppnet.linear_t_decode.default


def linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, idx: Tensor | None = None) -> Tensor:
    """x W[idx]ᵀ + bias[idx] for at most 8 tokens.

    Args:
        x: ``(T, D)``, T <= 8, float32, bfloat16 or float16.
        weight: ``(N, D)`` of x's dtype; rows contiguous, any distance apart.
        bias: ``(N,)`` or None.
        idx: ``(K,)`` int64 rows in [0, N), any order, repeats allowed; None: all.

    Returns:
        ``(T, K)`` of x's dtype; products and sums in float32, rounded once. The result does not depend on the number
        of threads. Not differentiable. Working memory: x, and x in float32, padded to 1, 2, 4 or 8 tokens of
        D + 64 features at most; the calling thread keeps it.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        refuse_gradient("linear_decode", "torch.nn.functional.linear", x, weight, bias)
        return _linear_decode(x, weight, bias, idx)
    except Exception as error:
        explain(error, linear_decode, locals())
        raise


def linear_t_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    idx: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """(x z) W[idx] + bias for at most 8 tokens.

    Args:
        x: ``(T, K)``, T <= 8, float32, bfloat16 or float16; K is F without an idx.
        weight: ``(F, D)`` of x's dtype; rows contiguous, any distance apart. It is the transpose of what `nn.Linear`
            holds: ``linear.weight.t()``, which has contiguous rows once the weight is stored unit by unit.
        bias: ``(D,)`` or None.
        idx: ``(K,)`` int64 rows in [0, F), any order; None: all.
        z: ``(K,)`` float32 factors of the inputs, or None.

    Returns:
        ``(T, D)`` of x's dtype; products and sums in float32, rounded once; in bfloat16, where the processor has bf16
        products, x z is rounded too. The result does not depend on the number of threads. Not differentiable. Working
        memory, padded to 1, 2, 4 or 8 tokens of 64 features more at most: x, x in float32, and at most 32 sums (T, D)
        in float32; the calling thread keeps it.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        refuse_gradient("linear_t_decode", "torch.nn.functional.linear", x, weight, bias, z)
        return _linear_t_decode(x, weight, bias, idx, z)
    except Exception as error:
        explain(error, linear_t_decode, locals())
        raise


def linear_decode_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, idx: Tensor | None = None) -> Tensor:
    """linear_decode in plain torch."""
    if idx is not None:
        weight = weight.index_select(0, idx)
        bias = None if bias is None else bias.index_select(0, idx)
    return torch.nn.functional.linear(x, weight, bias)


def linear_t_decode_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    idx: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """linear_t_decode in plain torch."""
    if idx is not None:
        weight = weight.index_select(0, idx)
    if z is not None:
        x = (x.float() * z).to(x.dtype)
    return torch.nn.functional.linear(x, weight.t(), bias)


@torch.library.impl(LIBRARY, "linear_decode", "CompositeExplicitAutograd")
def _linear_decode_torch(x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor | None) -> Tensor:
    return linear_decode_ref(x, weight, bias, idx=idx)


@torch.library.impl(LIBRARY, "linear_t_decode", "CompositeExplicitAutograd")
def _linear_t_decode_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor | None, z: Tensor | None
) -> Tensor:
    return linear_t_decode_ref(x, weight, bias, idx=idx, z=z)


@torch.library.register_fake("ppnet::linear_decode", lib=LIBRARY)
def _linear_decode_fake(x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor | None) -> Tensor:
    same_device("linear_decode", x=x, weight=weight, bias=bias, idx=idx)
    return x.new_empty(x.shape[0], weight.shape[0] if idx is None else idx.shape[0])


@torch.library.register_fake("ppnet::linear_t_decode", lib=LIBRARY)
def _linear_t_decode_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor | None, z: Tensor | None
) -> Tensor:
    same_device("linear_t_decode", x=x, weight=weight, bias=bias, idx=idx, z=z)
    return x.new_empty(x.shape[0], weight.shape[1])


follow_autocast("linear_decode")
follow_autocast("linear_t_decode", keep=(4,))
