"""Skip what is masked: kept rows gathered into contiguous weights, the upstream forward run on fewer units.

`Engine` is attached to a wrapped model. Before each root forward it decides what the pass is (dense, one draw, or a
fixed size), gathers the kept rows and columns of every leaf with the gates folded in, and binds them to the leaf
modules; the model's own forward then runs on smaller matrices. Gradients of kept units come back through the gather
(scattered rows, and a row dot for the gate). The straight-through gradient of dropped units is computed in the backward
pass of each sub-layer from a random part of the tokens (`ppnet.straight_through`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ppnet.binding import Binding, GatedLeaf, across_of, feature_gate, gather_site, view_site
from ppnet.decode import Kept
from ppnet.errors import TrainingError
from ppnet.gates.draw import Draw
from ppnet.gates.puppet import Puppet
from ppnet.plan import Plan
from ppnet.straight_through import DroppedUnits, StraightThrough
from ppnet.units import Leaf, Site, leaf_module


@dataclass
class SitePass:
    """What one pass does at one site.

    Attributes:
        computed: sorted indices of the units that are computed: the kept ones, and a few with gate 0 for alignment.
        gate: ``(C,)`` gates of the computed units, or None when all are 1.
        dropped: the other units and their gates, or None when there are none or no gradient is wanted.
        input_scale: ``(D,)`` or None.
        prefix: whether the computed units are the first ones of the site.
    """

    computed: Tensor
    gate: Tensor | None
    dropped: DroppedUnits | None
    input_scale: Tensor | None
    prefix: bool = False


class PendingBackward:
    """A checkpointed pass whose backward has not run yet; dies with its autograd graph."""

    __slots__ = ("__weakref__", "done")

    def __init__(self) -> None:
        self.done = False


@dataclass
class Engine:
    """Decides what a pass computes and binds the leaves accordingly.

    Attributes:
        fixed: the size set by `ppnet.resize`, or None.
        force_dense: passes are lambda = 0 passes, whatever the size and the mode.
        bypass: passes are the plain model's, without any gate or amplitude.
        by_index: without gradients, a size is computed from the whole weights through indices (`ppnet.accelerate`).
        stale: what is bound may not be what the next pass needs.
        calls: how the sub-layers were called whose output is another module's, from one to the other.
    """

    model: nn.Module
    puppet: Puppet
    fixed: Plan | None = None
    force_dense: bool = False
    bypass: bool = False
    by_index: bool = False
    stale: bool = True
    active: list[SitePass | None] = field(default_factory=list)
    bound: bool = False
    versions: tuple[tuple[int, int], ...] = ()
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    pending: weakref.ref[PendingBackward] | None = None
    watch: RemovableHandle | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        import copy

        model, puppet = copy.deepcopy(self.model, memo), copy.deepcopy(self.puppet, memo)
        # The copy of the puppet may not be complete yet, if it is on the way to the hook that led here.
        return Engine(model, puppet, self.fixed, by_index=self.by_index, active=[None] * len(self.sites))

    def __post_init__(self) -> None:
        self.active = self.active or [None] * len(self.sites)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.puppet.structure.sites

    # ---- one pass ------------------------------------------------------------------------------------------------

    def before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Root forward pre-hook. What is bound already stays bound, and is then visible to torch.compile."""
        if not self.up_to_date():
            self.prepare()

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Root forward hook: weights with a graph live on in that graph; checkpointing alone needs them bound."""
        if self.bound and torch.is_grad_enabled() and self.stale and not self._checkpointing():
            self.release()

    def up_to_date(self) -> bool:
        """Whether the coming pass may use what is bound."""
        if self.stale or self.force_dense or self.bypass or self._draws():
            return False
        if self.fixed is None and self.puppet.dense_is_plain:
            return not self.bound
        if torch.is_grad_enabled():
            return False
        return self.bound and (torch.compiler.is_compiling() or self.versions == self.puppet.weight_versions())

    def _draws(self) -> bool:
        """Masks are drawn where something learns from them: training mode with gradients, and no size set."""
        return self.fixed is None and self.model.training and torch.is_grad_enabled()

    def _checkpointing(self) -> bool:
        # transformers renamed the property in 5.2x; both spellings are within the supported range.
        new = getattr(self.model, "is_activation_checkpointing", None)
        return bool(getattr(self.model, "is_gradient_checkpointing", False) if new is None else new)

    @torch.compiler.disable
    def prepare(self) -> None:
        """Binds every leaf for the coming pass.

        Raises:
            TrainingError: activation checkpointing has yet to recompute an earlier pass with what is bound now, or is
                of the re-entrant kind.
        """
        learns = torch.is_grad_enabled()
        if self._checkpointing():
            self._check_checkpointing(learns)
        self.stale = True
        if self.bypass:
            self.release()
        elif self._draws() and not self.force_dense:
            self._bind_draw(self.puppet.draw())
        elif (self.fixed is None or self.force_dense) and self.puppet.dense_is_plain:
            self.release()
            self.stale = False
        elif learns:
            self._bind_size(None if self.force_dense else self.fixed)
        else:
            # Normal tensors also under inference_mode: what is bound here outlives the pass.
            with torch.inference_mode(False), torch.no_grad():
                self._bind_size(None if self.force_dense else self.fixed)
            self.stale = self.force_dense
            self.versions = self.puppet.weight_versions()

    def _check_checkpointing(self, learns: bool) -> None:
        if self.watch is not None:
            # The pass before never reached its embeddings: it failed, or was given inputs_embeds.
            self.watch.remove()
            self.watch = self.pending = None
        layer = self.model.get_submodule(self.sites[0].block.rpartition(".")[0])
        options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", None) or {}
        if options.get("use_reentrant"):
            raise TrainingError(
                "gradient_checkpointing_kwargs: use_reentrant=True does not work with gates (their graph would be run "
                "through once per layer); use {'use_reentrant': False}."
            )
        waiting = None if self.pending is None else self.pending()
        if waiting is not None and not waiting.done:
            raise TrainingError(
                "forward: a second forward before the backward of the first, under activation checkpointing, would "
                "recompute the first with the wrong units. Call backward first, run the other forward before, or turn "
                "activation checkpointing off."
            )
        if learns and self.model.training:
            self._watch_backward()

    def _watch_backward(self) -> None:
        """Marks this pass as pending until the gradient of its embeddings, the last one of a backward, arrives."""
        token = PendingBackward()
        self.pending = weakref.ref(token)

        def finished(gradient: Tensor) -> None:
            token.done = True

        def embedded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.watch is not None:
                self.watch.remove()
                self.watch = None
            if output.requires_grad:
                output.register_hook(finished)

        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        self.watch = embeddings.register_forward_hook(embedded)

    def release(self) -> None:
        """Every leaf computes with its own weights again."""
        for index in range(len(self.sites)):
            self._unbind(index)
        self.bound = False

    def fix(self, plan: Plan | None) -> None:
        """Sets the size of the coming passes: a plan, or None for dense in evaluation and draws in training.

        Raises:
            PlanError: a plan for another order of the units.
        """
        if plan is not None:
            plan.check_order(self.puppet.structure)
        before, self.fixed = self.fixed, plan
        self.stale = True
        if self.model.training:
            return
        try:
            # At once, so that sub-modules called directly are of this size too.
            with torch.no_grad():
                self.prepare()
        except BaseException:
            self.fixed = before
            raise

    def binding(self, leaf: Leaf) -> Binding:
        gated = cast(GatedLeaf, leaf_module(self.model, leaf))
        return gated._ppnet_binding

    def set_attributes(self, site: Site, units: int) -> None:
        site.set_attributes(self.model, units)

    # ---- binding -------------------------------------------------------------------------------------------------

    def _bind_draw(self, draw: Draw) -> None:
        if draw.gate is None and draw.input_scale is None:
            self.release()
            return
        gate_grad = torch.is_grad_enabled() and draw.gate is not None and draw.gate.requires_grad
        align = self.puppet.config.align
        units = [site.units for site in self.sites]
        gates = None if draw.gate is None else draw.gate.split(units)
        masks = (torch.ones(sum(units), dtype=torch.bool) if draw.mask is None else draw.mask.clone()).split(units)
        for index, (site, mask) in enumerate(zip(self.sites, masks, strict=True)):
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
        self.bound = True

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

    def _bind_size(self, plan: Plan | None) -> None:
        """Binds a plan, or (None) every unit with the amplitudes of lambda = 0."""
        for index, (site, (out, inputs)) in enumerate(
            zip(self.sites, self.puppet.scales(0.0 if plan is None else plan.u), strict=True)
        ):
            first = site.units if plan is None else plan.prefix(site.name)
            if plan is None or first is not None:
                computed, gate = torch.arange(first or 0), None if out is None else out[:first]
            else:
                computed = torch.tensor(plan.kept[site.name])
                gate = None if out is None else out[computed.to(out.device)]
            if len(computed) == site.units and gate is None and inputs is None:
                self._unbind(index)
            else:
                self._bind(index, SitePass(computed, gate, None, inputs, first is not None))
        self.bound = True

    def _unbind(self, index: int) -> None:
        site = self.sites[index]
        self.active[index] = None
        for leaf in site.leaves:
            self.binding(leaf).set(None, None)
        for norm in site.across:
            across_of(self.model, norm).set(norm, None)
        self.set_attributes(site, site.units)

    def _bind(self, index: int, site_pass: SitePass) -> None:
        site, learns = self.sites[index], torch.is_grad_enabled()
        self.active[index] = site_pass
        units = len(site_pass.computed)
        if self._fused(site) if learns else self.by_index:
            for leaf in site.leaves:
                self.binding(leaf).set(None, None, self._kept(leaf, site_pass))
        else:
            # Where something learns, one gather brings back the gates' gradients, too.
            views = view_site(self.model, site, units, site_pass.gate) if site_pass.prefix and not learns else None
            bound = gather_site(self.model, site, site_pass.computed, site_pass.gate) if views is None else views
            for leaf in site.leaves:
                self.binding(leaf).set(*bound[leaf.name])
        for norm in site.across:
            across_of(self.model, norm).set(norm, site_pass.computed)
        self.set_attributes(site, units)

    def _kept(self, leaf: Leaf, site_pass: SitePass) -> Kept:
        weight = leaf_module(self.model, leaf).weight
        return Kept(leaf.features(site_pass.computed).to(weight.device), feature_gate(leaf, weight, site_pass.gate))

    def _fused(self, site: Site) -> bool:
        """Whether a site is computed by `gated_mlp`, which gathers what it needs and remembers no weights."""
        block = self.model.get_submodule(site.block)
        return "_ppnet_mlp" in block.__dict__ and leaf_module(self.model, site.consumer).weight.device.type == "cpu"

    # ---- sub-layer hooks -----------------------------------------------------------------------------------------

    def scale_input(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sub-layer pre-hook: multiplies the sub-layer's input by f^in."""
        site_pass, site = self.active[index], self.sites[index]
        if site_pass is None:
            return None
        scaled = None
        if site_pass.input_scale is not None:
            x = sub_layer_input(args, kwargs)
            scaled = with_sub_layer_input(args, kwargs, x * site_pass.input_scale.to(x.dtype))
        if site.output != site.block and site_pass.dropped is not None and torch.is_grad_enabled():
            self.calls[index] = scaled or (args, kwargs)
        return scaled

    def attach_dropped(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook on a sub-layer's output: adds the node whose backward estimates the gate gradient of dropped units."""
        site_pass, site = self.active[index], self.sites[index]
        if site_pass is None or site_pass.dropped is None or not torch.is_grad_enabled():
            return None
        if site.output != site.block:
            args, kwargs = self.calls.pop(index)
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
