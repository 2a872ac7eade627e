"""What ppnet sees in a model: sites, units, costs, and what is never removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ppnet.cost import Cost, CostModel, cost_model
from ppnet.gates.config import SCORES
from ppnet.units import Structure
from ppnet.verify import verify_sites
from ppnet.wrap import engine_of, is_wrapped, structure_for

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`: print it, or read `to_dict()`."""

    model_class: str
    structure: Structure
    costs: CostModel
    gated: bool
    kept: dict[str, int]
    importance: str | None = None
    verified: float | None = None

    @property
    def smallest(self) -> Cost:
        """Cost with one unit per site."""
        return self.costs.total([1] * len(self.structure.sites))

    def to_dict(self) -> dict[str, Any]:
        structure, costs = self.structure, self.costs
        return {
            "model_class": self.model_class,
            "model_type": structure.model_type,
            "family": structure.family,
            "layers": structure.layers,
            "width": structure.width,
            "vocabulary": structure.vocabulary,
            "gated": self.gated,
            "importance": self.importance,
            "verified": self.verified,
            "cost": {
                "dense": costs.dense.to_dict(),
                "fixed": costs.fixed.to_dict(),
                "smallest": self.smallest.to_dict(),
            },
            "sites": [
                {
                    "name": site.name,
                    "kind": site.kind,
                    "module": site.block,
                    "units": site.units,
                    "kept": self.kept[site.name],
                    "leaves": {leaf.role: leaf.name for leaf in site.leaves},
                    "unit_cost": cost.to_dict(),
                }
                for site, cost in zip(structure.sites, costs.unit, strict=True)
            ],
        }

    def table(self) -> Table:
        """A rich table, one row per site."""
        from rich.table import Table

        structure, costs = self.structure, self.costs
        dense = costs.dense
        table = Table(
            title=f"{self.model_class} ({structure.model_type}): {structure.layers} layers, width {structure.width}, "
            f"{dense.params:,} params, {'gated' if self.gated else 'not gated'}",
            caption=f"never removed: {costs.fixed.params:,} params ({costs.fixed.params / dense.params:.1%}); "
            f"smallest possible: {self.smallest.params:,} ({self.smallest.params / dense.params:.1%})"
            + (f"\nimportance inside the gates: {self.importance}" if self.gated else "")
            + ("" if self.verified is None else f"\nverified: removal equals masking to {self.verified:.1e}"),
        )
        for name, justify in (("site", "left"), ("module", "left"), ("units", "right"), ("kept", "right"),
                              ("params/unit", "right"), ("share of params", "right")):  # fmt: skip
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for site, cost in zip(structure.sites, costs.unit, strict=True):
            share = cost.params * site.units / dense.params
            numbers = (f"{site.units:,}", f"{self.kept[site.name]:,}", f"{cost.params:,}", f"{share:.1%}")
            table.add_row(site.name, site.block, *numbers)
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        buffer = StringIO()
        Console(file=buffer, width=120).print(self.table())
        return buffer.getvalue().rstrip()


def inspect(model: nn.Module, verify: bool = False) -> Inspection:
    """What was found in a model. Print the result for a table.

    Args:
        model: a Hugging Face model, wrapped or not.
        verify: try whether the units are what its family says: a model without half of them must compute what the one
            computes in which these are masked (`ppnet.verify`). Needs memory for one such model.

    Raises:
        UnsupportedModelError: unknown family, already compacted, quantised, or with adapters; says why.
        EquivalenceError: with `verify`: they are not; names the first site that is wrong.
    """
    structure = structure_for(model)
    gated = is_wrapped(model)
    costs = cost_model(model, structure)
    fixed = engine_of(model).fixed if gated else None
    kept = {site.name: site.units if fixed is None else len(fixed.kept[site.name]) for site in structure.sites}
    importance = None
    if gated:
        config = engine_of(model).puppet.config
        importance = config.importance
        if importance == SCORES:
            importance += f", ranked within each {config.normalise_scores}"
    verified = verify_sites(model, structure) if verify else None
    return Inspection(type(model).__name__, structure, costs, gated, kept, importance, verified)
