"""How many tokens to draft before the target looks: the closed form of speculative decoding, on measured costs.

With acceptance a (the probability that a drafted token is accepted, given that all before it were) and k drafted tokens
a verification yields 1 + a + ... + aᵏ tokens on average (Leviathan et al. 2023, arXiv 2211.17192, equation 1).
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque

from ppnet.ops.linear_decode import MOST_TOKENS

# The drafted tokens and the one before them are one pass of the decode operators.
LONGEST = MOST_TOKENS - 1
# Lengths of the first rounds, which measure what a verification of so many tokens costs; later tried again now and
# then, as costs grow with the context and a length that is never used measures nothing.
TRIALS = (3, 0, 7, 1, 5)
FIRST_ROUNDS, EVERY = 2 * len(TRIALS), 32
# Weight of what was seen, per further token: the last hundred tokens count.
DECAY = 0.99


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens per verification of `length` drafted ones: (1 - a^(k+1)) / (1 - a)."""
    return sum(acceptance**i for i in range(length + 1))


def expected_speedup(acceptance: float, length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Times faster than the target alone (Leviathan et al. 2023, theorem 3.8).

    Args:
        draft_cost: of one drafted token, as a fraction of the target's pass of one token.
        verify_cost: of the target's pass of length + 1 tokens, as a fraction of that of one; 1 in the paper.
    """
    return expected_tokens(acceptance, length) / (length * draft_cost + verify_cost)


class Pace:
    """Chooses the draft length by the most tokens per second, from what rounds so far took and gave.

    Attributes:
        fixed: a length to keep to; None: choose.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.rounds = 0
        # A guess that two tokens stand for.
        self._accepted, self._rejected = 1.4, 0.6
        self._draft: deque[float] = deque(maxlen=33)
        self._verify: dict[int, deque[float]] = {}

    @property
    def acceptance(self) -> float:
        """Of the tokens seen last."""
        return self._accepted / (self._accepted + self._rejected)

    @property
    def draft_seconds(self) -> float:
        """Of one drafted token; 0 before the first."""
        return statistics.median_low(self._draft) if self._draft else 0.0

    def verify_seconds(self, tokens: int) -> float:
        """Of the target's pass of so many tokens, between measured numbers on a straight line; 0 before the first."""
        known = sorted(self._verify)
        if not known:
            return 0.0
        place = bisect.bisect_left(known, tokens)
        if place == len(known) or place == 0 or known[place] == tokens:
            return statistics.median_low(self._verify[known[min(place, len(known) - 1)]])
        low, high = known[place - 1], known[place]
        left, right = (statistics.median_low(self._verify[n]) for n in (low, high))
        return left + (right - left) * (tokens - low) / (high - low)

    def rate(self, length: int) -> float:
        """Expected tokens per second."""
        seconds = length * self.draft_seconds + self.verify_seconds(length + 1)
        return expected_tokens(self.acceptance, length) / max(seconds, 1e-9)

    def length(self, most: int) -> int:
        """Tokens to draft next, at most `most`."""
        most = max(0, min(most, LONGEST))
        if self.fixed is not None:
            return min(self.fixed, most)
        if self.rounds < FIRST_ROUNDS:
            return min(TRIALS[self.rounds % len(TRIALS)], most)
        if self.rounds % EVERY == 0:
            return min(TRIALS[self.rounds // EVERY % len(TRIALS)], most)
        return max(range(most + 1), key=self.rate)

    def observe(
        self, proposed: int, accepted: int, rejected: bool, draft_seconds: float, verify_seconds: float
    ) -> None:
        """What a round gave: tokens proposed and accepted, whether the next one was rejected, and what it took."""
        self.rounds += 1
        fade = DECAY ** (accepted + rejected)
        self._accepted = self._accepted * fade + accepted
        self._rejected = self._rejected * fade + rejected
        if proposed:
            self._draft.append(draft_seconds / proposed)
        self._verify.setdefault(proposed + 1, deque(maxlen=9)).append(verify_seconds)
