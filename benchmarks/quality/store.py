"""Rows of a study, kept in a file as they are made, so that a study that was killed goes on where it was."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Rows:
    """JSON lines, one per measurement: what it is of (`key`) and what came out.

    A line that a kill cut short is dropped when the file is opened again.

    Args:
        path: the file; its folder is made.
        recipe: what all rows have in common; a file of another recipe is refused.
    """

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path, self.rows = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        recipe = json.loads(json.dumps(recipe))
        if not lines:
            path.write_text(json.dumps(recipe) + "\n")
        elif lines[0] != recipe:
            changed = sorted(name for name in recipe.keys() | lines[0].keys() if recipe.get(name) != lines[0].get(name))
            raise SystemExit(f"{path}: holds rows of another recipe ({', '.join(changed)} differ); give another --out.")
        self.rows = lines[1:]

    def done(self, **key: Any) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, start: float, key: dict[str, Any], **values: Any) -> None:
        """Keeps a row and says so; `start` is the `time.perf_counter()` at its beginning."""
        row = {**key, **values, "seconds": round(time.perf_counter() - start, 2)}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        about = ", ".join(f"{name} {value}" for name, value in row.items())
        print(about, flush=True)

    def select(self, **key: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if key.items() <= row.items()]


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A study's recipe and rows."""
    recipe, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return recipe, rows
