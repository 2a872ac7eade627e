"""Clamped B-splines on [0, 1] as a row of basis values: spline(u) = basis(u) @ control_points."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def knots(control_points: int, degree: int) -> tuple[float, ...]:
    """Clamped uniform knots on [0, 1]: ``control_points + degree + 1`` values, both ends ``degree + 1`` times."""
    inner = control_points - degree
    return (0.0,) * degree + tuple(i / inner for i in range(inner + 1)) + (1.0,) * degree


@lru_cache(maxsize=4096)
def _basis(u: float, control_points: int, degree: int) -> tuple[float, ...]:
    t = knots(control_points, degree)
    # The last non-empty interval is closed, so that the spline is defined at u = 1.
    span = max(i for i in range(degree, control_points) if t[i] <= u)
    values = [1.0]
    # Cox-de Boor over the degree + 1 basis functions that are non-zero on the span.
    for order in range(1, degree + 1):
        raised = [0.0] * (order + 1)
        for j, value in enumerate(values):
            left, right = t[span + 1 + j - order], t[span + 1 + j]
            share = value / (right - left)
            raised[j] += share * (right - u)
            raised[j + 1] += share * (u - left)
        values = raised
    row = [0.0] * control_points
    row[span - degree : span + 1] = values
    return tuple(row)


def basis(u: float, control_points: int, degree: int) -> Tensor:
    """Values of all basis functions at `u`: float64 ``(control_points,)``, non-negative, summing to 1.

    Raises:
        ValueError: u outside [0, 1].
    """
    if not 0.0 <= u <= 1.0:
        raise ValueError(f"u: {u!r} must be in [0, 1].")
    return torch.tensor(_basis(float(u), control_points, degree), dtype=torch.float64)
