"""What of a model's parameters a plan keeps: shared by compaction in memory and from file to file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ppnet.plan import Plan
from ppnet.units import Structure, leaf_module

Scales = Sequence[tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Kept:
    """The part of a parameter that stays.

    Attributes:
        dim: the axis that features are taken of.
        features: int64 (K,), which ones, ascending.
        factors: axis -> what its entries are then multiplied by, float32: (K,) for `dim`.
    """

    dim: int
    features: Tensor
    factors: Mapping[int, Tensor] = field(default_factory=dict)


def kept_parts(model: nn.Module, structure: Structure, plan: Plan, scales: Scales) -> dict[str, Kept]:
    """Parameter name -> what stays of it, for all that belong to units; every other parameter stays whole.

    Args:
        scales: per site, what its units ``(U,)`` and its inputs ``(D,)`` are multiplied by, or None.
    """
    found: dict[str, Kept] = {}
    for site, (unit_scale, input_scale) in zip(structure.sites, scales, strict=True):
        units = torch.tensor(plan.kept[site.name])
        for leaf in site.leaves:
            features = leaf.features(units)
            factors: dict[int, Tensor] = {}
            if leaf is site.consumer:
                if unit_scale is not None:
                    factors[leaf.weight_dim] = unit_scale[leaf.owners(units).to(unit_scale.device)]
            else:
                if input_scale is not None:
                    factors[1 - leaf.weight_dim] = input_scale
                if leaf_module(model, leaf).bias is not None:
                    found[f"{leaf.name}.bias"] = Kept(0, features)
            found[f"{leaf.name}.weight"] = Kept(leaf.weight_dim, features, factors)
        for norm in site.across:
            # rsqrt(S / n + eps) = sqrt(k / n) rsqrt(S / k + eps n / k), of k kept features with the sum of squares S.
            larger = torch.full((len(units) * norm.features_per_unit,), math.sqrt(site.units / len(units)))
            factors = {0: larger} if len(units) < site.units else {}
            found[f"{norm.name}.weight"] = Kept(0, norm.features(units), factors)
    return found


def multiplied(kept: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """A tensor times one factor per entry of some axes, in at least float32, rounded once to its own dtype."""
    if not factors:
        return kept
    wide = kept.to(torch.promote_types(kept.dtype, torch.float32))
    for axis, factor in factors.items():
        shape = [-1 if position == axis else 1 for position in range(wide.dim())]
        wide = wide * factor.to(wide).view(shape)
    return wide.to(kept.dtype)
