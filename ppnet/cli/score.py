"""``ppnet score``: rank the units of a model by what they do on data, without training gates."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ppnet.cli.common import (
    Column,
    Device,
    Dtype,
    Force,
    Json,
    Tokenizer,
    check_output,
    load_model,
    load_tokenizer,
    quiet_stdout,
    show,
    table,
)
from ppnet.errors import DataError, PPNetError


def score(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder: dense, or with gates.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Write the scores to this safetensors file.")],
    data: Annotated[list[Path] | None, typer.Option(help="Text or .jsonl file; may be given more than once.")] = None,
    method: Annotated[
        str, typer.Option(help="activation, bias, kl, magnitude, mama, movement, obs, random, reward, taylor.")
    ] = "mama",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, name=value as JSON, e.g. sign=token.")
    ] = None,
    tokenizer: Tokenizer = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per sequence; default: 512 or the model's context.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences per pass.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Use about so many tokens of the data.")] = 2**16,
    separator: Annotated[str | None, typer.Option(help="Splits the text into documents, e.g. '<|endoftext|>'.")] = None,
    column: Column = "text",
    seed: Annotated[int, typer.Option(help="Which part of the data is used.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Score every unit of a model in one pass over data, and write the scores down.

    Example:  ppnet score models/llama --data train.txt --method mama --out scores.safetensors
    Then:     ppnet compact models/llama --size 0.5 --scores scores.safetensors --out small
    """
    from ppnet.scores import get_scorer
    from ppnet.scores import score as score_model

    given = _options(options)
    needs = get_scorer(method).needs(given)
    if needs and not data:
        raise PPNetError(f"data: method {method!r} needs calibration data; give --data FILE.")
    for file in data or []:
        if not file.is_file():
            raise DataError(f"data: {file} does not exist; give existing text or .jsonl files.")
    check_output(out, force)
    with quiet_stdout():
        model = load_model(folder, device, dtype)
        words = load_tokenizer(tokenizer or folder) if needs else None
        scores = score_model(
            model, list(data or []) if needs else None, method, tokenizer=words, length=length, batch_size=batch,
            max_tokens=max_tokens, separator=separator, column=column, seed=seed, **given,
        )  # fmt: skip
        scores.save(out)
    sites = {name: {"units": len(units), "mean": float(units.mean()), "least": float(units.min()),
                    "most": float(units.max())} for name, units in scores.items()}  # fmt: skip
    result: dict[str, Any] = {
        "out": out, "method": scores.method, "options": scores.options, "tokens": scores.tokens, "sites": sites,
    }  # fmt: skip
    rows = [
        [name, f"{site['units']:,}", *(f"{site[column]:.4g}" for column in ("mean", "least", "most"))]
        for name, site in sites.items()
    ]
    show(
        result,
        json,
        table(f"{scores.method}, {scores.tokens:,} tokens", ["site", "units", "mean", "least", "most"], rows),
        f"written to {out}; next: ppnet compact {folder} --size 0.5 --scores {out} --out small",
    )


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """``["sign=token"]`` -> ``{"sign": "token"}``; values are JSON, or else text."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise PPNetError(f"set: {pair!r} must be name=value, e.g. sign=token.")
        try:
            found[name] = json_module.loads(text)
        except ValueError:
            found[name] = text
    return found


def add_to(app: typer.Typer) -> None:
    app.command()(score)
