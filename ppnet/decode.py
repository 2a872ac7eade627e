"""Linear layers and MLPs that compute their kept units from the whole weights.

A leaf holds its own weights and, at a size of a gated model or in a training step, the indices and gates of its kept
units. With few tokens the decode operators read just the kept rows; with many, kept rows are gathered for the library's
matrix product. An MLP whose parts are known is one operator: `gated_mlp_decode` or `gated_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ppnet import ops
from ppnet.modes import certainly, evaluating, transformed
from ppnet.ops.gated_act import ACTS
from ppnet.ops.gated_act import activation as named_activation
from ppnet.ops.linear_decode import DTYPES, MOST_TOKENS, has_kernels
from ppnet.units import Site


@dataclass(frozen=True, eq=False)
class Kept:
    """The features of a leaf that a pass computes.

    Attributes:
        features: ``(K,)`` int64 indices.
        gate: ``(K,)`` factors of the consumer's inputs, float32 (float64 for a float64 leaf), or None for 1.
    """

    features: Tensor
    gate: Tensor | None = None


def suits(x: Tensor) -> bool:
    """Whether the decode operators take tokens x ``(..., D)``; a graph for any number has the library's products."""
    few = certainly(x.numel() <= MOST_TOKENS * x.shape[-1])
    return few and x.dtype in DTYPES and has_kernels(x) and not torch.is_autocast_enabled(x.device.type)


def decodes(x: Tensor, rows: Iterable[Tensor], others: Iterable[Tensor | None] = ()) -> bool:
    """Whether the decode operators do the products of x ``(..., D)`` with weights that are read by `rows`.

    Args:
        others: what else goes into them (biases, gates): nothing may want a gradient.
    """
    if not suits(x):
        return False
    for weight in rows:
        if weight.dtype != x.dtype or weight.stride(1) != 1:
            return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *rows, *others))


def is_plain(block: nn.Module, leaves: Iterable[str]) -> bool:
    """Whether a block may compute for its leaves: they are what they were, and not calling them goes unnoticed.

    Hooks would, and torch.func.
    """
    if _has_any_global_hook() or transformed():
        return False
    for child in block._modules.values():
        if child is not None and (
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        ):
            return False
    for name in leaves:
        binding = block._modules[name].__dict__.get("_ppnet_binding")
        if binding is None or binding.overrides:
            return False
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, by_input: bool, kept: Kept | None) -> Tensor:
    """A linear layer over its kept units, from its whole weight.

    Args:
        x: ``(..., in)``, or ``(..., K)`` where the kept units are inputs.
        weight: ``(out, in)``; `by_input`: units are its columns, which are contiguous if it is stored unit by unit.
    """
    rows = weight.t() if by_input else weight
    features, gate = (None, None) if kept is None else (kept.features, kept.gate)
    if decodes(x, (rows,), (bias, gate)):
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
    return ops.linear(x, weight, bias)


# ---- MLPs ------------------------------------------------------------------------------------------------------------


# Tensors of `gated_mlp` beside x and the weights.
OTHERS = ("up_bias", "gate_bias", "down_bias", "z")


