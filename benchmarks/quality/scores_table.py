"""Table and plot of the study "scores": means over seeds of calibration data, and what is within noise of the best."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ppnet.reporting.style import LIGHT, canvas, headline, labels

# What follows removal: nothing, redistribution, healing, both.
FORMS = (
    ("cut", {"redistributed": False, "healed": False}),
    ("+R", {"redistributed": True, "healed": False}),
    ("+H", {"redistributed": False, "healed": True}),
    ("+RH", {"redistributed": True, "healed": True}),
)
TITLES = {
    "gated": "heads and neurons",
    "mama": "weights of mama's indicators",
    "gates": "gates, then cut",
    "masks": "single weights at zero, nothing smaller",
    "neurons": "MLP neurons alone",
}
PLOTTED = ("random", "magnitude", "activation", "taylor", "mama")

Rows = list[dict[str, Any]]


def by_seed(rows: Rows, **key: Any) -> dict[int, float]:
    return {row["seed"]: row["value"] for row in rows if key.items() <= row.items()}


def noise(values: dict[int, float], best: dict[int, float]) -> tuple[float, float]:
    """Mean of the paired differences to the best over common seeds, and twice its standard error."""
    differences = [values[seed] - best[seed] for seed in values.keys() & best.keys()]
    if not differences:
        return math.inf, 0.0
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return statistics.mean(differences), 2 * spread / math.sqrt(len(differences))


def column(rows: Rows, lower: bool, **key: Any) -> dict[str, str]:
    """One column of a table: method -> cell; the best in bold, what is within noise of it with a star."""
    methods = list(dict.fromkeys(row["method"] for row in rows if key.items() <= row.items()))
    found = {method: by_seed(rows, method=method, **key) for method in methods}
    # A study that still runs has more seeds of some methods than of others.
    common = set.intersection(*(set(values) for values in found.values())) if found else set()
    found = {method: {seed: values[seed] for seed in common} for method, values in found.items() if common}
    sign = 1 if lower else -1
    means = {method: statistics.mean(values.values()) for method, values in found.items()}
    if not means:
        return {}
    first = min(means, key=lambda method: sign * means[method])
    cells = {}
    for method in found:
        away, error = noise(found[method], found[first])
        mark = "**" if method == first else ""
        cells[method] = f"{mark}{means[method]:.3f}{mark}{'*' if method != first and abs(away) <= error else ''}"
    return cells


def table(recipe: dict[str, Any], rows: Rows) -> str:
    """Markdown."""
    metric, lower = recipe["metric"], recipe["lower_is_better"]
    dense = next(row for row in rows if row["section"] == "dense")
    lines = [
        f"## {recipe['subject']}",
        "",
        f"{metric}, {'lower' if lower else 'higher'} is better; dense {dense['value']:.4f}, {dense['params']:,} "
        "parameters; means over seeds of calibration data. R: least-squares redistribution, H: short healing. "
        "**Best** of a column and section; a star: its mean difference to the best is within two standard errors.",
    ]
    for section, title in TITLES.items():
        own = [row for row in rows if row["section"] == section]
        if not own:
            continue
        removed = sorted({row["removed"] for row in own})
        forms = [(name, form) for name, form in FORMS if any(form.items() <= row.items() for row in own)]
        forms = forms or [("cut", {})]
        counts = Counter((row["method"], row["removed"], row.get("redistributed"), row.get("healed")) for row in own)
        seeds = min(counts.values())
        heads = [f"{share:.0%} {name}" for share in removed for name, _ in forms]
        columns = [column(own, lower, removed=share, **form) for share in removed for _, form in forms]
        lines += [
            "",
            f"| {title} ({seeds} seed{'s' * (seeds > 1)}) | {' | '.join(heads)} |",
            f"|---|{'---:|' * len(heads)}",
        ]
        for method in dict.fromkeys(row["method"] for row in own):
            lines.append(f"| {method} | {' | '.join(cells.get(method, '') for cells in columns)} |")
    return "\n".join(lines) + "\n"


def losers(recipe: dict[str, Any], rows: Rows, section: str = "gated") -> list[str]:
    """Where a method loses to random by more than the noise: a line each, for what the defaults may be."""
    own = [row for row in rows if row["section"] == section]
    sign, found = (1 if recipe["lower_is_better"] else -1), []
    for share in sorted({row["removed"] for row in own}):
        for name, form in FORMS:
            random = by_seed(own, method="random", removed=share, **form)
            for method in dict.fromkeys(row["method"] for row in own if row["method"] != "random"):
                away, error = noise(by_seed(own, method=method, removed=share, **form), random)
                if math.isfinite(away) and sign * away > error:
                    found.append(f"{method} at {share:.0%} {name}: {abs(away):.3f} worse than random (+- {error:.3f})")
    return found


def plot(recipe: dict[str, Any], rows: Rows, path: Path) -> None:
    """Metric against the removed share, with and without redistribution, bands over seeds."""
    figure, axes = canvas(LIGHT, height=7.2, rows=2)
    colours = (LIGHT.faint, LIGHT.fourth, LIGHT.main, LIGHT.third, LIGHT.second)
    dense = next(row["value"] for row in rows if row["section"] == "dense")
    own = [row for row in rows if row["section"] == "gated"]
    shares = sorted({row["removed"] for row in own})
    for axis, (name, form) in zip(axes, FORMS[:2], strict=True):
        axis.axhline(dense, color=LIGHT.ink, linewidth=1, linestyle=":", label="dense")
        for method, colour in zip(PLOTTED, colours, strict=True):
            values = [by_seed(own, method=method, removed=share, **form).values() for share in shares]
            if not all(values):
                continue
            at = [100 * share for share in shares]
            axis.plot(at, [statistics.mean(v) for v in values], color=colour, marker="o", label=method)
            axis.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        axis.set_xticks([100 * share for share in shares])
        headline(axis, LIGHT, f"{recipe['subject']}: cut{'' if name == 'cut' else ' and redistributed'}")
        labels(axis, LIGHT, "gated parameters removed, %", recipe["metric"])
    axes[0].legend(frameon=False, labelcolor=LIGHT.ink, fontsize=9.5)
    figure.savefig(path)
