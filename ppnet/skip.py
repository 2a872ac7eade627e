"""Skip what is masked: kept rows gathered into contiguous weights, the upstream forward run on fewer units.

`Engine` is attached to a wrapped model. Before each root forward it decides what the pass is (dense, one draw, or a
fixed size), gathers the kept rows and columns of every leaf with the gates folded in, and binds them to the leaf
modules; the model's own forward then runs on smaller matrices. Gradients of kept units come back through the gather
(scattered rows, and a row dot for the gate). The straight-through gradient of dropped units is computed in the backward
pass of each sub-layer from a random part of the tokens (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ppnet import ops
from ppnet.gates.draw import Draw
from ppnet.gates.puppet import Puppet
from ppnet.plan import Plan
from ppnet.straight_through import DroppedUnits, StraightThrough
from ppnet.units import Leaf, Site, leaf_module

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


@dataclass
class SitePass:
    """What one pass does at one site.

    Attributes:
        computed: sorted indices of the units that are computed: the kept ones, and a few with gate 0 for alignment.
        gate: ``(C,)`` gates of the computed units, or None when all are 1.
        dropped: the other units and their gates, or None when there are none or no gradient is wanted.
        input_scale: ``(D,)`` or None.
    """

    computed: Tensor
    gate: Tensor | None
    dropped: DroppedUnits | None
    input_scale: Tensor | None


@dataclass
class Engine:
    """Decides what a pass computes and binds the leaves accordingly."""

    model: nn.Module
    puppet: Puppet
    fixed: Plan | None = None
    force_dense: bool = False
    stale: bool = True
    active: list[SitePass | None] = field(default_factory=list)
    bound: bool = False
    versions: tuple[tuple[int, int], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        import copy

        clone = Engine(copy.deepcopy(self.model, memo), copy.deepcopy(self.puppet, memo), self.fixed)
        clone.active = [None] * len(self.puppet.structure.sites)
        clone.stale = True
        return clone

    def __post_init__(self) -> None:
        self.sites = self.puppet.structure.sites
        self.active = [None] * len(self.sites)
        self.offsets = self.puppet.structure.offsets()

    # ---- one pass ------------------------------------------------------------------------------------------------

    def before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Root forward pre-hook. A frozen size that is already bound costs nothing and is visible to torch.compile."""
        if self.up_to_date():
            return
        self.prepare()

    def up_to_date(self) -> bool:
        if self.stale or self.force_dense or self.model.training:
            return False
        if self.fixed is None:
            return not self.bound
        return self.bound and (torch.compiler.is_compiling() or self.versions == self.puppet.weight_versions())

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Root forward hook: training weights live in the autograd graph; checkpointing alone needs them again."""
        if self.model.training and self.bound and not self._checkpointing():
            self.release()

    def _checkpointing(self) -> bool:
        # transformers renamed the property in 5.2x; both spellings are within the supported range.
        new = getattr(self.model, "is_activation_checkpointing", None)
        return bool(getattr(self.model, "is_gradient_checkpointing", False) if new is None else new)

    @torch.compiler.disable
    def prepare(self) -> None:
        """Binds every leaf for the coming pass."""
        if self.force_dense or (self.fixed is None and not self.model.training):
            self.release()
            self.stale = False
            return
        if self.fixed is None:
            self._bind_draw(self.puppet.draw())
            self.stale = True
        elif self.model.training and torch.is_grad_enabled():
            self._bind_fixed(self.fixed)
            self.stale = True
        else:
            with torch.no_grad():
                self._bind_fixed(self.fixed)
            self.stale = False
            self.versions = self.puppet.weight_versions()
        self.bound = True

    def release(self) -> None:
        """Every leaf computes with its own weights again."""
        for index, site in enumerate(self.sites):
            self.active[index] = None
            for leaf in site.leaves:
                self.binding(leaf).set(None, None)
            self.set_attributes(site, site.units)
        self.bound = False

    def fix(self, plan: Plan | None) -> None:
        """Sets the size of the coming passes: a plan, or None for dense in evaluation and draws in training."""
        self.fixed = plan
        self.stale = True

    def binding(self, leaf: Leaf) -> Binding:
        gated = cast(GatedLeaf, leaf_module(self.model, leaf))
        return gated._ppnet_binding

    def set_attributes(self, site: Site, units: int) -> None:
        block = self.model.get_submodule(site.block)
        for name, value in site.attributes(units).items():
            setattr(block, name, value)

    # ---- binding -------------------------------------------------------------------------------------------------

    def _bind_draw(self, draw: Draw) -> None:
        if draw.gate is None and draw.input_scale is None:
            self.release()
            return
        gate_grad = torch.is_grad_enabled() and draw.gate is not None and draw.gate.requires_grad
        align = self.puppet.config.align
        gates = None if draw.gate is None else draw.gate.split([site.units for site in self.sites])
        for index, site in enumerate(self.sites):
            start, stop = self.offsets[index], self.offsets[index + 1]
            mask = torch.ones(site.units, dtype=torch.bool) if draw.mask is None else draw.mask[start:stop].clone()
            if site.kind == "neuron" and gates is not None and not mask.all():
                self._pad(mask, align)
            computed = mask.nonzero().flatten()
            gate = None if gates is None else gates[index]
            dropped = None
            if gate is not None and gate_grad and len(computed) < site.units:
                rest = (~mask).nonzero().flatten()
                dropped = DroppedUnits(self, index, rest, gate[rest.to(gate.device)], f"{draw.number}/{index}")
            self._bind(
                index,
                SitePass(
                    computed=computed,
                    gate=None if gate is None else gate[computed.to(gate.device)],
                    dropped=dropped,
                    input_scale=self._input_scale(index, draw.input_scale),
                ),
            )

    @staticmethod
    def _pad(mask: Tensor, align: int) -> None:
        """Adds dropped units (their gate is 0, so the result is the same) until the count is a multiple of `align`."""
        missing = -int(mask.sum()) % align
        if missing:
            mask[(~mask).nonzero().flatten()[:missing]] = True

    def _input_scale(self, index: int, scale: Tensor | None) -> Tensor | None:
        if scale is None or self.sites[index].kind != "neuron":
            return None
        return scale[self.puppet.mlp_sites.index(index)]

    def _bind_fixed(self, plan: Plan) -> None:
        for index, (site, (out, inputs)) in enumerate(zip(self.sites, self.puppet.scales(plan.u), strict=True)):
            computed = torch.tensor(plan.kept[site.name])
            gate = None if out is None else out[computed.to(out.device)]
            if len(computed) == site.units and gate is None and inputs is None:
                self._unbind(index)
            else:
                self._bind(index, SitePass(computed, gate, None, inputs))

    def _unbind(self, index: int) -> None:
        site = self.sites[index]
        self.active[index] = None
        for leaf in site.leaves:
            self.binding(leaf).set(None, None)
        self.set_attributes(site, site.units)

    def _bind(self, index: int, site_pass: SitePass) -> None:
        site = self.sites[index]
        self.active[index] = site_pass
        bound = gather_site(self.model, site, site_pass.computed, site_pass.gate)
        for leaf in site.leaves:
            self.binding(leaf).set(*bound[leaf.name])
        self.set_attributes(site, len(site_pass.computed))

    # ---- sub-layer hooks -----------------------------------------------------------------------------------------

    def scale_input(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sub-layer pre-hook: multiplies the sub-layer's input by f^in."""
        site_pass = self.active[index]
        if site_pass is None or site_pass.input_scale is None:
            return None
        x = sub_layer_input(args, kwargs)
        return with_sub_layer_input(args, kwargs, x * site_pass.input_scale.to(x.dtype))

    def attach_dropped(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Sub-layer hook: adds the node whose backward estimates the gate gradient of the dropped units."""
        site_pass = self.active[index]
        if site_pass is None or site_pass.dropped is None or not torch.is_grad_enabled():
            return None
        y = output[0] if isinstance(output, tuple) else output
        y = straight_through(y, site_pass.dropped, args, kwargs)
        return (y, *output[1:]) if isinstance(output, tuple) else y


@torch.compiler.disable
def straight_through(y: Tensor, dropped: DroppedUnits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return StraightThrough.apply(y, dropped.gate, sub_layer_input(args, kwargs), dropped, args[1:], kwargs)


def sub_layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def with_sub_layer_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[Any, dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


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
