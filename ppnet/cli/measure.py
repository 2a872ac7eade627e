"""``ppnet bench FOLDER | report``: quality and speed, at one size or at many; models of a size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Tokenizer,
    check_output,
    load_model,
    load_tokenizer,
    parse_multiple_of,
    parse_sizes,
    quiet_stdout,
    show,
    table,
)
from ppnet.errors import PPNetError

if TYPE_CHECKING:
    from ppnet.evaluate import Speed

Folder = Annotated[
    Path, typer.Argument(help="A Hugging Face model folder: dense, with gates, or compacted.", show_default=False)
]
DataFile = Annotated[list[Path], typer.Option("--data", help="UTF-8 text file; may be given several times.")]
Window = Annotated[int | None, typer.Option(help="Tokens per window; default: 2048 or the model's context.")]
Stride = Annotated[int | None, typer.Option(help="Tokens between window starts; default: the window (no overlap).")]
Batch = Annotated[int, typer.Option(help="Windows per forward pass.")]
Bos = Annotated[Literal["auto", "document", "window", "none"], typer.Option(help="Where BOS goes.")]
Separator = Annotated[str | None, typer.Option(help="Splits the text into documents, e.g. '<|endoftext|>'.")]
MaxTokens = Annotated[int | None, typer.Option(help="Score only the first so many tokens.")]
Prompt = Annotated[int | None, typer.Option(help="Prompt tokens; default: 128, or half of a shorter context.")]
New = Annotated[int | None, typer.Option(help="New tokens; default: 64, or a quarter of a shorter context.")]
Rounds = Annotated[int, typer.Option(help="Timed rounds; the median counts.")]
SpeedBatch = Annotated[int, typer.Option(help="Sequences decoded at once.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")]


BENCH_SIZES = "0.75,0.5,0.25"


def bench_model(
    folder: Path,
    sizes: str | None,
    metric: str,
    of: str,
    multiple_of: list[str] | None,
    prompt: int | None,
    new: int | None,
    batch: int,
    rounds: int,
    device: str | None,
    dtype: str | None,
    accelerated: bool,
    json: bool,
) -> None:
    """Measured prefill and decoding speed of compacted models, in turns with the dense one (``ppnet bench FOLDER``)."""
    from ppnet.accelerate import accelerate
    from ppnet.compact import compact
    from ppnet.evaluate import speed
    from ppnet.wrap import is_wrapped

    with quiet_stdout():
        model = load_model(folder, device, dtype)
        workload = _workload(model, prompt, new, batch, rounds)
        measured: list[tuple[str, float | None, Speed]]
        if not is_wrapped(model) and hasattr(model, "ppnet_plan"):
            if sizes is not None:
                raise PPNetError(f"sizes: {folder} is compacted already and has one size; leave --sizes out.")
            if accelerated:
                accelerate(model)
            measured = [("as it is", None, speed(model, **workload))]
        else:
            wanted = parse_sizes(sizes or BENCH_SIZES)
            # Without gates, units at random: how many there are makes the speed, not which.
            scores = None if is_wrapped(model) else "random"
            whole, *plans = [plan_of(model, size, metric, of, multiple_of, scores) for size in (1.0, *wanted)]

            def made(plan: Any) -> Any:
                small = compact(model, plan).eval()
                return accelerate(small) if accelerated else small

            dense = made(whole)
            measured = [
                (f"{size:g}", size, speed(made(plan), baseline=dense, **workload))
                for size, plan in zip(wanted, plans, strict=True)
            ]
    rows = [{"size": size, **figures.to_dict()} for _, size, figures in measured]
    lines = [_speed_line(name, figures) for name, _, figures in measured]
    first = measured[0][2]
    if first.baseline is not None:
        lines.insert(0, _speed_line("dense", first.baseline))
    setting = first.setting
    note = (
        f"{workload['prompt_tokens']} prompt + {workload['new_tokens']} new tokens, batch {batch}, median of {rounds} "
        f"rounds, {setting['processor']}, {setting['threads']} threads, {setting['dtype']}"
        f"{', accelerated' if accelerated else ''}"
    )
    head = ["size", "parameters", "MB", "prefill tok/s", "x dense", "decode tok/s", "x dense", "cache B/token"]
    result = {"model": folder, "metric": metric, "of": of, "accelerated": accelerated, "rows": rows}
    show(result, json, table(f"speed of {folder}", head, lines, note))


def report(
    folder: Folder,
    data: DataFile,
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    sizes: Sizes = None,
    metric: Metric = "flops",
    of: Of = "model",
    multiple_of: MultipleOf = None,
    draws: Annotated[int, typer.Option(help="Mask draws per size, for the bands.")] = 8,
    anchor: Annotated[float | None, typer.Option(help="Perplexity of the ungated model on the same data.")] = None,
    tokenizer: Tokenizer = None,
    window: Window = None,
    stride: Stride = None,
    batch: Batch = 8,
    bos: Bos = "auto",
    separator: Separator = None,
    max_tokens: MaxTokens = None,
    speed: Annotated[bool, typer.Option(help="Time the compacted models.")] = True,
    prompt: Prompt = None,
    new: New = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    title: Annotated[str | None, typer.Option(help="The model's name on the page; default: its folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Quality, cost and measured speed at many sizes: CSV, JSON, figures and one HTML page.

    Example:  ppnet report puppet --data valid.txt --out report
    """
    from ppnet.reporting import report as make_report
    from ppnet.reporting import require_extra

    require_extra()
    check_output(out, force)
    wanted = parse_sizes(sizes) if sizes is not None else None
    set_threads(threads)
    with quiet_stdout():
        words = load_tokenizer(tokenizer or folder)
        model = load_model(folder, device, dtype)
        made = make_report(
            model,
            words,
            data,
            out,
            sizes=wanted,
            metric=metric,
            of=of,
            multiple_of=parse_multiple_of(multiple_of),
            draws=draws,
            window=window,
            stride=stride,
            batch_size=batch,
            bos=bos,
            separator=separator,
            max_tokens=max_tokens,
            measure_speed=speed,
            speed_options=_workload(model, prompt, new, 1, rounds),
            dense_anchor=anchor,
            title=title or folder.resolve().name,
        )
    lines = [
        [
            f"{row.size:.3g}",
            f"{row.params:,}",
            f"{row.flops_fraction:.1%}",
            f"{row.perplexity:.4g}",
            f"{row.ratio:.3f}",
            "-" if row.draws_mean is None else f"{row.draws_mean:.4g} ({row.draws_min:.4g} to {row.draws_max:.4g})",
            "-" if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}",
            "-" if row.decode_ratio is None else f"{row.decode_ratio:.2f}",
        ]
        for row in made.rows
    ]
    head = ["size", "parameters", "FLOPs", "perplexity", "x own dense", "mask draws", "prefill x", "decode x"]
    show(
        {"out": out, "page": out / "report.html", **made.to_dict()},
        json,
        table(f"{made.title}: sizes are fractions of {metric}", head, lines),
        f"written to {out}: report.html, report.csv, report.json and the figures",
    )


