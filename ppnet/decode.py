"""Linear layers and MLPs whose weights stay as they are while few tokens go through: the decode operators' callers.

A leaf computes with the whole weights and, at a size of a gated model, the indices of its kept units. With few tokens
the operators read just the kept rows; with many, kept rows are gathered for the library's matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppnet import ops
from ppnet.ops.gated_act import ACTS
from ppnet.ops.gated_act import activation as named_activation
from ppnet.ops.linear_decode import MOST_TOKENS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Kept:
    """The features of a leaf that a size computes: indices ``(K,)`` int64, and their gates ``(K,)`` float32 or None."""

    features: Tensor
    gate: Tensor | None = None


def decodes(x: Tensor, rows: Tensor) -> bool:
    """Whether the decode operators do a product of x ``(..., D)`` with a weight that is read by `rows`."""
    return (
        x.device.type == "cpu"
        and x.dtype == rows.dtype
        and x.dtype in DTYPES
        and x.numel() <= MOST_TOKENS * x.shape[-1]
        and rows.stride(1) == 1
        and not (torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, by_input: bool, kept: Kept | None) -> Tensor:
    """A linear layer over its kept units.

    Args:
        x: ``(..., in)``, or ``(..., K)`` where the kept units are inputs.
        weight: ``(out, in)``; `by_input`: units are its columns, which are contiguous if it is stored unit by unit.
    """
    rows = weight.t() if by_input else weight
    features, gate = (None, None) if kept is None else (kept.features, kept.gate)
    if decodes(x, rows):
        flat = x.reshape(-1, x.shape[-1])
        if by_input:
            y = ops.linear_t_decode(flat, rows, bias, idx=features, z=gate)
        else:
            y = ops.linear_decode(flat, rows, bias, idx=features)
        return y.view(*x.shape[:-1], y.shape[-1])
    if features is not None:
        (weight,) = ops.gather_rows([weight], [features], [gate], [1 if by_input else 0])
        if bias is not None and not by_input:
            bias = bias.index_select(0, features)
    return nn.functional.linear(x, weight, bias)


# ---- MLPs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlpParts:
    """An MLP sub-layer as `gated_mlp_decode` computes it: names of its linear modules, and its activation."""

    up: str
    down: str
    gate: str | None
    act: str


def unit_rows(module: Any, by_input: bool) -> Tensor:
    """A linear module's weight with one row per unit, ``(F, D)``: a view of it."""
    out_in = module.weight if isinstance(module, nn.Linear) else module.weight.t()
    return out_in.t() if by_input else out_in


def recognise(activation: nn.Module) -> str | None:
    """The name in `ACTS` of a module that computes one of them, by what it does; None for any other."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = activation(x)
    except Exception:  # not an elementwise function of one tensor
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((act for act in ACTS if torch.allclose(y.double(), named_activation(x, act), rtol=0, atol=1e-9)), None)


def mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward of an accelerated MLP: one operator for few tokens, else the class's own forward."""
    parts: MlpParts = self._ppnet_mlp
    up, down = getattr(self, parts.up), getattr(self, parts.down)
    gate = None if parts.gate is None else getattr(self, parts.gate)
    binding = down._ppnet_binding
    up_rows = unit_rows(up, False)
    plain = not args and not kwargs and not binding.overrides
    if not plain or self.training or not decodes(x, up_rows):
        return type(self).forward(self, x, *args, **kwargs)
    kept: Kept | None = binding.kept
    y = ops.gated_mlp_decode(
        x.reshape(-1, x.shape[-1]),
        up_rows,
        unit_rows(down, True),
        None if gate is None else unit_rows(gate, False),
        up_bias=up.bias,
        gate_bias=None if gate is None else gate.bias,
        down_bias=down.bias,
        idx=None if kept is None else kept.features,
        z=None if kept is None else kept.gate,
        act=parts.act,
    )
    return y.view(x.shape)


def fuse_mlp(block: nn.Module, parts: MlpParts) -> None:
    """Gives an MLP the fused forward."""
    block.__dict__["_ppnet_mlp"] = parts
    block.__dict__["forward"] = MethodType(mlp_forward, block)


def unfuse_mlp(block: nn.Module) -> None:
    block.__dict__.pop("_ppnet_mlp", None)
    block.__dict__.pop("forward", None)


@torch.no_grad()
def computes_the_same(block: nn.Module, width: int, like: Tensor) -> bool:
    """Whether a fused MLP agrees with the forward of its class on random tokens."""
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(like)
    ours, own = cast(Tensor, block(x)), cast(Any, type(block)).forward(block, x)
    tolerance = 1e-4 if like.dtype == torch.float32 else 4e-2
    return bool((ours - own).abs().max() <= tolerance * own.abs().max())
