"""The command ``ppnet``: inspect, score, train, resize, compact, heal, eval, speculate, bench, report, demo.

Results go to stdout, progress and messages to stderr; with ``--json`` stdout holds one JSON value and nothing else.
Exit codes: 0 done, 1 a request that cannot be carried out (one line says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from ppnet.cli import bench, demo, evaluate, measure, models, score, speculate, train
from ppnet.errors import PPNetError

app = typer.Typer(
    name="ppnet",
    help="One training run, every size: structured sparsity for Hugging Face language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (models, score, train, evaluate, measure, speculate, bench, demo):
    module.add_to(app)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits. `arguments`: without the program's name; None: those of the process."""
    try:
        app(arguments)
    except PPNetError as error:
        _fail(str(error))
    except OSError as error:
        # a full disk, a missing permission: the message of the system names the file
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