def plan_of(
    model: Any, size: float | None, metric: str, of: str, multiple_of: list[str] | None, scores: str | None
) -> Any:
    if size is None:
        return None
    from ppnet.size import plan

    return plan(model, size, metric=metric, of=of, multiple_of=parse_multiple_of(multiple_of), scores=scores)


def sized(model: Any, plan: Any) -> Any:
    if plan is None:
        return model
    from ppnet.compact import compact

    return compact(model, plan).eval()


def cost_of(model: Any, plan: Any) -> dict[str, int]:
    if plan is not None:
        return dict(plan.cost.to_dict())
    return {"params": sum(p.numel() for name, p in model.named_parameters() if not name.startswith("puppet."))}


def _workload(model: Any, prompt: int | None, new: int | None, batch: int, rounds: int) -> dict[str, Any]:
    from ppnet.evaluate import fitting_workload

    fitting = fitting_workload(model)
    return {
        "prompt_tokens": fitting["prompt_tokens"] if prompt is None else prompt,
        "new_tokens": fitting["new_tokens"] if new is None else new,
        "batch_size": batch,
        "rounds": rounds,
    }


def set_threads(threads: int | None) -> None:
    """torch's number of CPU threads; None: its own choice.

    Raises:
        PPNetError: below 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise PPNetError(f"threads: must be at least 1, got {threads}.")
    import torch

    torch.set_num_threads(threads)


def _speed_line(name: str, figures: Speed) -> list[str]:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        name,
        f"{figures.params:,}",
        f"{figures.weight_bytes / 1e6:,.3g}",
        f"{figures.prefill_tokens_per_s:,.0f}",
        ratio(figures.prefill_ratio),
        f"{figures.decode_tokens_per_s:,.1f}",
        ratio(figures.decode_ratio),
        f"{figures.kv_bytes_per_token:,.0f}",
    ]


def add_to(app: typer.Typer) -> None:
    app.command()(report)
