"""How many units every site keeps: one order over all units of the model, filled up to the size.

Units are taken in order; a unit that no longer fits ends its site, and filling goes on with the others. For two sizes
s < s' the first decision that differs is a unit that fits s' but not s, so the result for s' costs more than s: the
achieved size is monotone in the asked one, and misses it by less than one unit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ppnet.errors import PlanError, SizeError
from ppnet.metrics import Meter, dense, total
from ppnet.units import Structure

ALLOCATIONS = ("uniform", "global", "cost")
NORMALISATIONS = ("none", "kind", "site")


@dataclass(frozen=True)
class _Chunk:
    site: int
    units: int


def _chunks(
    order: Sequence[Sequence[int]], keys: Sequence[Tensor], multiples: Sequence[int], kept: Sequence[int]
) -> list[_Chunk]:
    """What can be added to `kept`: chunks of `multiple` units per site, by the key of their best unit."""
    ranked: list[tuple[float, int, int]] = []
    for site, units in enumerate(order):
        step = multiples[site]
        for start in range(kept[site], len(units), step):
            ranked.append((-float(keys[site][units[start]]), start // step, site))
    ranked.sort()
    counts = [len(units) for units in order]
    return [_Chunk(site, min(multiples[site], counts[site] - rank * multiples[site])) for _, rank, site in ranked]


def fill_to(
    target: float,
    meter: Meter,
    order: Sequence[Sequence[int]],
    keys: Sequence[Tensor],
    multiples: Sequence[int],
    least: Sequence[int],
) -> list[int]:
    """Kept units per site whose size comes closest to `target` from below, in order.

    Args:
        least: units that every site keeps in any case; whole multiples, or all.

    Raises:
        SizeError: below the smallest possible size, which the message names.
    """
    kept = list(least)
    spent, whole = total(meter, kept), dense(meter)
    # One part in 10^12: a fraction of dense that names a whole number of units must not lose one to rounding.
    slack = whole * 1e-12
    if spent > target + slack:
        raise SizeError(
            f"size: {target:,.0f} {meter.unit} is not possible; the smallest is {_shown(spent)} ({spent / whole:.4f} "
            f"of dense, {_shown(whole)}): what is never removed ({_shown(meter.fixed)}) plus {max(least)} unit(s) or "
            "fewer per layer and kind. Ask for at least that, or gate more kinds, or lower the floor."
        )
    ended = [False] * len(order)
    for chunk in _chunks(order, keys, multiples, kept):
        site = chunk.site
        if ended[site]:
            continue
        price = meter.site(site, kept[site] + chunk.units) - meter.site(site, kept[site])
        if spent + price <= target + slack:
            kept[site] += chunk.units
            spent += price
        else:
            ended[site] = True
    return kept


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


# ---- keys ------------------------------------------------------------------------------------------------------------


def finite(keys: Sequence[Tensor], structure: Structure, source: str) -> list[Tensor]:
    """The keys, if they can be ranked.

    Raises:
        PlanError: NaN or infinite ones.
    """
    for key, site in zip(keys, structure.sites, strict=True):
        if not torch.isfinite(key).all():
            raise PlanError(
                f"model: the {source} of site {site.name!r} cannot be ranked: NaN or infinite for "
                f"{int((~torch.isfinite(key)).sum())} of {site.units} units; go back to a checkpoint that is finite."
            )
    return list(keys)


def given_scores(scores: Any) -> Mapping[str, Any]:
    """Scores, or those of a file's name.

    Raises:
        PlanError: something else. CheckpointError: not a file of scores.
    """
    if isinstance(scores, str | os.PathLike):
        from ppnet.scores import Scores

        return Scores.load(scores)
    if not isinstance(scores, Mapping):
        raise PlanError(
            f"scores: a {type(scores).__name__}; give ppnet.Scores, the name of a file of them, or a mapping of site "
            "name -> one score per unit."
        )
    return scores


def score_keys(scores: Mapping[str, Any], structure: Structure, known: Collection[str] = ()) -> list[Tensor]:
    """Given scores as float64 (U,) per site.

    Args:
        known: names of further sites of the model, whose scores are left out.

    Raises:
        PlanError: scores of another model, of sites that are not there, missing ones, or not one finite number a unit.
    """
    made_for = getattr(scores, "model_type", structure.model_type)
    if made_for != structure.model_type:
        raise PlanError(
            f"scores: were made for model_type {made_for!r}, the model is {structure.model_type!r}; score this model "
            "with ppnet.score(model, data)."
        )
    if getattr(scores, "order", structure.order) != structure.order:
        raise PlanError(
            "scores: ppnet.sort_ has put the model's units into another order since they were scored; score this model "
            'with ppnet.score(model, data), or give scores="position" to rank its units as they are sorted.'
        )
    strangers = sorted(map(str, scores.keys() - {site.name for site in structure.sites} - set(known)))
    if strangers:
        raise PlanError(f"scores: {strangers[:3]} are no sites of this model; ppnet.inspect(model) lists them.")
    keys = []
    for site in structure.sites:
        if site.name not in scores:
            raise PlanError(f"scores: no entry for site {site.name!r}; give one score per unit of every site.")
        try:
            key = torch.as_tensor(scores[site.name]).detach().double().cpu().flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise PlanError(f"scores: {site.name!r} must hold {site.units} numbers ({error}).") from error
        if key.numel() != site.units or not torch.isfinite(key).all():
            wrong = int((~torch.isfinite(key)).sum())
            odd = f", {wrong} of them NaN or infinite" if wrong else ""
            raise PlanError(
                f"scores: {site.name!r} needs {site.units} finite scores, got {key.numel()} values{odd}; score this "
                "model with ppnet.score(model, data)."
            )
        keys.append(key)
    return keys


def check_allocation(allocation: str, normalise: str) -> None:
    """Refuses words that are not known.

    Raises:
        PlanError: an unknown `allocation` or `normalise`, or a `normalise` that would do nothing.
    """
    if allocation not in ALLOCATIONS:
        raise PlanError(f"allocation: {allocation!r} is not known; use one of {', '.join(ALLOCATIONS)}.")
    if normalise not in NORMALISATIONS:
        raise PlanError(f"normalise: {normalise!r} is not known; use one of {', '.join(NORMALISATIONS)}.")
    if allocation == "uniform" and normalise != "none":
        raise PlanError(
            f"normalise: {normalise!r} has no meaning for allocation='uniform', which takes ranks; leave it out, or "
            "use allocation='global' or 'cost'."
        )


def allocated(
    keys: Sequence[Tensor], structure: Structure, meter: Meter, allocation: str, normalise: str
) -> list[Tensor]:
    """Keys that one order over all units can be made of; the order within a site stays.

    Args:
        allocation: ``uniform``: rank within the site; ``global``: the score; ``cost``: the score over what one unit of
            the site costs on average, which solves the knapsack of scores up to one unit.
        normalise: for ``global`` and ``cost``: divide scores by the mean of their absolute values over all units of a
            ``kind``, or of the ``site``; ``none``: take them as they are.

    Raises:
        PlanError: scores below 0 per cost.
    """
    if allocation == "uniform":
        return [rank_fraction(key) for key in keys]
    keys = _normalised(keys, structure, normalise)
    if allocation == "global":
        return keys
    if any(float(key.min()) < 0 for key in keys):
        raise PlanError(
            "scores: allocation='cost' divides scores by costs, and some are negative; use scores >= 0, or "
            "allocation='global'."
        )
    sizes = [meter.site(index, units) / units for index, units in enumerate(meter.dense_units)]
    return [key / max(size, 1e-300) for key, size in zip(keys, sizes, strict=True)]


def _normalised(keys: Sequence[Tensor], structure: Structure, normalise: str) -> list[Tensor]:
    if normalise == "none":
        return list(keys)
    groups = [site.kind if normalise == "kind" else site.name for site in structure.sites]
    scale = {}
    for group in set(groups):
        together = torch.cat([key for key, other in zip(keys, groups, strict=True) if other == group])
        scale[group] = float(together.abs().mean()) or 1.0
    return [key / scale[group] for key, group in zip(keys, groups, strict=True)]


def rank_fraction(key: Tensor) -> Tensor:
    """1 for the best unit of a site down to 1/U: comparing these across sites keeps the same fraction everywhere."""
    rank = torch.empty_like(key)
    rank[torch.argsort(key, descending=True, stable=True)] = torch.arange(len(key), dtype=key.dtype)
    return 1.0 - rank / len(key)


# ---- limits ----------------------------------------------------------------------------------------------------------


def multiples_of(multiple_of: Mapping[str, int] | None, structure: Structure) -> list[int]:
    """Per site, what its kept width is a multiple of.

    Raises:
        PlanError: an unknown kind, or not an integer >= 1.
    """
    multiple_of = dict(multiple_of or {})
    kinds = {site.kind for site in structure.sites}
    for kind, value in multiple_of.items():
        if kind not in kinds or not isinstance(value, int) or value < 1:
            raise PlanError(f"multiple_of: {{{kind!r}: {value!r}}} must map one of {sorted(kinds)} to an integer >= 1.")
    return [min(multiple_of.get(site.kind, 1), site.units) for site in structure.sites]


def least_units(floor: float | Mapping[str, float] | None, structure: Structure, multiples: Sequence[int]) -> list[int]:
    """Per site, the units that stay in any case: at least one, and one multiple.

    Raises:
        PlanError: an unknown kind, or not a fraction in [0, 1].
    """
    kinds = {site.kind for site in structure.sites}
    floors = (
        dict(floor) if isinstance(floor, Mapping) else dict.fromkeys(sorted(kinds), 0.0 if floor is None else floor)
    )
    for kind, value in floors.items():
        if kind not in kinds or isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            raise PlanError(
                f"floor: {value!r} for {kind!r} must be a fraction in [0, 1] of the units of every layer, or a mapping "
                f"of {sorted(kinds)} to such."
            )
    least = []
    for site, multiple in zip(structure.sites, multiples, strict=True):
        # One part in 10^9: 0.1 of 30 units is 3, whatever 0.1 is in binary.
        units = max(1, math.ceil(float(floors.get(site.kind, 0.0)) * site.units - 1e-9))
        least.append(min(math.ceil(units / multiple) * multiple, site.units))
    return least
