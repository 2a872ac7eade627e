"""Scores as the importance inside gates: fixed numbers per unit, whatever the scale of the scores."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ppnet.allocation import given_scores, score_keys
from ppnet.units import Structure


def importance_of(scores: Any, structure: Structure, within: str, known: Collection[str] = ()) -> Tensor:
    """2 Phi(z) in (0, 2), as `ppnet.gates.importance.scale_free`, with z the normal score of a unit's rank.

    That is 2 (r - 1/2) / N for rank r = 1..N from below; equal scores share their mean rank. Only the order of the
    scores counts, so any monotone transform of them gives the same numbers; their mean is 1.

    Args:
        scores: `ppnet.Scores`, the name of a file of them, or a mapping of site name -> one number per unit.
        structure: the gated sites.
        within: what N counts: the units of a ``"site"``, or those of a ``"kind"`` in all layers.
        known: names of sites of the model that are not gated, whose scores are left out.

    Returns:
        float32 ``(U,)`` in the structure's order.

    Raises:
        PlanError, CheckpointError: the scores do not fit the model, as `ppnet.plan` says it.
    """
    from ppnet.scores.combine import rank  # which imports the verbs that import gates

    keys = score_keys(given_scores(scores), structure, known)
    groups = [site.name if within == "site" else site.kind for site in structure.sites]
    parts: list[Tensor] = [torch.empty(0)] * len(keys)
    for group in dict.fromkeys(groups):
        numbers = [number for number, other in enumerate(groups) if other == group]
        together = torch.cat([keys[number] for number in numbers])
        shares = 2.0 * rank(together) - 1.0 / len(together)
        for number, part in zip(numbers, shares.split([len(keys[number]) for number in numbers]), strict=True):
            parts[number] = part
    return torch.cat(parts).float()
