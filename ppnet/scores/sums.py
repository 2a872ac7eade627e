"""The arithmetic of the sums that statistics are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(size: int, device: torch.device) -> Tensor:
    """Zeros (size,) in float64, or float32 where the device has nothing wider."""
    return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
