"""Measures a puppet at many sizes: quality of the sizes and of mask draws, cost, speed after compaction."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.compact import compact
from ppnet.cost import CostModel, check_metric
from ppnet.errors import PPNetError
from ppnet.evaluate.perplexity import Perplexity, perplexity
from ppnet.evaluate.progress import Progress
from ppnet.evaluate.speed import Speed, fitting_workload, setting, speed
from ppnet.evaluate.tokens import Bos, Data, token_sequences
from ppnet.gates import Puppet
from ppnet.plan import Plan
from ppnet.reporting.result import Report, SiteCurve, SizeRow
from ppnet.reporting.write import require_extra, write
from ppnet.size import plan as make_plan
from ppnet.size import resize

SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
FEWEST_SIZES = 10
CURVE_POINTS = 65


def report(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    output: str | Path | None,
    *,
    sizes: Sequence[float] | None = None,
    metric: str = "flops",
    of: str = "model",
    multiple_of: Mapping[str, int] | None = None,
    draws: int = 8,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: Bos = "auto",
    separator: str | None = None,
    max_tokens: int | None = None,
    measure_speed: bool = True,
    speed_options: Mapping[str, int] | None = None,
    dense_anchor: float | None = None,
    comparisons: Sequence[Mapping[str, Any]] = (),
    extra_tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    title: str | None = None,
    progress: bool = True,
) -> Report:
    """Measures a puppet at many sizes and writes the result to a folder (`ppnet.reporting.write`).

    Every size is compacted, scored and timed in turns with the dense model; then the masks are drawn `draws` times at
    the same u and scored, which shows how much the choice of units matters.

    Args:
        model: a model with gates (`ppnet.wrap` or `ppnet.load`); unchanged afterwards.
        tokenizer: Hugging Face tokenizer; may be None when `data` holds ids.
        data: held-out text, a file's name or token ids, as for `ppnet.evaluate.perplexity`.
        output: the folder; made if missing, files of an earlier report in it are replaced. None: nothing is written.
        sizes: fractions of `metric`, at most 1. Default: 1 down to 0.1, or as low as the model goes.
        metric: ``"flops"``, ``"params"`` or ``"bytes"``. of, multiple_of: as for `ppnet.plan`.
        draws: mask draws per size.
        window, stride, batch_size, bos, separator, max_tokens: as for `ppnet.evaluate.perplexity`.
        measure_speed: whether to time the compacted models.
        speed_options: ``prompt_tokens, new_tokens, batch_size, rounds, warmup`` of `ppnet.evaluate.speed`.
        dense_anchor: perplexity of the ungated model on the same data: drawn as a line, and as a ratio in the table.
        comparisons: other models: dicts with ``label``, ``perplexity`` and any of ``params``, ``flops``, ``bytes``.
        extra_tables: title -> rows (dicts) of further tables for the page.
        title: the model's name on the page.
        progress: write progress to stderr when it takes longer than two seconds.

    Returns:
        Report

    Raises:
        PPNetError: matplotlib or Jinja2 is missing, the model has no gates, a bad option, or the dense model's
            perplexity is not finite.
        SizeError: a size that the model cannot take. DataError: data that cannot be scored.
    """
    if output is not None:
        require_extra()
    puppet: Any = getattr(model, "puppet", None)
    if puppet is None:
        raise PPNetError(
            "model: has no gates; wrap it with ppnet.wrap(model) and train, or load a puppet (ppnet.load)."
        )
    check_metric(metric)
    if draws < 0:
        raise PPNetError(f"draws: must be at least 0, got {draws}.")
    started = time.perf_counter()
    plans = _plans(model, sizes, metric, of, multiple_of)
    documents, bos, _ = token_sequences(tokenizer, data, bos=bos, separator=separator, max_tokens=max_tokens)
    scoring: dict[str, Any] = {
        "window": window,
        "stride": stride,
        "batch_size": batch_size,
        "bos": "window" if bos == "window" else "none",  # a document's BOS is among the ids already
        "progress": False,
    }

    def quality(scored: nn.Module) -> Perplexity:
        return perplexity(scored, tokenizer, documents, **scoring)

    with resize(model, 1.0):
        dense_quality = quality(model)
    if not math.isfinite(dense_quality.perplexity):
        raise PPNetError(
            f"model: the perplexity of the dense model is {dense_quality.perplexity}; its weights are damaged or the "
            "data is not what it was trained on. Check it with ppnet.evaluate.perplexity."
        )
    machine = setting(model)  # before the work, which loads the machine itself
    workload = speed_options if speed_options is not None else fitting_workload(model)
    dense_model = compact(model, 1.0).eval() if measure_speed else None
    rows, every_draw = [], []
    with Progress(len(plans) * (draws + 2), "report, steps") as steps:
        for size, plan in plans:
            small = compact(model, plan).eval()
            measured = quality(small)
            if progress:
                steps.advance()
            speeds = None
            if dense_model is not None:
                speeds = speed(small, baseline=dense_model, progress=False, **workload)
            del small
            if progress:
                steps.advance()
            of_size = []
            for seed in range(draws if plan.u > 0.0 else 0):
                drawn = puppet.draw_plan(plan.u, seed)
                with resize(model, drawn):
                    value = quality(model).perplexity
                of_size.append({"size": size, "u": plan.u, "seed": seed, "perplexity": value, **_fractions(drawn)})
                if progress:
                    steps.advance()
            if progress:
                steps.advance(draws - len(of_size))
            every_draw += of_size
            rows.append(_row(puppet, size, plan, measured, dense_quality, dense_anchor, of_size, speeds))
    about = {
        "model_type": puppet.structure.model_type,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "draws_per_size": draws,
        "tokens": dense_quality.tokens,
        "windows": dense_quality.windows,
        "documents": dense_quality.documents,
        "window": dense_quality.window,
        "stride": dense_quality.stride,
        "bos": bos,
        "speed": dict(workload) if measure_speed else None,
        "setting": machine,
    }
    u_grid = [i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    result = Report(
        title=title or Path(getattr(model.config, "_name_or_path", "")).name or puppet.structure.model_type,
        metric=metric,
        of=of,
        rows=tuple(sorted(rows, key=lambda row: -row.size)),
        draws=tuple(every_draw),
        u_grid=tuple(u_grid),
        sites=_site_curves(puppet, u_grid, metric),
        dense=puppet.costs.dense.to_dict(),
        anchor=dense_anchor,
        comparisons=tuple(dict(entry) for entry in comparisons),
        tables={name: [dict(row) for row in table] for name, table in (extra_tables or {}).items()},
        about=about,
    )
    return result if output is None else write(result, output)


def default_sizes(model: nn.Module, metric: str = "flops", of: str = "model") -> list[float]:
    """Fractions from 1 down to 0.1, or at least ten evenly spaced ones where the floor is higher than that."""
    puppet: Any = model.puppet
    costs: CostModel = puppet.costs
    ones = [1] * len(costs.unit)
    whole, least = (
        (costs.dense, costs.total(ones)) if of == "model" else (costs.gated(costs.dense_units), costs.gated(ones))
    )
    floor = least.of(metric) / whole.of(metric)
    sizes = [size for size in SIZES if size >= floor]
    if len(sizes) >= FEWEST_SIZES:
        return sizes
    # a thousandth above the floor, so that rounding the fraction cannot fall below it
    lowest = min(1.0, floor * 1.001)
    return [1.0 - i / (FEWEST_SIZES - 1) * (1.0 - lowest) for i in range(FEWEST_SIZES)]


def _plans(
    model: nn.Module, sizes: Sequence[float] | None, metric: str, of: str, multiple_of: Mapping[str, int] | None
) -> list[tuple[float, Plan]]:
    """All plans before anything slow, so that a size that cannot be met is known at once."""
    wanted = sorted(set(default_sizes(model, metric, of) if sizes is None else sizes), reverse=True)
    if not wanted:
        raise PPNetError("sizes: is empty; give fractions such as (1.0, 0.5, 0.25).")
    return [(size, make_plan(model, size, metric=metric, of=of, multiple_of=multiple_of)) for size in wanted]


def _fractions(plan: Plan) -> dict[str, Any]:
    return {
        f"{metric}_fraction": plan.cost.of(metric) / plan.dense_cost.of(metric)
        for metric in ("params", "flops", "bytes")
    }


def _row(
    puppet: Puppet,
    size: float,
    plan: Plan,
    measured: Perplexity,
    dense: Perplexity,
    anchor: float | None,
    draws: list[dict[str, Any]],
    speeds: Speed | None,
) -> SizeRow:
    structure, costs = puppet.structure, puppet.costs
    counts = plan.counts(structure)
    keep = {}
    for kind in sorted({site.kind for site in structure.sites}):
        of_kind = [
            (count, site.units) for count, site in zip(counts, structure.sites, strict=True) if site.kind == kind
        ]
        keep[kind] = sum(count for count, _ in of_kind) / sum(units for _, units in of_kind)
    spread: dict[str, Any] = {}
    if draws:
        values = torch.tensor([draw["perplexity"] for draw in draws], dtype=torch.float64)
        spread = {
            "draws": len(draws),
            "draws_mean": float(values.mean()),
            "draws_min": float(values.min()),
            "draws_p10": float(torch.quantile(values, 0.1)),
            "draws_p90": float(torch.quantile(values, 0.9)),
            "draws_max": float(values.max()),
            **{f"draws_{name}": sum(draw[name] for draw in draws) / len(draws) for name in _fractions(plan)},
        }
    rates: dict[str, Any] = {}
    if speeds is not None:
        for phase, tokens in (("prefill", speeds.prompt_tokens), ("decode", speeds.new_tokens)):
            timing, batch = getattr(speeds, phase), speeds.batch_size
            rates |= {
                f"{phase}_tokens_per_s": getattr(speeds, f"{phase}_tokens_per_s"),
                f"{phase}_p20": batch * tokens / timing.p80,
                f"{phase}_p80": batch * tokens / timing.p20,
                f"{phase}_ratio": getattr(speeds, f"{phase}_ratio"),
            }
        rates["kv_bytes_per_token"] = speeds.kv_bytes_per_token
    return SizeRow(
        size=size,
        **plan.cost.to_dict(),
        **_fractions(plan),
        gated_flops_fraction=costs.gated(counts).flops / costs.gated(costs.dense_units).flops,
        keep=keep,
        kept={site.name: count for site, count in zip(structure.sites, counts, strict=True)},
        u=plan.u,
        lambda_=plan.lambda_,
        nll=measured.nll,
        nll_stderr=measured.stderr,
        perplexity=measured.perplexity,
        ratio=measured.perplexity / dense.perplexity,
        anchor_ratio=None if anchor is None else measured.perplexity / anchor,
        **spread,
        **rates,
    )


def _site_curves(puppet: Puppet, u_grid: list[float], metric: str) -> tuple[SiteCurve, ...]:
    """Thresholds, and the size at which each unit leaves when units go one by one in the order of the gates."""
    with torch.no_grad():
        tau = torch.stack([puppet.threshold(u).float().cpu() for u in u_grid])
    structure, costs = puppet.structure, puppet.costs
    key = puppet.order_key().double().cpu()
    site_of_unit = torch.repeat_interleave(
        torch.arange(len(structure.sites)), torch.tensor([site.units for site in structure.sites])
    )
    price = torch.tensor([cost.of(metric) for cost in costs.unit], dtype=torch.float64)[site_of_unit]
    offsets = structure.offsets()
    order = torch.argsort(key, descending=True, stable=True)
    sizes = torch.empty_like(key)
    sizes[order] = price[order].cumsum(0)
    leaves_at = (sizes + costs.fixed.of(metric)) / costs.dense.of(metric)
    curves = []
    for i, site in enumerate(structure.sites):
        own: Tensor = leaves_at[offsets[i] : offsets[i + 1]].sort().values
        own[0] = 0.0  # one unit of every site always stays
        curves.append(
            SiteCurve(site.name, site.layer, site.kind, site.units, tuple(tau[:, i].tolist()), tuple(own.tolist()))
        )
    return tuple(curves)
