"""First-order change of the loss when a unit is removed, from the gradient of its gate."""

from __future__ import annotations

from torch import Tensor

from ppnet.scores.registry import GRADIENTS, choose, scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("taylor", GRADIENTS)
def taylor(statistics: SiteStatistics, *, sign: str = "sequence") -> Tensor:
    """Sum of |gate gradient|, in nats per predicted token.

    Removing a unit changes the loss by minus its gate gradient to first order. Changes of either sign mean that the
    unit does something, so absolute values are taken; where matters:

    Args:
        sign: ``"sequence"``: absolute values of every sequence's gradient. ``"token"``: of every position's term.
            ``"batch"``: of the gradient of all data, |sum_b s_{u,b}|. ``"squared"``: sum of squares over sequences.
            ``"signed"``: minus the gradient itself, the expected rise of the loss; ranks the strongest units that hurt
            on this data below units that do nothing, and is there for comparison only.
    """
    choose("sign", sign, ("sequence", "token", "batch", "squared", "signed"))
    gradients = statistics.gradients
    total = {
        "sequence": gradients.absolute,
        "token": gradients.by_token,
        "batch": gradients.signed.abs(),
        "squared": gradients.squared,
        "signed": -gradients.signed,
    }[sign]
    return total / max(statistics.tokens, 1)
