"""Conversations as data: rows of messages, put into words by the tokenizer's chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ppnet.errors import DataError

MESSAGES = "messages"


def chat_column(row: Any, column: str) -> str | None:
    """The key under which a row holds a list of ``{"role": ..., "content": ...}``: `column`, or ``messages`` where the
    row has no `column`; None if it holds none."""
    if not isinstance(row, Mapping):
        return None
    name = column if column in row else MESSAGES
    value = row.get(name)
    if not isinstance(value, list | tuple) or not value:
        return None
    return name if all(isinstance(one, Mapping) and "role" in one for one in value) else None


def chat_lines(paths: Any, column: str) -> list[Any] | None:
    """The rows of ``.jsonl`` files, if the first one holds a chat; else None."""
    files = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(files, list | tuple) or not files:
        return None
    if not all(isinstance(f, str | os.PathLike) and str(f).endswith(".jsonl") and Path(f).is_file() for f in files):
        return None
    lines = []
    for file in files:
        with Path(file).open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    lines.append(json.loads(line))
                except ValueError as error:
                    raise DataError(
                        f"data: {file}, line {number} is not JSON ({error}); give one object per line."
                    ) from error
                if len(lines) == 1 and chat_column(lines[0], column) is None:
                    return None
    return lines or None


def templated(rows: Iterable[Any], tokenizer: Any, column: str) -> Iterator[dict[str, list[int]]]:
    """Token ids of whole conversations, one after the other, with what else a row says of them.

    Args:
        tokenizer: the model's, with a chat template.
        column: the key of the messages.

    Raises:
        DataError: no tokenizer or template, or a row that is no chat or that the template refuses.
    """
    if tokenizer is None:
        raise DataError(f"tokenizer: None, but {column!r} are chats; give the model's tokenizer, with a chat template.")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"tokenizer: {type(tokenizer).__name__} has no chat template, which the chats in {column!r} are put into "
            "words with; use the tokenizer of a chat model, set tokenizer.chat_template, or give text."
        )
    for number, row in enumerate(rows):
        if chat_column(row, column) != column:
            keys = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(
                f"data: row {number} has no chat under {column!r} ({keys}); every row must hold a list of "
                "{'role': ..., 'content': ...} there."
            )
        try:
            ids = tokenizer.apply_chat_template(list(row[column]), tokenize=True, return_dict=False)
        except Exception as error:  # templates are programs, which raise what they like
            raise DataError(
                f"data: the chat template refuses row {number} ({type(error).__name__}: {error}); correct or leave out "
                "the row, or use the template that it was made for."
            ) from error
        yield {**{name: row[name] for name in ("rewards", "groups") if name in row}, "input_ids": list(ids)}
