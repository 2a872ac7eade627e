"""From a size to kept units: `plan`, `resize` and `size_curve`.

The order of the units comes from the gates (how far up the cost axis a unit stays) or from scores, of which there is
no default; `ppnet.allocation` fills it up to the unit, and `ppnet.metrics` says what a size counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.allocation import (
    allocated,
    check_allocation,
    fill_to,
    finite,
    given_scores,
    least_units,
    multiples_of,
    score_keys,
)
from ppnet.cost import Cost, CostModel, cost_model
from ppnet.errors import CheckpointError, PlanError, PPNetError, SizeError
from ppnet.gates.puppet import Puppet
from ppnet.gates.solve import bracket
from ppnet.metrics import Meter, count, dense, get_meter, total
from ppnet.plan import Plan, make_plan
from ppnet.units import Structure
from ppnet.wrap import engine_of, is_wrapped, structure_for

Size = float | int


def target_cost(size: Size, meter: Meter, of: str) -> float:
    """The asked cost in the meter's unit.

    Args:
        size: a number <= 1 is a fraction of dense, a larger one is absolute.
        of: what a fraction is taken of: ``"model"`` or ``"gated"`` (the removable units alone; what is never removed is
            added on top).

    Raises:
        SizeError: not a positive finite number, or above dense.
        PPNetError: an unknown `of`.
    """
    if of not in ("model", "gated"):
        raise PPNetError(f"of: {of!r} is not known; use 'model' or 'gated'.")
    if isinstance(size, bool) or not isinstance(size, Real) or not math.isfinite(size) or size <= 0:
        raise SizeError(
            f"size: {size!r} must be a positive finite number (a fraction <= 1, or an absolute {meter.unit})."
        )
    size = float(size)
    whole, fixed = dense(meter), meter.fixed
    if size <= 1:
        return size * whole if of == "model" else fixed + size * (whole - fixed)
    target = size if of == "model" else fixed + size
    if target > whole:
        largest = whole if of == "model" else whole - fixed
        raise SizeError(f"size: {size:,.0f} {meter.unit} is above the dense {of}'s {largest:,}; ask for at most that.")
    return target


def fill(target: float, metric: str, costs: CostModel, order: Sequence[Sequence[int]], keys: Sequence[Tensor],
         multiples: Sequence[int]) -> list[int]:  # fmt: skip
    """`ppnet.allocation.fill_to` for a counted metric, with no more than a multiple of every site kept in any case."""
    least = [min(multiple, len(units)) for multiple, units in zip(multiples, order, strict=True)]
    return fill_to(target, count(costs, metric), order, keys, multiples, least)


def _gate_keys(puppet: Puppet, importance: Callable[[float], Tensor] | None) -> list[Tensor]:
    structure = puppet.structure
    keys = puppet.order_key(importance=importance).split([site.units for site in structure.sites])
    return finite(keys, structure, "gates")


def unranked(model: nn.Module, first: str = "") -> PlanError:
    """The error for a model whose units nothing ranks.

    Args:
        first: a way out that only the caller has, to be named before the others.
    """
    return PlanError(
        f"scores: None, and this {type(model).__name__} has no gates to rank its units; {first}give "
        "scores=ppnet.score(model, data, tokenizer=...), or, without data, "
        'scores="magnitude", which can lose to units drawn at random (scores="random").'
    )


def _score_keys(model: nn.Module, structure: Structure, scores: Any) -> tuple[list[Tensor], str]:
    """Keys and source of given scores: a method's by its name, a file's, or as they are."""
    # Imported here: plans by gates need no scorers.
    from ppnet.scores.registry import SCORERS
    from ppnet.scores.score import without_data

    if isinstance(scores, str) and scores in SCORERS:
        if SCORERS[scores].needs({}):
            raise PlanError(
                f"scores: {scores!r} needs data to rank units by; give scores=ppnet.score(model, data, "
                f'method="{scores}").'
            )
        return finite(without_data(model, structure, scores), structure, "weights"), scores
    try:
        given = given_scores(scores)
    except CheckpointError as error:
        if not isinstance(scores, str) or os.path.exists(scores):
            raise
        free = ", ".join(sorted(name for name, scorer in SCORERS.items() if not scorer.needs({})))
        raise CheckpointError(f"{error} Nor is it the name of a method that needs no data ({free}).") from error
    return score_keys(given, structure), str(getattr(given, "method", "scores"))


def _solve_u(puppet: Puppet, importance: Callable[[float], Tensor], target: float, meter: Meter) -> float:
    """u at which the expected size of the masks is `target` (bisection; clamped to [0, 1])."""
    offsets = puppet.structure.offsets()

    @torch.no_grad()
    def expected(u: float) -> float:
        rho = puppet.inclusion(u, importance(u)).double().cpu()
        return total(meter, [float(rho[start:stop].sum()) for start, stop in pairwise(offsets)])

    return 0.5 * sum(bracket(expected, target, high=1.0, steps=30))


def unit_keys(
    model: nn.Module, structure: Structure, scores: Any, importance: Callable[[float], Tensor] | None = None
) -> tuple[list[Tensor], str]:
    """What ranks the units of every site, as float64 (U,), higher stays, and its origin, as `plan` takes them.

    Args:
        importance: the gates' `importance_curve`, where the caller has it.

    Raises:
        PlanError, CheckpointError: as `plan`.
    """
    if scores is not None:
        return _score_keys(model, structure, scores)
    if is_wrapped(model):
        return _gate_keys(engine_of(model).puppet, importance), "gates"
    raise unranked(model)


def plan(
    model: nn.Module,
    size: Size,
    *,
    metric: str = "params",
    of: str = "model",
    scores: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    allocation: str = "uniform",
    normalise: str = "none",
    floor: float | Mapping[str, float] | None = None,
    multiple_of: Mapping[str, int] | None = None,
) -> Plan:
    """Which units stay at a size. Nothing is changed.

    Args:
        model: wrapped (its gates rank the units) or never wrapped (it then needs `scores`).
        size: a number <= 1 is a fraction of dense, a larger one absolute, in units of `metric`.
        metric: ``"params"``, ``"flops"`` (per token, `ppnet.cost`), ``"bytes"`` of the weights, or ``"latency"``:
            microseconds of one decoding step, measured on the model's device (`ppnet.latency`).
        of: a fraction of the whole ``"model"``, or of the ``"gated"`` units alone.
        scores: what ranks the units in place of gates: `ppnet.Scores`, the name of a file of them, or any mapping of
            site name -> one score per unit, higher stays; or the name of a method that needs no data, ``"magnitude"``,
            ``"position"`` or ``"random"``, as ``ppnet.score(model, method=...)`` scores by default. A string that names
            both is the method; a file of that name is ``"./magnitude"``. Magnitude is no default, as it can lose to
            random units: where there is data, give ``ppnet.score(model, data, tokenizer=...)``.
        allocation: for scores, not for gates: ``"uniform"`` keeps the same fraction of every site, ``"global"``
            compares scores across sites, ``"cost"`` compares scores per what a unit costs in `metric` (the knapsack).
        normalise: for ``"global"`` and ``"cost"``: ``"kind"`` divides scores by their mean over all units of a kind,
            ``"site"`` by that of the site, so that scores of another scale can be compared; ``"none"``.
        floor: fraction of the units of every site that stays in any case, for all or by kind, e.g.
            ``{"kv_group": 0.5}``; one unit stays always.
        multiple_of: kind -> multiple that kept widths are rounded to, e.g. ``{"neuron": 64}``; a site narrower than the
            multiple, or its last, incomplete multiple, is kept or dropped whole.

    Returns:
        The plan; it costs at most `size`, and less than one unit (or multiple) less. Its `source` is ``gates``, the
        method of the scores, or ``scores`` where these do not tell.

    Raises:
        SizeError: above dense, or below the smallest possible size (which is named).
        PlanError: neither gates nor `scores`, or those of a method that needs data; bad `scores`, `allocation`,
            `normalise`, `floor` or `multiple_of`; weights or gates that are NaN or infinite.
        CheckpointError: `scores` is neither a file of scores nor a method.
        PPNetError: an unknown `metric` or `of`.
    """
    check_allocation(allocation, normalise)
    structure = structure_for(model)
    gated = is_wrapped(model) and scores is None
    if gated and allocation != "uniform":
        raise PlanError(
            f"allocation: {allocation!r} is for scores, and this model's gates rank the units of all layers by "
            "themselves; leave it out (normalise, too), or give scores=..."
        )
    costs = cost_model(model, structure)
    # Read once: where it depends on lambda, it takes many looks at the weights.
    importance = engine_of(model).puppet.importance_curve() if gated else None
    keys, source = unit_keys(model, structure, scores, importance)
    multiples = multiples_of(multiple_of, structure)
    least = least_units(floor, structure, multiples)
    meter = get_meter(model, structure, costs, metric)
    target = target_cost(size, meter, of)
    if not gated:
        keys = allocated(keys, structure, meter, allocation, normalise)
    order = [torch.argsort(key, descending=True, stable=True).tolist() for key in keys]
    counts = fill_to(target, meter, order, keys, multiples, least)
    whole = all(number == site.units for number, site in zip(counts, structure.sites, strict=True))
    return make_plan(
        structure,
        [units[:number] for units, number in zip(order, counts, strict=True)],
        cost=costs.total(counts),
        dense_cost=costs.dense,
        asked=target,
        metric=metric,
        u=0.0 if importance is None or whole else _solve_u(engine_of(model).puppet, importance, target, meter),
        source=source,
        extra=_reading(meter, counts),
    )


def _reading(meter: Meter, counts: Sequence[int]) -> dict[str, Any]:
    """What `Cost` does not hold: the size in a metric that is not counted, and how it was read."""
    about = meter.about()
    return {"achieved": total(meter, counts), "dense": dense(meter), **about} if about else {}


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
        achieved, whole = self.plan.achieved, self.plan.dense
        return f"Resized({achieved:,} {self.plan.metric}, {achieved / whole:.4f} of dense)"


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
    keys = _gate_keys(puppet, importance)
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
