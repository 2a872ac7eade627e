"""What the forms of an MLP on its kept neurons share: the reference in plain torch and the checks of arguments."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppnet.ops.gated_act import gated_act_ref


def gated_mlp_ref(
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
    """gated_mlp in plain torch."""

    def kept(t: Tensor | None) -> Any:
        return t if t is None or idx is None else t.index_select(0, idx)

    u = functional.linear(x, kept(up), kept(up_bias))
    g = None if gate is None else functional.linear(x, kept(gate), kept(gate_bias))
    return functional.linear(gated_act_ref(u, g, z, act), kept(down).t(), down_bias)


def check_mlp(
    op: str,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """RuntimeError unless shapes, and without autocast dtypes, are those of an MLP."""
    if x.dim() < 1 or up.dim() != 2 or up.shape[1] != x.shape[-1]:
        raise RuntimeError(f"{op}: up has shape {tuple(up.shape)}; for x of {tuple(x.shape)} it must be (F, D)")
    if down.dim() != 2 or down.shape[0] != up.shape[0]:
        raise RuntimeError(f"{op}: down has shape {tuple(down.shape)}; it must be (F, D) with F = {up.shape[0]}")
    if gate is not None and gate.shape != up.shape:
        raise RuntimeError(f"{op}: gate has shape {tuple(gate.shape)}; it must be that of up, {tuple(up.shape)}")
    if gate is None and gate_bias is not None:
        raise RuntimeError(f"{op}: gate_bias is given, but gate is None")
    for name, bias, size in (
        ("up_bias", up_bias, up.shape[0]),
        ("gate_bias", gate_bias, up.shape[0]),
        ("down_bias", down_bias, down.shape[1]),
    ):
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != size):
            raise RuntimeError(f"{op}: {name} has shape {tuple(bias.shape)}; it must be ({size},)")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return
    named = dict(up=up, down=down, gate=gate, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias)
    for name, t in named.items():
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(f"{op}: {name} has dtype {t.dtype}; without autocast it must be x's, {x.dtype}")


def tokens_of(t: Tensor) -> Tensor:
    """(..., D) as (T, D)."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
