"""No information: the baseline that every scorer has to beat."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ppnet.scores.registry import scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("random")
def random(statistics: SiteStatistics) -> Tensor:
    """Uniform numbers in [0, 1), drawn from the seed and the site's name."""
    seed = zlib.crc32(f"{statistics.seed}/{statistics.site.name}".encode())
    return torch.rand(statistics.site.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
