"""gated_mlp: an MLP on its kept neurons, for training and prefill.

    y = (z ⊙ act(x gate[idx]ᵀ + gate_bias[idx]) ⊙ (x up[idx]ᵀ + up_bias[idx])) down[idx] + down_bias

Composed of gather_rows (the kept rows of all weights in one pass), the library's matrix products (linear), gated_act
and scatter_rows. For the backward it keeps x, the pre-activations (T, K) and references to its inputs; the gathered
weights and h are made again. The gates act in gated_act, forward and backward, so that their gradient is a column sum
over what that pass reads anyway: nothing more is read for it, and no weight is rounded a second time.

That is path="library", the default everywhere. path="fused" computes without a gradient by gated_mlp_fused: on GPUs two
kernels that read the kept rows where they are.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppnet.ops.gated_act import gated_act, gated_act_backward
from ppnet.ops.gated_mlp_fused import gated_mlp_fused
from ppnet.ops.library import LIBRARY, define, explain_types, same_device
from ppnet.ops.linear import linear
from ppnet.ops.mlp import check_mlp, tokens_of
from ppnet.ops.rows import _prefers_transpose, gather_rows, scatter_rows

PATHS = ("library", "fused")

_WEIGHTS = (
    "Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, Tensor? idx,"
    " Tensor? z, str act"
)
define(f"gated_mlp(Tensor x, {_WEIGHTS}) -> (Tensor y, Tensor u, Tensor g)")
# needs and the outputs are in the order of gated_mlp's arguments: x, up, down, gate, the three biases, z.
define(
    f"gated_mlp_backward(Tensor dy, Tensor? x, Tensor u, Tensor? g, {_WEIGHTS}, bool[] needs) -> (Tensor dx,"
    " Tensor dup, Tensor ddown, Tensor dgate, Tensor dup_bias, Tensor dgate_bias, Tensor ddown_bias, Tensor dz)"
)


@explain_types
def gated_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    idx: Tensor | None = None,
    z: Tensor | None = None,
    act: str = "silu",
    path: str = "library",
) -> Tensor:
    """y = (z · act(x gate[idx]ᵀ) · (x up[idx]ᵀ)) down[idx] with biases, or act of up without a gate. y: (..., D).

    x: (..., D). up, gate: (F, D), as an `nn.Linear` stores them; down: (F, D), as `down_proj.weight.t()` is: any memory
        order. up_bias, gate_bias: (F,); down_bias: (D,). All of x's dtype; under autocast x and the *gathered* weights
        are cast to its dtype.
    idx: (K,) int64, the kept neurons, unique; None: all of them, and nothing is copied.
    z: (K,) float32 (float64 for a float64 x), their gates; None: 1. K = 0 gives down_bias.
    act: as for gated_act.
    path: "library", or "fused" for gated_mlp_fused where no gradient is recorded; where one is, and for what those
        kernels do not take, it is "library" all the same.
    Differentiable once in all floating inputs. Errors (RuntimeError) name the argument and its value.
    Memory: (T, K) pre-activations, u and g, are kept for the backward. Workspace of the forward: u, g, h and, with an
    idx, the kept rows of the weights; of the backward, while the last weight's gradient is made: h and, with an idx,
    the gradient of one weight's kept rows (before there are gradients of weights: dh, du, dg and one weight's kept
    rows). In both what gated_act and gather_rows take, and oneDNN's products.
    """
    if path not in PATHS:
        raise RuntimeError(f"gated_mlp: path is {path!r}; allowed are {' and '.join(PATHS)}")
    check_mlp("gated_mlp", x, up, down, gate, up_bias, gate_bias, down_bias)
    if path == "fused" and not _records_gradient(x, up, down, gate, up_bias, gate_bias, down_bias, z):
        return gated_mlp_fused(
            x, up, down, gate, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, idx=idx, z=z, act=act
        )
    return torch.ops.ppnet.gated_mlp(x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act)[0]


def _records_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kept(tensors: Sequence[Tensor | None], idx: Tensor | None, dtype: torch.dtype) -> list[Any]:
    """The kept rows of all tensors, gathered in one pass and then cast; None stays None."""
    present = [t for t in tensors if t is not None]
    if idx is not None and present:
        n = len(present)
        present = gather_rows(present, [idx] * n, [None] * n, [0] * n)
    kept = iter([t.to(dtype) for t in present])
    return [None if t is None else next(kept) for t in tensors]


@torch.library.impl(LIBRARY, "gated_mlp", "CompositeExplicitAutograd")
def _gated_mlp_kernel(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    idx: Tensor | None,
    z: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = tokens_of(x)
    weights = _kept((up, gate, down, up_bias, gate_bias), idx, x.dtype)
    u = linear(rows, weights[0], weights[3])
    g = None if gate is None else linear(rows, weights[1], weights[4])
    down = weights[2]
    del weights
    h = gated_act(u, g, z, act)
    y = linear(h, down.t(), None if down_bias is None else down_bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], down.shape[1]), u, x.new_empty(0) if g is None else g


def _weight_gradient(dout: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """doutᵀ rows (K, D), in the memory order and dtype of the weight: of the two orientations of one product."""
    if _prefers_transpose(like):
        return linear(rows.t(), dout.t()).t().to(like.dtype)
    return linear(dout.t(), rows.t()).to(like.dtype)


@torch.library.impl(LIBRARY, "gated_mlp_backward", "CompositeExplicitAutograd")
def _gated_mlp_backward_kernel(
    dy: Tensor,
    x: Tensor | None,
    u: Tensor,
    g: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    idx: Tensor | None,
    z: Tensor | None,
    act: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_up, need_down, need_gate, need_up_bias, need_gate_bias, need_down_bias, need_z = needs
    dtype, drows, units = u.dtype, tokens_of(dy), up.shape[0]
    grads: dict[str, Tensor] = {}
    need_u, need_g = need_x or need_up or need_up_bias, g is not None and (need_x or need_gate or need_gate_bias)
    # In the order that lets go of what is large first, and one weight at a time: at the end there are the
    # pre-activations, the full gradients and one of kept rows.
    if need_u or need_g or need_z:
        dh = linear(drows, *_kept((down,), idx, dtype))
        du, dg, grads["z"] = gated_act_backward(dh, u, g, z, act, need_u, need_g, need_z)
        del dh
        if need_x:
            dx = linear(du, _kept((up,), idx, dtype)[0].t())
            if gate is not None:
                dx += linear(dg, _kept((gate,), idx, dtype)[0].t())
            grads["x"] = dx.reshape(*dy.shape[:-1], up.shape[1])
        if need_up_bias and up_bias is not None:
            grads["up_bias"] = _scattered(du.sum(0, dtype=up_bias.dtype), idx, units)
        if need_up and x is not None:
            grads["up"] = _scattered(_weight_gradient(du, tokens_of(x), up), idx, units)
        del du
        if need_gate_bias and gate_bias is not None:
            grads["gate_bias"] = _scattered(dg.sum(0, dtype=gate_bias.dtype), idx, units)
        if need_gate and x is not None and gate is not None:
            grads["gate"] = _scattered(_weight_gradient(dg, tokens_of(x), gate), idx, units)
        del dg
    if need_down_bias and down_bias is not None:
        grads["down_bias"] = drows.sum(0, dtype=down_bias.dtype)
    if need_down:
        grads["down"] = _scattered(_weight_gradient(gated_act(u, g, z, act), drows, down), idx, units)
    names = ("x", "up", "down", "gate", "up_bias", "gate_bias", "down_bias", "z")
    return tuple(grads[name] if needed else u.new_empty(0) for name, needed in zip(names, needs, strict=True))


def _scattered(grad: Tensor, idx: Tensor | None, units: int) -> Tensor:
    """The gradient of the kept rows in its place, 0 elsewhere."""
    return grad if idx is None else scatter_rows([grad], [idx], [None], [0], [units], [None])[0][0]


@torch.library.register_fake("ppnet::gated_mlp", lib=LIBRARY)
def _gated_mlp_fake(x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act):
    biases = {"up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias}
    same_device("gated_mlp", x=x, up=up, down=down, gate=gate, **biases, idx=idx, z=z)
    pre = (math.prod(x.shape[:-1]), up.shape[0] if idx is None else idx.shape[0])
    y = x.new_empty((*x.shape[:-1], down.shape[1]))
    return y, x.new_empty(pre), x.new_empty(0 if gate is None else pre)


@torch.library.register_fake("ppnet::gated_mlp_backward", lib=LIBRARY)
def _gated_mlp_backward_fake(
    dy, x, u, g, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act, needs
) -> tuple[Tensor, ...]:
    def like(t: Tensor) -> Tensor:
        return t.new_empty(t.shape[::-1]).t() if _prefers_transpose(t) else t.new_empty(t.shape)

    absent = u.new_empty(0)
    dx = u.new_empty((*dy.shape[:-1], up.shape[1])) if needs[0] else absent
    inputs = (up, down, gate, up_bias, gate_bias, down_bias, z)
    return dx, *(like(t) if needed else u.new_empty(0) for t, needed in zip(inputs, needs[1:], strict=True))


def _save_for_gradient(ctx, inputs, output) -> None:
    x, up, down, gate, *_ = inputs
    _, u, g = output
    ctx.mark_non_differentiable(u, g)
    ctx.set_materialize_grads(False)
    ctx.act = inputs[-1]
    reads_x = up.requires_grad or (gate is not None and gate.requires_grad)
    ctx.save_for_backward(x if reads_x else None, u, None if gate is None else g, up, down, *inputs[3:-1])


def _gated_mlp_gradient(ctx, dy, du, dg):
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needs)
    wanted = [*needs[:7], needs[8]]
    grads = torch.ops.ppnet.gated_mlp_backward(dy, *ctx.saved_tensors, ctx.act, wanted)
    *through, dz = (grad if needed else None for grad, needed in zip(grads, wanted, strict=True))
    return *through, None, dz, None


torch.library.register_autograd("ppnet::gated_mlp", _gated_mlp_gradient, setup_context=_save_for_gradient, lib=LIBRARY)


def _register_autocast(device: str, key: str) -> None:
    """As for a linear layer: x becomes autocast's dtype, and with it all products; weights after they are gathered."""

    def forward(x: Tensor, *rest):
        with torch.amp.autocast(device, enabled=False):
            cast = x if x.dtype == torch.float64 else x.to(dtype_of())
            return torch.ops.ppnet.gated_mlp(cast, *rest)

    def backward(*args):
        with torch.amp.autocast(device, enabled=False):
            return torch.ops.ppnet.gated_mlp_backward(*args)

    def dtype_of() -> torch.dtype:
        return torch.get_autocast_dtype(device)

    LIBRARY.impl("gated_mlp", forward, key)
    LIBRARY.impl("gated_mlp_backward", backward, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
