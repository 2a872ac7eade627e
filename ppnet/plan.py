"""A plan: which units of every layer stay, what that costs, and how it was decided. Saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ppnet.cost import Cost
from ppnet.errors import CheckpointError, PlanError
from ppnet.files import write_atomic
from ppnet.units import Structure

FORMAT = "ppnet.plan/1"


@dataclass(frozen=True)
class Plan:
    """Kept units of every site. A plan is a value: what it holds is not to be changed.

    Attributes:
        model_type: `config.model_type` of the model the plan was made for.
        kept: site name (``layers.0.neuron``) -> sorted indices of the units that stay.
        dense_units: site name -> dense number of units.
        cost: what the compacted model costs.
        dense_cost: what the dense model costs.
        asked: the size asked for, in units of `metric` (None: the plan was given by hand).
        metric: ``params``, ``flops``, ``bytes``, or another of `ppnet.metrics`.
        u: position on the gates' cost axis, u = lambda / (lambda + 1) in [0, 1]; the amplitudes are taken there. 0 for
            plans made without gates.
        source: what ranked the units: ``gates``, the method of scores, or a caller's word.
        extra: of a metric that is not in `cost`: the size ``achieved``, that of ``dense``, and how they were read.
        order: the order that `ppnet.sort_` had put the model's units into ("": none), which the indices refer to.
    """

    model_type: str
    kept: dict[str, list[int]]
    dense_units: dict[str, int]
    cost: Cost
    dense_cost: Cost
    asked: float | None = None
    metric: str = "params"
    u: float = 0.0
    source: str = "gates"
    extra: dict[str, Any] = field(default_factory=dict)
    order: str = ""

    @property
    def lambda_(self) -> float:
        """The price of computation at which the gates were read: u / (1 - u), infinite at u = 1."""
        return self.u / (1.0 - self.u) if self.u < 1.0 else float("inf")

    @property
    def achieved(self) -> float:
        """The size in units of `metric`."""
        return self.extra["achieved"] if "achieved" in self.extra else self.cost.of(self.metric)

    @property
    def dense(self) -> float:
        """The dense model's size in units of `metric`."""
        return self.extra["dense"] if "dense" in self.extra else self.dense_cost.of(self.metric)

    def counts(self, structure: Structure) -> list[int]:
        """Kept units per site, in the structure's order."""
        return [len(self.kept[site.name]) for site in structure.sites]

    def is_dense(self) -> bool:
        return all(len(self.kept[name]) == units for name, units in self.dense_units.items())

    @cached_property
    def _prefixes(self) -> dict[str, int]:
        """Sites that keep exactly their first units -> how many: looked for once, as lists of thousands take long."""
        return {name: len(kept) for name, kept in self.kept.items() if kept == list(range(len(kept)))}

    def prefix(self, name: str) -> int | None:
        """How many units of a site stay, if these are its first ones, as in a sorted model (`ppnet.sort_`)."""
        kept = self.kept[name]
        first = self._prefixes.get(name)
        return first if first and first == len(kept) == kept[-1] + 1 else None

    def check_order(self, structure: Structure) -> None:
        """Checks that indices mean the same units in the plan and in the model.

        Raises:
            PlanError: `ppnet.sort_` has put the units into another order in between.
        """
        if self.order != structure.order:
            raise PlanError(
                f"plan: was made for units in {_order_in_words(self.order)}, those of the model are in "
                f"{_order_in_words(structure.order)} (ppnet.sort_), so its indices name other units; make a plan for "
                "this model with ppnet.plan(model, size)."
            )

    def check(self, structure: Structure) -> None:
        """Checks that the plan fits the structure.

        Raises:
            PlanError: another model type, other sites or widths, another order of the units, indices not sorted and
                unique, or an empty site.
        """
        if self.model_type != structure.model_type:
            raise PlanError(
                f"plan: was made for model_type {self.model_type!r}, the model is {structure.model_type!r}; "
                "make a plan for this model with ppnet.plan(model, size)."
            )
        expected = {site.name: site.units for site in structure.sites}
        if self.dense_units != expected:
            odd = sorted(set(self.dense_units.items()) ^ set(expected.items()))[:3]
            raise PlanError(f"plan: its dense widths differ from the model's, first at {odd}; make a new plan.")
        self.check_order(structure)
        strangers = sorted(self.kept.keys() - expected.keys())
        if strangers:
            raise PlanError(f"plan: keeps units of {strangers[:3]}, which the model does not have; make a new plan.")
        for name, units in expected.items():
            kept = self.kept.get(name)
            if not kept:
                raise PlanError(f"plan: keeps no unit of {name}; at least one unit of every site must stay.")
            first = self.prefix(name)
            if first and first <= units:
                continue
            if kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= units:
                raise PlanError(f"plan: {name} must hold sorted, unique indices in [0, {units}); got {kept[:8]}...")

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_type": self.model_type,
            "source": self.source,
            "metric": self.metric,
            "asked": self.asked,
            "u": self.u,
            "cost": self.cost.to_dict(),
            "dense_cost": self.dense_cost.to_dict(),
            "dense_units": self.dense_units,
            "kept": self.kept,
            **({"extra": self.extra} if self.extra else {}),
            **({"order": self.order} if self.order else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: not a ppnet plan, or fields are missing.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(f"plan: not a ppnet plan (format {found!r}, expected {FORMAT!r}).")
        try:
            return cls(
                model_type=data["model_type"],
                kept={name: [int(i) for i in kept] for name, kept in data["kept"].items()},
                dense_units={name: int(units) for name, units in data["dense_units"].items()},
                cost=Cost(**data["cost"]),
                dense_cost=Cost(**data["dense_cost"]),
                asked=data["asked"],
                metric=data["metric"],
                u=float(data["u"]),
                source=data["source"],
                extra=data.get("extra", {}),
                order=str(data.get("order", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"plan: incomplete or damaged: {error!r}.") from error

    def save(self, path: str | Path) -> None:
        write_atomic(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file.

        Raises:
            CheckpointError: missing, truncated or foreign file.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
            raise CheckpointError(f"plan: cannot read {path}: {error}.") from error
        return cls.from_dict(data)


def make_plan(structure: Structure, kept: Sequence[Sequence[int]], **fields: Any) -> Plan:
    """A plan from kept indices in site order."""
    return Plan(
        model_type=structure.model_type,
        kept={site.name: sorted(int(i) for i in units) for site, units in zip(structure.sites, kept, strict=True)},
        dense_units={site.name: site.units for site in structure.sites},
        order=structure.order,
        **fields,
    )


def _order_in_words(order: str) -> str:
    return f"order {order}" if order else "their first order"
