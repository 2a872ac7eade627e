"""``ppnet eval FOLDER --size 0.5 --draws 8``: drawn masks of a size, alone and averaged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppnet.cli.common import load_model, load_tokenizer, parse_sizes, quiet_stdout, show, table
from ppnet.errors import PPNetError

if TYPE_CHECKING:
    from ppnet.evaluate import Ensemble, Spread

Draws = Annotated[
    int | None,
    typer.Option(help="Draw so many masks from the gates at each size: spread, average of predictions, calibration."),
]
CoverageDraws = Annotated[
    int | None, typer.Option(help="With --draws: further draws, on which the intervals are tried; default: none.")
]
Level = Annotated[
    float | None, typer.Option(help="With --draws: probability that an interval covers a fresh draw; default: 0.9.")
]
Seed = Annotated[int | None, typer.Option(help="With --draws: seed of the masks; default: 0.")]


def evaluate_draws(
    folder: Path,
    data: list[Path],
    sizes: str | None,
    *,
    metric: str,
    of: str,
    draws: int,
    tokenizer: str | None,
    device: str | None,
    dtype: str | None,
    json: bool,
    refused: dict[str, Any],
    **options: Any,
) -> None:
    """`ppnet.evaluate.ensemble` at some sizes.

    Args:
        refused: options of ``ppnet eval`` that have no meaning here.
        options: of `ppnet.evaluate.ensemble`; None where not given.

    Raises:
        PPNetError: no sizes, options that have no meaning for drawn masks, or as `ppnet.evaluate.ensemble`.
    """
    from ppnet.evaluate import ensemble

    if sizes is None:
        raise PPNetError("draws: masks are drawn at a size; add --size, e.g. --size 0.5.")
    for name, value in refused.items():
        if value:
            raise PPNetError(
                f"{name.replace('_', '-')}: has no meaning with --draws, where the gates' own masks are drawn; leave "
                "one of the two out."
            )
    wanted = parse_sizes(sizes)
    given = {name: value for name, value in options.items() if value is not None}
    with quiet_stdout():
        words = load_tokenizer(tokenizer or folder)
        model = load_model(folder, device, dtype)
        found = [ensemble(model, words, data, size, metric=metric, of=of, draws=draws, **given) for size in wanted]
    first = found[0]
    head = ["size", "prediction", "perplexity", f"{first.level:.0%} interval", "ECE", "parameters", "FLOPs"]
    note = (
        f"{first.tokens:,} tokens in windows of at most {first.window}, stride {first.stride}, BOS: {first.bos}; "
        f"sizes in {metric} of the {of}"
    )
    show(
        {"model": folder, "metric": metric, "of": of, "rows": [one.to_dict() for one in found]},
        json,
        table(f"{draws} mask draws of {folder}", head, [line for one in found for line in _lines(one)], note),
        *(_words(one) for one in found),
    )


def _lines(one: Ensemble) -> list[list[str]]:
    """Table rows of one size."""

    def share(spread: Spread) -> str:
        return f"{spread.mean:.1%} ({spread.low:.1%} to {spread.high:.1%})"

    drawn, single = one.perplexity, one.single
    return [
        [
            f"{one.size:g}",
            "single plan",
            f"{single.perplexity:.4g}",
            "-",
            f"{single.ece:.4f}",
            f"{single.params:.1%}",
            f"{single.flops:.1%}",
        ],
        [
            "",
            "draws, mean",
            f"{drawn.mean:.4g}",
            f"{drawn.low:.4g} to {drawn.high:.4g}",
            f"{one.ece.mean:.4f}",
            share(one.params),
            share(one.flops),
        ],
        ["", "average of the draws", f"{one.average.perplexity:.4g}", "-", f"{one.average.ece:.4f}", "-", "-"],
    ]


def _words(one: Ensemble) -> str:
    text = f"size {one.size:g}: mutual information of token and mask {one.mutual_information:.4f} nats per token"
    if one.coverage is None:
        return text
    found = one.coverage
    return (
        f"{text}; of {found.draws} fresh draws, the intervals cover {found.perplexity:.0%} (perplexity), "
        f"{found.params:.0%} (parameters), {found.flops:.0%} (FLOPs)"
    )
