"""``ppnet eval FOLDER --tasks NAMES``: tasks of lm-evaluation-harness, at one size or at some."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ppnet.cli.common import quiet_stdout, show, table
from ppnet.errors import PPNetError

Tasks = Annotated[str | None, typer.Option(help="Comma-separated tasks of lm-evaluation-harness, instead of --data.")]
TaskFolder = Annotated[
    Path | None, typer.Option(help="With --tasks: folder of task files (YAML); default: the harness's own tasks.")
]
Fewshot = Annotated[int | None, typer.Option(help="With --tasks: examples before each question.")]
Limit = Annotated[float | None, typer.Option(help="With --tasks: only the first so many documents of each.")]


def evaluate_tasks(
    folder: Path,
    tasks: str,
    models: Callable[[], tuple[Any, Iterable[tuple[float | None, dict[str, int], Any]]]],
    *,
    json: bool,
    refused: dict[str, Any],
    **options: Any,
) -> None:
    """`ppnet.evaluate.lm_eval` at some sizes.

    Args:
        models: gives the tokenizer and, of every size, the size, its cost and the model.
        refused: options of ``ppnet eval`` that have no meaning here.
        options: of `ppnet.evaluate.lm_eval`.

    Raises:
        PPNetError: options of perplexity, or as `ppnet.evaluate.lm_eval`.
    """
    from ppnet.evaluate import lm_eval

    for name, value in refused.items():
        if value:
            raise PPNetError(f"{name.replace('_', '-')}: has no meaning with --tasks; leave one of the two out.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    rows: list[dict[str, Any]] = []
    with quiet_stdout():
        words, sized = models()
        for size, cost, model in sized:
            found = lm_eval(model, words, names, bootstrap_iters=1000, **options)
            rows += [{"size": size, **cost, **one.to_dict()} for one in found]
    lines = [
        [
            "as it is" if row["size"] is None else f"{row['size']:g}",
            f"{row['params']:,}",
            row["task"],
            metric,
            f"{value:.4f}" + (f" ± {row['stderr'][metric]:.4f}" if metric in row["stderr"] else ""),
            f"{row['samples']:,}",
        ]
        for row in rows
        for metric, value in row["metrics"].items()
    ]
    head = ["size", "parameters", "task", "metric", "value", "samples"]
    show({"model": folder, "tasks": names, "rows": rows}, json, table(f"tasks of {folder}", head, lines))
