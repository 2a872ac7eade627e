"""Figures of the gates: thresholds over the price of computation, who leaves when, widths at every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from ppnet.reporting.result import KIND_NAMES, METRIC_NAMES, Report, SiteCurve
from ppnet.reporting.style import Theme, canvas, headline, labels, separate_rows, spread_out

LAMBDA_TICKS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0)
MOST_LABELS = 12  # layers that are labelled one by one
MAP_COLUMNS = 256


def thresholds(result: Report, theme: Theme) -> Figure:
    """tau of every layer against lambda, one panel per kind."""
    kinds = result.kinds
    figure, axes = canvas(theme, height=1.2 + 3.4 * len(kinds), rows=len(kinds))
    u = np.array(result.u_grid)
    half = int(np.argmin(np.abs(u - 0.5)))
    for axis, kind in zip(axes, kinds, strict=True):
        sites = [site for site in result.sites if site.kind == kind]
        colour = _layer_colours(theme, sites)
        for site in sites:
            axis.plot(u, site.tau, color=colour(site.layer), linewidth=1.8)
        low, high = min(min(site.tau) for site in sites), max(max(site.tau) for site in sites)
        margin = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)
        axis.set_xlim(0.0, 1.0)
        ticks = [value / (1.0 + value) for value in LAMBDA_TICKS] + [1.0]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _lambda_text(value)))
        labels(axis, theme, "price of computation λ (even steps of λ / (λ + 1))", "threshold τ(λ) of the importance")
        highest = max(sites, key=lambda site: site.tau[half])
        if highest.tau[half] - min(site.tau[half] for site in sites) < 0.01 * (high - low):
            text = f"{_name(kind)}: every layer has the same threshold at λ = 1"
        else:
            text = f"{_name(kind)}: layer {highest.layer} has the highest threshold at λ = 1"
        headline(axis, theme, text)
        _layer_labels(figure, axis, theme, sites, colour)
    return figure


def survival(result: Report, theme: Theme) -> Figure:
    """For every site its units in the order in which they leave, coloured by the model's size at that moment."""
    kinds = result.kinds
    counts = [sum(site.kind == kind for site in result.sites) for kind in kinds]
    figure, axes = canvas(theme, height=1.6 + sum(max(1.7, 0.28 * count + 1.1) for count in counts), rows=len(kinds))
    norm, colours = Normalize(0.0, 1.0), theme.colormap()
    image = None
    for axis, kind in zip(axes, kinds, strict=True):
        sites = sorted((site for site in result.sites if site.kind == kind), key=lambda s: s.layer)
        table = np.array([_stretched(site.leaves_at) for site in sites])
        image = axis.imshow(
            table,
            aspect="auto",
            cmap=colours,
            norm=norm,
            interpolation="nearest",
            extent=(0.0, 100.0, len(sites) - 0.5, -0.5),
        )
        axis.grid(False)
        separate_rows(axis, theme, len(sites))
        _layer_axis(axis, [site.layer for site in sites])
        labels(axis, theme, f"{KIND_NAMES.get(kind, kind)} of the layer, %, the last to leave first", "layer")
        means = {site.layer: float(np.mean(site.leaves_at)) for site in sites}
        early, late = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        text = f"{_name(kind)}: layer {early} loses most early, layer {late} keeps most longest"
        headline(axis, theme, text if early != late else f"{_name(kind)}: when each unit leaves")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.045, pad=0.02, aspect=40)
        bar.set_label(
            f"size at which the unit leaves ({METRIC_NAMES[result.metric]}, fraction of dense; 0: never)",
            color=theme.ink,
        )
        bar.ax.tick_params(colors=theme.faint, labelcolor=theme.ink)
        bar.outline.set_visible(False)
    return figure


