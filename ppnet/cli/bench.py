"""``ppnet bench``: where each operator stands on this machine's roofline; with a folder, a model's speed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppnet.cli.common import (
    Device,
    Dtype,
    Force,
    Json,
    Metric,
    MultipleOf,
    Of,
    Sizes,
    check_output,
    place,
    quiet_stdout,
    show,
    table,
)
from ppnet.cli.measure import New, Prompt, SpeedBatch, Threads, bench_model, set_threads
from ppnet.errors import PPNetError

if TYPE_CHECKING:
    from ppnet.roofline.result import Change, Result

Folder = Annotated[
    Path | None,
    typer.Argument(
        help="A model folder: its prefill and decoding speed. Without one: the operators.", show_default=False
    ),
]
Operators = Annotated[str | None, typer.Option(help="Comma-separated operators; default: all.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer variants and rounds.")]
Accelerate = Annotated[bool, typer.Option("--accelerate", help="Models with ppnet's CPU decode kernels under them.")]
Out = Annotated[Path | None, typer.Option(help="Folder for result.json, result.csv and roofline.png.")]
Against = Annotated[Path | None, typer.Option(help="An earlier result.json, or its folder: what became slower?")]
Rounds = Annotated[int | None, typer.Option(help="Timed rounds of a model; default: 5. The median counts.")]
RATIOS = "x: how many times faster ours is; medians of paired rounds; ceilings sampled in the same rounds"
MARKED = (
    "marked: the bands (p20 to p80) of the time and of % of ideal are both apart; measure again before you believe it"
)
MARKS = {"slower": "▼ slower", "faster": "▲ faster"}


def bench(
    folder: Folder = None,
    operators: Operators = None,
    quick: Quick = False,
    out: Out = None,
    compare: Against = None,
    sizes: Sizes = None,
    metric: Metric = "params",
    of: Of = "model",
    multiple_of: MultipleOf = None,
    prompt: Prompt = None,
    new: New = None,
    batch: SpeedBatch = 1,
    rounds: Rounds = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    accelerate: Accelerate = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """The machine's roofline and where each operator stands on it; or, with a folder, a model's measured speed.

    Without gates a model is cut down at random: how many units stay makes the speed, not which.

    Example:  ppnet bench --out today --compare yesterday

    Example:  ppnet bench puppet --sizes 0.5,0.25 --accelerate
    """
    set_threads(threads)
    if folder is not None:
        _only("without a model folder", operators=operators, quick=quick or None, out=out, compare=compare)
        rounds = 5 if rounds is None else rounds
        bench_model(folder, sizes, metric, of, multiple_of, prompt, new, batch, rounds, device, dtype, accelerate, json)
        return
    _only(
        "with a model folder",
        sizes=sizes,
        metric=None if metric == "params" else metric,
        of=None if of == "model" else of,
        multiple_of=multiple_of,
        prompt=prompt,
        new=new,
        batch=None if batch == 1 else batch,
        rounds=rounds,
        dtype=dtype,
        accelerate=accelerate or None,
    )
    bench_operators(operators, quick, out, compare, device, force, json)


def _only(where: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise PPNetError(f"{name}: has a meaning only {where}, got {value}.")


def bench_operators(
    operators: str | None,
    quick: bool,
    out: Path | None,
    compare: Path | None,
    device: str | None,
    force: bool,
    json: bool,
) -> None:
    """``ppnet bench`` without a folder."""
    from ppnet.roofline.machine import steady_memory

    steady_memory()  # before any tensor is made
    from ppnet.roofline import result as results

    if out is not None:
        _require_matplotlib()
        check_output(out, force)
    earlier = None if compare is None else results.Result.load(compare)
    names = None if operators is None else [name.strip() for name in operators.split(",") if name.strip()]
    with quiet_stdout():
        keep = None if out is None else partial(_write, out)
        found = results.run(names, size="quick" if quick else "full", device=place(device), keep=keep)
        if out is not None:
            _draw(out, found)
    parts = [_ceilings(found), _where(found), _table(found), RATIOS]
    value = found.to_dict()
    if earlier is not None:
        changes, notes = results.compare(earlier, found)
        value["compare"] = {"file": compare, "changes": [vars(change) for change in changes], "notes": notes}
        parts += [_changes(compare, changes), "\n".join([MARKED, *notes])]
    if out is not None:
        parts.append(f"written to {out}: result.json, result.csv and roofline.png")
    show(value, json, *parts)
    if found.failed:
        raise PPNetError(
            "\n".join([f"{len(found.failed)} cases failed:", *(": ".join(one) for one in found.failed.items())])
        )


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PPNetError("out: the figure needs matplotlib; run: pip install 'ppnet[report]'") from error


def _write(out: Path, found: Result) -> None:
    from ppnet.files import write_files

    write_files(out, {"result.json": found.to_json().encode(), "result.csv": found.to_csv().encode()})


def _draw(out: Path, found: Result) -> None:
    from ppnet.files import write_files
    from ppnet.reporting.plots import png
    from ppnet.roofline.plot import roofline

    write_files(out, {"roofline.png": png(roofline(found))})


def _ceilings(found: Result) -> Any:
    machine = found.machine
    rows = [
        [kind, f"{figure['value']['median']:,.1f}", _span(figure["value"]), figure["unit"], figure["by"]]
        for kind, figure in machine["ceilings"].items()
    ]
    return table(f"ceilings of {machine['processor']}", ["", "median", "p20 to p80", "unit", "best by"], rows)


def _where(found: Result) -> str:
    machine = found.machine
    return (
        f"{machine['threads']} threads, kernels {machine['isa']}, {machine['pages']} pages for tensors, "
        f"torch {machine['torch']}, load before {machine['load']}"
    )


def _span(band: dict[str, float]) -> str:
    return f"{band['p20']:,.1f} to {band['p80']:,.1f}"


def _table(found: Result) -> Any:
    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = []
    on_gpu = any(row.timing for row in found.rows)
    for row in found.rows:
        ours = next(iter(row.seconds))
        band, called = row.seconds[ours], row.eager.get(ours)
        rows.append(
            [
                row.operator,
                f"{row.variant}, {row.dtype}",
                f"{band.median * 1e3:,.3f}",
                *([f"{called.median * 1e3:,.3f}" if called else "as ms"] if on_gpu else []),
                f"{row.rate:,.1f}",
                f"{row.ceiling.median:,.1f} {row.bound}",
                f"{100 * row.share.median:.0f}",
                times(row.faster.get("dense")),
                times(row.faster.get("dense+mask")),
                "-" if row.best is None else f"{times(row.faster[row.best])} {row.best}",
            ]
        )
    head = [
        "operator",
        "case",
        "ms",
        *(["ms eager"] if on_gpu else []),
        "GB/s or GFLOP/s",
        "of",
        "% of ideal",
        "x dense",
        "x dense+mask",
        "x best other",
    ]
    return table("operators", head, rows)


def _changes(path: Path | None, changes: list[Change]) -> Any:
    def shown(value: float | None, factor: float, digits: int) -> str:
        return "-" if value is None else f"{factor * value:,.{digits}f}"

    rows = [
        [
            change.operator,
            change.label,
            shown(change.before, 1e3, 3),
            shown(change.now, 1e3, 3),
            shown(change.ratio, 1, 2),
            shown(change.share_before, 100, 0),
            shown(change.share_now, 100, 0),
            MARKS.get(change.mark, change.mark),
        ]
        for change in changes
    ]
    head = ["operator", "case", "ms then", "ms now", "now / then", "% of ideal then", "now", ""]
    return table(f"against {path}", head, rows)


def add_to(app: typer.Typer) -> None:
    app.command()(bench)
