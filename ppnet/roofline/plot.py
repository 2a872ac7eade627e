"""The roofline as a figure: what the machine sustains, where each operator stands, and how far below the roof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ppnet.reporting.style import LIGHT, Theme, canvas, headline, labels, log_scale
from ppnet.roofline.case import Row
from ppnet.roofline.result import Result

MARKERS = "osD^vPX<>h"
# More hues than a theme has: Okabe and Ito, Paul Tol's vibrant.
HUES = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#33BBEE", "#882255", "#555555", "#117733", "#EE3377")
WIDTH, ROOF_HEIGHT, ROW_HEIGHT = 8.6, 5.2, 0.2  # inches


def roofline(result: Result, theme: Theme = LIGHT) -> Figure:
    """Above: GFLOP/s against arithmetic intensity under the measured ceilings, for cases with arithmetic.
    Below: every case's share of its ideal time, ours (filled) beside the best baseline (hollow)."""
    rows = result.rows
    list_height = 1.3 + ROW_HEIGHT * (len(rows) + len(_operators(rows)))
    figure, (top, bottom) = canvas(theme, WIDTH, ROOF_HEIGHT + list_height, rows=2)
    grid = top.get_gridspec()
    assert grid is not None
    grid.set_height_ratios([ROOF_HEIGHT, list_height])
    # With more operators than hues the markers move on by one in each round: no two look alike.
    looks = {
        name: (HUES[i % len(HUES)], MARKERS[(i + i // len(HUES)) % len(MARKERS)])
        for i, name in enumerate(_operators(rows))
    }
    _roof(top, theme, result, looks)
    _shares(bottom, theme, rows, looks)
    return figure


def _operators(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.operator for row in rows))


def _ceiling(result: Result, kind: str) -> float | None:
    figure = result.machine["ceilings"].get(kind)
    return figure["value"]["median"] if figure else None


def _roof(axis: Axes, theme: Theme, result: Result, looks: dict[str, tuple[str, str]]) -> None:
    rows = [row for row in result.rows if row.flops > 0]
    read, copy = _ceiling(result, "read"), _ceiling(result, "copy")
    flat = {kind: value for kind in ("matmul fp32", "matmul bf16") if (value := _ceiling(result, kind))}
    assert read and copy and flat
    intensities = [row.flops / row.bytes for row in rows]
    low, high = min([0.1, *intensities]), max([12 * max(flat.values()) / min(read, copy), *intensities])
    rates = [rate for row in rows for rate in _rates(result, row)]
    log_scale(axis, "x", low, high)
    log_scale(axis, "y", min([low * min(read, copy) / 3, *rates]), max(flat.values()) * 1.6)
    left, right = axis.get_xlim()
    for bandwidth, dash in zip((read, copy), ("-", (0, (5, 2))), strict=True):
        knee = max(flat.values()) / bandwidth
        axis.plot([left, knee], [left * bandwidth, max(flat.values())], color=theme.ink, linestyle=dash, linewidth=1.4)
    for kind, value in flat.items():
        axis.plot([value / max(read, copy), right], [value, value], color=theme.ink, linewidth=1.4)
        axis.annotate(
            f"{kind} {value:,.0f} GFLOP/s",
            (right, value),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=theme.ink,
            zorder=6,
            bbox={"facecolor": theme.background, "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
        )
    for row in rows:
        colour, marker = looks[row.operator]
        at = row.flops / row.bytes
        points = _rates(result, row)
        axis.plot([at] * len(points), points, color=colour, linewidth=0.9, alpha=0.6, zorder=3)
        for index, y in enumerate(points):
            face = colour if index == 0 else theme.background
            axis.plot([at], [y], marker=marker, color=colour, markerfacecolor=face, markersize=6, zorder=5 - index)
    labels(axis, theme, "arithmetic intensity: FLOPs per byte that must move", "GFLOP/s, at the ceilings drawn")
    slopes: dict[str, Any] = {f"read bandwidth, {read:.0f} GB/s": "-", f"copy bandwidth, {copy:.0f} GB/s": (0, (5, 2))}
    hollow = {"marker": "o", "color": theme.faint, "markerfacecolor": theme.background}
    handles: list[Any] = [
        *(_key(name, color=looks[name][0], marker=looks[name][1]) for name in _operators(rows)),
        _key("best baseline", **hollow),
        *(Line2D([], [], color=theme.ink, linestyle=dash, label=name) for name, dash in slopes.items()),
    ]
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    axis.legend(handles=handles, frameon=False, fontsize=9, labelcolor=theme.ink, **place)
    setting = result.machine
    where = f"{setting['processor']}, {setting['threads']} threads, {setting['isa']}, torch {setting['torch']}"
    headline(axis, theme, "Operators under the ceilings measured here", pad=20)
    axis.text(0, 1.01, where, transform=axis.transAxes, color=theme.faint, fontsize=9, va="bottom")


def _key(name: str, **look: Any) -> Line2D:
    return Line2D([], [], linestyle="none", label=name, **look)


def _rates(result: Result, row: Row) -> list[float]:
    """GFLOP/s of ours and of the best baseline, as they would be under the ceiling drawn: that of the case's own rounds
    may be another one, and a point is to be as far below its roof as it was measured to be."""
    drawn = _ceiling(result, f"matmul {row.dtype}" if row.bound == "matmul" else row.bound) or row.ceiling.median
    shares = [share for share in (row.share.median, row.best_share) if share is not None]
    return [share * row.flops / row.ideal * drawn / row.ceiling.median * 1e-9 for share in shares]


def _shares(axis: Axes, theme: Theme, rows: Sequence[Row], looks: dict[str, tuple[str, str]]) -> None:
    y, ticks, texts = 0.0, [], []
    for name in _operators(rows):
        ticks.append(y)
        texts.append(name)
        y += 1
        for row in (row for row in rows if row.operator == name):
            colour, marker = looks[name]
            ours = 100 * row.share.median
            axis.plot([100 * row.share.p20, 100 * row.share.p80], [y, y], color=colour, linewidth=3.5, alpha=0.35)
            if row.best_share is not None:
                theirs = 100 * row.best_share
                axis.plot([theirs, ours], [y, y], color=colour, linewidth=0.9, alpha=0.6)
                axis.plot([theirs], [y], marker=marker, color=colour, markerfacecolor=theme.background, markersize=6)
            axis.plot([ours], [y], marker=marker, color=colour, markersize=6, zorder=5)
            ticks.append(y)
            texts.append(f"{row.variant}, {row.dtype}  ({row.bound})")
            y += 1
    axis.axvline(100, color=theme.ink, linewidth=1.4)
    axis.set_yticks(ticks, texts)
    for text, label in zip(texts, axis.get_yticklabels(), strict=True):
        if text in looks:
            label.set_color(looks[text][0])
            label.set_fontweight("bold")
        label.set_fontsize(9)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.set_ylim(max(y, 1) - 0.4, -0.6)
    shown = [100 * share for row in rows for share in (row.share.p80, row.best_share or 0.0)]
    axis.set_xlim(0, max([105.0, *(1.03 * share for share in shown)]))
    labels(axis, theme, "% of the ideal time that the ceiling in brackets allows (sampled in the same rounds)", "")
    headline(axis, theme, "Share of the ideal: ours filled, best baseline hollow")
