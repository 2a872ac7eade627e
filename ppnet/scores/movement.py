"""Movement (Sanh et al. 2020) of whole units: are their weights moving away from zero?"""

from __future__ import annotations

from torch import Tensor

from ppnet.scores.registry import GRADIENTS, scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("movement", GRADIENTS)
def movement(statistics: SiteStatistics) -> Tensor:
    """-sum over a unit's weights of w dL/dw, which is minus its gate's gradient, in nats per predicted token.

    On one checkpoint this is a single step of the accumulation; `ppnet.train.MovementCallback` accumulates through
    training, as the method asks for. Signed, as published: a unit that the loss pushes towards zero has a negative
    score. Used in one shot it removes strong units first and loses to random; `taylor` takes absolute values.
    """
    return -statistics.gradients.signed / max(statistics.tokens, 1)
