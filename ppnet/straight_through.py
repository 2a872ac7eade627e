"""The straight-through gradient of dropped units.

m~ = m + (rho - sg rho) gives a dropped unit the gate gradient of its own output, dz_u = sum_t <a_tu W_out[u], dy_t>,
which needs outputs that a skipping forward never computed. Dropping that gradient collapses training (DESIGN section
3), so it is computed in the backward pass, either on all tokens (`"exact"`) or, unbiased, on a random part of them,
weighted by the inverse of that part (`"sampled"`): whole sequences for KV groups, whose outputs depend on all earlier
tokens, and single tokens for neurons. No weight gradient is needed there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppnet import ops
from ppnet.binding import across_of, gather_site
from ppnet.gates.draw import generator
from ppnet.units import Leaf, Site, leaf_module

if TYPE_CHECKING:
    from ppnet.skip import Engine


# What attentions call the cache, which a second run must not add to.
CACHES = ("past_key_values", "layer_past")


@dataclass
class DroppedUnits:
    """What a pass does not compute at site `index`: unit indices ``(K,)`` and gates ``(K,)`` (value 0, with graph)."""

    engine: Engine
    index: int
    units: Tensor
    gate: Tensor
    draw: str

    @property
    def site(self) -> Site:
        return self.engine.sites[self.index]


class StraightThrough(torch.autograd.Function):
    """Identity on a sub-layer's output whose backward also yields the gate gradient of its dropped units."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gate: Tensor,
        x: Tensor,
        dropped: DroppedUnits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """y: (B, T, D) output and x: (B, T, D) input of the sub-layer; gate: (K,) gates of its dropped units."""
        ctx.save_for_backward(x)
        ctx.dropped, ctx.args, ctx.kwargs = dropped, args, kwargs
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        (x,) = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        dgate = None
        if ctx.needs_input_grad[1]:
            with torch.no_grad(), torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
                dgate = dropped_gate_gradient(ctx.dropped, x, dy, ctx.args, ctx.kwargs)
        return dy, dgate, None, None, None, None


def dropped_gate_gradient(
    dropped: DroppedUnits, x: Tensor, dy: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """dz of dropped units: ``(K,)`` float32, unbiased under `gate_gradient="sampled"`, exact under ``"exact"``.

    Args:
        x, dy: ``(B, T, D)`` input of the sub-layer and gradient of its output.
        args, kwargs: the sub-layer's further forward arguments.
    """
    site, config = dropped.site, dropped.engine.puppet.config
    fraction = 1.0 if config.gate_gradient == "exact" else config.sampled_fraction
    source = generator(config.seed, 0, f"tokens/{dropped.draw}")
    if site.kind == "neuron":
        x, dy = x.reshape(1, -1, x.shape[-1]), dy.reshape(1, -1, dy.shape[-1])
        picked, weight = _sample_tokens(x.shape[1], fraction, source)
        if picked is not None:
            picked = picked.to(x.device)
            x, dy = x.index_select(1, picked), dy.index_select(1, picked)
    else:
        picked, weight = _sample_sequences(x.shape[0], fraction, source)
        if picked is not None:
            if len(picked) == 0:
                return torch.zeros_like(dropped.gate)
            batch, picked = x.shape[0], picked.to(x.device)
            x, dy = x.index_select(0, picked), dy.index_select(0, picked)
            args = tuple(_pick(value, picked, batch) for value in args)
            kwargs = {name: _pick(value, picked, batch) for name, value in kwargs.items()}
        kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
    outputs, columns = _unit_outputs(dropped, x, args, kwargs)
    dunits = ops.linear(dy, columns.t())
    products = (outputs.float() * dunits.float()).flatten(0, -2).sum(dim=0)
    return products.view(len(dropped.units), -1).sum(dim=1) * weight


def _sample_tokens(tokens: int, fraction: float, source: torch.Generator) -> tuple[Tensor | None, float]:
    """Token indices without replacement, and the weight that makes their sum unbiased. None: all tokens."""
    count = max(1, round(tokens * fraction))
    if count >= tokens:
        return None, 1.0
    return torch.randperm(tokens, generator=source)[:count].sort().values, tokens / count


def _sample_sequences(batch: int, fraction: float, source: torch.Generator) -> tuple[Tensor | None, float]:
    """Sequence indices; when batch * fraction is no whole number it is rounded at random, so that the mean is right."""
    if fraction >= 1.0:
        return None, 1.0
    expected = batch * fraction
    count = math.floor(expected) + int(float(torch.rand((), generator=source)) < expected - math.floor(expected))
    return torch.randperm(batch, generator=source)[:count].sort().values, 1.0 / fraction


def _pick(value: Any, picked: Tensor, batch: int) -> Any:
    """Restricts a forward argument to some sequences: tensors with a batch axis, also inside tuples."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch and batch > 1:
        return value.index_select(0, picked.to(value.device))
    if isinstance(value, tuple | list):
        return type(value)(_pick(item, picked, batch) for item in value)
    return value


def _mean_square(dropped: DroppedUnits, norm: Leaf, x: Tensor) -> Tensor:
    """What a norm over all units divides by the root of: of the kept units, as dropped ones do not count: (B, T, 1)."""
    engine, site = dropped.engine, dropped.site
    leaf = site.producer(norm.role.removesuffix("_norm"))
    assert leaf is not None
    kept = torch.ones(site.units, dtype=torch.bool)
    kept[dropped.units] = False
    module = leaf_module(engine.model, leaf)
    features = leaf.features(kept.nonzero().flatten()).to(x.device)
    bias = None if module.bias is None else module.bias.index_select(0, features)
    made = ops.linear(x, module.weight.index_select(leaf.weight_dim, features), bias)
    return made.float().square().sum(-1, keepdim=True) / norm.index.numel()


def _unit_outputs(
    dropped: DroppedUnits, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The sub-layer's own forward on the dropped units: (their outputs ``(B, T, K * r)``, columns ``(D, K * r)``)."""
    engine, site = dropped.engine, dropped.site
    weights = gather_site(engine.model, site, dropped.units, None)
    bindings = [engine.binding(leaf) for leaf in site.leaves]
    saved = [(binding, binding.bound()) for binding in bindings]
    computed = engine.active[dropped.index]
    consumer = engine.binding(site.consumer)
    captured: list[Tensor] = []
    block = engine.model.get_submodule(site.block)
    try:
        for leaf in site.producers:
            engine.binding(leaf).set(*weights[leaf.name])
        for norm in site.across:
            across_of(engine.model, norm).set(norm, dropped.units, _mean_square(dropped, norm, x))
        consumer.capture = captured
        engine.set_attributes(site, len(dropped.units))
        # The forward itself, not __call__: the hooks of the gated pass must not run here.
        output = block.forward(x, *args, **{name: value for name, value in kwargs.items() if name != "hidden_states"})
        if not site.holds_consumer:
            captured.append(site.entering(engine.model, output))
    finally:
        consumer.capture = None
        for binding, bound in saved:
            binding.set(*bound)
        for norm in site.across:
            across_of(engine.model, norm).set(norm, None if computed is None else computed.computed)
        engine.set_attributes(site, site.units if computed is None else len(computed.computed))
    columns = weights[site.consumer.name][0]
    return captured[0], columns if site.consumer.weight_dim == 1 else columns.t()
