"""How far the model's predictions move when a unit is removed: a guard for scores that reward little of the data."""

from __future__ import annotations

from torch import Tensor

from ppnet.scores.registry import FISHER, scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("kl", FISHER)
def kl(statistics: SiteStatistics) -> Tensor:
    """KL(dense || unit removed) to second order, 1/2 E[(d log p(y) / dm_u)^2], in nats per predicted token.

    y is drawn from the dense model's own predictions at every position, so that the expectation is the Fisher
    information of the gate and not that of the data's labels.
    """
    return 0.5 * statistics.fisher.squared / max(statistics.tokens, 1)
