"""Putting several scores of the same units together, whatever their scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppnet.errors import PPNetError
from ppnet.scores.registry import choose

FORMS = ("ranks", "product")


def rank(values: Tensor) -> Tensor:
    """Rank from below over the number of values, in (0, 1]; equal values share their mean rank. float64 (N,)."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    upper = counts.cumsum(0)
    return (upper.double() - (counts.double() - 1) / 2)[inverse] / len(values)


def combined(
    parts: Sequence[Sequence[Tensor]], weights: Sequence[float], kinds: Sequence[str], form: str = "ranks"
) -> list[Tensor]:
    """One score per unit out of several.

    ``ranks``: sum_i weights_i rank(x_i). ``product``: prod_i (x_i / mean(x_i))^weights_i. Ranks and means are over
    all units of a kind, so that the result compares units across layers.

    Args:
        parts: for each score, one (U,) tensor per site.
        weights: one number per score.
        kinds: the kind of every site.

    Raises:
        PPNetError: an unknown form, or a product of scores that are negative or NaN.
    """
    choose("form", form, FORMS)
    result = [torch.zeros(len(units), dtype=torch.float64) for units in parts[0]]
    for part, weight in zip(parts, weights, strict=True):
        for kind in dict.fromkeys(kinds):
            numbers = [number for number, other in enumerate(kinds) if other == kind]
            units = torch.cat([part[number].detach().double().cpu() for number in numbers])
            if form == "ranks":
                terms = weight * rank(units)
            else:
                if not bool((units >= 0).all()):
                    raise PPNetError("form: 'product' needs scores >= 0, and one of them has others; use 'ranks'.")
                terms = weight * torch.log(units / units.mean().clamp_min(1e-300) + 1e-6)
            for number, term in zip(numbers, terms.split([len(part[number]) for number in numbers]), strict=True):
                result[number] = result[number] + term
    return [units.exp() for units in result] if form == "product" else result
