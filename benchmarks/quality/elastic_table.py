"""Table and plot of the study "elastic": quality at every size over that of the model without gates."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from ppnet.reporting.style import LIGHT, canvas, headline, labels, legend, log_scale

PLOTTED = (
    "alone", "paper", "matformer", "mama healed", "retrofit prefix rising healed", "retrofit prefix rising",
    "scratch rising",
)  # fmt: skip
# Ways to spend more or less on the gate phase.
TRADED = (
    "retrofit mama", "retrofit prefix", "retrofit prefix rising", "retrofit prefix distill 0", "retrofit prefix log",
    "retrofit prefix sandwich 1", "retrofit prefix sandwich 2", "retrofit prefix log sandwich 3",
)  # fmt: skip
LARGE = 0.3  # sizes from here up are the first panel's
HIGHEST = 4.0  # of the plot
Rows = list[dict[str, Any]]


def values(rows: Rows, run: str, fraction: float) -> dict[int, float]:
    """NLL by seed. At the full size, what was made from the dense model without touching it has the dense model's."""
    found = {row["seed"]: row["value"] for row in rows if row["run"] == run and row.get("fraction") == fraction}
    if fraction == 1.0 and not found:
        own = {row["seed"] for row in rows if row["run"] == run}
        return {seed: value for seed, value in values(rows, "dense", 1.0).items() if seed in own} if own else {}
    return found


def ratios(rows: Rows, run: str, fraction: float) -> list[float]:
    """Perplexity over that of the dense model, by seed."""
    dense = values(rows, "dense", 1.0)
    return [math.exp(value - dense[seed]) for seed, value in values(rows, run, fraction).items() if seed in dense]


def area(curve: dict[float, float]) -> float:
    """Mean of a curve over the logarithm of the fraction, by trapezoids."""
    at = sorted(curve)
    total = sum((math.log(b) - math.log(a)) * (curve[a] + curve[b]) / 2 for a, b in pairwise(at))
    return total / (math.log(at[-1]) - math.log(at[0]))


def training(rows: Rows, run: str, key: str) -> float | None:
    """What training the run took, mean over seeds; all its models together."""
    own = [row for row in rows if row.get("what") == "training" and (row["run"] == run or row.get("part_of") == run)]
    seeds = {row["seed"] for row in own}
    return sum(row[key] for row in own) / len(seeds) if own else None


def table(recipe: dict[str, Any], rows: Rows, fractions: tuple[float, ...]) -> str:
    """Markdown: mean NLL over seeds and how far above the models trained alone, the area, what training took."""
    dense = values(rows, "dense", 1.0)
    shape = ", ".join(f"{name} {recipe[name]}" for name in ("width", "neurons", "layers", "heads"))
    step = recipe["batch"] * recipe["length"]
    before = "a trained model" if "pretrained" in recipe else f"{recipe['steps'] * step:,} training tokens"
    lines = [
        f"## {recipe['subject']}",
        "",
        f"{shape}; {before}, retrofits {recipe['retrofit_steps'] * step:,} tokens more. NLL at fractions of the gated "
        "FLOPs, mean over seeds; in brackets, per cent above the dense model of that size trained alone, and the "
        f"means of these over the sizes from {LARGE:g} up and below. Area: mean "
        "perplexity ratio to the dense model over the logarithm of the fraction. Seconds and TFLOPs of training, after "
        "the dense model's where it is a retrofit.",
        "",
        f"| run (seeds) | {' | '.join(f'{fraction:g}' for fraction in fractions)} | from {LARGE:g} up | below | area "
        "| seconds | TFLOPs |",
        f"|---|{'---:|' * (len(fractions) + 5)}",
    ]
    for run in dict.fromkeys(row["run"] for row in rows if "fraction" in row):
        cells, curve = [], {}
        for fraction in fractions:
            found, above = values(rows, run, fraction), above_alone(rows, run, (fraction,))
            cell = f"{statistics.mean(found.values()):.3f}" if found else ""
            if above is not None and run != "alone":
                cell += f" ({above:+.1f})"
            cells.append(cell)
            if found and dense:
                curve[fraction] = statistics.mean(ratios(rows, run, fraction))
        seeds = max(len(values(rows, run, fraction)) for fraction in fractions)
        whole = f"{area(curve):.3f}" if len(curve) == len(fractions) else ""
        seconds, flops = training(rows, run, "training_seconds"), training(rows, run, "training_flops")
        took = " | " if seconds is None or flops is None else f"{seconds:.0f} | {flops / 1e12:.2f}"
        means = [above_alone(rows, run, part) if run != "alone" else None for part in panels(fractions)]
        cells += ["" if mean is None else f"{mean:+.1f}" for mean in means]
        lines.append(f"| {run} ({seeds}) | {' | '.join(cells)} | {whole} | {took} |")
    return "\n".join(lines) + "\n"


