"""Quality studies by name: `python benchmarks/quality STUDY`.

    python benchmarks/quality scores --seeds 3 --out DIR

Every measured row is kept in --out at once; the same command goes on after a kill. `python benchmarks/quality table
scores --out DIR` writes the table and the plot of what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import scores

STUDIES = {"scores": scores}


def main():
    parser = argparse.ArgumentParser(prog="python benchmarks/quality", description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows, and of models that are trained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subjects", nargs="+", help="default: all")
    parser.add_argument("--sections", nargs="+", help="default: all")
    options = parser.parse_args()
    STUDIES[options.study].main(options)


if __name__ == "__main__":
    main()
