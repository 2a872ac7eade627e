"""The figures of a report: quality against cost, quality against measured speed, and what the gates decided."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

from matplotlib.figure import Figure

from ppnet.report.maps import kept_widths, survival, thresholds
from ppnet.report.result import METRIC_NAMES, Report, SizeRow
from ppnet.report.style import Theme, canvas, headline, label_points, labels, legend, log_scale

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
    """File stem -> figure, in the order of the page. Speed figures are left out when speed was not measured."""
    makers: dict[str, Callable[[Report, Theme], Figure]] = {
        "perplexity_params": lambda r, t: against_cost(r, t, "params"),
        "perplexity_flops": lambda r, t: against_cost(r, t, "flops"),
        "perplexity_bytes": lambda r, t: against_cost(r, t, "bytes"),
    }
    if all(row.prefill_ratio is not None for row in result.rows):
        makers |= {
            "perplexity_prefill": lambda r, t: against_speed(r, t, "prefill"),
            "perplexity_decode": lambda r, t: against_speed(r, t, "decode"),
            "speedup": speedup,
        }
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
    axis.plot(x, [row.perplexity for row in rows], color=theme.main, marker="o", markersize=5, linewidth=2, zorder=4,
              label="compacted model")  # fmt: skip
    others = [entry for entry in result.comparisons if entry.get(metric)]
    for entry in others:
        axis.plot([entry[metric]], [entry["perplexity"]], color=theme.fourth, marker="D", markersize=6, linestyle="none", zorder=5)
        axis.annotate(str(entry["label"]), (entry[metric], entry["perplexity"]), xytext=(7, 0), textcoords="offset points",
                      color=theme.fourth, fontsize=9, va="center", zorder=6,
                      bbox={"facecolor": theme.background, "alpha": 0.75, "edgecolor": "none", "pad": 1.0})  # fmt: skip
    x_all = [*x, *(float(entry[metric]) for entry in others), *([a for a in at] if drawn else [])]
    log_scale(axis, "x", min(x_all), max([*x_all, dense]))
    _quality_axis(axis, theme, result, rows, [float(entry["perplexity"]) for entry in others])
    labels(axis, theme, METRIC_AXES[metric], PERPLEXITY)
    row = _example(result, metric)
    share = getattr(row, f"{metric}_fraction")
    headline(axis, theme, f"{share:.0%} of the {METRIC_NAMES[metric]}: {_times(result, row)}")
    label_points(axis, theme, [(a, row.perplexity) for a, row in zip(x, rows, strict=True)],
                 [f"{getattr(row, f'{metric}_fraction'):.0%}" for row in rows], to_the_left=True)  # fmt: skip
    legend(axis, theme, loc="upper right")
    return figure


def against_speed(result: Report, theme: Theme, phase: str) -> Figure:
    """Perplexity against measured tokens per second of the compacted model."""
    figure, (axis,) = canvas(theme)
    rows = _finite_rows(result)
    x = [getattr(row, f"{phase}_tokens_per_s") for row in rows]
    low, high = [getattr(row, f"{phase}_p20") for row in rows], [getattr(row, f"{phase}_p80") for row in rows]
    y = [row.perplexity for row in rows]
    drawn = [row for row in rows if row.draws]
    axis.errorbar(x, y, xerr=[[max(0.0, a - b) for a, b in zip(x, low, strict=True)],
                              [max(0.0, b - a) for a, b in zip(x, high, strict=True)]],
                  fmt="none", ecolor=theme.faint, elinewidth=1, capsize=2, zorder=3,
                  label="20th to 80th percentile of the rounds")  # fmt: skip
    if drawn:
        at = [getattr(row, f"{phase}_tokens_per_s") for row in drawn]
        axis.vlines(at, [row.draws_min for row in drawn], [row.draws_max for row in drawn], color=theme.second, alpha=0.55,
                    linewidth=3, zorder=2, label=f"{drawn[0].draws} mask draws: lowest to highest")  # fmt: skip
    axis.plot(x, y, color=theme.main, marker="o", markersize=5, linewidth=1.6, zorder=4, label="compacted model (median)")
    log_scale(axis, "x", min([*x, *low]), max([*x, *high]))
    _quality_axis(axis, theme, result, rows, [])
    labels(axis, theme, PHASE_AXES[phase], PERPLEXITY)
    row = _example(result, result.metric)
    word = "Prefill" if phase == "prefill" else "Decoding"
    headline(axis, theme, f"{word} {getattr(row, f'{phase}_ratio'):.2f}x as fast at {_times(result, row)}")
    label_points(axis, theme, list(zip(x, y, strict=True)), [f"{row.size:.0%}" for row in rows], to_the_left=False)
    legend(axis, theme, loc="best")
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
        y = [getattr(row, f"{phase}_ratio") for row in rows]
        values += y
        axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=2,
                  label="prefill, measured" if phase == "prefill" else "decoding, measured")  # fmt: skip
    axis.axhline(1.0, color=theme.faint, linewidth=1)
    log_scale(axis, "x", min(x), 1.0)
    log_scale(axis, "y", min([*values, 1.0]), max(values))
    labels(axis, theme, "FLOPs per token, fraction of dense", "speed, times the dense model's")
    smallest = rows[0]
    headline(axis, theme, f"{smallest.flops_fraction:.0%} of the FLOPs: prefill {smallest.prefill_ratio:.2f}x, "
                          f"decoding {smallest.decode_ratio:.2f}x as fast")  # fmt: skip
    legend(axis, theme, loc="upper right")
    return figure


def _finite_rows(result: Report) -> list[SizeRow]:
    """Rows that can be drawn: a perplexity beyond the float range stays in the tables only."""
    return [row for row in result.rows if math.isfinite(row.perplexity)]


def _bands(axis, theme: Theme, at: list[float], rows: list[SizeRow]) -> None:
    """Spread over mask draws, placed at the mean size of the draws."""
    order = sorted(range(len(rows)), key=lambda i: at[i])
    x, rows = [at[i] for i in order], [rows[i] for i in order]
    axis.fill_between(x, [row.draws_min for row in rows], [row.draws_max for row in rows], color=theme.second, alpha=0.15,
                      linewidth=0, label=f"{rows[0].draws} mask draws: lowest to highest")  # fmt: skip
    axis.fill_between(x, [row.draws_p10 for row in rows], [row.draws_p90 for row in rows], color=theme.second, alpha=0.25,
                      linewidth=0, label="10th to 90th percentile")  # fmt: skip
    axis.plot(x, [row.draws_mean for row in rows], color=theme.second, linewidth=1.6, linestyle=(0, (4, 2)), label="mean of the draws")


def _quality_axis(axis, theme: Theme, result: Report, rows: list[SizeRow], others: list[float]) -> None:
    """The perplexity axis, with the ungated model's line."""
    values = [row.perplexity for row in rows] + others
    values += [value for row in rows if row.draws for value in (row.draws_min, row.draws_max) if math.isfinite(value)]
    if result.anchor is not None:
        values.append(result.anchor)
        axis.axhline(result.anchor, color=theme.third, linewidth=1.8, linestyle=(0, (6, 2)), zorder=3,
                     label=f"ungated dense model: {result.anchor:.4g}")  # fmt: skip
    log_scale(axis, "y", min(values), max(values))


def _example(result: Report, metric: str) -> SizeRow:
    """The row that a title speaks of: the one nearest to half of what can be removed of a metric."""
    shares = [getattr(row, f"{metric}_fraction") for row in result.rows]
    middle = 0.5 * (1.0 + min(shares))
    return min(result.rows, key=lambda row: abs(getattr(row, f"{metric}_fraction") - middle))


def _times(result: Report, row: SizeRow) -> str:
    if row.anchor_ratio is not None:
        return f"{row.anchor_ratio:.2f}x the ungated perplexity"
    return f"{row.ratio:.2f}x the dense perplexity"
