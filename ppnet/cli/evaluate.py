"""``ppnet eval``: perplexity, drawn masks or tasks, of a model as it is or at some sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ppnet.cli.common import (
    Device,
    Dtype,
    Json,
    Metric,
    MultipleOf,
    Of,
    Ranking,
    Sizes,
    Tokenizer,
    check_ranking,
    load_model,
    load_tokenizer,
    parse_sizes,
    quiet_stdout,
    refuse_without,
    show,
    table,
)
from ppnet.cli.ensemble import CoverageDraws, Draws, Level, Seed, evaluate_draws
from ppnet.cli.measure import Batch, Bos, Folder, MaxTokens, Separator, Stride, Window, cost_of, plan_of, sized
from ppnet.cli.tasks import Fewshot, Limit, TaskFolder, Tasks, evaluate_tasks
from ppnet.errors import PPNetError

EvalData = Annotated[
    list[Path] | None, typer.Option("--data", help="UTF-8 text file; may be given several times.", show_default=False)
]


def evaluate(
    folder: Folder,
    data: EvalData = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    fewshot: Fewshot = None,
    limit: Limit = None,
    sizes: Sizes = None,
    metric: Metric = "params",
    of: Of = "model",
    multiple_of: MultipleOf = None,
    scores: Ranking = None,
    draws: Draws = None,
    coverage_draws: CoverageDraws = None,
    level: Level = None,
    seed: Seed = None,
    tokenizer: Tokenizer = None,
    window: Window = None,
    stride: Stride = None,
    batch: Batch = 8,
    bos: Bos = "auto",
    separator: Separator = None,
    max_tokens: MaxTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Perplexity of a model on held-out text, as it is or at some sizes; with --draws, what the gates are unsure of;
    with --tasks, tasks of lm-evaluation-harness.

    Gates rank the units of a size, or scores if these are given; sizes of a model without gates need scores.

    Example:  ppnet eval puppet --data valid.txt --sizes 1,0.5,0.25 --separator '<|endoftext|>'
    Example:  ppnet eval models/llama --data valid.txt --sizes 1,0.5,0.25 --scores scores.safetensors
    Example:  ppnet eval puppet --data valid.txt --size 0.5 --draws 8 --coverage-draws 40
    Example:  ppnet eval puppet --tasks my_task --task-folder tasks --sizes 1,0.5
    """
    if tasks is not None:
        evaluate_tasks(
            folder,
            tasks,
            lambda: _models(folder, tokenizer, device, dtype, sizes, metric, of, multiple_of, scores),
            json=json,
            refused={
                "data": data,
                "draws": draws,
                "stride": stride,
                "separator": separator,
                "max_tokens": max_tokens,
                "coverage_draws": coverage_draws,
                "level": level,
                "bos": None if bos == "auto" else bos,
            },
            include_path=task_folder,
            num_fewshot=fewshot,
            limit=limit,
            batch_size=batch,
            max_length=window,
            seed=seed or 0,
        )
        return
    refuse_without("--tasks", task_folder=task_folder, fewshot=fewshot, limit=limit)
    if not data:
        raise PPNetError("data: none; give --data FILE (perplexity) or --tasks NAMES (lm-evaluation-harness).")
    if draws is not None:
        evaluate_draws(
            folder,
            data,
            sizes,
            metric=metric,
            of=of,
            draws=draws,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            json=json,
            refused={"scores": scores, "multiple_of": multiple_of},
            coverage_draws=coverage_draws,
            level=level,
            seed=seed,
            window=window,
            stride=stride,
            batch_size=batch,
            bos=bos,
            separator=separator,
            max_tokens=max_tokens,
        )
        return
    refuse_without("--draws", coverage_draws=coverage_draws, level=level, seed=seed)
    from ppnet.evaluate import perplexity

    with quiet_stdout():
        words, models = _models(folder, tokenizer, device, dtype, sizes, metric, of, multiple_of, scores)
        rows = []
        for size, cost, model in models:
            measured = perplexity(
                model,
                words,
                data,
                window=window,
                stride=stride,
                batch_size=batch,
                bos=bos,
                separator=separator,
                max_tokens=max_tokens,
            )
            rows.append({"size": size, **cost, **measured.to_dict()})
    lines = [
        [
            "as it is" if row["size"] is None else f"{row['size']:g}",
            f"{row['params']:,}",
            f"{row['perplexity']:.4g}",
            f"{row['nll']:.4f} ± {row['stderr']:.4f}",
            f"{row['tokens']:,}",
        ]
        for row in rows
    ]
    first = rows[0]
    note = f"windows of at most {first['window']} tokens, stride {first['stride']}, BOS: {first['bos']}"
    head = ["size", "parameters", "perplexity", "NLL per token (nats)", "tokens"]
    show(
        {"model": folder, "metric": metric, "of": of, "rows": rows},
        json,
        table(f"quality of {folder}", head, lines, note),
    )


def _models(
    folder: Path,
    tokenizer: str | None,
    device: str | None,
    dtype: str | None,
    sizes: str | None,
    metric: str,
    of: str,
    multiple_of: list[str] | None,
    scores: str | None,
) -> tuple[Any, Iterator[tuple[float | None, dict[str, int], Any]]]:
    """The tokenizer of a folder and, of every size in turn, the size, its cost and the model.

    Raises:
        PPNetError: scores without sizes, or sizes of a model whose units nothing ranks.
    """
    if sizes is None and scores is not None:
        raise PPNetError(f"scores: {scores} has a meaning only with --sizes; leave it out.")
    wanted: list[float | int | None] = list(parse_sizes(sizes)) if sizes is not None else [None]
    words = load_tokenizer(tokenizer or folder)
    model = load_model(folder, device, dtype)
    if sizes is not None:
        check_ranking(model, scores)
    plans = [plan_of(model, size, metric, of, multiple_of, scores) for size in wanted]
    return words, ((size, cost_of(model, plan), sized(model, plan)) for size, plan in zip(wanted, plans, strict=True))


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
