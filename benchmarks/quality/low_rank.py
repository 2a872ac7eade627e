"""Low-rank changes of the gated matrices (LoRA, Hu et al. 2021, arXiv 2106.09685) while gates train, then merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ppnet.units import leaf_module


class LowRank(nn.Module):
    """W + B A, with A ``(rank, in)`` random and B ``(out, rank)`` zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def freeze(model: nn.Module) -> None:
    """Gates alone learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("puppet."))


@contextmanager
def low_rank(model: Any, rank: int) -> Iterator[None]:
    """Inside, gates and low-rank changes of every gated matrix learn; afterwards the changes are in the weights."""
    freeze(model)
    modules = {leaf.name: leaf_module(model, leaf) for site in model.puppet.structure.sites for leaf in site.leaves}
    for module in modules.values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    yield
    for module in modules.values():
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
