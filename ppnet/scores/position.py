"""The order that units are stored in: for models that `ppnet.sort_` has sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from ppnet.scores.registry import scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("position")
def position(statistics: SiteStatistics) -> Tensor:
    """U for the first unit of a site down to 1 for the last: the first units stay."""
    return torch.arange(statistics.site.units, 0, -1, dtype=torch.float64)
