"""Looking at a model without changing it: its device, its vocabulary, its context length."""

from __future__ import annotations

from typing import Any

import torch


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
