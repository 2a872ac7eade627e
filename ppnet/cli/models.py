"""``ppnet inspect | resize | compact | heal``: a model's units, which stay at a size, the small model, its healing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ppnet.cli.common import (
    Allocation,
    Column,
    Device,
    Dtype,
    Floor,
    Force,
    Json,
    Metric,
    MultipleOf,
    Normalise,
    Of,
    Ranking,
    Separator,
    Tokenizer,
    achieved,
    check_output,
    check_ranking,
    cost_table,
    load_model,
    load_tokenizer,
    parse_floor,
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
    scores: Ranking = None,
    allocation: Allocation = "uniform",
    normalise: Normalise = "none",
    floor: Floor = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan (which units stay) to this JSON file.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Decide which units stay at a size, and write it down as a plan.

    Gates rank the units, or scores if these are given; a model without gates needs scores.

    Example:  ppnet resize puppet --size 0.5 --metric flops --out plan.json
    Example:  ppnet resize models/llama --size 0.5 --scores scores.safetensors --out plan.json
    """
    from ppnet.size import plan as make_plan

    wanted, multiples, least = parse_size(size), parse_multiple_of(multiple_of), parse_floor(floor)
    if out is not None:
        check_output(out, force)
    with quiet_stdout():
        model = load_model(folder, "cpu")
        check_ranking(model, scores)
        plan = make_plan(
            model, wanted, metric=metric, of=of, multiple_of=multiples, allocation=allocation, normalise=normalise,
            floor=least, scores=scores,
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
    scores: Ranking = None,
    allocation: Allocation = "uniform",
    normalise: Normalise = "none",
    floor: Floor = None,
    check: Annotated[
        bool | None,
        typer.Option(
            help="Build both models and compare their logits. If neither is given: whatever is written from folder to "
            "folder is read back beside the source instead; --no-check does neither.",
        ),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights, e.g. 5GB.")] = "5GB",
    redistribute: Annotated[
        Path | None, typer.Option(help="Text to refit what stays on, so that it takes over what removed units gave.")
    ] = None,
    redistribution: Annotated[
        str | None, typer.Option(help="How: least_squares (if not given), nearest or mean.")
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="Of least_squares, as a share of the mean squared feature.")
    ] = None,
    separator: Separator = None,
    column: Column = "text",
    tokenizer: Tokenizer = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a smaller, ordinary Hugging Face model that holds only the units that stay.

    Gates rank the units, or scores if these are given; without either, mama scores them on the text of --redistribute.
    The model is never built: what stays goes from file to file, in little memory, whatever its size. Only --check,
    --redistribute and --metric latency need it, and memory for the dense and the small model.

    Example:  ppnet compact puppet --size 0.5 --out small
    Example:  ppnet compact puppet --size 0.5 --redistribute text.txt --out small
    Example:  ppnet compact puppet --plan plan.json --out small
    Example:  ppnet compact models/llama --size 0.5 --scores scores.safetensors --out small
    """
    from ppnet.plan import Plan
    from ppnet.size import refuse_options

    if ridge is not None and redistribute is None:
        raise PPNetError(f"ridge: {ridge} has a meaning only with --redistribute FILE; leave it out.")
    if (size is None) == (plan is None):
        raise typer.BadParameter("give either --size or --plan", param_hint="--size")
    check_output(out, force)
    multiples = parse_multiple_of(multiple_of)
    if plan is not None:
        rounding = {} if multiples is None else {"multiple-of": multiples}
        ranking = {
            "scores": scores,
            "allocation": None if allocation == "uniform" else allocation,
            "normalise": None if normalise == "none" else normalise,
            "floor": floor,
        }
        given = {name: value for name, value in ranking.items() if value is not None}
        refuse_options("--plan is given", metric=metric, of=of, **rounding, **given)
        wanted: Any = Plan.load(plan)
        choices: dict[str, Any] = {}
    else:
        assert size is not None
        wanted = parse_size(size)
        choices = {
            "metric": metric, "of": of, "multiple_of": multiples, "allocation": allocation, "normalise": normalise,
            "floor": parse_floor(floor), "scores": scores,
        }  # fmt: skip
    refitted = redistribute is not None or redistribution not in (None, "none")
    if refitted or check or (plan is None and metric == "latency"):
        given_text = (redistribute, redistribution, ridge, separator, column)
        result = _compact_in_memory(
            folder, out, wanted, choices, given_text, tokenizer, check is not False, dtype, max_shard_size
        )
    else:
        result = _compact_folder(folder, out, wanted, choices, tokenizer, check is None, dtype, max_shard_size)
    checked = {
        "logits": "logits equal the masked model's",
        "weights": "read back beside the source (--check compares logits, in memory)",
        None: "not checked (--no-check)",
    }
    show(
        result,
        json,
        cost_table(f"{result['class']}, units ranked by {result['source']}", result),
        f"written to {out}: {result['file_bytes']:,} bytes of weights; {checked[result['checked']]}"
        + ("" if result["tokenizer"] else "; no tokenizer found beside the model"),
        _redistributed(result["redistribution"]),
    )


def _compact_folder(
    folder: Path, out: Path, wanted: Any, choices: dict[str, Any], tokenizer: str | None, verify: bool,
    dtype: str | None, max_shard_size: str,
) -> dict[str, Any]:  # fmt: skip
    """From folder to folder, without building the model."""
    from ppnet.blueprint import read_blueprint
    from ppnet.streaming import compact_folder

    with quiet_stdout():
        if choices:
            check_ranking(
                read_blueprint(folder).model, choices["scores"], "give --redistribute TEXT, which then ranks them, "
                "too, or ",
            )  # fmt: skip
        words = None if tokenizer is None else load_tokenizer(tokenizer)
        made = compact_folder(
            folder, out, wanted, dtype=dtype, max_shard_size=max_shard_size, tokenizer=words, verify=verify, **choices
        )
    return {
        "out": out,
        "class": made.model_class,
        "streamed": True,
        "checked": "weights" if verify else None,
        "file_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "tokenizer": made.tokenizer,
        **achieved(made.plan),
        "scores": made.plan.extra.get("scores"),
        "redistribution": made.plan.extra.get("redistribution"),
    }


def _compact_in_memory(
    folder: Path, out: Path, wanted: Any, choices: dict[str, Any], given_text: tuple[Any, ...], tokenizer: str | None,
    check: bool, dtype: str | None, max_shard_size: str,
) -> dict[str, Any]:  # fmt: skip
    """With the dense and the small model in memory, which data and logits need."""
    from ppnet.checkpoint import save
    from ppnet.compact import compact as compact_model
    from ppnet.families import is_decoder
    from ppnet.redistribute import RIDGE
    from ppnet.wrap import is_wrapped

    redistribute, redistribution, ridge, separator, column = given_text
    by_size, scores = bool(choices), choices.get("scores")
    with quiet_stdout():
        model = load_model(folder, "cpu", dtype)
        if by_size and (scores is not None or redistribute is None):
            check_ranking(model, scores, "give --redistribute TEXT, which then ranks them, too, or ")
        elif by_size and not is_wrapped(model) and not is_decoder(model):
            raise PPNetError(
                "scores: the model is an encoder, which has no next-token loss to score its units with on the text of "
                "--redistribute; give --scores FILE (ppnet score FOLDER --data TEXT --method activation --out FILE "
                "writes it)."
            )
        try:
            words = load_tokenizer(tokenizer or folder)
        except DataError:
            if tokenizer is not None or redistribute is not None:
                raise
            words = None  # a model without a tokenizer stays one
        batches = None if redistribute is None else _calibration(model, redistribute, words, separator, column)
        small = compact_model(
            model, wanted, check=check, redistribute=batches, redistribution=redistribution,
            ridge=RIDGE if ridge is None else ridge, **choices,
        )  # fmt: skip
        save(small, out, words, max_shard_size=max_shard_size)
    decided = small.ppnet_plan
    files = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    if not files:
        raise PPNetError(f"out: {out} holds no weights after saving.")
    return {
        "out": out,
        "class": type(small).__name__,
        "streamed": False,
        "checked": "logits" if check else None,
        "file_bytes": files,
        "tokenizer": words is not None,
        **achieved(decided),
        "scores": decided.extra.get("scores"),
        "redistribution": decided.extra.get("redistribution"),
    }


def _calibration(model: Any, file: Path, tokenizer: Any, separator: str | None, column: str) -> Any:
    from ppnet.calibration import calibration_batches

    if not file.is_file():
        raise DataError(f"redistribute: {file} does not exist; give an existing text or .jsonl file.")
    return calibration_batches(model, file, tokenizer, separator=separator, column=column)


def _redistributed(done: dict[str, Any] | None) -> str:
    if done is None:
        return "nothing redistributed (--redistribute text.txt)"
    errors = done["errors"].values()
    before, after = (sum(e[key] for e in errors) / max(len(errors), 1) for key in ("before", "after"))
    return (
        f"redistributed by {done['method']} on {done['tokens']:,} tokens: the sub-layers' outputs miss {after:.1%} of "
        f"their squared length, {before:.1%} before"
    )


def heal(
    folder: Folder,
    teacher: Annotated[Path, typer.Option(help="Folder of the dense model that the small one came from.")],
    data: Annotated[list[Path], typer.Option("--data", help="UTF-8 text or .jsonl file; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder of the healed model.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    length: Annotated[
        int | None, typer.Option(help="Tokens per sequence; default: 512, or the model's context.")
    ] = None,
    weight: Annotated[float, typer.Option(help="The teacher's share of the loss, 0 to 1.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Temperature of both models' answers.")] = 2.0,
    direction: Annotated[str, typer.Option(help="forward, reverse or jsd.")] = "forward",
    hidden: Annotated[float, typer.Option(help="Weight of the hidden states' distance.")] = 0.0,
    lora: Annotated[
        int | None, typer.Option(help="Train low-rank adapters of this rank only, then merge them.")
    ] = None,
    separator: Separator = None,
    column: Column = "text",
    seed: Annotated[int, typer.Option(help="What is drawn from longer texts, and the order of it.")] = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a small model on the answers of the dense one it came from.

    Example:  ppnet heal small --teacher models/llama --data train.txt --steps 500 --out healed
    """
    from ppnet.checkpoint import save
    from ppnet.train.healing import LastLog
    from ppnet.train.healing import heal as heal_model

    for file in data:
        if not file.is_file():
            raise DataError(f"data: {file} does not exist; give existing text or .jsonl files.")
    check_output(out, force)
    log = LastLog()
    with quiet_stdout():
        words = load_tokenizer(tokenizer or folder)
        model, dense = load_model(folder, device), load_model(teacher, device)
        heal_model(
            model, dense, list(data), steps=steps, tokenizer=words, learning_rate=lr, batch_size=batch, length=length,
            separator=separator, column=column, seed=seed, lora=lora, callbacks=[log], weight=weight,
            temperature=temperature, direction=direction, hidden=hidden,
        )  # fmt: skip
        save(model, out, words)
    terms = {name: log.values.get(name) for name in ("loss", "nll", "distillation_kl", "hidden_loss")}
    result = {"out": out, "steps": steps, "parameters": sum(p.numel() for p in model.parameters()), **terms}
    lines = [f"{name}: {value:.4g}" for name, value in terms.items() if value is not None]
    show(result, json, f"after {steps} steps: " + ", ".join(lines), f"written to {out}")


def add_to(app: typer.Typer) -> None:
    for command in (inspect, resize, compact, heal):
        app.command()(command)
