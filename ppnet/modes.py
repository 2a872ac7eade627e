"""Training and evaluation modes of a model, set for a while and given back; what mode a pass is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true


def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is under way.

    Our operators have no rules for these: such a pass runs torch's own.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def certainly(condition: bool) -> bool:
    """A condition on sizes; in a graph that is to serve other sizes too, only what holds for all of them."""
    return statically_known_true(condition) if torch.compiler.is_compiling() else condition


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own training flag returns afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own training flag returns afterwards."""
    with evaluation_mode(*models), torch.no_grad():
        yield
