"""Checks of plain arguments, with messages that name the argument, its value, and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ppnet.errors import PPNetError


def integer(
    name: str, value: Any, least: int | None = None, error: type[PPNetError] = PPNetError, hint: str = ""
) -> int:
    """`value` as an int.

    Raises:
        PPNetError (or the given class): not an integer, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise error(f"{name}: must be an integer{bound}{hint}, got {value!r}.")
    return int(value)


def number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    error: type[PPNetError] = PPNetError,
    hint: str = "",
) -> float:
    """`value` as a finite float.

    Raises:
        PPNetError (or the given class): not a finite number in [low, high].
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not math.isfinite(value)
        or not low <= float(value) <= high
    ):
        allowed = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise error(f"{name}: must be a finite number {allowed}{hint}, got {value!r}.")
    return float(value)


def renamed(error: PPNetError, argument: str, *inner: str) -> PPNetError:
    """The same error, speaking of the caller's argument instead of a callee's."""
    text = str(error)
    for name in inner:
        if text.startswith(f"{name}:"):
            text = f"{argument}{text[len(name) :]}"
    return type(error)(text)
