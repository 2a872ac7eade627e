"""Solving for a position on the cost axis: what gates keep falls as u rises."""

from __future__ import annotations

from collections.abc import Callable


def bracket(kept: Callable[[float], float], target: float, high: float, steps: int) -> tuple[float, float]:
    """Bisection for `kept(u) = target` with a falling `kept`.

    Returns:
        (low, high) in [0, `high`], ``high / 2**steps`` apart: `kept` is above the target at low (unless it is 0), and
        not above it at high (unless it is the given `high`).
    """
    low = 0.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) > target else (low, middle)
    return low, high
