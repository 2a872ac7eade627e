"""Sorting: every layer's units in the order in which they leave, so that each size is a prefix of the weights.

A permutation of KV groups and of neurons moves rows of the producers, columns of the consumer, and the gates' numbers
of the units; the function stays. What a sorted model keeps at a size are the first units of every site, `W[:K]`: a
view, where the units of an unsorted one have to be gathered (`ppnet.binding.view_site`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppnet.errors import PlanError, UnsupportedModelError
from ppnet.families import structure_of
from ppnet.size import unit_keys
from ppnet.units import ORDER, Site, Structure, leaf_module
from ppnet.wrap import engine_of, is_wrapped, structure_for

Model = TypeVar("Model", bound=nn.Module)

# Sums over units round in another way once these have moved, and gates then may rank nearly equal units the other way
# round. One more round settles that.
ROUNDS = 4


@torch.no_grad()
def sort_(model: Model, scores: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> Model:
    """Puts the units of every layer into the order in which they leave as the model gets smaller, in place.

    The model computes the same, up to the order in which output projections and attention add their products up: each
    neuron and each head is what it was, to the bit where matrix products do not depend on a row's place. What
    `ppnet.plan` keeps of it by the same ranking are the first units of every site, so that `ppnet.resize` in
    evaluation binds views of the weights: nothing is copied. Weights, names and shapes stay an ordinary model's.
    ``config.ppnet_order`` says which order it is; plans and `ppnet.Scores` that were made before are then refused.

    Sort after training or before it, not in between: the state of an optimizer knows units by their place. A model
    that is `ppnet.accelerate`\\ d can be sorted as it is.

    Args:
        model: with gates, whose order it is, or a dense model, which needs `scores`.
        scores: what ranks the units instead, as in `ppnet.plan`. Afterwards ``scores="position"`` ranks them as sorted.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: an unknown family, adapters, quantised, already compacted to layers of different widths,
            without its weights, or with one weight in several layers. The model is unchanged then.
        PlanError: a size is set (`ppnet.resize`); neither gates nor `scores`, or some that `ppnet.plan` refuses.
    """
    structure = _sortable(model)
    for _ in range(ROUNDS if scores is None else 1):
        keys, _ = unit_keys(model, structure, scores)
        orders = [torch.argsort(key, descending=True, stable=True) for key in keys]
        if all(torch.equal(order, torch.arange(len(order))) for order in orders):
            break
        structure = _permute(model, structure, orders)
    if is_wrapped(model):
        engine_of(model).fix(None)
    return model


def _sortable(model: nn.Module) -> Structure:
    """The sites of a model whose units may be moved. Raises UnsupportedModelError, PlanError."""
    structure_of(model)  # gates may have been attached before a module was replaced
    structure = structure_for(model)
    if is_wrapped(model) and engine_of(model).fixed is not None:
        raise PlanError(
            "model: a size is set (ppnet.resize), whose plan names units by their place; call ppnet.resize(model, "
            "None) first, and make new plans once the model is sorted."
        )
    seen: dict[int, str] = {}
    for leaf in (leaf for site in structure.sites for leaf in site.leaves):
        weight = leaf_module(model, leaf).weight
        if weight.is_meta:
            raise UnsupportedModelError(f"model: {leaf.name}.weight is on the meta device; load the weights first.")
        other = seen.setdefault(weight.data_ptr(), leaf.name)
        if other != leaf.name:
            raise UnsupportedModelError(
                f"model: {leaf.name} and {other} share one weight, whose units cannot be in two orders; give each "
                "layer its own (module.weight = nn.Parameter(module.weight.clone()))."
            )
    return structure


def _permute(model: Any, structure: Structure, orders: Sequence[Tensor]) -> Structure:
    """Puts unit ``order[i]`` of every site in the place of unit i; returns the structure with the new order's name."""
    digest = hashlib.blake2b(structure.order.encode(), digest_size=8)
    for order in orders:
        digest.update(order.numpy().tobytes())
    structure = replace(structure, order=digest.hexdigest())
    # First of all: should what follows be interrupted, no plan fits a model of which some layers are sorted.
    setattr(model.config, ORDER, structure.order)
    model.__dict__.pop("ppnet_plan", None)  # of an earlier compaction: what it says of units is no longer so
    per_unit: list[Tensor] = []
    if is_wrapped(model):
        model.puppet.structure = structure
        per_unit = model.puppet.per_unit()
    for site, start, order in zip(structure.sites, structure.offsets(), orders, strict=False):
        _permute_site(model, site, order, [numbers[start : start + site.units] for numbers in per_unit])
    return structure


def _permute_site(model: nn.Module, site: Site, order: Tensor, per_unit: Sequence[Tensor]) -> None:
    """Moves the units of one site, all or none, with their numbers ``(units,)`` of the gates."""
    places = torch.arange(site.units)
    moved = [(numbers, 0, places, order) for numbers in per_unit]
    for leaf in site.leaves:
        module = leaf_module(model, leaf)
        features = leaf.features(places), leaf.features(order)
        moved.append((module.weight, leaf.weight_dim, *features))
        if leaf.role != "out" and module.bias is not None:
            moved.append((module.bias, 0, *features))
    for norm in site.across:
        moved.append((leaf_module(model, norm).weight, 0, norm.features(places), norm.features(order)))
    new = [tensor.index_select(dim, source.to(tensor.device)) for tensor, dim, _, source in moved]
    for (tensor, dim, target, _), values in zip(moved, new, strict=True):
        tensor.index_copy_(dim, target.to(tensor.device), values)
