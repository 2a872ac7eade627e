"""Scoring under many masks at once, batch by batch: every plan alone, and the mean of the drawn ones' probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ppnet.errors import PPNetError
from ppnet.evaluate.model_state import device_of, vocabulary_of
from ppnet.evaluate.reliability import Tally
from ppnet.evaluate.windows import MAX_LOGITS, Batch, Window, batches
from ppnet.modes import evaluating

if TYPE_CHECKING:
    from ppnet.plan import Plan
    from ppnet.skip import Engine

CHUNK = 2**23  # elements of the distributions that are worked on at once: 32 MiB in float32


class Mixture:
    """Sums over the scored tokens of all windows.

    Attributes:
        single: of the plan that is scored alone.
        draws: of each of the K plans that are averaged.
        average: of the mean of their probabilities.
        fresh: summed NLL of each of the plans that are scored beside them.
    """

    def __init__(self, draws: int, fresh: int, bins: int) -> None:
        self.single, self.average = Tally(bins), Tally(bins)
        self.draws = [Tally(bins) for _ in range(draws)]
        self.fresh = [0.0] * fresh

    def score(
        self,
        model: nn.Module,
        engine: Engine,
        windows: list[Window],
        plans: tuple[Plan, Sequence[Plan], Sequence[Plan]],
        batch_size: int,
        advance: Callable[[int], None],
    ) -> None:
        """Scores windows under all plans: the single one, the K, the fresh ones. The size and modes return afterwards.

        Memory beyond the forward pass: the sum of the K distributions of one batch, at most half of MAX_LOGITS.

        Args:
            advance: called with the tokens of every forward pass.

        Raises:
            PPNetError: predictions that are NaN.
        """
        with evaluating(model), _size_kept(engine):
            for batch in batches(windows, batch_size, vocabulary_of(model), MAX_LOGITS // 2):
                self._add(_Pass(model, engine, batch, windows, advance), *plans)

    def _add(self, batch: _Pass, single: Plan, drawn: Sequence[Plan], fresh: Sequence[Plan]) -> None:
        for where, log_p in batch.log_probabilities(single):
            self.single.add(batch.of_targets(where, log_p), log_p.exp(), batch.targets[where])
        # The targets' likelihoods are averaged in log space, as they may underflow. The whole distributions, of which
        # only the largest probability and the entropy are wanted, need not be: p log p of what underflows is nothing.
        log_likelihoods = torch.empty(len(drawn), len(batch.targets), dtype=torch.float64, device=batch.targets.device)
        total = torch.zeros(0, device=batch.targets.device)
        for k, plan in enumerate(drawn):
            for where, log_p in batch.log_probabilities(plan):
                log_likelihoods[k, where] = batch.of_targets(where, log_p)
                probabilities = log_p.exp()
                self.draws[k].add(log_likelihoods[k, where], probabilities, batch.targets[where])
                if not total.numel():
                    total = probabilities.new_zeros(len(batch.targets), probabilities.shape[-1])
                total[where] += probabilities
        mean = torch.logsumexp(log_likelihoods, 0) - math.log(len(drawn))
        for where in _chunks(len(total), total.shape[-1]):
            self.average.add(mean[where], total[where] / len(drawn), batch.targets[where])
        for index, plan in enumerate(fresh):
            for where, log_p in batch.log_probabilities(plan):
                self.fresh[index] -= float(batch.of_targets(where, log_p).sum())


class _Pass:
    """One batch under any plan.

    Attributes:
        targets: the true tokens, int64 ``(n,)``, in the order in which `log_probabilities` tells of them.
    """

    def __init__(
        self, model: nn.Module, engine: Engine, batch: Batch, windows: list[Window], advance: Callable[[int], None]
    ) -> None:
        self.model, self.engine, self.advance = model, engine, advance
        self.ids = batch.ids.to(device_of(model))
        self.spans = [(windows[row].first, len(windows[row].ids)) for row in batch.rows]
        self.targets = torch.cat([self.ids[row, first:last] for row, (first, last) in enumerate(self.spans)])

    def log_probabilities(self, plan: Plan) -> Iterator[tuple[slice, Tensor]]:
        """A chunk of the scored tokens at a time: which of `targets`, and their distributions, float32 ``(n, V)``.

        Raises:
            PPNetError: NaN.
        """
        self.engine.fix(plan)
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        at = 0
        for row, (first, last) in enumerate(self.spans):
            for where in _chunks(last - first, logits.shape[-1]):
                found = torch.log_softmax(logits[row, first - 1 : last - 1][where].float(), -1)
                if found.isnan().any():
                    raise PPNetError(
                        "model: its predictions are NaN; the weights or gates are damaged, or overflow in this dtype."
                    )
                yield slice(at, at + len(found)), found
                at += len(found)
        self.advance(len(self.targets))

    def of_targets(self, where: slice, log_p: Tensor) -> Tensor:
        """Log-likelihoods of the true tokens: float64 ``(n,)``."""
        return log_p.gather(-1, self.targets[where, None]).squeeze(-1).double()


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, each of at most `CHUNK` elements, or of one row."""
    step = max(1, CHUNK // width)
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


@contextmanager
def _size_kept(engine: Engine) -> Iterator[None]:
    """The size that is set returns, whatever is set and raised inside."""
    before = engine.fixed
    try:
        yield
    finally:
        engine.fix(before)
