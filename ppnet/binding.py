"""What a leaf computes with: its own weights, or weights gathered for some units."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ppnet import ops
from ppnet.attention import register_attention
from ppnet.decode import Kept, linear
from ppnet.modes import transformed
from ppnet.units import Leaf, Site, leaf_module

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class Binding:
    """What a leaf computes with: its own weights (`weight` None), or bound ones; `capture` collects its input instead.

    Not part of the module's state: a deep copy starts unbound (bound tensors carry autograd graphs).

    Attributes:
        weight, bias: bound in place of the leaf's own; with one axis more, the blocks of a fused producer.
        scale: ``(K,)`` factors of the leaf's input, float32 or float64, where they are not folded into `weight`.
        kept: with its own weights: the features that are computed, or None for all.
        decode: whether the leaf's own weights go through the decode operators where these apply.
        by_input: whether the units are inputs of the leaf.
        features: dense number of features of the leaf's output.
    """

    __slots__ = ("bias", "by_input", "capture", "decode", "features", "kept", "scale", "weight")

    def __init__(self, features: int, by_input: bool) -> None:
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.kept: Kept | None = None
        self.scale: Tensor | None = None
        self.features, self.by_input = features, by_input
        self.decode = False
        self.capture: list[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        clone = Binding(self.features, self.by_input)
        clone.decode = self.decode
        return clone

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():
            setattr(self, name, value)
        register_attention()  # the config of a pickled model names it, and this may be another process

    @property
    def overrides(self) -> bool:
        """Whether the leaf does something else than a product with its own weights."""
        return self.weight is not None or self.capture is not None

    def set(
        self, weight: Tensor | None, bias: Tensor | None, kept: Kept | None = None, scale: Tensor | None = None
    ) -> None:
        self.weight, self.bias, self.kept, self.scale = weight, bias, kept, scale

    def bound(self) -> tuple[Tensor | None, Tensor | None, Kept | None, Tensor | None]:
        """What `set` was given."""
        return self.weight, self.bias, self.kept, self.scale

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The leaf's output for a weight ``(out, in)`` and bias, or for blocks ``(blocks, out, in)`` of such."""
        if self.capture is not None:
            self.capture.append(input)
            return input.new_zeros((*input.shape[:-1], self.features))
        if weight.dim() == 3:
            biases = [None] * len(weight) if bias is None else bias.unbind()
            return torch.cat([self.run(input, w, b) for w, b in zip(weight.unbind(), biases, strict=True)], dim=-1)
        if self.scale is not None:
            input = (input * self.scale).to(input.dtype)  # rounded once, as weights are that it is folded into
        if transformed() and self.kept is None:
            return nn.functional.linear(input, weight, bias)
        if self.decode and self.weight is None:
            return linear(input, weight, bias, self.by_input, self.kept)
        if self.weight is None and not torch.is_grad_enabled():
            return nn.functional.linear(input, weight, bias)  # dense evaluation is the model's own, to the bit
        return ops.linear(input, weight, bias)


class GatedLeaf(Protocol):
    """A patched `nn.Linear` or `Conv1D`."""

    weight: Tensor
    bias: Tensor | None
    _ppnet_binding: Binding


def linear_forward(self: GatedLeaf, input: Tensor) -> Tensor:
    """Forward of a patched `nn.Linear`: the bound weights when there are any."""
    binding = self._ppnet_binding
    if binding.weight is None:
        return binding.run(input, self.weight, self.bias)
    return binding.run(input, binding.weight, binding.bias)


def conv1d_forward(self: GatedLeaf, input: Tensor) -> Tensor:
    """Forward of a patched transformers `Conv1D`, whose weight is (in, out)."""
    binding = self._ppnet_binding
    if binding.weight is None:
        return binding.run(input, self.weight.t(), self.bias)
    return binding.run(input, binding.weight.mT, binding.bias)


def feature_gate(leaf: Leaf, weight: Tensor, gate: Tensor | None) -> Tensor | None:
    """The units' gates ``(K,)`` for each feature of a consumer, in the dtype of its arithmetic; None for a producer."""
    if leaf.role != "out" or gate is None:
        return None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return gate.to(wide).repeat_interleave(leaf.features_per_unit)


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
        scales.append(feature_gate(leaf, module.weight, gate))
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


