"""``ppnet demo``: everything once, on data that is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppnet.cli.common import Force, Json, check_output, json_value, quiet_stdout, show


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the models and the report.")] = Path("ppnet-demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: shows that everything works.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a small model with gates, resize it, compact it, and report on it.

    Example:  ppnet demo --fast --out /tmp/demo
    """
    from ppnet.demo import run

    check_output(out, force)
    with quiet_stdout():
        result = run(out, fast=fast)
    lines = [f"{name}: {value}" for name, value in json_value(result).items() if not isinstance(value, dict | list)]
    show(result, json, *lines, f"written to {out}")


def add_to(app: typer.Typer) -> None:
    app.command()(demo)
