"""row_norms: the L2 norm of every unit's weights with its inputs scaled, of many weights in one call.

    n[f] = √ Σ_d (w[f, d] · s[d])²
    dw[f, d] = g[f] / n[f] · s[d]² · w[f, d];   ds[d] = s[d] · Σ_f g[f] / n[f] · w[f, d]²;   0 where n[f] is 0

Sums are in float32 (float64 of float64 weights), in an order that does not depend on the number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain_types, same_device, same_lengths

define("row_norms(Tensor[] weight, Tensor[] input_scale, int[] dim) -> Tensor[]")
define(
    "row_norms_backward(Tensor[] grad, Tensor[] norm, Tensor[] weight, Tensor[] input_scale, int[] dim,"
    " bool needs_weight, bool needs_scale) -> (Tensor[] dweight, Tensor[] dscale)"
)


@explain_types
def row_norms(weight: Sequence[Tensor], input_scale: Sequence[Tensor | None], dim: Sequence[int]) -> list[Tensor]:
    """Norms of the rows of weight[i] along dim[i]: n[f] = √ Σ_d (w[f, d] · s[d])², for all i in one pass.

    weight[i]: (F, D) with dim 0, (D, F) with dim 1, or (F,), whose norm is the absolute value; float32, bfloat16,
    float16 or float64; any strides.
    input_scale[i]: (D,) float32 (float64 for a float64 weight), or None for 1; None where weight[i] is (F,).
    Returns n[i]: (F,) float32 (float64 for a float64 weight).
    Differentiable in weight and input_scale, once; where n[f] is 0 the gradient is 0. Errors (RuntimeError) name the
    list, the position and the value.
    Workspace, in elements of n: ceil(D / 256) · F where units lie along the contiguous axis (dim 1 of a row-major
    weight). The backward: F + D, and ceil(F / 256) · D for the gradient of input_scale where features lie along it. A
    copy of a weight that is contiguous along neither axis. On a GPU blocks have 8 rows or more in place of 256.
    """
    same_lengths("row_norms", weight=weight, input_scale=input_scale, dim=dim)
    for i, (w, s) in enumerate(zip(weight, input_scale, strict=True)):
        if s is not None and _is_absent(s) and w.numel():
            raise RuntimeError(f"row_norms: input_scale[{i}] has shape (0,), but weight[{i}] is {tuple(w.shape)}")
    return torch.ops.ppnet.row_norms(
        list(weight),
        [w.new_empty(0, dtype=_arithmetic(w)) if s is None else s for w, s in zip(weight, input_scale, strict=True)],
        list(dim),
    )


def row_norms_ref(weight: Sequence[Tensor], input_scale: Sequence[Tensor | None], dim: Sequence[int]) -> list[Tensor]:
    """row_norms in plain torch."""
    out = []
    for w, s, d in zip(weight, input_scale, dim, strict=True):
        wide = w.to(_arithmetic(w))
        if w.dim() == 1:
            out.append(wide.abs())
            continue
        if s is not None:
            wide = wide * (s if d == 0 else s[:, None])
        out.append(torch.linalg.vector_norm(wide, dim=1 - d))
    return out


def row_norms_backward_ref(
    grad: Sequence[Tensor],
    norm: Sequence[Tensor],
    weight: Sequence[Tensor],
    input_scale: Sequence[Tensor | None],
    dim: Sequence[int],
    needs_weight: bool = True,
    needs_scale: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of row_norms in plain torch: dweight[i] as weight[i], dscale[i] (D,); empty where not needed."""
    dweight, dscale = [], []
    for g, n, w, s, d in zip(grad, norm, weight, input_scale, dim, strict=True):
        unit = (g / n).masked_fill(n == 0, 0.0)
        wide = w.to(n.dtype)
        if w.dim() == 2 and d == 0:
            unit = unit[:, None]
        feature = None if s is None else s if d == 0 else s[:, None]
        if needs_weight:
            dweight.append((wide * (unit if feature is None else unit * feature.square())).to(w.dtype))
        else:
            dweight.append(w.new_empty(0))
        if needs_scale and s is not None:
            dscale.append(s * (wide.square() * unit).sum(d))
        else:
            dscale.append(n.new_empty(0))
    return dweight, dscale


