"""Draws a report and puts its files into a folder."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from ppnet.errors import PPNetError
from ppnet.files import write_files
from ppnet.reporting.result import Report


def require_extra() -> None:
    """Makes sure that the figures and the page can be drawn.

    Raises:
        PPNetError: matplotlib or Jinja2 is missing; names the extra to install.
    """
    for module, name in (("matplotlib", "matplotlib"), ("jinja2", "Jinja2")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise PPNetError(f"report: {name} is not installed; run: pip install 'ppnet[report]'") from error


def write(result: Report, output: str | Path) -> Report:
    """Writes ``report.csv``, ``report.json``, the figures as PNG files, and ``report.html``, which holds them all.

    Every file is complete before it appears under its name; other files of an existing folder are left alone.

    Returns:
        The report with `folder` set.

    Raises:
        PPNetError: matplotlib or Jinja2 is missing, or `output` is a file.
    """
    require_extra()
    from ppnet.reporting.page import page
    from ppnet.reporting.plots import figures, png
    from ppnet.reporting.style import DARK, LIGHT

    output = Path(output)
    if output.exists() and not output.is_dir():
        raise PPNetError(f"output: {output} is a file; name a folder.")
    light = {name: png(figure) for name, figure in figures(result, LIGHT).items()}
    dark = {name: png(figure) for name, figure in figures(result, DARK).items()}
    contents = {
        "report.csv": result.to_csv().encode(),
        "report.json": result.to_json().encode(),
        **{f"{name}.png": image for name, image in light.items()},
        "report.html": page(result, light, dark).encode(),
    }
    write_files(output, contents)
    return dataclasses.replace(result, folder=output)
