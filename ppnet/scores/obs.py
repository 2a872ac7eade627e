"""What removing a unit costs if the other units take over what they can: Optimal Brain Surgeon for whole units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppnet.checks import number
from ppnet.errors import PPNetError
from ppnet.scores.registry import CURVATURE, GRAM, Needs, choose, scorer
from ppnet.scores.statistics import SiteStatistics

RIDGE = 0.01


def _needed(options: Mapping[str, Any]) -> Needs:
    return frozenset({GRAM} if options.get("weighting", "loss") == "output" else {GRAM, CURVATURE})


@scorer("obs", needed=_needed)
def obs(statistics: SiteStatistics, *, weighting: str = "loss", ridge: float = RIDGE) -> Tensor:
    """1/2 tr(B_u C_u), with C_u the covariance of what the other units cannot say of the unit's features.

    With G = E[a a^T] of all features a of the site, C_u = ([(G + ridge * diag G)^-1]_uu)^-1 (r, r) is the second moment
    of a_u minus its least-squares prediction from the other units (Schur complement), which is what stays missing after
    redistribution (`ppnet.compact(redistribute=...)`). Where the output projection has a bias, moments are taken around
    the mean, as the bias takes over the rest. Following Hassibi & Stork (1993), at the level of units as Kurtic et al.
    (ZipLM, 2023); the weighting by the loss is the Kronecker-factored one of K-FAC.

    Costs F^3 operations per site of F features, and three times (F, F) in float64 while they run.

    Args:
        weighting: ``"loss"``: B_u = E[da_u da_u^T] of the gradients da = W_out^T dy, with labels drawn from the model's
            own predictions (a given loss: of that loss): then the score is the KL divergence from the dense model, to
            second order, in nats per predicted token. ``"output"``: B_u = W_out,u^T W_out,u: half the squared error of
            the sub-layer's output per token; needs no gradients.
        ridge: share of a feature's own second moment that no other feature can say; at least 1e-9.

    Raises:
        PPNetError: a ridge that is too small for features that depend on each other.
    """
    choose("weighting", weighting, ("loss", "output"))
    number("ridge", ridge, 1e-9)
    gram = statistics.gram.mean(centred=statistics.weights.output_has_bias())
    index = statistics.site.consumer.index.to(gram.device)
    own = gram.diagonal()
    # By feature, so that a unit's scale does not matter; features that are never there get a floor to be divided by.
    floor = torch.finfo(torch.float32).eps ** 2 * own.mean() + torch.finfo(torch.float32).tiny
    own.clamp_(min=floor).mul_(1 + ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise PPNetError(
            f"ridge: {ridge:g} is too small for the features of {statistics.site.name}, which depend on each other up "
            "to rounding; give a larger one (0.01 is the default), or more data."
        )
    del gram, own
    inverse = torch.cholesky_inverse(factor)
    del factor
    left = torch.linalg.inv(inverse[index[:, :, None], index[:, None, :]])
    if weighting == "output":
        columns = statistics.weights.output().to(left)
        block = torch.einsum("urd,usd->urs", columns, columns)
    else:
        block = statistics.curvature.to(left) / max(statistics.tokens, 1)
    return 0.5 * (block * left).sum((1, 2))