def kept_widths(result: Report, theme: Theme) -> Figure:
    """Kept units of every layer at every size: colour is the fraction of the layer, the number is the width."""
    kinds = result.kinds
    counts = [sum(site.kind == kind for site in result.sites) for kind in kinds]
    figure, axes = canvas(theme, height=1.6 + sum(max(1.8, 0.32 * count + 1.1) for count in counts), rows=len(kinds))
    colours = theme.colormap()
    image = None
    for axis, kind in zip(axes, kinds, strict=True):
        sites = sorted((site for site in result.sites if site.kind == kind), key=lambda s: s.layer)
        widths = np.array([[row.kept[site.name] for row in result.rows] for site in sites])
        dense = np.array([[site.units] for site in sites])
        image = axis.imshow(widths / dense, aspect="auto", cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
        axis.grid(False)
        separate_rows(axis, theme, len(sites), len(result.rows))
        _layer_axis(axis, [site.layer for site in sites])
        axis.set_xticks(range(len(result.rows)), [f"{row.size:.3g}" for row in result.rows])
        labels(axis, theme, f"size asked for ({METRIC_NAMES[result.metric]}, fraction of the {result.of})", "layer")
        if len(sites) <= 24 and len(result.rows) <= 16:
            _numbers(axis, widths, widths / dense, colours)
        middle = widths[:, len(result.rows) // 2]
        span = f"{middle.min()} to {middle.max()}" if middle.min() < middle.max() else f"{middle.min()}"
        of = f"{dense.min()}" if dense.min() == dense.max() else "the layer's"
        headline(
            axis,
            theme,
            f"{_name(kind)}: {span} of {of} stay per layer at size {result.rows[len(result.rows) // 2].size:.3g}",
        )
    if image is not None:
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.045, pad=0.02, aspect=40)
        bar.set_label("fraction of the layer's units that stay", color=theme.ink)
        bar.ax.tick_params(colors=theme.faint, labelcolor=theme.ink)
        bar.outline.set_visible(False)
    return figure


def _name(kind: str) -> str:
    text = KIND_NAMES.get(kind, kind)
    return text[0].upper() + text[1:]


def _lambda_text(u: float) -> str:
    return "∞" if u >= 1.0 else f"{u / (1.0 - u):.3g}"


def _layer_colours(theme: Theme, sites: list[SiteCurve]) -> Callable[[int], Any]:
    colours, last = theme.colormap(), max(1, max(site.layer for site in sites))
    return lambda layer: colours(layer / last)


def _layer_labels(
    figure: Figure, axis: Axes, theme: Theme, sites: list[SiteCurve], colour: Callable[[int], Any]
) -> None:
    """Names the curves at their right ends; many layers get a colour bar instead."""
    if len(sites) > MOST_LABELS:
        from matplotlib.cm import ScalarMappable

        scale = ScalarMappable(Normalize(0, max(site.layer for site in sites)), theme.colormap())
        bar = figure.colorbar(scale, ax=axis, pad=0.01, aspect=30)
        bar.set_label("layer", color=theme.ink)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar.ax.tick_params(colors=theme.faint, labelcolor=theme.ink)
        bar.outline.set_visible(False)
        return
    low, high = axis.get_ylim()
    places = spread_out([site.tau[-1] for site in sites], 0.062 * (high - low), low, high)
    for site, place in zip(sites, places, strict=True):
        axis.annotate(
            f"layer {site.layer}",
            (1.0, site.tau[-1]),
            xytext=(1.02, place),
            textcoords=("axes fraction", "data"),
            color=theme.ink,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour(site.layer), "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
        )


def _layer_axis(axis: Axes, layers: list[int]) -> None:
    step = max(1, -(-len(layers) // 16))
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _stretched(values: tuple[float, ...]) -> np.ndarray:
    """Values resampled to a fixed number of columns, so that sites of different widths share one axis."""
    index = np.minimum((np.arange(MAP_COLUMNS) + 0.5) / MAP_COLUMNS * len(values), len(values) - 1).astype(int)
    return np.asarray(values)[index]


def _numbers(axis: Axes, widths: np.ndarray, shares: np.ndarray, colours: Colormap) -> None:
    size = 8.5 if widths.max() < 1000 and widths.shape[1] <= 12 else 6.5
    for (row, column), width in np.ndenumerate(widths):
        red, green, blue, _ = colours(float(shares[row, column]))
        ink = "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        axis.text(column, row, f"{width}", ha="center", va="center", fontsize=size, color=ink)
