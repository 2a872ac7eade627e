"""Where the next draw will fall: prediction intervals from a few draws of a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ppnet.errors import PPNetError


@dataclass(frozen=True)
class Spread:
    """One figure over K mask draws.

    Attributes:
        mean, min, max: over the draws. [min, max] covers a fresh draw with probability (K - 1) / (K + 1), whatever the
            distribution: a fresh draw is as likely as any of the K to be the least or the largest.
        low, high: `prediction_interval` at the level that was asked for.
    """

    mean: float
    min: float
    max: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether a value is in [low, high]."""
        return self.low <= value <= self.high

    def through(self, function: Callable[[float], float], values: Sequence[float]) -> Spread:
        """Of the figure that an increasing function makes of this one, whose `values` are given."""
        image = [function(value) for value in values]
        return Spread(_mean(image), min(image), max(image), function(self.low), function(self.high))

    def within(self, least: float, most: float) -> Spread:
        """The same with an interval that does not leave the range of the figure."""
        return Spread(self.mean, self.min, self.max, max(self.low, least), min(self.high, most))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float], level: float) -> Spread:
    """Mean, range and prediction interval of draws of a figure.

    Raises:
        PPNetError: as `prediction_interval`.
    """
    low, high = prediction_interval(values, level)
    return Spread(_mean(values), min(values), max(values), low, high)


def prediction_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Central interval that covers one fresh draw with probability `level`: mean +- t_{K-1} s sqrt(1 + 1/K).

    Student's t, and not order statistics, as it has any level from two draws on: of K draws in order, the widest
    interval is [min, max], whose level (K - 1) / (K + 1) is 0.78 with 8 draws and reaches 0.9 with 19. It asks for
    about normal draws; sizes and log-likelihoods are sums over, or smooth functions of, many independent masks. The
    level is that of the draws that make the interval and the fresh one together: a given interval has its own, which
    varies much when K is small.

    Args:
        values: K >= 2 draws.
        level: probability in (0, 1).

    Raises:
        PPNetError: fewer than two values, or a level outside (0, 1).
    """
    count = len(values)
    if count < 2:
        raise PPNetError(f"values: an interval needs at least 2 draws, got {count}.")
    mean = _mean(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student_t(level, count - 1) * deviation * math.sqrt(1.0 + 1.0 / count)
    return mean - half, mean + half


def student_t(level: float, freedom: int) -> float:
    """t > 0 with P(-t <= T <= t) = level for Student's T with `freedom` degrees of freedom.

    Bisection of the finite series for whole degrees of freedom in theta = atan(t / sqrt(freedom)) (Abramowitz and
    Stegun 1964, 26.7.3 and 26.7.4).

    Raises:
        PPNetError: a level outside (0, 1), or less than one degree of freedom.
    """
    if not 0.0 < level < 1.0:
        raise PPNetError(f"level: must be between 0 and 1, got {level!r}; 0.9 covers nine of ten fresh draws.")
    if freedom < 1:
        raise PPNetError(f"freedom: must be at least 1, got {freedom}.")
    low, high = 0.0, 0.5 * math.pi
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _central(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(0.5 * (low + high))


def _central(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(theta)), for theta in [0, pi/2]."""
    cosine = math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2.0 / math.pi * (theta + total) if odd else total


def _mean(values: Sequence[float]) -> float:
    # Equal values have just that mean, so that an interval without width still covers them.
    return min(max(math.fsum(values) / len(values), min(values)), max(values))