def plot(recipe: dict[str, Any], rows: Rows, fractions: tuple[float, ...], path: Path) -> None:
    """Perplexity ratio to the dense model against the fraction of the gated FLOPs, bands over seeds."""
    figure, (axis,) = canvas(LIGHT, height=5.6)
    colours = (LIGHT.ink, LIGHT.faint, LIGHT.fourth, LIGHT.second, LIGHT.third, LIGHT.main, LIGHT.main)
    highest = 1.0
    for run, colour in zip(PLOTTED, colours, strict=True):
        at = [fraction for fraction in fractions if ratios(rows, run, fraction)]
        if len(at) < 2:
            continue
        found = [ratios(rows, run, fraction) for fraction in at]
        style = "--" if run.startswith("scratch") else "-"
        axis.plot(at, [statistics.mean(v) for v in found], style, color=colour, marker="o", markersize=4, label=run)
        axis.fill_between(at, [min(v) for v in found], [max(v) for v in found], color=colour, alpha=0.15, lw=0)
        highest = max(highest, *(statistics.mean(v) for v in found))
    log_scale(axis, "x", min(fractions), 1.0)
    log_scale(axis, "y", 1.0, max(2.0, min(highest, HIGHEST)))
    headline(axis, LIGHT, f"{recipe['subject']}: quality at every size")
    labels(axis, LIGHT, "fraction of the gated FLOPs", "perplexity / dense model without gates")
    legend(axis, LIGHT)
    figure.savefig(path)


def above_alone(rows: Rows, run: str, fractions: tuple[float, ...]) -> float | None:
    """Mean over sizes and seeds of the per cent of NLL above the dense model of that size trained alone."""
    found: list[float] = []
    for fraction in fractions:
        alone = values(rows, "alone", fraction)
        own = values(rows, run, fraction)
        found += [100 * (own[seed] / alone[seed] - 1) for seed in own.keys() & alone.keys()]
    return statistics.mean(found) if found else None


def panels(fractions: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Large and small sizes."""
    large = tuple(fraction for fraction in fractions if fraction >= LARGE)
    return large, fractions[len(large) :]


def plot_trade(recipe: dict[str, Any], rows: Rows, fractions: tuple[float, ...], path: Path) -> None:
    """Quality against what the gate phase costs, large and small sizes apart."""
    whole = training(rows, "dense", "training_flops")
    runs = [run for run in TRADED if training(rows, run, "training_flops") is not None]
    if not runs or not whole:
        return
    figure, axes = canvas(LIGHT, height=7.2, rows=2)
    for axis, part in zip(axes, panels(fractions), strict=True):
        for number, run in enumerate(runs):
            x = 100 * (training(rows, run, "training_flops") or 0.0) / whole
            y = above_alone(rows, run, part)
            axis.plot(x, y, "o", color=LIGHT.main)
            axis.annotate(
                run.removeprefix("retrofit "), (x, y), (-7 if number % 2 else 7, -3), textcoords="offset points",
                fontsize=8.5, color=LIGHT.ink, ha="right" if number % 2 else "left",
            )  # fmt: skip
        axis.margins(x=0.3, y=0.2)
        headline(axis, LIGHT, f"sizes {part[0]:g} to {part[-1]:g}: what the gate phase buys")
        labels(axis, LIGHT, "training FLOPs of the gate phase, % of the dense model's", "NLL above alone, %")
    figure.savefig(path)
