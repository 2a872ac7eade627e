"""The figures of a report: quality against cost, quality against measured speed, and what the gates decided."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppnet.reporting.maps import kept_widths, survival, thresholds
from ppnet.reporting.result import METRIC_NAMES, Report, SizeRow
from ppnet.reporting.style import Theme, canvas, headline, label_points, labels, legend, log_scale

METRIC_AXES = {
    "params": "parameters of the compacted model",
    "flops": "FLOPs per token of the compacted model (forward pass)",
    "bytes": "bytes of the compacted model's weights",
}
PHASE_AXES = {
    "prefill": "measured prefill speed, tokens per second",
    "decode": "measured decoding speed, tokens per second",
}
PERPLEXITY = "perplexity on held-out text (lower is better)"


def figures(result: Report, theme: Theme) -> dict[str, Figure]:
    """File stem -> figure, in the order of the page; without those of speed or quality where nothing was measured."""
    makers: dict[str, Callable[[Report, Theme], Figure]] = {}
    scored, timed = bool(_finite_rows(result)), all(row.prefill_ratio is not None for row in result.rows)
    if scored:
        for metric in METRIC_AXES:
            makers[f"perplexity_{metric}"] = partial(against_cost, metric=metric)
    if scored and timed:
        for phase in PHASE_AXES:
            makers[f"perplexity_{phase}"] = partial(against_speed, phase=phase)
    if timed:
        makers["speedup"] = speedup
    makers |= {"thresholds": thresholds, "survival": survival, "kept_widths": kept_widths}
    return {name: make(result, theme) for name, make in makers.items()}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return out.getvalue()


def against_cost(result: Report, theme: Theme, metric: str) -> Figure:
    """Perplexity against parameters, FLOPs or bytes, with the spread over mask draws."""
    figure, (axis,) = canvas(theme)
    rows = _finite_rows(result)
    x = [float(getattr(row, metric)) for row in rows]
    dense = float(result.dense[metric])
    drawn = [row for row in rows if row.draws]
    if drawn:
        at = [getattr(row, f"draws_{metric}_fraction") * dense for row in drawn]
        _bands(axis, theme, at, drawn)
    axis.plot(
        x,
        [row.perplexity for row in rows],
        color=theme.main,
        marker="o",
        markersize=5,
        linewidth=2,
        zorder=4,
        label="compacted model",
    )
    others = [entry for entry in result.comparisons if entry.get(metric)]
    for entry in others:
        axis.plot(
            [entry[metric]],
            [entry["perplexity"]],
            color=theme.fourth,
            marker="D",
            markersize=6,
            linestyle="none",
            zorder=5,
        )
        axis.annotate(
            str(entry["label"]),
            (entry[metric], entry["perplexity"]),
            xytext=(7, 0),
            textcoords="offset points",
            color=theme.fourth,
            fontsize=9,
            va="center",
            zorder=6,
            bbox={"facecolor": theme.background, "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
        )
    x_all = [*x, *(float(entry[metric]) for entry in others), *([a for a in at] if drawn else [])]
    log_scale(axis, "x", min(x_all), max([*x_all, dense]))
    _quality_axis(axis, theme, result, rows, [float(entry["perplexity"]) for entry in others])
    labels(axis, theme, METRIC_AXES[metric], PERPLEXITY)
    row = _example(result, metric)
    share = getattr(row, f"{metric}_fraction")
    headline(axis, theme, f"{share:.0%} of the {METRIC_NAMES[metric]}: {_times(result, row)}")
    label_points(
        axis,
        theme,
        [(a, row.perplexity) for a, row in zip(x, rows, strict=True)],
        [f"{getattr(row, f'{metric}_fraction'):.0%}" for row in rows],
        to_the_left=True,
    )
    legend(axis, theme)
    return figure


def against_speed(result: Report, theme: Theme, phase: str) -> Figure:
    """Perplexity against measured tokens per second of the compacted model."""
    figure, (axis,) = canvas(theme)
    rows = _finite_rows(result)
    x = _column(rows, f"{phase}_tokens_per_s")
    low, high = _column(rows, f"{phase}_p20"), _column(rows, f"{phase}_p80")
    y = [row.perplexity for row in rows]
    drawn = [row for row in rows if row.draws]
    axis.errorbar(
        x,
        y,
        xerr=[
            [max(0.0, a - b) for a, b in zip(x, low, strict=True)],
            [max(0.0, b - a) for a, b in zip(x, high, strict=True)],
        ],
        fmt="none",
        ecolor=theme.faint,
        elinewidth=1,
        capsize=2,
        zorder=3,
        label="20th to 80th percentile of the rounds",
    )
    if drawn:
        at = _column(drawn, f"{phase}_tokens_per_s")
        axis.vlines(
            at,
            _column(drawn, "draws_min"),
            _column(drawn, "draws_max"),
            color=theme.second,
            alpha=0.55,
            linewidth=3,
            zorder=2,
            label=f"{drawn[0].draws} mask draws: lowest to highest",
        )
    axis.plot(
        x, y, color=theme.main, marker="o", markersize=5, linewidth=1.6, zorder=4, label="compacted model (median)"
    )
    log_scale(axis, "x", min([*x, *low]), max([*x, *high]))
    _quality_axis(axis, theme, result, rows, [])
    labels(axis, theme, PHASE_AXES[phase], PERPLEXITY)
    row = _example(result, result.metric)
    word = "Prefill" if phase == "prefill" else "Decoding"
    headline(axis, theme, f"{word} {getattr(row, f'{phase}_ratio'):.2f}x as fast at {_times(result, row)}")
    label_points(axis, theme, list(zip(x, y, strict=True)), [f"{row.size:.0%}" for row in rows], to_the_left=False)
    legend(axis, theme)
    return figure


def speedup(result: Report, theme: Theme) -> Figure:
    """Measured speed over dense against the FLOPs kept, beside what the FLOPs alone would promise."""
    figure, (axis,) = canvas(theme)
    rows = sorted(result.rows, key=lambda row: row.flops_fraction)
    x = [row.flops_fraction for row in rows]
    ideal = [1.0 / share for share in x]
    axis.plot(x, ideal, color=theme.faint, linestyle=(0, (4, 3)), linewidth=1.6, label="dense FLOPs / kept FLOPs")
    series = [("prefill", theme.main, "o"), ("decode", theme.second, "s")]
    values = list(ideal)
    for phase, colour, marker in series:
        y = _column(rows, f"{phase}_ratio")
        values += y
        axis.plot(
            x,
            y,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2,
            label="prefill, measured" if phase == "prefill" else "decoding, measured",
        )
    axis.axhline(1.0, color=theme.faint, linewidth=1)
    log_scale(axis, "x", min(x), 1.0)
    log_scale(axis, "y", min([*values, 1.0]), max(values))
    labels(axis, theme, "FLOPs per token, fraction of dense", "speed, times the dense model's")
    smallest = rows[0]
    headline(
        axis,
        theme,
        f"{smallest.flops_fraction:.0%} of the FLOPs: prefill {smallest.prefill_ratio:.2f}x, "
        f"decoding {smallest.decode_ratio:.2f}x as fast",
    )
    legend(axis, theme)
    return figure


def _finite_rows(result: Report) -> list[SizeRow]:
    """Rows that can be drawn: a perplexity beyond the float range stays in the tables only."""
    return [row for row in result.rows if math.isfinite(row.perplexity)]


def _column(rows: Sequence[SizeRow], name: str) -> list[float]:
    """One field of several rows, none of which is None."""
    return [float(getattr(row, name)) for row in rows]


def _bands(axis: Axes, theme: Theme, at: list[float], rows: list[SizeRow]) -> None:
    """Spread over mask draws, placed at the mean size of the draws."""
    order = sorted(range(len(rows)), key=lambda i: at[i])
    x, rows = [at[i] for i in order], [rows[i] for i in order]
    axis.fill_between(
        x,
        _column(rows, "draws_min"),
        _column(rows, "draws_max"),
        color=theme.second,
        alpha=0.15,
        linewidth=0,
        label=f"{rows[0].draws} mask draws: lowest to highest",
    )
    axis.fill_between(
        x,
        _column(rows, "draws_p10"),
        _column(rows, "draws_p90"),
        color=theme.second,
        alpha=0.25,
        linewidth=0,
        label="10th to 90th percentile",
    )
    axis.plot(
        x,
        _column(rows, "draws_mean"),
        color=theme.second,
        linewidth=1.6,
        linestyle=(0, (4, 2)),
        label="mean of the draws",
    )


def _quality_axis(axis: Axes, theme: Theme, result: Report, rows: list[SizeRow], others: list[float]) -> None:
    """The perplexity axis, with the ungated model's line."""
    values = [row.perplexity for row in rows] + others
    drawn = [row for row in rows if row.draws]
    values += [value for value in _column(drawn, "draws_min") + _column(drawn, "draws_max") if math.isfinite(value)]
    if result.anchor is not None:
        values.append(result.anchor)
        axis.axhline(
            result.anchor,
            color=theme.third,
            linewidth=1.8,
            linestyle=(0, (6, 2)),
            zorder=3,
            label=f"ungated dense model: {result.anchor:.4g}",
        )
    log_scale(axis, "y", min(values), max(values))


def _example(result: Report, metric: str) -> SizeRow:
    """The row that a title speaks of: the one nearest to half of what can be removed of a metric."""
    rows = _finite_rows(result)
    middle = 0.5 * (1.0 + min(getattr(row, f"{metric}_fraction") for row in rows))
    return min(rows, key=lambda row: abs(getattr(row, f"{metric}_fraction") - middle))


def _times(result: Report, row: SizeRow) -> str:
    if row.anchor_ratio is not None:
        return f"{row.anchor_ratio:.2f}x the ungated perplexity"
    return f"{row.ratio:.2f}x the dense perplexity"
