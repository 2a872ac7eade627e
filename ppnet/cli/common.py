"""What the commands share: options, loading, the way results leave the program."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ppnet.checkpoint import load_tokenizer as load_tokenizer
from ppnet.errors import PPNetError

if TYPE_CHECKING:
    from rich.table import Table

Value = TypeVar("Value")

Json = Annotated[bool, typer.Option("--json", help="Write one JSON value to stdout and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Write into an output that exists already.")]
Metric = Annotated[str, typer.Option(help="What a size counts: params, flops, bytes or latency.")]
Ranking = Annotated[
    str | None,
    typer.Option(
        "--scores",
        metavar="FILE|METHOD",
        help="Rank units by a file that `ppnet score` wrote, or by a method without data: magnitude, random.",
    ),
]
Allocation = Annotated[
    str, typer.Option(help="Of scores over layers: uniform, global, or cost (score per what a unit costs).")
]
Of = Annotated[str, typer.Option(help="What a fraction is taken of: the whole model, or the gated units alone.")]
MultipleOf = Annotated[
    list[str] | None, typer.Option(help="Round kept widths, e.g. neuron=64 or kv_group=2; may be given for each kind.")
]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer folder; default: the model's folder.")]
Separator = Annotated[str | None, typer.Option(help="Splits the text into documents, e.g. '<|endoftext|>'.")]
Column = Annotated[str, typer.Option(help="Key of the text in .jsonl lines.")]
Floor = Annotated[
    list[str] | None,
    typer.Option(help="Fraction of every layer's units that stays: 0.1, or by kind, kv_group=0.5; may be repeated."),
]
Normalise = Annotated[
    str, typer.Option(help="Of scores, for --allocation global or cost: none, kind or site (divide by their mean).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Sizes = Annotated[
    str | None, typer.Option("--sizes", "--size", help="Comma-separated sizes: fractions (0.5) or absolute numbers.")
]


def json_value(value: Any) -> Any:
    """The same value for JSON: paths as text, infinities and NaN as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Whatever libraries print goes to stderr: stdout is for the result."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: dict[str, Any], as_json: bool, *parts: Table | str) -> None:
    """Writes a result to stdout: as JSON, or as text and rich tables."""
    if as_json:
        print(json.dumps(json_value(result), indent=1, allow_nan=False))
        return
    from rich.console import Console

    # A pipe has no width of its own, and 80 columns would cut names short.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """A rich table: the first column left-aligned, numbers right-aligned."""
    from rich.table import Table

    made = Table(title=title, caption=caption, title_justify="left")
    for index, name in enumerate(head):
        made.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def parse_size(text: str) -> float | int:
    """A size as typed: a fraction or an absolute number.

    Raises:
        PPNetError: not a number.
    """
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        raise PPNetError(
            f"size: {text!r} is not a number; give a fraction such as 0.5, or an absolute number."
        ) from None
    return int(value) if value > 1 and value.is_integer() else value


def parse_sizes(text: str) -> list[float | int]:
    """Sizes between commas.

    Raises:
        PPNetError: one is not a number, or there is none.
    """
    sizes = [parse_size(part.strip()) for part in text.split(",") if part.strip()]
    if not sizes:
        raise PPNetError(f"sizes: {text!r} holds no size; give fractions such as 1,0.5,0.25.")
    return sizes


def parse_multiple_of(pairs: list[str] | None) -> dict[str, int] | None:
    """``["neuron=64"]`` -> ``{"neuron": 64}``.

    Raises:
        PPNetError: not of the form kind=number.
    """
    if not pairs:
        return None
    found = {}
    for pair in pairs:
        kind, _, number = pair.partition("=")
        if not number.isdigit():
            raise PPNetError(f"multiple-of: {pair!r} must be kind=number, e.g. neuron=64.")
        found[kind] = int(number)
    return found


def parse_floor(parts: list[str] | None) -> float | dict[str, float] | None:
    """``["0.1"]`` -> 0.1; ``["kv_group=0.5"]`` -> ``{"kv_group": 0.5}``.

    Raises:
        PPNetError: not a number, or a number for all beside others.
    """
    if not parts:
        return None
    found = {}
    for part in parts:
        kind, _, text = part.rpartition("=")
        try:
            found[kind] = float(text)
        except ValueError:
            raise PPNetError(f"floor: {part!r} must be a fraction, or kind=fraction, e.g. kv_group=0.5.") from None
    if "" not in found:
        return found
    if len(parts) > 1:
        raise PPNetError(
            f"floor: {parts} names a fraction for all kinds beside others; give one, or one for each kind."
        )
    return found[""]


