"""gather_rows and scatter_rows: kept units of many weights, gathered or scattered in one call, gates folded in.

    gather   out[k] = scale[k] · src[idx[k]]
    scatter  out[idx[k]] = scale[k] · grad[k], all other rows 0;   dot[k] = ⟨grad[k], weight[idx[k]]⟩

"Row" is along `dim`: dim 1 of a (D, F) matrix takes columns. scatter is gather's gradient, and dot that of its scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain_types, same_device, same_lengths

# An absent scale or weight is an empty tensor: with `Tensor?[]`, autograd ignores every tensor of a list with a None.
define("gather_rows(Tensor[] src, Tensor[] idx, Tensor[] scale, int[] dim) -> Tensor[]")
define(
    "scatter_rows(Tensor[] grad, Tensor[] idx, Tensor[] scale, int[] dim, SymInt[] size, Tensor[] weight)"
    " -> (Tensor[] out, Tensor[] dot)"
)


@explain_types
def gather_rows(
    src: Sequence[Tensor], idx: Sequence[Tensor], scale: Sequence[Tensor | None], dim: Sequence[int]
) -> list[Tensor]:
    """Rows idx[i] of src[i] along dim[i], times scale[i]: out[k] = scale[k] · src[idx[k]], for all i in one pass.

    src[i]: (F,), (F, D) with dim 0, or (D, F) with dim 1; float32, bfloat16, float16 or float64; any strides.
    idx[i]: (K,) int64 in [0, F), any order; unique where src[i] needs a gradient.
    scale[i]: (K,) float32 (float64 for a float64 src), or None for an exact copy.
    Returns out[i]: (K,), (K, D) or (D, K), of src[i]'s dtype and memory order. The product is rounded once.
    Workspace: 4 K bytes, and F / 8 where units lie along the contiguous axis (dim 1 of a row-major matrix); 5 KB per
    thread; a copy of what is contiguous along neither axis.
    Differentiable in src and scale. Errors (RuntimeError) name the list, the position and the value.
    """
    same_lengths("gather_rows", src=src, idx=idx, scale=scale, dim=dim)
    absent = _absent(src)
    _refuse_empty("gather_rows", "scale", scale, idx)
    return torch.ops.ppnet.gather_rows(
        list(src), list(idx), [s if s is not None else a for s, a in zip(scale, absent, strict=True)], list(dim)
    )


@explain_types
def scatter_rows(
    grad: Sequence[Tensor],
    idx: Sequence[Tensor],
    scale: Sequence[Tensor | None],
    dim: Sequence[int],
    size: Sequence[int],
    weight: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of gather_rows, zero-filled, and the gradient of its scale, for all i in one pass.

    grad[i]: (K,), (K, D) with dim 0, or (D, K) with dim 1. idx[i]: (K,) int64, unique. scale[i]: (K,) or None.
    size[i]: F; 0 together with a weight asks for the dot alone (frozen weights), and out[i] is empty.
    weight[i]: (F,), (F, D) or (D, F), of grad[i]'s dtype, or None.
    Returns out[i] (grad's shape with F along dim[i], in the memory order of weight[i] if given, else of grad[i]):
    out[idx[k]] = scale[k] · grad[k]; and dot[i] (K,) float32 = ⟨grad[k], weight[idx[k]]⟩ (without the scale),
    empty without a weight. Not differentiable. Errors (RuntimeError) name the list, the position and the value.
    Workspace: 4 (F + 2 K) bytes; where units lie along the contiguous axis (dim 1 of a row-major matrix) F / 8 more, a
    scale (F,), and with a weight ceil(D / 64) · F sums of dot's dtype; 5 KB per thread; a copy of what is contiguous
    along neither axis.
    """
    same_lengths("scatter_rows", grad=grad, idx=idx, scale=scale, dim=dim, size=size, weight=weight)
    absent = _absent(grad)
    _refuse_empty("scatter_rows", "scale", scale, idx)
    _refuse_empty("scatter_rows", "weight", weight, idx)
    return torch.ops.ppnet.scatter_rows(
        list(grad),
        list(idx),
        [s if s is not None else a for s, a in zip(scale, absent, strict=True)],
        list(dim),
        list(size),
        [w if w is not None else a for w, a in zip(weight, absent, strict=True)],
    )


