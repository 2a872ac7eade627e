"""Quality studies by name.

    python benchmarks/quality scores --seeds 3      measures what is not in --out yet, row by row
    python benchmarks/quality scores --table        writes the tables and plots of what is there

Every row is kept at once; the same command goes on after a kill. Models that a study trains are kept in --models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elastic
import scores
import uncertainty
import variants

STUDIES = {"scores": scores, "elastic": elastic, "uncertainty": uncertainty}
ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    for name, study in STUDIES.items():
        own = studies.add_parser(name, help=study.__doc__.partition("\n")[0])
        own.add_argument("--seeds", type=int, default=3)
        own.add_argument("--subjects", nargs="+", choices=study.SUBJECTS, default=[*study.SUBJECTS])
        own.add_argument("--table", action="store_true", help="write tables and plots of what is there")
        own.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the rows")
        own.add_argument("--models", type=Path, default=ROOT / "build" / "quality", help="folder of trained models")
        if name == "scores":
            own.add_argument("--sections", nargs="+", choices=scores.SECTIONS, default=[*scores.SECTIONS])
            own.add_argument("--without-healing", action="store_true", help="leave the healed rows for another run")
        else:
            known = uncertainty.GATED if name == "uncertainty" else variants.RUNS
            own.add_argument("--runs", nargs="+", choices=known, default=[*known])
            own.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    study = STUDIES[options.study]
    if options.table:
        study.tabulate(options)
    else:
        study.main(options)


if __name__ == "__main__":
    main()