def load_scores(path: Path | None) -> Any:
    """Scores from a file, or None.

    Raises:
        CheckpointError: not a file of scores.
    """
    if path is None:
        return None
    from ppnet.scores import Scores

    return Scores.load(path)


def check_ranking(model: Any, scores: str | None, also: str = "") -> None:
    """Refuses a model whose units nothing ranks, in the words of the command line.

    Args:
        scores: what --scores says.
        also: a way out that only the command has, to be named before the others.

    Raises:
        PPNetError: neither gates nor scores, or the name of a method that needs data.
        UnsupportedModelError: no model that sizes can be asked of.
    """
    from ppnet.scores import SCORERS
    from ppnet.wrap import is_wrapped, structure_for

    structure_for(model)
    if scores in SCORERS and SCORERS[scores].needs({}):
        raise PPNetError(
            f"scores: {scores!r} needs data to rank units by; run ppnet score FOLDER --data TEXT --method {scores} "
            "--out FILE, then give --scores FILE."
        )
    if scores is None and not is_wrapped(model):
        raise PPNetError(
            f"scores: the model has no gates to rank its units; {also}give --scores FILE (ppnet score FOLDER --data "
            "TEXT --out FILE writes it), or, without data, --scores magnitude, which can lose to units drawn at random "
            "(--scores random)."
        )


def check_output(path: Path, force: bool) -> None:
    """Refuses to write over something that exists, unless told to.

    Raises:
        PPNetError: `path` is a file, or a folder with something in it.
    """
    if force or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    what = "is not empty" if path.is_dir() else "exists"
    raise PPNetError(f"out: {path} {what}; name another output, or add --force to write there.")


def place(device: str | None) -> str:
    """The device asked for, or the best there is.

    Raises:
        PPNetError: an unknown device, or one this machine does not have.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PPNetError(f"device: {device!r} cannot be used here ({str(error).splitlines()[0]}); try cpu.") from error
    return device


def load_model(folder: Path, device: str | None = None, dtype: str | None = None) -> Any:
    """A model of any kind (dense, with gates, compacted) in evaluation mode.

    Raises:
        CheckpointError: no such folder, or damaged. PPNetError: unknown device or dtype.
    """
    from ppnet.checkpoint import load

    options: dict[str, Any] = {}
    if dtype is not None:
        import torch

        if dtype not in ("float32", "bfloat16", "float16"):
            raise PPNetError(f"dtype: {dtype!r} is not known; use float32, bfloat16 or float16.")
        options["dtype"] = getattr(torch, dtype)
    return load(folder, **options).to(place(device)).eval()


def achieved(plan: Any) -> dict[str, Any]:
    """What a plan costs, for people and programs: the numbers beside dense and the fractions."""
    cost, dense = plan.cost.to_dict(), plan.dense_cost.to_dict()
    return {
        "source": plan.source,
        "u": plan.u,
        "lambda": plan.lambda_,
        "cost": cost,
        "dense_cost": dense,
        "fraction": {metric: cost[metric] / dense[metric] for metric in cost},
        "metric": plan.metric,
        "achieved": plan.achieved,
        "dense": plan.dense,
        "kept": {name: len(units) for name, units in plan.kept.items()},
        "dense_units": plan.dense_units,
    }


def cost_table(title: str, result: dict[str, Any]) -> Table:
    names = {"params": "parameters", "flops": "FLOPs per token", "bytes": "bytes of weights"}
    rows = [
        [name, f"{result['cost'][metric]:,}", f"{result['dense_cost'][metric]:,}", f"{result['fraction'][metric]:.2%}"]
        for metric, name in names.items()
    ]
    if result["metric"] not in names:
        small, dense = result["achieved"], result["dense"]
        rows.append([result["metric"], f"{small:,.1f}", f"{dense:,.1f}", f"{small / dense:.2%}"])
    return table(title, ["", "small", "dense", "of dense"], rows)


def refuse_without(option: str, /, **options: Any) -> None:
    """Refuses options that only another one gives a meaning.

    Raises:
        PPNetError: one is given.
    """
    for name, value in options.items():
        if value is not None:
            raise PPNetError(f"{name.replace('_', '-')}: {value} has a meaning only with {option}; leave it out.")
