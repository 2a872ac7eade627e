"""Output weights times what flows through them: Wanda (Sun et al. 2023) for whole units."""

from __future__ import annotations

from torch import Tensor

from ppnet.scores.registry import ACTIVATIONS, scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("activation", ACTIVATIONS)
def activation(statistics: SiteStatistics, *, centred: bool = False) -> Tensor:
    """sqrt(sum_f ||W_out[:, f]||^2 E[a_f^2]) over the features f of a unit: ||W_out[:, u]|| ||a_u|| for neurons.

    Args:
        centred: the variance of a in place of E[a^2]: what a constant in the output's bias could not replace.
    """
    moments = statistics.activations.variance if centred else statistics.activations.second
    columns = statistics.weights.output().square().sum(-1)
    return (columns * moments.to(columns.device)).sum(1).sqrt()
