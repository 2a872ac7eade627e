"""Quality studies by name.

    python benchmarks/quality scores --seeds 3      measures what is not in --out yet, row by row
    python benchmarks/quality scores --table        writes the tables and plots of what is there

Every row is kept at once; the same command goes on after a kill. Models that a study trains are kept in --models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import scores

STUDIES = {"scores": scores}
ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subjects", nargs="+", choices=scores.SUBJECTS, default=[*scores.SUBJECTS])
    parser.add_argument("--sections", nargs="+", choices=scores.SECTIONS, default=[*scores.SECTIONS])
    parser.add_argument("--without-healing", action="store_true", help="leave the healed rows for another run")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the rows")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "quality", help="folder of trained models")
    options = parser.parse_args()
    study = STUDIES[options.study]
    if options.table:
        study.tabulate(options)
    else:
        study.main(options)


if __name__ == "__main__":
    main()
