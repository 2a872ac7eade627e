"""rms_norm: the RMSNorm of Llama and its kin in one pass.

    y = weight · round(x / √(mean(x²) + eps))

rounded to x's dtype where transformers' modules round, so that both give the same bits but for the order of the sum.
"""

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain, refuse_gradient, same_device

define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")

# The packet torch.ops.ppnet.rms_norm looks its overload up at every call.
_rms_norm = torch.ops.ppnet.rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight x / √(mean(x²) + eps) over the last axis (Zhang and Sennrich 2019, equation 4).

    Args:
        x: ``(..., D)`` float32, bfloat16 or float16.
        weight: ``(D,)`` of x's dtype.
        eps: added to the mean of the squares.

    Returns:
        ``(..., D)`` of x's dtype; sums in float32. Under autocast it computes in x's dtype. Not differentiable: it is
        for generation. Nothing is allocated beside the output, and x once more where it is not contiguous.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        refuse_gradient("rms_norm", "torch.nn.functional.rms_norm", x, weight)
        return _rms_norm(x, weight, eps)
    except Exception as error:
        explain(error, rms_norm, locals())
        raise


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm in plain torch."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.library.impl(LIBRARY, "rms_norm", "CompositeExplicitAutograd")
def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_ref(x, weight, eps)


@torch.library.register_fake("ppnet::rms_norm", lib=LIBRARY)
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    same_device("rms_norm", x=x, weight=weight)
    return x.new_empty(x.shape)
