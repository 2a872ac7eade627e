"""What a size counts. To add a metric, register a function that makes its meter: nothing else needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ppnet.cost import METRICS, CostModel
from ppnet.errors import PPNetError
from ppnet.units import Structure


class Meter(Protocol):
    """Reads the size of a model off the number of units that each site keeps.

    Attributes:
        metric: its name. unit: what it counts in, for messages.
        fixed: what is never removed.
        dense_units: the dense number of units of each site.
    """

    @property
    def metric(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def fixed(self) -> float: ...
    @property
    def dense_units(self) -> tuple[int, ...]: ...

    def site(self, index: int, kept: float) -> float:
        """The size of one site that keeps so many units (a fraction is allowed); never falls when more are kept."""
        ...

    def about(self) -> dict[str, Any]:
        """How it was read, for a plan to keep."""
        ...


@dataclass(frozen=True)
class Count:
    """A meter of something counted: every unit of a site adds the same."""

    metric: str
    unit: str
    fixed: float
    dense_units: tuple[int, ...]
    prices: tuple[int, ...]

    def site(self, index: int, kept: float) -> float:
        return self.prices[index] * kept

    def about(self) -> dict[str, Any]:
        return {}


MeterFn = Callable[[nn.Module, Structure, CostModel], Meter]
METERS: dict[str, MeterFn] = {}


def meter(metric: str) -> Callable[[MeterFn], MeterFn]:
    """Registers a metric: (model, its structure, its costs) -> Meter."""

    def decorate(function: MeterFn) -> MeterFn:
        METERS[metric] = function
        return function

    return decorate


def get_meter(model: nn.Module, structure: Structure, costs: CostModel, metric: str) -> Meter:
    """The meter of a metric for a model.

    Raises:
        PPNetError: an unknown metric.
    """
    import ppnet.latency  # noqa: F401  (registers itself)

    if metric not in METERS:
        raise PPNetError(f"metric: {metric!r} is not known; use one of {', '.join(map(repr, METERS))}.")
    return METERS[metric](model, structure, costs)


def count(costs: CostModel, metric: str) -> Count:
    """The meter of a counted metric: ``params``, ``flops`` or ``bytes``."""
    prices = tuple(cost.of(metric) for cost in costs.unit)
    return Count(metric, metric, costs.fixed.of(metric), costs.dense_units, prices)


def total(meter: Meter, kept: Sequence[float]) -> float:
    """The size of a model that keeps ``kept[i]`` units of site i."""
    return meter.fixed + sum(meter.site(index, number) for index, number in enumerate(kept))


def dense(meter: Meter) -> float:
    return total(meter, meter.dense_units)


for _metric in METRICS:
    meter(_metric)(lambda model, structure, costs, name=_metric: count(costs, name))  # type: ignore[misc]
