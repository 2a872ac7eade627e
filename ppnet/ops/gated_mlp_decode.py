"""gated_mlp_decode: an MLP sub-layer for a few tokens, in one pass over its kept neurons.

    y = (z · act(x Gᵀ + g) · (x Uᵀ + u)) W + b      over the neurons idx: rows of G, U (F, D) and W (F, D)

Every kept neuron's three rows are read once, one after the other; nothing is gathered, so any size of a model runs on
the weights of the whole one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppnet.ops.gated_act import activation
from ppnet.ops.library import LIBRARY, define, explain, follow_autocast, refuse_gradient, same_device

define(
    "gated_mlp_decode(Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? gate_bias,"
    " Tensor? down_bias, Tensor? idx, Tensor? z, str act) -> Tensor"
)

# The packet torch.ops.ppnet.gated_mlp_decode looks its overload up at every call.
_gated_mlp_decode = torch.ops.ppnet.gated_mlp_decode.default


def gated_mlp_decode(
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
) -> Tensor:
    """An MLP for at most 8 tokens over its kept neurons.

    Args:
        x: ``(T, D)``, T <= 8, float32, bfloat16 or float16.
        up, gate: ``(F, D)`` of x's dtype, rows contiguous: as `nn.Linear` stores them. No gate: act is that of up.
        down: ``(F, D)``, rows contiguous: ``down_proj.weight.t()`` of a weight that is stored unit by unit.
        up_bias, gate_bias: ``(F,)`` or None. down_bias: ``(D,)`` or None.
        idx: ``(K,)`` int64 neurons in [0, F), any order; None: all.
        z: ``(K,)`` float32 gates of the kept neurons, or None.
        act: silu, gelu (erf), gelu_tanh, relu or relu2.

    Returns:
        ``(T, D)`` of x's dtype. Everything in between is float32, rounded once; in bfloat16, where the processor has
        bf16 products, the inputs of `down` are rounded too. The result does not depend on the number of threads. Not
        differentiable. Working memory, padded to 1, 2, 4 or 8 tokens of D + 64 features at most: x, x in float32, and
        32 sums (T, D) in float32 at most; the calling thread keeps it.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        refuse_gradient("gated_mlp_decode", "gated_mlp", x, up, down, gate, up_bias, gate_bias, down_bias, z)
        return _gated_mlp_decode(x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act)
    except Exception as error:
        explain(error, gated_mlp_decode, locals())
        raise


def gated_mlp_decode_ref(
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
) -> Tensor:
    """gated_mlp_decode in plain torch."""

    def kept(t: Tensor | None) -> Tensor | None:
        return t if t is None or idx is None else t.index_select(0, idx)

    linear = torch.nn.functional.linear
    h = linear(x, kept(up), kept(up_bias))  # type: ignore[arg-type]
    h = activation(h, act) if gate is None else activation(linear(x, kept(gate), kept(gate_bias)), act) * h  # type: ignore[arg-type]
    if z is not None:
        h = (h.float() * z).to(h.dtype)
    return linear(h, kept(down).t(), down_bias)  # type: ignore[union-attr]


@torch.library.impl(LIBRARY, "gated_mlp_decode", "CompositeExplicitAutograd")
def _gated_mlp_decode_torch(
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
) -> Tensor:
    return gated_mlp_decode_ref(
        x, up, down, gate, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, idx=idx, z=z, act=act
    )


@torch.library.register_fake("ppnet::gated_mlp_decode", lib=LIBRARY)
def _gated_mlp_decode_fake(
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
) -> Tensor:
    biases = {"up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias}
    same_device("gated_mlp_decode", x=x, up=up, down=down, gate=gate, **biases, idx=idx, z=z)
    return x.new_empty(x.shape[0], up.shape[1])


follow_autocast("gated_mlp_decode", keep=(8,))
