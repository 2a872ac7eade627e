"""Magnitude of the weights alone, unchanged when a unit's input side is scaled against its output side."""

from __future__ import annotations

import torch
from torch import Tensor

from ppnet.checks import number
from ppnet.scores.registry import choose, scorer
from ppnet.scores.statistics import SiteStatistics, SiteWeights


@scorer("magnitude")
def magnitude(statistics: SiteStatistics, *, form: str = "norms", kappa: float = 1.0) -> Tensor:
    """Product of a unit's input and output norms, its bias entries counted among its weights.

    ``form="norms"``: neurons ||gate_j|| ||up_j|| ||down_j||, KV groups ||V_g||_F ||O_g||_F.
    ``form="paths"``: the rows as they act on the normalised input (the gain of the norm before the sub-layer is folded
    into the columns, its shift into the bias). Neurons as above; KV groups by what a token's value and its match can
    do, sum_h ||O_h V_g||_F + kappa sum_h ||Q_h^T K_g||_F / sqrt(d), over the group's query heads h.

    Args:
        form: ``"norms"`` or ``"paths"``.
        kappa: weight of the match of queries and keys.
    """
    choose("form", form, ("norms", "paths"))
    number("kappa", kappa)
    weights, folded = statistics.weights, form == "paths"
    if "v" not in weights.roles():
        product = _norm(weights.output())
        for role in weights.roles():
            product = product * _norm(weights.rows(role, folded))
        return product
    if folded:
        return _paths(weights, kappa)
    return _norm(weights.rows("v")) * _norm(weights.output())


def _norm(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)


def _paths(weights: SiteWeights, kappa: float) -> Tensor:
    value, key = weights.rows("v", folded=True), weights.rows("k", folded=True)
    output = _heads(weights.output(), value.shape[1])
    score = _product_norms(output, value).sum(1)
    if kappa:
        query = _heads(weights.rows("q", folded=True), key.shape[1])
        score = score + kappa * _product_norms(query, key).sum(1) / key.shape[1] ** 0.5
    return score


def _heads(rows: Tensor, width: int) -> Tensor:
    """(U, H * width, D) -> (U, H, width, D): the query heads of a group."""
    return rows.unflatten(1, (-1, width))


def _product_norms(left: Tensor, right: Tensor) -> Tensor:
    """||left_h^T right||_F of (U, H, w, D) and (U, w, E): (U, H), through the (w, w) Gram matrices."""
    gram_left = left @ left.transpose(-1, -2)
    gram_right = right @ right.transpose(-1, -2)
    return torch.sqrt((gram_left * gram_right[:, None]).sum((-1, -2)).clamp_min(0))
