"""From a size to kept units: one order over all units of the model, filled up to the unit.

The order comes from the gates (how far up the cost axis a unit stays), from given scores, or from magnitude. Units are
taken in that order, a unit that no longer fits ends its site, and filling goes on with the others. For two sizes s < s'
the first decision that differs is a unit that fits s' but not s, so the result for s' costs more than s: the achieved
size is monotone in the asked one, and misses it by less than one unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.cost import Cost, CostModel, check_metric, cost_model
from ppnet.errors import PlanError, PPNetError, SizeError
from ppnet.gates.importance import norm_product
from ppnet.gates.puppet import Puppet
from ppnet.gates.solve import bracket
from ppnet.plan import Plan, make_plan
from ppnet.units import Structure
from ppnet.wrap import engine_of, is_wrapped, structure_for

Size = float | int
ALLOCATIONS = ("uniform", "global")


def target_cost(size: Size, costs: CostModel, metric: str, of: str) -> float:
    """The asked cost in units of `metric`.

    Args:
        size: a number <= 1 is a fraction of dense, a larger one is absolute.
        of: what a fraction is taken of: ``"model"`` or ``"gated"`` (the removable units alone; what is never removed is
            added on top).

    Raises:
        SizeError: not a positive finite number, or above dense.
        PPNetError: an unknown `metric` or `of`.
    """
    check_metric(metric)
    if of not in ("model", "gated"):
        raise PPNetError(f"of: {of!r} is not known; use 'model' or 'gated'.")
    if isinstance(size, bool) or not isinstance(size, Real) or not math.isfinite(size) or size <= 0:
        raise SizeError(f"size: {size!r} must be a positive finite number (a fraction <= 1, or an absolute {metric}).")
    size = float(size)
    dense, fixed = costs.dense.of(metric), costs.fixed.of(metric)
    if size <= 1:
        return size * dense if of == "model" else fixed + size * (dense - fixed)
    target = size if of == "model" else fixed + size
    if target > dense:
        largest = dense if of == "model" else dense - fixed
        raise SizeError(f"size: {size:,.0f} {metric} is above the dense {of}'s {largest:,}; ask for at most that.")
    return target


@dataclass(frozen=True)
class _Chunk:
    site: int
    units: int


def _chunks(order: Sequence[Sequence[int]], keys: Sequence[Tensor], multiples: Sequence[int]) -> list[_Chunk]:
    """What can be added after the floor: chunks of `multiple` units per site, by the key of their best unit."""
    ranked: list[tuple[float, int, int]] = []
    for site, units in enumerate(order):
        step = multiples[site]
        for start in range(step, len(units), step):
            ranked.append((-float(keys[site][units[start]]), start // step, site))
    ranked.sort()
    counts = [len(units) for units in order]
    return [_Chunk(site, min(multiples[site], counts[site] - rank * multiples[site])) for _, rank, site in ranked]


def fill(target: float, metric: str, costs: CostModel, order: Sequence[Sequence[int]], keys: Sequence[Tensor],
         multiples: Sequence[int]) -> list[int]:  # fmt: skip
    """Kept units per site whose cost comes closest to `target` from below, in order.

    Raises:
        SizeError: below the smallest possible size, which the message names.
    """
    kept = [min(multiple, len(units)) for multiple, units in zip(multiples, order, strict=True)]
    spent = costs.total(kept).of(metric)
    # One part in 10^12: a fraction of dense that names a whole number of units must not lose one to rounding.
    slack = costs.dense.of(metric) * 1e-12
    if spent > target + slack:
        dense = costs.dense.of(metric)
        raise SizeError(
            f"size: {target:,.0f} {metric} is not possible; the smallest is {spent:,} ({spent / dense:.4f} of dense, "
            f"{dense:,}): what is never removed ({costs.fixed.of(metric):,}) plus {max(multiples)} unit(s) or fewer "
            "per layer and kind. Ask for at least that, or gate more kinds."
        )
    ended = [False] * len(order)
    unit = [cost.of(metric) for cost in costs.unit]
    for chunk in _chunks(order, keys, multiples):
        if ended[chunk.site]:
            continue
        price = unit[chunk.site] * chunk.units
        if spent + price <= target + slack:
            kept[chunk.site] += chunk.units
            spent += price
        else:
            ended[chunk.site] = True
    return kept


def _finite(keys: Sequence[Tensor], structure: Structure, source: str) -> list[Tensor]:
    for key, site in zip(keys, structure.sites, strict=True):
        if not torch.isfinite(key).all():
            raise PlanError(
                f"model: the {source} of site {site.name!r} cannot be ranked: NaN or infinite for "
                f"{int((~torch.isfinite(key)).sum())} of {site.units} units; go back to a checkpoint that is finite."
            )
    return list(keys)


def _gate_keys(puppet: Puppet) -> list[Tensor]:
    structure = puppet.structure
    return _finite(puppet.order_key().split([site.units for site in structure.sites]), structure, "gates")


def _magnitude_keys(model: nn.Module, structure: Structure) -> list[Tensor]:
    with torch.no_grad():
        keys = [norm_product(model, site).double().cpu() for site in structure.sites]
    return _finite(keys, structure, "weights")


def _score_keys(scores: Mapping[str, Any], structure: Structure) -> list[Tensor]:
    keys = []
    strangers = sorted(map(str, scores.keys() - {site.name for site in structure.sites}))
    if strangers:
        raise PlanError(f"scores: {strangers[:3]} are no sites of this model; ppnet.inspect(model) lists them.")
    for site in structure.sites:
        if site.name not in scores:
            raise PlanError(f"scores: no entry for site {site.name!r}; give one score per unit of every site.")
        key = torch.as_tensor(scores[site.name]).detach().double().cpu().flatten()
        if key.numel() != site.units or not torch.isfinite(key).all():
            raise PlanError(f"scores: {site.name!r} needs {site.units} finite scores, got {key.numel()} values.")
        keys.append(key)
    return keys


def _rank_fraction(key: Tensor) -> Tensor:
    """1 for the best unit of a site down to 1/U: comparing these across sites keeps the same fraction everywhere."""
    rank = torch.empty_like(key)
    rank[torch.argsort(key, descending=True, stable=True)] = torch.arange(len(key), dtype=key.dtype)
    return 1.0 - rank / len(key)


def _multiples(multiple_of: Mapping[str, int] | None, structure: Structure) -> list[int]:
    multiple_of = dict(multiple_of or {})
    kinds = {site.kind for site in structure.sites}
    for kind, value in multiple_of.items():
        if kind not in kinds or not isinstance(value, int) or value < 1:
            raise PlanError(f"multiple_of: {{{kind!r}: {value!r}}} must map one of {sorted(kinds)} to an integer >= 1.")
    return [min(multiple_of.get(site.kind, 1), site.units) for site in structure.sites]


def _solve_u(puppet: Puppet, target: float, metric: str, costs: CostModel) -> float:
    """u at which the expected cost of the masks is `target` (bisection; clamped to [0, 1])."""
    offsets = puppet.structure.offsets()
    importance = puppet.importance_curve()
    unit, fixed = [cost.of(metric) for cost in costs.unit], costs.fixed.of(metric)

    @torch.no_grad()
    def expected(u: float) -> float:
        rho = puppet.inclusion(u, importance(u)).double().cpu()
        sums = [float(rho[start:stop].sum()) for start, stop in pairwise(offsets)]
        return fixed + sum(a * b for a, b in zip(sums, unit, strict=True))

    return 0.5 * sum(bracket(expected, target, high=1.0, steps=30))


def plan(
    model: nn.Module,
    size: Size,
    *,
    metric: str = "params",
    of: str = "model",
    scores: Mapping[str, Any] | None = None,
    allocation: str = "uniform",
    multiple_of: Mapping[str, int] | None = None,
) -> Plan:
    """Which units stay at a size. Nothing is changed.

    Args:
        model: wrapped (its gates rank the units) or never wrapped (magnitude ranks them: the product of a unit's input
            and output norms).
        size: a number <= 1 is a fraction of dense, a larger one absolute, in units of `metric`.
        metric: ``"params"``, ``"flops"`` (per token, `ppnet.cost`) or ``"bytes"`` of the weights.
        of: a fraction of the whole ``"model"``, or of the ``"gated"`` units alone.
        scores: site name -> one score per unit, higher stays; overrides gates and magnitude.
        allocation: for scores and magnitude: ``"uniform"`` keeps the same fraction of every site, ``"global"`` compares
            scores across sites.
        multiple_of: kind -> multiple that kept widths are rounded to, e.g. ``{"neuron": 64}``; a site narrower than the
            multiple, or its last, incomplete multiple, is kept or dropped whole.

    Returns:
        The plan; it costs at most `size`, and less than one unit (or multiple) less.

    Raises:
        SizeError: above dense, or below the smallest possible size (which is named).
        PlanError: bad `scores`, `allocation` or `multiple_of`; weights or gates that are NaN or infinite.
    """
    structure = structure_for(model)
    gated = is_wrapped(model) and scores is None
    costs = cost_model(model, structure)
    if allocation not in ALLOCATIONS:
        raise PlanError(f"allocation: {allocation!r} is not known; use one of {', '.join(ALLOCATIONS)}.")
    target = target_cost(size, costs, metric, of)
    if gated:
        keys = _gate_keys(engine_of(model).puppet)
    else:
        keys = _magnitude_keys(model, structure) if scores is None else _score_keys(scores, structure)
        if allocation == "uniform":
            keys = [_rank_fraction(key) for key in keys]
    order = [torch.argsort(key, descending=True, stable=True).tolist() for key in keys]
    counts = fill(target, metric, costs, order, keys, _multiples(multiple_of, structure))
    dense = all(count == site.units for count, site in zip(counts, structure.sites, strict=True))
    return make_plan(
        structure,
        [units[:count] for units, count in zip(order, counts, strict=True)],
        cost=costs.total(counts),
        dense_cost=costs.dense,
        asked=target,
        metric=metric,
        u=_solve_u(engine_of(model).puppet, target, metric, costs) if gated and not dense else 0.0,
        source="gates" if gated else "magnitude" if scores is None else "scores",
    )


class Resized:
    """The result of `resize`. As a context manager it restores the size that was set before.

    Attributes:
        plan: the plan in force (None: the size was reset).
    """

    def __init__(self, model: nn.Module, plan: Plan | None) -> None:
        self.engine = engine_of(model)
        self.plan = plan
        self._before = self.engine.fixed
        self.engine.fix(plan)

    @property
    def cost(self) -> Cost:
        """Cost of the model at this size, as compaction would leave it."""
        return self.engine.puppet.costs.dense if self.plan is None else self.plan.cost

    def __enter__(self) -> Resized:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.fix(self._before)

    def __repr__(self) -> str:
        if self.plan is None:
            return "Resized(dense)"
        share = self.plan.cost.of(self.plan.metric) / self.plan.dense_cost.of(self.plan.metric)
        return f"Resized({self.plan.cost.of(self.plan.metric):,} {self.plan.metric}, {share:.4f} of dense)"


def refuse_options(reason: str, /, **options: Any) -> None:
    """Refuses options of `plan` where no plan is made from a size.

    Raises:
        PPNetError: one is given (`metric` and `of`: with another value than their default).
    """
    defaults = {"metric": "params", "of": "model"}
    given = [name for name, value in options.items() if name not in defaults or value != defaults[name]]
    if given:
        raise PPNetError(f"{', '.join(given)}: only used to make a plan from a size; {reason}, so leave it out.")


def resize(
    model: nn.Module, size: Size | Plan | None, metric: str = "params", *, of: str = "model", **options: Any
) -> Resized:
    """Sets the size of a wrapped model: masks only, no weight changes, reversible.

    Evaluation and `generate` then compute only the kept units; training passes train that one size. ``resize(model,
    None)`` resets: dense in evaluation, drawn masks in training.

    Args:
        model: a wrapped model.
        size: as in `plan`, or a `Plan`, or None.
        metric, of: as in `plan`.
        options: further arguments of `plan`.

    Returns:
        An object with the plan, also usable as a context manager: ``with ppnet.resize(model, 0.5): ...``.

    Raises:
        UnsupportedModelError: the model carries no gates.
        SizeError, PlanError: as `plan`; the size that was set before stays.
        PPNetError: options of `plan` beside a `Plan` or None.
    """
    engine = engine_of(model)
    if isinstance(size, Plan):
        refuse_options("size is already a Plan", metric=metric, of=of, **options)
        size.check(engine.puppet.structure)
        return Resized(model, size)
    if size is None:
        refuse_options("size=None resets", metric=metric, of=of, **options)
        return Resized(model, None)
    return Resized(model, plan(model, size, metric=metric, of=of, **options))


@dataclass(frozen=True)
class SizePoint:
    """One point of `size_curve`: the model at u, with the masks' expected cost.

    Attributes:
        u, lambda_: position on the cost axis.
        cost: cost of the model filled to the masks' expected FLOPs at u.
        gated_flops: fraction of the gated FLOPs kept.
        kept: site name -> kept units.
    """

    u: float
    lambda_: float
    cost: Cost
    gated_flops: float
    kept: dict[str, int]


@torch.no_grad()
def size_curve(model: nn.Module, points: int = 33) -> list[SizePoint]:
    """What the gates keep along the cost axis: sizes at `points` values of u = lambda / (lambda + 1) in [0, 1).

    Raises:
        UnsupportedModelError: the model carries no gates.
        PPNetError: fewer than 2 points.
    """
    if points < 2:
        raise PPNetError(f"points: {points!r} must be at least 2.")
    puppet = engine_of(model).puppet
    structure, costs = puppet.structure, puppet.costs
    importance = puppet.importance_curve()
    keys = _gate_keys(puppet)
    order = [torch.argsort(key, descending=True, stable=True).tolist() for key in keys]
    floor = costs.gated([1] * len(structure.sites)).flops
    gated = costs.gated([site.units for site in structure.sites]).flops
    curve = []
    for index in range(points):
        u = index / points
        rho_bar = 1.0 if u == 0.0 else float(puppet.mean_inclusion(puppet.inclusion(u, importance(u))))
        target = costs.fixed.flops + max(floor, rho_bar * gated)
        counts = fill(target, "flops", costs, order, keys, [1] * len(structure.sites))
        curve.append(
            SizePoint(
                u=u,
                lambda_=u / (1.0 - u),
                cost=costs.total(counts),
                gated_flops=costs.gated(counts).flops / gated,
                kept={site.name: count for site, count in zip(structure.sites, counts, strict=True)},
            )
        )
    return curve