Bound = tuple[Tensor, Tensor | None, None, Tensor | None]


def view_site(model: nn.Module, site: Site, units: int, gate: Tensor | None) -> dict[str, Bound] | None:
    """Weights and biases of a site's first units, as views: leaf name -> arguments of `Binding.set`. No gradients.

    Args:
        units: K, how many.
        gate: ``(K,)`` factors of the units' outputs, which then scale what enters the consumer; None: 1.

    Returns:
        None where the units of a leaf do not follow one another, so that no view holds the first ones.
    """
    if not all(leaf.consecutive for leaf in site.leaves):
        return None
    result: dict[str, Bound] = {}
    for leaf in site.leaves:
        module = leaf_module(model, leaf)
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if units < site.units:
            weight = _first(weight, leaf, leaf.weight_dim, units)
            bias = bias if bias is None or leaf.role == "out" else _first(bias, leaf, 0, units)
        result[leaf.name] = (weight, bias, None, feature_gate(leaf, weight, gate))
    return result


def _first(tensor: Tensor, leaf: Leaf, dim: int, units: int) -> Tensor:
    """The first units' features along `dim`: a view, with the blocks of a fused producer as its first axis."""
    blocks = len(leaf.blocks)
    features = units * leaf.features_per_unit // blocks
    if blocks == 1:
        return tensor.narrow(dim, 0, features)
    return tensor.unflatten(dim, (blocks, -1)).narrow(dim + 1, 0, features).movedim(dim, 0)


# ---- norms over all units --------------------------------------------------------------------------------------------


class Across:
    """Which features a norm over all units is given in a pass, of its own order: None for all.

    Attributes:
        eps: of the norm, with all units.
        mean_square: ``(..., 1)``, what to divide by the root of instead of the given features' own.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.features: Tensor | None = None
        self.mean_square: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Across:
        return Across(self.eps)

    def set(self, norm: Leaf, units: Tensor | None, mean_square: Tensor | None = None) -> None:
        self.features = None if units is None or len(units) == len(norm.index) else norm.features(units)
        self.mean_square = mean_square


def across_forward(self: Any, x: Tensor) -> Tensor:
    """Forward of a patched RMSNorm over all units, of which some are given: the others are zeros in its mean square."""
    part: Across = self._ppnet_across
    if part.features is None and part.mean_square is None:
        return type(self).forward(self, x)
    weight = self.weight if part.features is None else self.weight.index_select(0, part.features.to(x.device))
    wide = x.float()
    mean_square = part.mean_square
    if mean_square is None:
        mean_square = wide.square().sum(-1, keepdim=True) / len(self.weight)
    return (weight * (wide * torch.rsqrt(mean_square + part.eps))).to(x.dtype)


def across_of(model: nn.Module, norm: Leaf) -> Across:
    return cast(Any, model.get_submodule(norm.name))._ppnet_across


def patch_across(module: Any) -> None:
    """Gives a norm over all units the forward that is told which of them it gets."""
    module.__dict__["_ppnet_across"] = Across(module.variance_epsilon)
    module.__dict__["forward"] = partial(across_forward, module)


def unpatch_across(module: nn.Module) -> None:
    module.__dict__.pop("_ppnet_across", None)
    module.__dict__.pop("forward", None)


# ---- leaves ----------------------------------------------------------------------------------------------------------


def patch_leaf(module: nn.Linear | Conv1D, by_input: bool) -> Binding:
    """Gives a linear module a binding and the forward that honours it."""
    linear_module = isinstance(module, nn.Linear)
    binding = Binding(module.weight.shape[0 if linear_module else 1], by_input)
    module.__dict__["_ppnet_binding"] = binding
    forward: Any = linear_forward if linear_module else conv1d_forward
    module.__dict__["forward"] = partial(forward, module)  # not a method: it would not survive pickling
    return binding


def unpatch_leaf(module: nn.Linear | Conv1D) -> None:
    module.__dict__.pop("_ppnet_binding", None)
    module.__dict__.pop("forward", None)
