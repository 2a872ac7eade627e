"""Progress with an estimate of the time left, for work that lasts longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

QUIET_SECONDS = 2.0
LOG_SECONDS = 10.0  # a log file gets one line per period; a terminal line is redrawn
REDRAW_SECONDS = 0.2


def duration(seconds: float) -> str:
    """Seconds in words: ``7 s``, ``3 min 20 s``, ``1 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Counts finished work and writes ``what: done/total, elapsed, left`` to stderr once two seconds have passed.

    Args:
        total: amount of work in any unit.
        what: the words before the numbers.
        stream: where to write; stderr by default, so that stdout stays free for results.
    """

    def __init__(self, total: int, what: str, stream: TextIO | None = None) -> None:
        self.total = max(1, total)
        self.what = what
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.done = 0
        self.start = time.monotonic()
        self.next_line = self.start + QUIET_SECONDS
        self.shown = 0

    def advance(self, amount: int = 1) -> None:
        """Adds finished work and writes a line when one is due."""
        self.done += amount
        now = time.monotonic()
        if now >= self.next_line:
            self.next_line = now + (REDRAW_SECONDS if self.terminal else LOG_SECONDS)
            self._write(now - self.start)

    def _write(self, elapsed: float) -> None:
        left = elapsed / self.done * (self.total - self.done)
        line = (
            f"{self.what}: {100 * self.done / self.total:3.0f} % ({self.done:,}/{self.total:,}), "
            f"{duration(elapsed)} elapsed, about {duration(left)} left"
        )
        if self.terminal:
            self.stream.write("\r" + line.ljust(self.shown))
            self.shown = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.stream.write("\r" + " " * self.shown + "\r")
            self.stream.flush()
