"""``ppnet demo``: everything once, on data that is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ppnet.cli.common import Force, Json, check_output, quiet_stdout, show, table


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the models and the report.")] = Path("ppnet-demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: shows that everything works.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a small model with gates, resize it, compact it, and report on it.

    Example:  ppnet demo --fast --out my-demo
    """
    from ppnet.demo import run

    check_output(out, force)
    with quiet_stdout():
        result = run(out, fast=fast)
    show(
        result,
        json,
        _rows(
            "Elastic model on held-out text",
            result["quality"],
            f"ungated: the same model trained without gates for as many tokens, perplexity "
            f"{result['ungated_perplexity']:.2f}; own dense: the elastic model at lambda = 0; paper: arXiv 2606.28251",
        ),
        _rows("Compacted models: ordinary Hugging Face folders", result["compacted"], "batch 1, against dense"),
        f"report: {result['report']}\n{result['seconds']:.0f} s in all",
    )


def _rows(title: str, rows: list[dict[str, Any]], caption: str) -> Any:
    return table(title, list(rows[0]), [[_cell(value) for value in row.values()] for row in rows], caption)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def add_to(app: typer.Typer) -> None:
    app.command()(demo)