def _arithmetic(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _is_absent(t: Tensor) -> bool:
    return t.dim() == 1 and t.shape[0] == 0


def _dense_like(t: Tensor) -> Tensor:
    """Where the gradient of a weight goes: contiguous, or the transpose of a contiguous matrix where `t` is one."""
    if t.dim() == 2:
        (n0, n1), (s0, s1) = t.shape, t.stride()
        row_major = (s1 == 1 or n1 <= 1) and (s0 >= n1 or n0 <= 1)
        if not row_major and (s0 == 1 or n0 <= 1) and (s1 >= n0 or n1 <= 1):
            return t.new_empty((n1, n0)).t()
    return t.new_empty(t.shape)


@torch.library.impl(LIBRARY, "row_norms", "CompositeExplicitAutograd")
def _row_norms_torch(weight: list[Tensor], input_scale: list[Tensor], dim: list[int]) -> list[Tensor]:
    """Runs where there is no compiled kernel: without the extension, or on a device it was not built for."""
    out = row_norms_ref(weight, [None if _is_absent(s) else s for s in input_scale], dim)
    return [o.contiguous() for o in out]


@torch.library.impl(LIBRARY, "row_norms_backward", "CompositeExplicitAutograd")
def _row_norms_backward_torch(
    grad: list[Tensor],
    norm: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    dim: list[int],
    needs_weight: bool,
    needs_scale: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    scales = [None if _is_absent(s) else s for s in input_scale]
    dweight, dscale = row_norms_backward_ref(grad, norm, weight, scales, dim, needs_weight, needs_scale)
    if needs_weight:
        dweight = [_dense_like(w).copy_(d) for w, d in zip(weight, dweight, strict=True)]
    return dweight, dscale


@torch.library.register_fake("ppnet::row_norms", lib=LIBRARY)
def _row_norms_fake(weight: list[Tensor], input_scale: list[Tensor], dim: list[int]) -> list[Tensor]:
    same_device("row_norms", weight=weight, input_scale=input_scale)
    return [w.new_empty(w.shape[d], dtype=_arithmetic(w)) for w, d in zip(weight, dim, strict=True)]


@torch.library.register_fake("ppnet::row_norms_backward", lib=LIBRARY)
def _row_norms_backward_fake(
    grad: list[Tensor],
    norm: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    dim: list[int],
    needs_weight: bool,
    needs_scale: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    same_device("row_norms_backward", grad=grad, norm=norm, weight=weight, input_scale=input_scale)
    dweight = [_dense_like(w) if needs_weight else w.new_empty(0) for w in weight]
    return dweight, [s.new_empty(s.shape[0] if needs_scale else 0) for s in input_scale]


def _save_for_gradient(ctx, inputs, output) -> None:
    weight, input_scale, dim = inputs
    ctx.dim = dim
    ctx.save_for_backward(*weight, *input_scale, *output)


def _row_norms_gradient(ctx, grad):
    n = len(ctx.dim)
    weight, scale, norm = (list(ctx.saved_tensors[i * n : i * n + n]) for i in range(3))
    needs_weight, needs_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    used = [i for i in range(n) if grad[i] is not None and (needs_weight[i] or needs_scale[i])]
    dweight, dscale = torch.ops.ppnet.row_norms_backward(
        [grad[i] for i in used],
        [norm[i] for i in used],
        [weight[i] for i in used],
        [scale[i] for i in used],
        [ctx.dim[i] for i in used],
        any(needs_weight[i] for i in used),
        any(needs_scale[i] for i in used),
    )
    dw, ds = [None] * n, [None] * n
    for j, i in enumerate(used):
        dw[i] = dweight[j] if needs_weight[i] else None
        ds[i] = dscale[j] if needs_scale[i] else None
    return dw, ds, None


torch.library.register_autograd("ppnet::row_norms", _row_norms_gradient, setup_context=_save_for_gradient, lib=LIBRARY)
