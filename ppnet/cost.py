"""What a model costs: parameters, FLOPs and bytes, split into what every unit costs and what is never removed.

FLOPs are those of the matrix products of one token's forward pass: 2 per weight of every linear module, the output head
included. The attention core (softmax(QK^T)V), norms and embedding look-ups are not counted (DESIGN section 2 weights
gates by the projections' FLOPs in the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ppnet.errors import PPNetError
from ppnet.units import Site, Structure, leaf_module

Metric = Literal["params", "flops", "bytes"]
METRICS: tuple[Metric, ...] = ("params", "flops", "bytes")


@dataclass(frozen=True)
class Cost:
    """params: parameters; flops: forward FLOPs per token; bytes: bytes of the weights as stored in the model."""

    params: int
    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.flops - other.flops, self.bytes - other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.params * times, self.flops * times, self.bytes * times)

    def of(self, metric: str) -> int:
        """The entry of one metric.

        Raises:
            PPNetError: an unknown metric.
        """
        check_metric(metric)
        return int(getattr(self, metric))

    def to_dict(self) -> dict[str, int]:
        return {"params": self.params, "flops": self.flops, "bytes": self.bytes}


ZERO = Cost(0, 0, 0)


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise PPNetError(f"metric: {metric!r} is not known; use one of {', '.join(map(repr, METRICS))}.")


@dataclass(frozen=True)
class CostModel:
    """The cost of a model as a sum: `fixed` + kept units of each site times `unit[site]`."""

    fixed: Cost
    unit: tuple[Cost, ...]
    dense_units: tuple[int, ...]

    def total(self, kept: Sequence[int]) -> Cost:
        """Cost of a model that keeps ``kept[i]`` units of site ``i``."""
        return sum((cost * count for cost, count in zip(self.unit, kept, strict=True)), self.fixed)

    def gated(self, kept: Sequence[int]) -> Cost:
        """Cost of the kept units alone."""
        return self.total(kept) - self.fixed

    @property
    def dense(self) -> Cost:
        return self.total(self.dense_units)


def unit_cost(model: nn.Module, site: Site) -> Cost:
    """Cost of one unit of a site: its rows and columns in every leaf, its entries in biases of producers and norms."""
    params = flops = stored = 0
    for leaf in site.leaves:
        module = leaf_module(model, leaf)
        entries = leaf.features_per_unit * int(module.weight.shape[1 - leaf.weight_dim])
        flops += 2 * entries
        if leaf.role != "out" and module.bias is not None:
            entries += leaf.features_per_unit
        params += entries
        stored += entries * module.weight.element_size()
    for norm in site.across:
        params += norm.features_per_unit
        stored += norm.features_per_unit * leaf_module(model, norm).weight.element_size()
    return Cost(params, flops, stored)


def _linear_flops(model: nn.Module) -> int:
    from transformers.pytorch_utils import Conv1D

    return sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))


def cost_model(model: nn.Module, structure: Structure) -> CostModel:
    """The cost of `model` at any number of kept units. Tied parameters count once; gate parameters never count."""
    units = tuple(unit_cost(model, site) for site in structure.sites)
    dense_units = tuple(site.units for site in structure.sites)
    own = [p for name, p in model.named_parameters() if not name.startswith("puppet.")]
    dense = Cost(
        params=sum(p.numel() for p in own),
        flops=_linear_flops(model),
        bytes=sum(p.numel() * p.element_size() for p in own),
    )
    gated = sum((cost * count for cost, count in zip(units, dense_units, strict=True)), ZERO)
    return CostModel(fixed=dense - gated, unit=units, dense_units=dense_units)