def gather_rows_ref(
    src: Sequence[Tensor], idx: Sequence[Tensor], scale: Sequence[Tensor | None], dim: Sequence[int]
) -> list[Tensor]:
    """gather_rows in plain torch."""
    out = []
    for s, i, z, d in zip(src, idx, scale, dim, strict=True):
        kept = s.index_select(d, i)
        if z is not None:
            kept = (kept.to(z.dtype) * _along(z, s, d)).to(s.dtype)
        out.append(kept)
    return out


def scatter_rows_ref(
    grad: Sequence[Tensor],
    idx: Sequence[Tensor],
    scale: Sequence[Tensor | None],
    dim: Sequence[int],
    size: Sequence[int],
    weight: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """scatter_rows in plain torch."""
    out, dot = [], []
    for g, i, z, d, n, w in zip(grad, idx, scale, dim, size, weight, strict=True):
        scaled = g if z is None else (g.to(z.dtype) * _along(z, g, d)).to(g.dtype)
        full = g.new_zeros(_shape(g, d, n))
        out.append(full.index_copy(d, i, scaled) if n else full)
        if w is None:
            dot.append(g.new_empty(0, dtype=_arithmetic(g)))
        else:
            product = g.to(_arithmetic(g)) * w.index_select(d, i).to(_arithmetic(g))
            dot.append(product if g.dim() == 1 else product.sum(1 - d))
    return out, dot


def _arithmetic(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _absent(like: Sequence[Tensor]) -> list[Tensor]:
    """One empty tensor per entry: the operators' form of None."""
    return [t.new_empty(0, dtype=_arithmetic(t)) for t in like]


def _refuse_empty(operator: str, name: str, values: Sequence[Tensor | None], idx: Sequence[Tensor]) -> None:
    """The operators' form of None is what a caller got wrong."""
    for i, (value, kept) in enumerate(zip(values, idx, strict=True)):
        if value is not None and _is_absent(value) and kept.numel():
            raise RuntimeError(f"{operator}: {name}[{i}] has shape (0,), but idx[{i}] has {kept.numel()} entries")


def _is_absent(t: Tensor) -> bool:
    return t.dim() == 1 and t.shape[0] == 0


def _along(scale: Tensor, like: Tensor, dim: int) -> Tensor:
    """scale (K,) as a factor along `dim` of `like`."""
    return scale[:, None] if like.dim() == 2 and dim == 0 else scale


def _shape(t: Tensor, dim: int, n: int) -> list[int]:
    shape = list(t.shape)
    shape[dim] = n
    return shape


def _prefers_transpose(t: Tensor) -> bool:
    """Whether only the first axis of a matrix is contiguous (csrc/bind/rows_check.cpp has the same rule)."""
    if t.dim() != 2:
        return False
    (n0, n1), (s0, s1) = t.shape, t.stride()
    row_major = (s1 == 1 or n1 <= 1) and (s0 >= n1 or n0 <= 1)
    return not row_major and (s0 == 1 or n0 <= 1) and (s1 >= n0 or n1 <= 1)


def _empty(t: Tensor, dim: int, n: int, transposed: bool) -> Tensor:
    shape = _shape(t, dim, n)
    return t.new_empty(shape[::-1]).t() if transposed else t.new_empty(shape)


def _ordered(t: Tensor, transposed: bool) -> Tensor:
    return t.t().contiguous().t() if transposed else t.contiguous()


@torch.library.impl(LIBRARY, "gather_rows", "CompositeExplicitAutograd")
def _gather_rows_torch(src: list[Tensor], idx: list[Tensor], scale: list[Tensor], dim: list[int]) -> list[Tensor]:
    """Runs where there is no compiled kernel: without the extension, or on a device it was not built for."""
    out = gather_rows_ref(src, idx, [None if _is_absent(z) else z for z in scale], dim)
    return [_ordered(o, _prefers_transpose(s)) for o, s in zip(out, src, strict=True)]


@torch.library.impl(LIBRARY, "scatter_rows", "CompositeExplicitAutograd")
def _scatter_rows_torch(
    grad: list[Tensor], idx: list[Tensor], scale: list[Tensor], dim: list[int], size: list[int], weight: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    weights = [None if _is_absent(w) else w for w in weight]
    out, dot = scatter_rows_ref(grad, idx, [None if _is_absent(z) else z for z in scale], dim, size, weights)
    order = [_prefers_transpose(g if w is None else w) for g, w in zip(grad, weights, strict=True)]
    return [_ordered(o, t) for o, t in zip(out, order, strict=True)], dot


@torch.library.register_fake("ppnet::gather_rows", lib=LIBRARY)
def _gather_rows_fake(src: list[Tensor], idx: list[Tensor], scale: list[Tensor], dim: list[int]) -> list[Tensor]:
    same_device("gather_rows", src=src, idx=idx, scale=scale)
    return [_empty(s, d, i.shape[0], _prefers_transpose(s)) for s, i, d in zip(src, idx, dim, strict=True)]


@torch.library.register_fake("ppnet::scatter_rows", lib=LIBRARY)
def _scatter_rows_fake(
    grad: list[Tensor], idx: list[Tensor], scale: list[Tensor], dim: list[int], size: list[int], weight: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    same_device("scatter_rows", grad=grad, idx=idx, scale=scale, weight=weight)
    out, dot = [], []
    for g, i, d, n, w in zip(grad, idx, dim, size, weight, strict=True):
        out.append(_empty(g, d, n, _prefers_transpose(g if _is_absent(w) else w)))
        dot.append(g.new_empty(0 if _is_absent(w) else i.shape[0], dtype=_arithmetic(g)))
    return out, dot


def _save_for_gradient(ctx, inputs, output) -> None:
    src, idx, scale, dim = inputs
    # src is needed for the gradient of the scale alone.
    with_dot = [z.requires_grad and not _is_absent(z) for z in scale]
    ctx.dim, ctx.with_dot = dim, with_dot
    ctx.size = [s.shape[d] for s, d in zip(src, dim, strict=True)]
    ctx.save_for_backward(*idx, *scale, *(s for s, needed in zip(src, with_dot, strict=True) if needed))


def _gather_rows_backward(ctx, dout):
    n = len(ctx.dim)
    saved = ctx.saved_tensors
    idx, scale, weights = saved[:n], saved[n : 2 * n], iter(saved[2 * n :])
    src = [next(weights) if needed else None for needed in ctx.with_dot]
    needs_src = ctx.needs_input_grad[0]
    used = [i for i in range(n) if dout[i] is not None and (needs_src[i] or ctx.with_dot[i])]
    out, dot = scatter_rows(
        [dout[i] for i in used],
        [idx[i] for i in used],
        [None if _is_absent(scale[i]) else scale[i] for i in used],
        [ctx.dim[i] for i in used],
        [ctx.size[i] if needs_src[i] else 0 for i in used],
        [src[i] for i in used],
    )
    dsrc, dscale = [None] * n, [None] * n
    for j, i in enumerate(used):
        dsrc[i] = out[j] if needs_src[i] else None
        dscale[i] = dot[j] if ctx.with_dot[i] else None
    return dsrc, [None] * n, dscale, None


torch.library.register_autograd(
    "ppnet::gather_rows", _gather_rows_backward, setup_context=_save_for_gradient, lib=LIBRARY
)