@dataclass(frozen=True)
class MlpParts:
    """An MLP as `gated_mlp` computes it: names of its linear modules and its activation's module, and what that is."""

    up: str
    down: str
    gate: str | None
    fn: str
    act: str

    @property
    def leaves(self) -> tuple[str, ...]:
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)


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
    """Forward of a fused MLP: one operator, unless a child is not what it was or the call is not a plain one."""
    parts: MlpParts = self._ppnet_mlp
    known = is_plain(self, parts.leaves) and self._modules[parts.fn].__dict__.get("_ppnet_act") == parts.act
    if args or kwargs or not known or not has_kernels(x) or (self.training and drops_out(self)):
        return type(self).forward(self, x, *args, **kwargs)
    up, down = getattr(self, parts.up), getattr(self, parts.down)
    gate = None if parts.gate is None else getattr(self, parts.gate)
    binding = down._ppnet_binding
    kept: Kept | None = binding.kept
    # Dense evaluation is the class's own, to the bit.
    if not (torch.is_grad_enabled() or binding.decode or kept is not None):
        return type(self).forward(self, x, *args, **kwargs)
    weights = (unit_rows(up, False), unit_rows(down, True), None if gate is None else unit_rows(gate, False))
    options = {
        "up_bias": up.bias,
        "gate_bias": None if gate is None else gate.bias,
        "down_bias": down.bias,
        "idx": None if kept is None else kept.features,
        "z": None if kept is None else kept.gate,
        "act": parts.act,
    }
    rows, others = [w for w in weights if w is not None], [options[name] for name in OTHERS]
    if binding.decode and decodes(x, rows, others):
        return ops.gated_mlp_decode(x.reshape(-1, x.shape[-1]), *weights, **options).view(x.shape)
    return ops.gated_mlp(x, *weights, **options) if x.is_cpu else type(self).forward(self, x)


def drops_out(block: nn.Module) -> bool:
    return any(isinstance(child, nn.Dropout) and child.p > 0 for child in block._modules.values())


def fuse_mlp(block: nn.Module, parts: MlpParts) -> None:
    """Gives an MLP the fused forward."""
    block.__dict__["_ppnet_mlp"] = parts
    block.get_submodule(parts.fn).__dict__["_ppnet_act"] = parts.act
    block.__dict__["forward"] = partial(mlp_forward, block)


def mlp_parts(block: nn.Module, site: Site) -> MlpParts | None:
    """The parts of an MLP in which feature u of every leaf is unit u, and whose activation is known; else None."""
    plain = torch.arange(site.units)
    if any(leaf.index.shape[1] != 1 or not torch.equal(leaf.index[:, 0], plain) for leaf in site.leaves):
        return None
    prefix = f"{site.block}."
    names = {leaf.role: leaf.name.removeprefix(prefix) for leaf in site.leaves if leaf.name.startswith(prefix)}
    if len(names) < len(site.leaves) or not {"up", "out"} <= names.keys() <= {"gate", "up", "out"}:
        return None
    rest = {name: child for name, child in block.named_children() if name not in names.values()}
    acts = {name: recognise(child) for name, child in rest.items() if not isinstance(child, nn.Dropout)}
    if len(acts) != 1:
        return None
    ((fn, act),) = acts.items()
    return None if act is None else MlpParts(names["up"], names["out"], names.get("gate"), fn, act)


def fuse_mlps(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Fuses every MLP whose parts are known and whose result is then the same; returns the names of these blocks."""
    fused: list[str] = []
    if any(parameter.is_meta for parameter in model.parameters()):
        return fused  # without weights nothing is computed
    with evaluating(model):
        for site in sites:
            block = model.get_submodule(site.block)
            parts = mlp_parts(block, site) if site.kind == "neuron" and "_ppnet_mlp" not in block.__dict__ else None
            if parts is None:
                continue
            fuse_mlp(block, parts)
            weight = unit_rows(block.get_submodule(parts.up), False)
            x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
            if computes_the_same(block, partial(block, x)):
                fused.append(site.block)
            else:
                unfuse_mlp(block)
    return fused


def unfuse_mlp(block: nn.Module) -> None:
    block.__dict__.pop("forward", None)
    parts = block.__dict__.pop("_ppnet_mlp", None)
    if parts is not None and parts.fn in block._modules:
        block._modules[parts.fn].__dict__.pop("_ppnet_act", None)


def computes_the_same(module: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Whether `run` gives the same with a module's fused forward as with its class's, up to rounding."""
    ours, fused = run(), module.__dict__.pop("forward")
    try:
        own = run()
    finally:
        module.__dict__["forward"] = fused
    tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) else 4e-2
    return bool((ours - own).abs().max() <= tolerance * own.abs().max())
