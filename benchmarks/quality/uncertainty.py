"""Uncertainty: what mask draws of trained gates say, tried on fresh draws.

Per size: NLL and expected calibration error (ECE) of the plan, of single draws and of the draws' averaged prediction,
and the share of fresh draws in the 90 % intervals of parameters and perplexity. The models are those of the study
"elastic", and are trained where they are not in --models.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from elastic import SUBJECTS, Study
from store import Rows, read
from variants import RUNS, Variant

from ppnet.evaluate import ensemble

FRACTIONS = (0.6, 0.3, 0.13)
DRAWS, FRESH, LEVEL = 16, 32, 0.9
GATED = {name: variant for name, variant in RUNS.items() if isinstance(variant, Variant)}


def main(options: Any) -> None:
    for subject in options.subjects:
        recipe = SUBJECTS[subject].about()
        about = {"study": "uncertainty", "subject": subject, "draws": DRAWS, "fresh": FRESH, "level": LEVEL, **recipe}
        rows = Rows(options.out / f"uncertainty-{subject}.jsonl", about)
        trained = Rows(options.out / f"elastic-{subject}.jsonl", {"study": "elastic", "subject": subject, **recipe})
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            study = Study(subject, trained, options.models, seed)
            for run in options.runs:
                measure(study, run, rows)


def measure(study: Study, run: str, rows: Rows) -> None:
    model = None
    for fraction in FRACTIONS:
        key = {"run": run, "seed": study.seed, "fraction": fraction}
        if rows.done(**key):
            continue
        start = time.perf_counter()
        model = model or study.elastic(run, GATED[run])
        found = ensemble(
            model, None, study.text.valid, fraction, metric="flops", of="gated", draws=DRAWS, coverage_draws=FRESH,
            level=LEVEL, seed=1000 * study.seed, window=study.recipe.length, batch_size=16, progress=False,
        )  # fmt: skip
        assert found.coverage is not None
        rows.add(
            start, key, single_nll=found.single.nll, draws_nll=found.nll.mean, average_nll=found.average.nll,
            single_ece=found.single.ece, draws_ece=found.ece.mean, average_ece=found.average.ece,
            spread=found.nll.max - found.nll.min, mutual_information=found.mutual_information,
            covered_perplexity=found.coverage.perplexity, covered_params=found.coverage.params,
        )  # fmt: skip


def tabulate(options: Any) -> None:
    lines = ["# Uncertainty", "", "Written by `python benchmarks/quality uncertainty --table`.", ""]
    for subject in options.subjects:
        path = options.out / f"uncertainty-{subject}.jsonl"
        if path.exists():
            lines += table(*read(path))
    (options.out / "uncertainty.md").write_text("\n".join(lines))
    print("\n".join(lines))


def table(recipe: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds, one line per run and size."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"## {recipe['subject']}",
        "",
        f"{recipe['draws']} draws and {recipe['fresh']} fresh ones, intervals of {recipe['level']:.0%}, means over "
        f"{seeds} seeds. Spread: largest less smallest NLL of the draws. Information: of token and mask, nats.",
        "",
        "| run | gated FLOPs | NLL plan | draw | average | ECE plan | draw | average | spread | information "
        "| perplexity covered | size covered |",
        "|---|" + "---:|" * 11,
    ]
    columns = ("single_nll", "draws_nll", "average_nll", "single_ece", "draws_ece", "average_ece", "spread",
               "mutual_information")  # fmt: skip
    for run, fraction in dict.fromkeys((row["run"], row["fraction"]) for row in rows):
        own = [row for row in rows if (row["run"], row["fraction"]) == (run, fraction)]
        cells = [f"{statistics.mean(row[column] for row in own):.3f}" for column in columns]
        covered = [statistics.mean(row[f"covered_{what}"] for row in own) for what in ("perplexity", "params")]
        lines.append(f"| {run} | {fraction:g} | {' | '.join(cells)} | {covered[0]:.0%} | {covered[1]:.0%} |")
    return [*lines, ""]
