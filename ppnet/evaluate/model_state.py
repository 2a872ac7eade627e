"""Looking at a model without changing it: its modes, its context length, its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own training flag returns afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def device_of(model: Any) -> torch.device:
    """The device that token ids go to: that of the input embeddings."""
    return model.get_input_embeddings().weight.device


def vocabulary_of(model: Any) -> int:
    """Rows of the input embeddings: valid ids are in [0, this)."""
    return int(model.get_input_embeddings().weight.shape[0])


def context_of(model: Any) -> int | None:
    """Longest sequence the model was built for, in tokens; None when its config names no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit else None
