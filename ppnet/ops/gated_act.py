"""gated_act: the activation between the two GEMMs of an MLP, its gate and its units' factors, in one pass.

    h[t, k] = z[k] · act(gate[t, k]) · up[t, k]     with a gate (SwiGLU, GeGLU, ReGLU, ...)
    h[t, k] = z[k] · act(up[t, k])                  without

The backward is one pass too: it computes the activation again, and dz[k] = Σ_t dh · act · up on the way.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from ppnet.ops.library import LIBRARY, define, explain_types, same_device

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

define("gated_act(Tensor up, Tensor? gate, Tensor? z, str act) -> Tensor")
define(
    "gated_act_backward(Tensor dh, Tensor up, Tensor? gate, Tensor? z, str act, bool need_up=True,"
    " bool need_gate=True, bool need_z=True) -> (Tensor dup, Tensor dgate, Tensor dz)"
)


@explain_types
def gated_act(up: Tensor, gate: Tensor | None = None, z: Tensor | None = None, act: str = "silu") -> Tensor:
    """h = z · act(gate) · up, or z · act(up) without a gate. Returns h (..., K), contiguous, of up's dtype.

    up, gate: (..., K) of one float32, bfloat16, float16 or float64; rows may be strided (halves of one GEMM's output),
        other layouts cost a copy. z: (K,) float32 (float64 for a float64 up), or None for 1.
    act: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2" (relu squared).
    act of infinity is infinity (torch's oneDNN kernel of gelu gives NaN); of -infinity 0 for relu and relu2, and
        infinity times 0 = NaN for the others, as in torch; of NaN it is NaN.
    Computed in float32 (float64 for float64) and rounded once. Differentiable once in up, gate and z; only the inputs
    are kept for that. Errors (RuntimeError) name the argument and its value.
    """
    return torch.ops.ppnet.gated_act(up, gate, z, act)


@explain_types
def gated_act_backward(
    dh: Tensor,
    up: Tensor,
    gate: Tensor | None,
    z: Tensor | None,
    act: str,
    need_up: bool = True,
    need_gate: bool = True,
    need_z: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dup, dgate, dz) of gated_act, in one pass; what is not needed (or has no input) is an empty tensor.

    dh, up, gate: (..., K) of one dtype. dz: (K,) of z's dtype; it is that of z = 1 where z is None.
    dz[k] = Σ_t dh · act · up is summed over blocks of 32 rows and then over the blocks in a fixed tree, whatever the
    number of threads; its terms have a relative error of 2e-4 for bfloat16 inputs. Workspace: ceil(T / 32) · K elements
    of dz's dtype, T being the rows of K; on a GPU blocks have 8 rows or more, after shape and alignment.
    Not differentiable. relu's slope at NaN is NaN, in torch 1; where it is 0, NaN
    and infinity times it are NaN, where torch selects 0.
    """
    return torch.ops.ppnet.gated_act_backward(dh, up, gate, z, act, need_up, need_gate, need_z)


def gated_act_ref(up: Tensor, gate: Tensor | None = None, z: Tensor | None = None, act: str = "silu") -> Tensor:
    """gated_act in plain torch."""
    wide = _arithmetic(up)
    h = activation((up if gate is None else gate).to(wide), act)
    if gate is not None:
        h = h * up.to(wide)
    return (h if z is None else h * z).to(up.dtype)


def gated_act_backward_ref(
    dh: Tensor,
    up: Tensor,
    gate: Tensor | None,
    z: Tensor | None,
    act: str,
    need_up: bool = True,
    need_gate: bool = True,
    need_z: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """gated_act_backward in plain torch."""
    wide = _arithmetic(up)
    through = dh.to(wide) if z is None else dh.to(wide) * z
    dup, dgate, dz = up.new_empty(0), up.new_empty(0), up.new_empty(0, dtype=wide)
    if gate is None:
        if need_up:
            dup = _activation_backward(through, up.to(wide), act).to(up.dtype)
    else:
        if need_up:
            dup = (through * activation(gate.to(wide), act)).to(up.dtype)
        if need_gate:
            dgate = _activation_backward(through * up.to(wide), gate.to(wide), act).to(up.dtype)
    if need_z:
        h = gated_act_ref(up.to(wide), None if gate is None else gate.to(wide), None, act)
        dz = (dh.to(wide) * h).reshape(math.prod(up.shape[:-1]), up.shape[-1]).sum(0)
    return dup.contiguous(), dgate.contiguous(), dz


def _arithmetic(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def activation(x: Tensor, act: str) -> Tensor:
    """An activation by its name here, in plain torch. Errors: RuntimeError for an unknown name."""
    if act == "silu":
        return functional.silu(x)
    if act == "gelu":
        return functional.gelu(x)
    if act == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if act == "relu":
        return functional.relu(x)
    if act == "relu2":
        return functional.relu(x).square()
    raise RuntimeError(f'gated_act: act is "{act}"; allowed are silu, gelu, gelu_tanh, relu and relu2')


def _activation_backward(dy: Tensor, x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if act == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    if act == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    if act == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    if act == "relu2":
        return dy * 2 * functional.relu(x)
    raise RuntimeError(f'gated_act: act is "{act}"; allowed are silu, gelu, gelu_tanh, relu and relu2')


@torch.library.impl(LIBRARY, "gated_act", "CompositeExplicitAutograd")
def _gated_act_torch(up: Tensor, gate: Tensor | None, z: Tensor | None, act: str) -> Tensor:
    """Runs where there is no compiled kernel: without the extension, or on a device it was not built for."""
    return gated_act_ref(up, gate, z, act).contiguous()


torch.library.impl(LIBRARY, "gated_act_backward", "CompositeExplicitAutograd")(gated_act_backward_ref)


@torch.library.register_fake("ppnet::gated_act", lib=LIBRARY)
def _gated_act_fake(up: Tensor, gate: Tensor | None, z: Tensor | None, act: str) -> Tensor:
    same_device("gated_act", up=up, gate=gate, z=z)
    return up.new_empty(up.shape)


@torch.library.register_fake("ppnet::gated_act_backward", lib=LIBRARY)
def _gated_act_backward_fake(
    dh: Tensor,
    up: Tensor,
    gate: Tensor | None,
    z: Tensor | None,
    act: str,
    need_up: bool = True,
    need_gate: bool = True,
    need_z: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    same_device("gated_act_backward", dh=dh, up=up, gate=gate, z=z)
    dup = up.new_empty(up.shape if need_up else 0)
    dgate = up.new_empty(up.shape if need_gate and gate is not None else 0)
    return dup, dgate, up.new_empty(up.shape[-1] if need_z else 0, dtype=_arithmetic(up))


def _save_for_gradient(ctx, inputs, output) -> None:
    up, gate, z, act = inputs
    ctx.act = act
    ctx.save_for_backward(up, gate, z)


def _gated_act_gradient(ctx, dh):
    up, gate, z = ctx.saved_tensors
    need_up, need_gate, need_z, _ = ctx.needs_input_grad
    need_gate, need_z = need_gate and gate is not None, need_z and z is not None
    dup, dgate, dz = gated_act_backward(dh, up, gate, z, ctx.act, need_up, need_gate, need_z)
    return dup if need_up else None, dgate if need_gate else None, dz if need_z else None, None


torch.library.register_autograd("ppnet::gated_act", _gated_act_gradient, setup_context=_save_for_gradient, lib=LIBRARY)
