"""linears_decode: several linear layers of the same few tokens, as q, k and v are, in one parallel pass.

y[i][t, k] = ⟨x[t], W[i][idx[i][k]]⟩ + bias[i][idx[i][k]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain, follow_autocast, refuse_gradient, same_device, same_lengths
from ppnet.ops.linear_decode import linear_decode_ref

define("linears_decode(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor?[] idx) -> Tensor[]")

# The packet torch.ops.ppnet.linears_decode looks its overload up at every call.
_linears_decode = torch.ops.ppnet.linears_decode.default


def linears_decode(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    idx: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`linear_decode` of x with each of several weights: the same results, but the threads are woken once.

    Args:
        x: ``(T, D)``, T <= 8, float32, bfloat16 or float16.
        weight: ``(N_i, D)`` each, of x's dtype; rows contiguous, any distance apart.
        bias: ``(N_i,)`` or None each; None: no biases.
        idx: ``(K_i,)`` int64 rows in [0, N_i), any order, repeats allowed, or None each; None: all rows.

    Returns:
        ``(T, K_i)`` each, of x's dtype; products and sums in float32, rounded once. The results do not depend on the
        number of threads. Not differentiable. Working memory: x once more, in float32.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        bias = [None] * len(weight) if bias is None else bias
        idx = [None] * len(weight) if idx is None else idx
        refuse_gradient("linears_decode", "torch.nn.functional.linear", x, *weight, *bias)
        return _linears_decode(x, weight, bias, idx)
    except Exception as error:
        explain(error, linears_decode, locals())
        raise


def linears_decode_ref(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    idx: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """linears_decode in plain torch."""
    bias = [None] * len(weight) if bias is None else bias
    idx = [None] * len(weight) if idx is None else idx
    same_lengths("linears_decode", weight=weight, bias=bias, idx=idx)
    return [linear_decode_ref(x, w, b, idx=i) for w, b, i in zip(weight, bias, idx, strict=True)]


@torch.library.impl(LIBRARY, "linears_decode", "CompositeExplicitAutograd")
def _linears_decode_torch(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], idx: Sequence[Tensor | None]
) -> list[Tensor]:
    return linears_decode_ref(x, weight, bias, idx=idx)


@torch.library.register_fake("ppnet::linears_decode", lib=LIBRARY)
def _linears_decode_fake(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], idx: Sequence[Tensor | None]
) -> list[Tensor]:
    same_lengths("linears_decode", weight=weight, bias=bias, idx=idx)
    present = {"bias": [b for b in bias if b is not None], "idx": [i for i in idx if i is not None]}
    same_device("linears_decode", x=x, weight=weight, **present)
    return [x.new_empty(x.shape[0], w.shape[0] if i is None else i.shape[0]) for w, i in zip(weight, idx, strict=True)]


follow_autocast("linears_decode")
