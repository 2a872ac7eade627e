"""gated_mlp_fused: an MLP on its kept neurons for 16 to 1024 tokens on a GPU, without a gathered copy of the weights.

    h = z ⊙ act(x gate[idx]ᵀ + gate_bias[idx]) ⊙ (x up[idx]ᵀ + up_bias[idx])      (T, K)
    y = h down[idx] + down_bias

Two tensor-core kernels whose copies to shared memory follow the list of neurons: kept rows are read in place, h is
written once, in x's dtype. Gathering reads and writes the kept weights once more, which below some 1000 tokens costs as
much as it gains; fewer than 16 tokens are gated_mlp_decode's. Which is faster where, no GPU has measured yet:
`gated_mlp` uses this one only where its caller says so (path="fused").
"""

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain_types, follow_autocast, refuse_gradient, same_device
from ppnet.ops.mlp import check_mlp, gated_mlp_ref, tokens_of

define(
    "gated_mlp_fused(Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? gate_bias,"
    " Tensor? down_bias, Tensor? idx, Tensor? z, str act, int tile=0, int split=0) -> Tensor"
)


@explain_types
def gated_mlp_fused(
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
    tile: int = 0,
    split: int = 0,
) -> Tensor:
    """The forward of gated_mlp with its arguments and result, y (..., D) of x's dtype, in two kernels on a GPU.

    x: (..., D), bfloat16 or float16; other dtypes, layouts (below) and devices go to gated_mlp's library path.
    up, gate, down: (F, D) with contiguous rows: down as ``down_proj.weight.t()`` of a weight stored unit by unit. Rows
        aligned to 16 bytes (D and strides multiples of 8) are copied asynchronously, others value by value, slowly.
    idx: (K,) int64 in [0, F), in any order, repeated or not; outside of it a device-side assertion stops the GPU.
    tile, split: for measurements. The tile of a block, tokens x columns: 1: 32x64, 2: 64x128, 3: 128x128; and into how
        many parts the neurons are divided in the product with down (at most ceil(K / 64)). 0: by T, K and D alone.
    Under autocast all arguments but z are cast to its dtype, the weights as a whole.

    Sums are float32; h and y are rounded once each. The same bits at every run. Workspace: h, (T, K) with K rounded up
    to 8, of x's dtype; with split > 1 also (split, T, D) float32, D rounded up to 8, split <= 16 unless it is given.
    Not differentiable: the backward needs the pre-activations (T, K) of gate and up, which are never written here, and
    products over the kept weights in both orders; until a GPU has measured better it is gated_mlp's, by gather_rows
    and the library. Errors (RuntimeError) name the argument and its value.
    """
    check_mlp("gated_mlp_fused", x, up, down, gate, up_bias, gate_bias, down_bias)
    refuse_gradient("gated_mlp_fused", "gated_mlp", x, up, down, gate, up_bias, gate_bias, down_bias, z)
    arguments = (x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act)
    if not fits_fused(x, up, down, gate):
        return torch.ops.ppnet.gated_mlp(*arguments)[0]
    y = torch.ops.ppnet.gated_mlp_fused(tokens_of(x), *arguments[1:], tile, split)
    return y.reshape(*x.shape[:-1], down.shape[1])


def gated_mlp_fused_ref(
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
    tile: int = 0,
    split: int = 0,
) -> Tensor:
    """gated_mlp_fused in plain torch: gated_mlp_ref."""
    return gated_mlp_ref(
        x, up, down, gate, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, idx=idx, z=z, act=act
    )


def fits_fused(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> bool:
    """Whether the kernels take these: 16-bit, or cast to it by autocast; rows of the weights contiguous."""
    dtype, device = x.dtype, x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    weights = [t for t in (up, down, gate) if t is not None]
    return dtype in (torch.bfloat16, torch.float16) and all(_rows_contiguous(t) for t in weights)


def _rows_contiguous(t: Tensor) -> bool:
    return (t.shape[1] <= 1 or t.stride(1) == 1) and (t.shape[0] <= 1 or t.stride(0) >= t.shape[1])


@torch.library.impl(LIBRARY, "gated_mlp_fused", "CompositeExplicitAutograd")
def _gated_mlp_fused_library(
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
    tile: int = 0,
    split: int = 0,
) -> Tensor:
    """Where the kernels are not: on the CPU, or without the extension."""
    return torch.ops.ppnet.gated_mlp(x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act)[0]


@torch.library.register_fake("ppnet::gated_mlp_fused", lib=LIBRARY)
def _gated_mlp_fused_fake(x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act, tile=0, split=0) -> Tensor:
    biases = {"up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias}
    same_device("gated_mlp_fused", x=x, up=up, down=down, gate=gate, **biases, idx=idx, z=z)
    return x.new_empty(x.shape[0], down.shape[1])


follow_autocast("gated_mlp_fused", keep=(8,))
