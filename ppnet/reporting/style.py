"""How figures look: two themes, axes with units, ticks that read as numbers, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. The hues are those of Okabe and Ito, which colour-blind readers can tell apart."""

    name: str
    background: str
    ink: str
    faint: str
    grid: str
    main: str
    second: str
    third: str
    fourth: str

    def colormap(self) -> Colormap:
        """A sequential map (cividis) without the end that would vanish into the background."""
        low, high = (0.0, 0.93) if self.name == "light" else (0.12, 1.0)
        full = matplotlib.colormaps["cividis"]
        return LinearSegmentedColormap.from_list("sizes", [full(low + (high - low) * i / 63) for i in range(64)])


LIGHT = Theme("light", "#ffffff", "#1a1a1a", "#666666", "#e4e4e4", "#0072B2", "#D55E00", "#009E73", "#AA4499")
DARK = Theme("dark", "#16181c", "#ececec", "#a3a7ad", "#33373d", "#56B4E9", "#F0A04B", "#2FC79B", "#E08BCB")

FONT: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
    "axes.formatter.use_mathtext": False,
}


def canvas(theme: Theme, width: float = 6.2, height: float = 4.8, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` axes below each other, in inches; text stays legible at a phone's width."""
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(width, height), dpi=170, facecolor=theme.background, layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0].tolist()
    for axis in axes:
        axis.set_facecolor(theme.background)
        axis.grid(True, color=theme.grid, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=10, length=3)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
    return figure, axes


def headline(axis: Axes, theme: Theme, text: str, pad: float = 10) -> None:
    """The title says what is seen; left-aligned, at most two lines; `pad` points above the axes."""
    axis.set_title(text, loc="left", color=theme.ink, fontsize=11.5, fontweight="bold", pad=pad, wrap=True)


def labels(axis: Axes, theme: Theme, x: str, y: str) -> None:
    axis.set_xlabel(x, color=theme.ink, fontsize=11)
    axis.set_ylabel(y, color=theme.ink, fontsize=11)


def legend(axis: Axes, theme: Theme) -> None:
    """Below the axes, where no data can lie under it."""
    figure: Any = axis.figure
    figure.legend(loc="outside lower left", ncols=2, frameon=False, labelcolor=theme.ink, fontsize=9.5)


def short(value: float) -> str:
    """A number in few characters: 950, 1.2k, 34M, 0.25."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.99995 * limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def nice_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers inside [low, high] for a logarithmic axis: the finest set of steps with at most `most` ticks."""
    best: list[float] = []
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
        tuple(1 + 0.1 * i for i in range(90)),
        tuple(1 + 0.02 * i for i in range(450)),
    ):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) <= most and len(ticks) >= len(best):
            best = ticks
    return best


def log_scale(axis: Axes, which: str, low: float, high: float, most: int = 8) -> None:
    """A logarithmic axis over [low, high] with round, plainly written ticks; linear if narrower than 2x."""
    target = axis.xaxis if which == "x" else axis.yaxis
    logarithmic = low > 0 and high / low >= 2.0
    pad = (high / low) ** 0.05 if logarithmic else 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low / pad, high * pad) if logarithmic else (low - pad, high + pad)
    (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)
    target.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if logarithmic:
        (axis.set_xscale if which == "x" else axis.set_yscale)("log")
        (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)
        target.set_major_locator(FixedLocator(nice_ticks(low, high, most)))
        target.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        target.set_minor_locator(NullLocator())


def spread_out(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to `values` as possible that are at least `gap` apart and inside [low, high]."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [0.0] * len(values)
    floor = low
    for rank, i in enumerate(order):
        placed[i] = max(values[i], floor if rank else low)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def label_points(
    axis: Axes, theme: Theme, points: Sequence[tuple[float, float]], texts: Sequence[str], *, to_the_left: bool
) -> None:
    """Writes a text below each point, on its left or right, leaving out those that would touch one already written."""
    figure: Any = axis.figure
    figure.draw_without_rendering()
    taken: list[tuple[float, float]] = []
    scale = figure.dpi / 72
    for (x, y), text in zip(points, texts, strict=True):
        at = axis.transData.transform((x, y))
        if any(abs(at[0] - other[0]) < 32 * scale and abs(at[1] - other[1]) < 13 * scale for other in taken):
            continue
        taken.append((at[0], at[1]))
        axis.annotate(
            text,
            (x, y),
            xytext=(-4 if to_the_left else 4, -5),
            textcoords="offset points",
            color=theme.faint,
            fontsize=9,
            ha="right" if to_the_left else "left",
            va="top",
            annotation_clip=True,
            zorder=5,
            bbox={"facecolor": theme.background, "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
        )


def separate_rows(axis: Axes, theme: Theme, rows: int, columns: int = 0) -> None:
    """Thin lines of the background's colour between the rows (and columns) of a map."""
    for row in range(1, rows):
        axis.axhline(row - 0.5, color=theme.background, linewidth=1.5)
    for column in range(1, columns):
        axis.axvline(column - 0.5, color=theme.background, linewidth=1.5)
