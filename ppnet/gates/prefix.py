"""Prefix masks: the units that a deployed model of a size keeps, in the gates' order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def prefix_mask(keys: Tensor, costs: Tensor, fraction: float, offsets: Sequence[int]) -> Tensor:
    """The first units of one order over all sites, as many as cost at most `fraction` of all: bool ``(U,)``.

    The first unit of every site is kept, and counted, in any case.

    Args:
        keys: ``(U,)`` float64, higher = earlier in the order (`Puppet.order_key`).
        costs: ``(U,)`` float64, cost of every unit.
        offsets: where the sites begin in the units, and their number at the end.
    """
    firsts = torch.tensor([start + int(keys[start:stop].argmax()) for start, stop in pairwise(offsets)])
    keys = keys.clone()
    keys[firsts] = torch.inf
    order = keys.argsort(descending=True, stable=True)
    fits = costs[order].cumsum(0) <= fraction * float(costs.sum()) * (1 + 1e-12)
    fits[: len(firsts)] = True
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[order[fits]] = True
    return mask
