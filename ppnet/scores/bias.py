"""Effective bias: the constant that a unit adds to the output, bias terms or not."""

from __future__ import annotations

import torch
from torch import Tensor

from ppnet.scores.registry import ACTIVATIONS, scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("bias", ACTIVATIONS)
def bias(statistics: SiteStatistics) -> Tensor:
    """||W_out[:, u] E[a_u]||_2."""
    columns = statistics.weights.output()
    return torch.einsum("ur,urd->ud", statistics.activations.mean.to(columns), columns).norm(dim=1)
