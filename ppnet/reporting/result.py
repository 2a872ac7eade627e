"""What a report holds, as plain data: one row per size, every mask draw, the gates' curves, how it was measured."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KIND_NAMES = {"kv_group": "KV groups", "neuron": "neurons"}
METRIC_NAMES = {"params": "parameters", "flops": "FLOPs", "bytes": "bytes of weights"}


@dataclass(frozen=True)
class SizeRow:
    """One size.

    Attributes:
        size: the fraction asked for. The achieved one is ``params_fraction`` and so on, relative to dense.
        params, flops, bytes: of the compacted model; FLOPs per token, forward.
        gated_flops_fraction: FLOPs of the kept units over those of all units.
        keep: kind -> fraction of the kind's units that stay. kept: site name -> units that stay.
        u, lambda_: where the gates were read; lambda = u / (1 - u).
        nll, perplexity: of the compacted model; `nll_stderr` is the standard error over windows.
        ratio: perplexity over that of the same weights at lambda = 0. anchor_ratio: over the ungated model's, if given.
        draws: number of mask draws at `u` (0 at lambda = 0, where nothing is masked). draws_*: mean, extremes and
            percentiles of their perplexity, and the mean of their size fractions.
        prefill_*, decode_*: measured tokens/s: median, 20th and 80th percentile of the rounds; *_ratio: times the dense
            model's, measured in turns. None when speed was not measured.
        kv_bytes_per_token: bytes that one token adds to the key-value cache.
    """

    size: float
    params: int
    flops: int
    bytes: int
    params_fraction: float
    flops_fraction: float
    bytes_fraction: float
    gated_flops_fraction: float
    keep: dict[str, float]
    kept: dict[str, int]
    u: float
    lambda_: float
    nll: float
    nll_stderr: float
    perplexity: float
    ratio: float
    anchor_ratio: float | None = None
    draws: int = 0
    draws_mean: float | None = None
    draws_min: float | None = None
    draws_p10: float | None = None
    draws_p90: float | None = None
    draws_max: float | None = None
    draws_params_fraction: float | None = None
    draws_flops_fraction: float | None = None
    draws_bytes_fraction: float | None = None
    prefill_tokens_per_s: float | None = None
    prefill_p20: float | None = None
    prefill_p80: float | None = None
    prefill_ratio: float | None = None
    decode_tokens_per_s: float | None = None
    decode_p20: float | None = None
    decode_p80: float | None = None
    decode_ratio: float | None = None
    kv_bytes_per_token: float | None = None

    def flat(self) -> dict[str, float | int | None]:
        """Scalars alone, with the keep fractions as ``keep_<kind>``: a row of the CSV file."""
        row: dict[str, float | int | None] = {}
        for name, value in vars(self).items():
            if name == "keep":
                row.update({f"keep_{kind}": fraction for kind, fraction in value.items()})
            elif name != "kept":
                row[name] = value
        return row


@dataclass(frozen=True)
class SiteCurve:
    """Gates of one site.

    Attributes:
        tau: threshold at each of the report's `u_grid` points.
        leaves_at: for every unit of the site, sorted from the last to leave to the first: the model's size, as a
            fraction of the dense metric, at which the unit leaves (0: it never does).
    """

    name: str
    layer: int
    kind: str
    units: int
    tau: tuple[float, ...]
    leaves_at: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """Everything that was measured; `ppnet.report` also writes it to a folder.

    Attributes:
        title: the model's name. metric, of: what sizes are fractions of.
        rows: one per size, largest first. draws: one dict per mask draw.
        u_grid: points of the thresholds' curves. sites: the gates, site by site.
        dense: cost of the dense model (params, flops, bytes). anchor: perplexity of the ungated model, if given.
        comparisons: other models to show beside the curve: dicts with ``label``, ``perplexity`` and any of ``params``,
            ``flops``, ``bytes``.
        tables: title -> rows (dicts) of further tables.
        about: how it was measured: data, windows, workload, machine, versions, seconds.
        folder: where it was written; None if it was not.
    """

    title: str
    metric: str
    of: str
    rows: tuple[SizeRow, ...]
    draws: tuple[dict[str, float], ...]
    u_grid: tuple[float, ...]
    sites: tuple[SiteCurve, ...]
    dense: dict[str, int]
    anchor: float | None
    comparisons: tuple[dict[str, Any], ...]
    tables: dict[str, list[dict[str, Any]]]
    about: dict[str, Any]
    folder: Path | None = field(default=None, compare=False)

    @property
    def kinds(self) -> list[str]:
        return sorted({site.kind for site in self.sites})

    def nearest(self, size: float) -> SizeRow:
        """The row whose achieved size is nearest to `size` (fraction of the report's metric)."""
        return min(self.rows, key=lambda row: abs(getattr(row, f"{self.metric}_fraction") - size))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; infinities and NaN become None."""
        return finite(
            {
                "format": "ppnet.report/1",
                "title": self.title,
                "metric": self.metric,
                "of": self.of,
                "dense": self.dense,
                "anchor": self.anchor,
                "rows": [row.flat() for row in self.rows],
                "kept": [row.kept for row in self.rows],
                "draws": list(self.draws),
                "u_grid": list(self.u_grid),
                "sites": [vars(site) for site in self.sites],
                "comparisons": list(self.comparisons),
                "tables": self.tables,
                "about": self.about,
            }
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_csv(self) -> str:
        """One line per size; an empty cell is a value that was not measured or is infinite."""
        out = io.StringIO()
        rows = [finite(row.flat()) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()


def finite(value: Any) -> Any:
    """The same nested value with non-finite floats as None and tuples as lists: what JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
