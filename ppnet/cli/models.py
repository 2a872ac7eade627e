"""``ppnet inspect | resize | compact``: what a model is made of, which units stay at a size, the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppnet.cli.common import (
    Allocation,
    Force,
    Json,
    Metric,
    MultipleOf,
    Of,
    ScoresFile,
    achieved,
    check_output,
    cost_table,
    load_model,
    load_scores,
    load_tokenizer,
    parse_multiple_of,
    parse_size,
    quiet_stdout,
    show,
    table,
)
from ppnet.errors import DataError, PPNetError

Folder = Annotated[Path, typer.Argument(help="A Hugging Face model folder: dense, or with gates.", show_default=False)]


def inspect(folder: Folder, json: Json = False) -> None:
    """Show the units of a model, what each costs, and what is never removed.

    Example:  ppnet inspect models/llama
    """
    from ppnet.inspect import inspect as inspect_model

    with quiet_stdout():
        found = inspect_model(load_model(folder, "cpu"))
    show(found.to_dict(), json, "" if json else found.table())


def resize(
    folder: Folder,
    size: Annotated[str, typer.Option(help="A fraction of dense (0.5) or an absolute number.")],
    metric: Metric = "params",
    of: Of = "model",
    multiple_of: MultipleOf = None,
    scores: ScoresFile = None,
    allocation: Allocation = "uniform",
    out: Annotated[Path | None, typer.Option(help="Write the plan (which units stay) to this JSON file.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Decide which units stay at a size, and write it down as a plan.

    Gates rank the units, or scores if a file of them is given; a model without either is ranked by magnitude.

    Example:  ppnet resize puppet --size 0.5 --metric flops --out plan.json
    """
    from ppnet.size import plan as make_plan

    wanted, multiples = parse_size(size), parse_multiple_of(multiple_of)
    if out is not None:
        check_output(out, force)
    with quiet_stdout():
        plan = make_plan(
            load_model(folder, "cpu"), wanted, metric=metric, of=of, multiple_of=multiples, allocation=allocation,
            scores=load_scores(scores),
        )  # fmt: skip
    if out is not None:
        plan.save(out)
    result = {"size": wanted, "metric": metric, "of": of, **achieved(plan), "plan": out}
    widths = table(
        "units that stay",
        ["site", "kept", "of"],
        [[name, f"{count:,}", f"{plan.dense_units[name]:,}"] for name, count in result["kept"].items()],
    )
    written = f"plan written to {out}" if out else "add --out plan.json to keep the plan"
    show(result, json, cost_table(f"size {size} of {metric}, ranked by {plan.source}", result), widths, written)


def compact(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder of the small model.")],
    size: Annotated[str | None, typer.Option(help="A fraction of dense (0.5) or an absolute number.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan written by `ppnet resize`.")] = None,
    metric: Metric = "params",
    of: Of = "model",
    multiple_of: MultipleOf = None,
    scores: ScoresFile = None,
    allocation: Allocation = "uniform",
    check: Annotated[bool, typer.Option(help="Compare the small model's logits with the masked model's.")] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a smaller, ordinary Hugging Face model that holds only the units that stay.

    Example:  ppnet compact puppet --size 0.5 --out small
    Example:  ppnet compact puppet --plan plan.json --out small
    Example:  ppnet compact models/llama --size 0.5 --scores scores.safetensors --out small
    """
    from ppnet.checkpoint import save
    from ppnet.compact import compact as compact_model
    from ppnet.plan import Plan
    from ppnet.size import plan as make_plan
    from ppnet.size import refuse_options

    if (size is None) == (plan is None):
        raise typer.BadParameter("give either --size or --plan", param_hint="--size")
    check_output(out, force)
    multiples = parse_multiple_of(multiple_of)
    if plan is not None:
        rounding = {} if multiples is None else {"multiple-of": multiples}
        ranking = {"scores": scores, "allocation": None if allocation == "uniform" else allocation}
        given = {name: value for name, value in ranking.items() if value is not None}
        refuse_options("--plan is given", metric=metric, of=of, **rounding, **given)
    decided = Plan.load(plan) if plan is not None else None
    wanted = parse_size(size) if size is not None else None
    with quiet_stdout():
        model = load_model(folder, "cpu")
        if decided is None:
            assert wanted is not None
            decided = make_plan(
                model, wanted, metric=metric, of=of, multiple_of=multiples, allocation=allocation,
                scores=load_scores(scores),
            )  # fmt: skip
        small = compact_model(model, decided, check=check)
        try:
            tokenizer = load_tokenizer(folder)
        except DataError:
            tokenizer = None  # a model without a tokenizer stays one
        save(small, out, tokenizer)
    files = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    if not files:
        raise PPNetError(f"out: {out} holds no weights after saving.")
    result = {
        "out": out,
        "class": type(small).__name__,
        "checked": check,
        "file_bytes": files,
        "tokenizer": tokenizer is not None,
        **achieved(decided),
    }
    show(
        result,
        json,
        cost_table(f"{type(small).__name__}, units ranked by {decided.source}", result),
        f"written to {out}: {files:,} bytes of weights"
        + ("; logits equal the masked model's" if check else "; logits not compared (--no-check)")
        + ("" if tokenizer is not None else "; no tokenizer found beside the model"),
    )


def add_to(app: typer.Typer) -> None:
    for command in (inspect, resize, compact):
        app.command()(command)
