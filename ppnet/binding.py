"""What a leaf computes with: its own weights, or weights gathered for some units."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ppnet import ops
from ppnet.units import Site, leaf_module

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class Binding:
    """What a leaf computes with: its own weights (`weight` None), or bound ones; `capture` collects its input instead.

    Not part of the module's state: a deep copy starts unbound (bound tensors carry autograd graphs).
    """

    __slots__ = ("bias", "capture", "features", "weight")

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.features = 0
        self.capture: list[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        clone = Binding()
        clone.features = self.features
        return clone

    def set(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias


class GatedLeaf(Protocol):
    """A patched `nn.Linear` or `Conv1D`."""

    weight: Tensor
    bias: Tensor | None
    _ppnet_binding: Binding


def linear_forward(self: GatedLeaf, input: Tensor) -> Tensor:
    """Forward of a gated `nn.Linear`: the bound weights when there are any."""
    binding = self._ppnet_binding
    if binding.capture is not None:
        binding.capture.append(input)
        return input.new_zeros((*input.shape[:-1], binding.features))
    if binding.weight is None:
        return nn.functional.linear(input, self.weight, self.bias)
    return nn.functional.linear(input, binding.weight, binding.bias)


def conv1d_forward(self: GatedLeaf, input: Tensor) -> Tensor:
    """Forward of a gated transformers `Conv1D`, whose weight is (in, out)."""
    binding = self._ppnet_binding
    if binding.capture is not None:
        binding.capture.append(input)
        return input.new_zeros((*input.shape[:-1], binding.features))
    weight, bias = (self.weight, self.bias) if binding.weight is None else (binding.weight, binding.bias)
    return nn.functional.linear(input, weight.t(), bias)


def gather_site(
    model: nn.Module, site: Site, units: Tensor, gate: Tensor | None
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights and biases of a site restricted to some units: leaf name -> (weight, bias). Differentiable.

    Args:
        units: ``(K,)`` int64 unit indices, sorted.
        gate: ``(K,)`` factors of the units' outputs, folded into the consumer's columns; None: 1.
    """
    # A leaf that keeps all its features unscaled computes with its own weights: nothing to copy, nothing to scatter.
    whole = len(units) == site.units
    gathered_leaves = [leaf for leaf in site.leaves if not whole or (leaf.role == "out" and gate is not None)]
    tensors: list[Tensor] = []
    indices: list[Tensor] = []
    scales: list[Tensor | None] = []
    dims: list[int] = []
    for leaf in gathered_leaves:
        module = leaf_module(model, leaf)
        features = leaf.features(units).to(module.weight.device)
        tensors.append(module.weight)
        indices.append(features)
        dims.append(leaf.weight_dim)
        scales.append(None)
        if leaf.role == "out" and gate is not None:
            wide = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
            scales[-1] = gate.to(wide).repeat_interleave(leaf.features_per_unit)
        if leaf.role != "out" and module.bias is not None:
            tensors.append(module.bias)
            indices.append(features)
            dims.append(0)
            scales.append(None)
    gathered = iter(ops.gather_rows(tensors, indices, scales, dims) if tensors else ())
    result: dict[str, tuple[Tensor, Tensor | None]] = {}
    for leaf in site.leaves:
        module = leaf_module(model, leaf)
        weight, bias = module.weight, module.bias
        if leaf in gathered_leaves:
            weight = next(gathered)
            if leaf.role != "out" and bias is not None:
                bias = next(gathered)
        result[leaf.name] = (weight, bias)
    return result


def patch_leaf(module: nn.Linear | Conv1D) -> None:
    """Gives a leaf a binding and the forward that honours it."""
    module.__dict__["_ppnet_binding"] = binding = Binding()
    linear = isinstance(module, nn.Linear)
    binding.features = module.weight.shape[0 if linear else 1]
    module.__dict__["forward"] = MethodType(linear_forward if linear else conv1d_forward, module)


def unpatch_leaf(module: nn.Linear | Conv1D) -> None:
    module.__dict__.pop("_ppnet_binding", None)
    module.__dict__.pop("forward", None)
