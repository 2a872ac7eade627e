"""What the gates are unsure of: K drawn masks of one size, scored alone and with their predictions averaged.

The averaged prediction is p(x) = 1/K sum_k p_k(x), the posterior predictive distribution over masks. How much the
draws disagree is the mutual information of token and mask, H(p) - 1/K sum_k H(p_k): between 0 (all draws predict the
same) and log K nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ppnet.errors import PPNetError, SizeError, UnsupportedModelError
from ppnet.evaluate.interval import Spread, spread, student_t
from ppnet.evaluate.mixture import Mixture
from ppnet.evaluate.perplexity import perplexity_of
from ppnet.evaluate.progress import Progress
from ppnet.evaluate.reliability import BINS, Prediction, Reliability, Tally
from ppnet.evaluate.tokens import Bos, Data
from ppnet.evaluate.windows import windows_of
from ppnet.families import check_decoder

if TYPE_CHECKING:
    from ppnet.plan import Plan

FRACTIONS = ("ece", "params", "flops")  # figures in [0, 1]


@dataclass(frozen=True)
class MaskPrediction(Prediction):
    """A `Prediction` under one mask.

    Attributes:
        params, flops: fractions of the dense model's.
        seed: of the draw; None for a plan that was not drawn.
    """

    params: float
    flops: float
    seed: int | None


@dataclass(frozen=True)
class Coverage:
    """Which share of fresh draws falls into the intervals that the ensemble's draws made.

    Attributes:
        draws: fresh draws.
        params, flops, perplexity: covered shares. With few draws these differ from the intervals' level by luck alone:
            by that of the fresh draws, and by that of the draws that made the interval.
    """

    draws: int
    params: float
    flops: float
    perplexity: float


@dataclass(frozen=True)
class Ensemble:
    """What was measured.

    Attributes:
        size, metric, of: what was asked for.
        u: position on the gates' cost axis at which the masks were drawn.
        level: probability with which an interval (`Spread.low`, `Spread.high`) is to cover a fresh draw.
        single: the plan that `ppnet.plan` makes, which keeps the units that the gates rank first.
        average: the mean of the draws' probabilities.
        draws: every draw alone.
        nll, perplexity, ece, params, flops: the same figures over the draws: mean, range and interval. The interval of
            `perplexity` is that of `nll`, which is closer to normal, through exp.
        mutual_information: of token and mask, mean per scored token, in nats: in [0, log K].
        coverage: what fresh draws say about the intervals, if there were any.
        bins: bins of the ECE.
        tokens, windows, documents, window, stride, bos: as in `Perplexity`.
        seconds: wall time.
    """

    size: float
    metric: str
    of: str
    u: float
    level: float
    single: MaskPrediction
    average: Prediction
    draws: tuple[MaskPrediction, ...]
    nll: Spread
    perplexity: Spread
    ece: Spread
    params: Spread
    flops: Spread
    mutual_information: float
    coverage: Coverage | None
    bins: int
    tokens: int
    windows: int
    documents: int
    window: int
    stride: int
    bos: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        drawn, params = self.perplexity, self.params
        lines = [
            f"{len(self.draws)} mask draws at u = {self.u:.4f} (size {self.size:g} in {self.metric} of the {self.of}), "
            f"{self.tokens:,} tokens",
            f"single plan: perplexity {self.single.perplexity:.4g}, ECE {self.single.ece:.4f}, "
            f"{self.single.params:.2%} of the parameters",
            f"draws: perplexity {drawn.mean:.4g} ({drawn.min:.4g} to {drawn.max:.4g}), ECE {self.ece.mean:.4f}, "
            f"{params.mean:.2%} of the parameters ({params.min:.2%} to {params.max:.2%})",
            f"average of the draws: perplexity {self.average.perplexity:.4g}, ECE {self.average.ece:.4f}, "
            f"mutual information {self.mutual_information:.4f} nats per token",
            f"{self.level:.0%} of fresh draws are expected at perplexity {drawn.low:.4g} to {drawn.high:.4g}, "
            f"{params.low:.2%} to {params.high:.2%} of the parameters",
        ]
        if self.coverage is not None:
            found = self.coverage
            lines[-1] += f"; {found.perplexity:.0%} and {found.params:.0%} of {found.draws} others are there"
        return "\n".join(lines)


def ensemble(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    size: float,
    *,
    metric: str = "params",
    of: str = "model",
    draws: int = 8,
    level: float = 0.9,
    coverage_draws: int = 0,
    bins: int = BINS,
    seed: int = 0,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: Bos = "auto",
    separator: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Ensemble:
    """Draws masks at the u of a size and scores text under each, under their average, and under the plan of that size.

    Args:
        model: a causal language model with gates (`ppnet.wrap` or `ppnet.load`); its size and modes return afterwards.
        tokenizer, data: as for `ppnet.evaluate.perplexity`.
        size, metric, of: as for `ppnet.plan`; below the dense size.
        draws: K, masks whose predictions are averaged.
        level: probability with which the intervals are to cover a fresh draw.
        coverage_draws: further masks, of other seeds, on which the intervals are tried.
        bins: equal bins of confidence for the expected calibration error.
        seed: the draws are those of ``seed .. seed + draws - 1``, the fresh ones those that follow; 0 gives the draws
            that `ppnet.report` scores at the same size.
        window, stride, bos, separator, max_tokens: as for `ppnet.evaluate.perplexity`.
        batch_size: most windows per forward pass; fewer where the logits would exceed 512 MiB in float32. Masks change
            ``draws + coverage_draws + 1`` times per batch, which gathers the kept weights each time.
        progress: write progress to stderr when it takes longer than two seconds.

    Returns:
        Ensemble

    Raises:
        UnsupportedModelError: the model is an encoder, or has no gates.
        SizeError: as `ppnet.plan`; or the dense size, where there is nothing to draw.
        DataError: as `ppnet.evaluate.perplexity`.
        PPNetError: fewer than two draws, a level outside (0, 1), no bins, predictions that are NaN, a model that is
            held dense (`puppet.dense()`).
    """
    # Imported here: these modules import others of this package.
    from ppnet.size import plan
    from ppnet.wrap import engine_of

    check_decoder(model, "predictions of next tokens")
    _check_gates(model)
    _check_numbers(draws, coverage_draws, level, bins)
    engine = engine_of(model)
    if engine.force_dense:
        raise PPNetError("model: is inside puppet.dense(), where every size is dense; measure outside of it.")
    single = plan(model, size, metric=metric, of=of)
    if single.is_dense():
        raise SizeError(f"size: {size!r} keeps every unit, so there is no mask to draw; ask for less, e.g. 0.5.")
    windows = windows_of(
        model,
        tokenizer,
        data,
        window=window,
        stride=stride,
        batch_size=batch_size,
        bos=bos,
        separator=separator,
        max_tokens=max_tokens,
    )
    start = time.perf_counter()
    seeds = range(seed, seed + draws + coverage_draws)
    plans = [engine.puppet.draw_plan(single.u, number) for number in seeds]
    drawn, fresh = plans[:draws], plans[draws:]
    sums = Mixture(draws, coverage_draws, bins)
    with Progress(windows.tokens * (1 + len(plans)), "ensemble, tokens") as report:
        advance = report.advance if progress else _silent
        sums.score(model, engine, windows.items, (single, drawn, fresh), batch_size, advance)
    scored = [_under_mask(*each) for each in zip(sums.draws, drawn, seeds, strict=False)]
    over = {name: spread([getattr(draw, name) for draw in scored], level) for name in ("nll", *FRACTIONS)}
    average = sums.average.result()
    return Ensemble(
        size=float(size),
        metric=metric,
        of=of,
        u=single.u,
        level=level,
        single=_under_mask(sums.single, single, None),
        average=average,
        draws=tuple(scored),
        nll=over["nll"],
        perplexity=over["nll"].through(perplexity_of, [draw.nll for draw in scored]),
        **{name: over[name].within(0.0, 1.0) for name in FRACTIONS},
        # Rounding alone can take a spread of nothing below 0.
        mutual_information=max(0.0, average.entropy - math.fsum(draw.entropy for draw in scored) / draws),
        coverage=_coverage(over, fresh, [total / windows.tokens for total in sums.fresh]) if fresh else None,
        bins=bins,
        tokens=windows.tokens,
        windows=len(windows.items),
        documents=windows.documents,
        window=windows.length,
        stride=windows.stride,
        bos=windows.bos,
        seconds=time.perf_counter() - start,
    )


def _check_gates(model: nn.Module) -> None:
    from ppnet.wrap import is_wrapped

    if not is_wrapped(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} carries no gates, so there are no masks to draw; wrap it with "
            "ppnet.wrap(model) and train, or load a model with gates (ppnet.load)."
        )


def _check_numbers(draws: int, coverage_draws: int, level: float, bins: int) -> None:
    if draws < 2:
        raise PPNetError(f"draws: must be at least 2, got {draws}; one draw has no spread.")
    if coverage_draws < 0:
        raise PPNetError(f"coverage_draws: must be at least 0, got {coverage_draws}.")
    student_t(level, draws - 1)
    Reliability(bins)


def _silent(tokens: int) -> None:
    """Progress that nobody wants to see."""


def _fractions(plan: Plan) -> dict[str, float]:
    return {metric: plan.cost.of(metric) / plan.dense_cost.of(metric) for metric in ("params", "flops")}


def _under_mask(tally: Tally, plan: Plan, seed: int | None) -> MaskPrediction:
    return MaskPrediction(**asdict(tally.result()), **_fractions(plan), seed=seed)


def _coverage(over: Mapping[str, Spread], fresh: Sequence[Plan], nll: Sequence[float]) -> Coverage:
    """Shares of fresh draws, given by their plans and NLLs, in the intervals."""
    costs = [_fractions(plan) for plan in fresh]

    def share(name: str, values: Sequence[float]) -> float:
        return sum(over[name].covers(value) for value in values) / len(values)

    return Coverage(
        draws=len(fresh),
        params=share("params", [cost["params"] for cost in costs]),
        flops=share("flops", [cost["flops"] for cost in costs]),
        perplexity=share("nll", nll),
    )
