"""One HTML page that holds the whole report: images inlined, no script, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppnet.reporting.result import KIND_NAMES, METRIC_NAMES, Report, SizeRow

CAPTIONS = {
    "perplexity_params": "Perplexity against parameters. Percentages are fractions of the dense model's parameters.",
    "perplexity_flops": "Perplexity against the FLOPs of one token's forward pass: 2 per weight of all linear modules, "
    "the output head included; attention scores, norms and embedding look-ups are not counted.",
    "perplexity_bytes": "Perplexity against the bytes of the weights as stored in memory.",
    "perplexity_prefill": "Perplexity against measured prefill speed. Each compacted model is timed in turns with the "
    "dense one. Percentages are the sizes asked for; bars across are the 20th to 80th percentile of the rounds.",
    "perplexity_decode": "Perplexity against measured speed of greedy decoding with a key-value cache. Each compacted "
    "model is timed in turns with the dense one; bars across are the 20th to 80th percentile of the rounds.",
    "speedup": "Measured speed over the dense model's, against the FLOPs kept. The dashed line is what FLOPs alone "
    "would promise; the distance to it is work that does not shrink with the widths.",
    "thresholds": "Threshold of every layer against the price of computation. A unit stays with probability 1/2 where "
    "its amplitude times its importance equals the threshold, so a higher curve asks for more.",
    "survival": "When units leave. A unit's colour is the size the model has when that unit goes, if units go one by "
    "one in the order of the gates. One unit of every layer and kind always stays.",
    "kept_widths": "Widths of the compacted models: units that stay in every layer at every size.",
}
BANDS = (
    " The bands show the same u with masks drawn at random from the gates' inclusion probabilities, placed at the mean "
    "size of the draws; a compacted model instead takes units in the order of the gates, up to the size asked for."
)
BARS = " Upright bars: perplexity of the mask draws, whose speed was not measured; they stand at the compacted model's."


def page(result: Report, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The page as text.

    Args:
        light, dark: file stem -> PNG file, for the two colour schemes.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((Path(__file__).parent / "template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        result=result,
        cards=_cards(result),
        figures=[
            {
                "name": name,
                "caption": _caption(result, name),
                "light": _inline(light[name]),
                "dark": _inline(dark[name]),
            }
            for name in light
        ],
        tables=[_size_table(result), *([_speed_table(result)] if _timed(result) else []), *_given_tables(result)],
        about=_about(result),
    )


def _inline(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _timed(result: Report) -> bool:
    return all(row.prefill_ratio is not None for row in result.rows)


def _caption(result: Report, name: str) -> str:
    text = CAPTIONS[name]
    if any(row.draws for row in result.rows):
        if name in ("perplexity_params", "perplexity_flops", "perplexity_bytes"):
            text += BANDS
        elif name in ("perplexity_prefill", "perplexity_decode"):
            text += BARS
    return text


def _cards(result: Report) -> list[dict[str, str]]:
    """The figures a reader looks for first."""
    largest, smallest = result.rows[0], result.rows[-1]
    half = result.nearest(0.5)
    cards = [
        _card(
            f"perplexity at size {largest.size:.3g}",
            number(largest.perplexity),
            f"{result.dense['params']:,} parameters dense",
        ),
        _card(
            f"perplexity at {getattr(half, f'{result.metric}_fraction'):.0%} of {METRIC_NAMES[result.metric]}",
            number(half.perplexity),
            f"{half.ratio:.3f}× own dense",
        ),
        _card(
            f"perplexity at {getattr(smallest, f'{result.metric}_fraction'):.0%} of {METRIC_NAMES[result.metric]}",
            number(smallest.perplexity),
            f"{smallest.ratio:.3f}× own dense",
        ),
    ]
    if result.anchor is not None:
        cards.insert(0, _card("perplexity, ungated model", number(result.anchor), "the anchor"))
    if half.prefill_ratio is not None:
        cards.append(
            _card(
                f"measured speed at {getattr(half, f'{result.metric}_fraction'):.0%} of {METRIC_NAMES[result.metric]}",
                f"{half.prefill_ratio:.2f}×",
                f"prefill; decoding {half.decode_ratio:.2f}×",
            )
        )
    return cards


def _card(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _size_table(result: Report) -> dict[str, Any]:
    anchored, drawn = result.anchor is not None, any(row.draws for row in result.rows)
    head = ["size asked", "parameters", "of dense", "FLOPs per token", "of dense", "MB", "gated FLOPs", "λ"]
    head += [f"{KIND_NAMES.get(kind, kind)} kept" for kind in result.kinds]
    head += ["perplexity", "× own dense"]
    head += ["× ungated"] if anchored else []
    head += ["draws: mean", "10th pct.", "90th pct.", "lowest", "highest"] if drawn else []

    def line(row: SizeRow) -> list[str]:
        cells = [
            f"{row.size:.3g}",
            f"{row.params:,}",
            f"{row.params_fraction:.1%}",
            f"{row.flops:,}",
            f"{row.flops_fraction:.1%}",
            f"{row.bytes / 1e6:,.3g}",
            f"{row.gated_flops_fraction:.1%}",
            "∞" if math.isinf(row.lambda_) else f"{row.lambda_:.3g}",
            *(f"{row.keep[kind]:.1%}" for kind in result.kinds),
            number(row.perplexity),
            f"{row.ratio:.3f}",
        ]
        cells += [number(row.anchor_ratio)] if anchored else []
        spread = (row.draws_mean, row.draws_p10, row.draws_p90, row.draws_min, row.draws_max)
        return cells + [number(value) for value in spread] if drawn else cells

    note = (
        f"Sorted by size, largest first. Sizes are fractions of the {result.of}'s {METRIC_NAMES[result.metric]}. "
        "MB: 10⁶ bytes of weights. λ: price of computation at which the gates were read."
    )
    return {"title": "Sizes", "note": note, "head": head, "rows": [line(row) for row in result.rows]}


def _speed_table(result: Report) -> dict[str, Any]:
    head = [
        "size asked",
        "prefill tokens/s",
        "20th to 80th pct.",
        "× dense",
        "decode tokens/s",
        "20th to 80th pct.",
        "× dense",
        "cache bytes per token",
    ]
    rows = [
        [
            f"{row.size:.3g}",
            number(row.prefill_tokens_per_s),
            f"{number(row.prefill_p20)} – {number(row.prefill_p80)}",
            number(row.prefill_ratio),
            number(row.decode_tokens_per_s),
            f"{number(row.decode_p20)} – {number(row.decode_p80)}",
            number(row.decode_ratio),
            f"{row.kv_bytes_per_token:,.0f}",
        ]
        for row in result.rows
    ]
    note = (
        "Medians. × dense: median over rounds of the ratio to the dense model, measured in turns. "
        "Percentiles are of the rounds."
    )
    machine = result.about["setting"]
    if (machine["load_average"] or 0) > 0.5 * machine["cores"]:
        note += (
            f" The machine was busy with other work (load {machine['load_average']:.1f} on {machine['cores']} cores "
            "before the start): these speeds are unreliable, measure again on an idle machine."
        )
    return {"title": "Measured speed", "note": note, "head": head, "rows": rows}


def _given_tables(result: Report) -> list[dict[str, Any]]:
    given: dict[str, Sequence[Mapping[str, Any]]] = dict(result.tables)
    if result.comparisons:
        given = {
            "Other models": sorted(result.comparisons, key=lambda entry: -float(entry.get("params") or 0)),
            **given,
        }
    tables = []
    for title, rows in given.items():
        head = list(dict.fromkeys(key for row in rows for key in row))
        tables.append(
            {"title": title, "note": "", "head": head, "rows": [[number(row.get(key)) for key in head] for row in rows]}
        )
    return tables


def _about(result: Report) -> list[tuple[str, str]]:
    about, machine = result.about, result.about["setting"]
    lines = [
        ("model", f"{result.title} ({about['model_type']})"),
        (
            "quality",
            f"{about['tokens']:,} scored tokens, {about['documents']:,} documents, {about['windows']:,} windows of at "
            f"most {about['window']} tokens, stride {about['stride']}, BOS: {about['bos']}; mean NLL per token, exp",
        ),
        (
            "uncertainty",
            f"{about['draws_per_size']} mask draws per size; at λ = 0 nothing is masked, so there are none",
        ),
    ]
    if about["speed"]:
        lines.append(("speed", ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in about["speed"].items())))
    lines += [
        (
            "machine",
            f"{machine['processor']}, {machine['threads']} threads, load {number(machine['load_average'])} on "
            f"{machine['cores']} cores before the start, {machine['device']}, {machine['dtype']}",
        ),
        ("versions", f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}"),
        ("made", f"{about['created']}, in {about['seconds']:,.0f} s"),
    ]
    return lines


def number(value: Any) -> str:
    """A table cell: four significant digits, thousands apart, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number" if math.isnan(value) else "−∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
