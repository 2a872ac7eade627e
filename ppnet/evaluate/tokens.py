"""From text, a file or ids to the token sequences that are scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ppnet.errors import DataError

Bos = Literal["auto", "document", "window", "none"]
IGNORED = -100  # the label of tokens that no loss counts, as torch and transformers have it
BOS_CHOICES: tuple[Bos, ...] = ("auto", "document", "window", "none")
Data = str | os.PathLike | Tensor | Sequence


def read_text(data: str | os.PathLike) -> str:
    """The text itself, or the content of the UTF-8 file that `data` names.

    A string is a file name when such a file exists, or when it can only be meant as one: a single word with a folder
    separator or a file suffix.

    Raises:
        DataError: no such file, not UTF-8 text, or nothing in it.
    """
    named = isinstance(data, os.PathLike) or looks_like_a_path(data)
    if not named:
        text, where = str(data), "the given text"
    else:
        path = Path(data)
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"data: {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        except OSError as error:
            raise DataError(
                f"data: cannot read {path}: {error.strerror or error}. Give an existing text file."
            ) from error
    if not text.strip():
        raise DataError(f"data: {where} is empty; give text with at least two tokens.")
    return text


def looks_like_a_path(text: str) -> bool:
    """Whether a string is a file's name: one exists, or it is one word with a separator or a text file's suffix."""
    if len(text) > 1024 or not text or any(c.isspace() and c != " " for c in text):
        return False
    if os.path.isfile(text):
        return True
    single_word = " " not in text
    return single_word and (os.sep in text or Path(text).suffix.lower() in (".txt", ".md", ".json", ".jsonl", ".csv"))


def token_sequences(
    tokenizer: Any,
    data: Data,
    *,
    bos: Bos = "auto",
    separator: str | None = None,
    max_tokens: int | None = None,
) -> tuple[list[Tensor], Bos, int | None]:
    """Tokenises once.

    Args:
        tokenizer: Hugging Face tokenizer; may be None when `data` holds ids.
        data: text, a file name, ids int ``(T,)``, or several of these as a sequence (each one a document).
        bos: see `ppnet.evaluate.perplexity`.
        separator: splits text into documents, each its own sequence.
        max_tokens: stop after this many tokens; the last document is cut.

    Returns:
        The documents, int64 ``(T_i,)`` each, with BOS in front where `bos` says so; the resolved `bos`; the BOS id.

    Raises:
        DataError: nothing to tokenise, an unknown `bos`, or BOS asked for where the tokenizer has none.
    """
    if bos not in BOS_CHOICES:
        raise DataError(f"bos: {bos!r} is not known; use one of {', '.join(map(repr, BOS_CHOICES))}.")
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"max_tokens: must be at least 2, got {max_tokens}.")
    bos_id = getattr(tokenizer, "bos_token_id", None)
    documents = _as_ids(data)
    if documents is None:
        if tokenizer is None:
            raise DataError("tokenizer: None, and data is text; give the model's tokenizer, or token ids.")
        documents = _encode(tokenizer, data, separator, max_tokens)
        if bos == "auto":
            wanted = separator is not None or adds_bos(tokenizer)
            bos = "document" if wanted and bos_id is not None else "none"
    elif bos == "auto":
        bos = "none"  # ids are taken as they are
    if bos != "none" and bos_id is None:
        raise DataError(f"bos: {bos!r} asked for, but the tokenizer has no bos_token_id; use bos='none'.")
    if max_tokens is not None:
        documents = _first_tokens(documents, max_tokens)
    if bos == "document":
        front = torch.tensor([bos_id])
        documents = [torch.cat([front, ids]) for ids in documents]
    return documents, bos, bos_id


def _as_ids(data: Data) -> list[Tensor] | None:
    """Documents when `data` holds ids already, None when it is text or file names."""
    if isinstance(data, str | os.PathLike):
        return None
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise DataError(f"data: token ids must be an integer tensor, got {data.dtype}.")
        if data.ndim not in (1, 2):
            raise DataError(f"data: token ids must be (T,) or (documents, T), got shape {tuple(data.shape)}.")
        rows = data.detach().cpu().long()
        return [rows] if rows.ndim == 1 else list(rows)
    items = list(data)
    if not items:
        raise DataError("data: is empty; give text, a file name or token ids.")
    if all(isinstance(item, str | os.PathLike) for item in items):
        return None
    if all(isinstance(item, int) for item in items):
        return [torch.tensor(items, dtype=torch.int64)]
    try:
        return [torch.as_tensor(item).detach().cpu().long().reshape(-1) for item in items]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("data: a sequence must hold only texts, only file names, or only token ids.") from error


def _encode(tokenizer: Any, data: Data, separator: str | None, max_tokens: int | None) -> list[Tensor]:
    sources = [data] if isinstance(data, str | os.PathLike) else list(data)
    documents, total = [], 0
    for source in sources:
        text = read_text(source)
        for part in text.split(separator) if separator else [text]:
            part = part.strip() if separator else part
            if not part:
                continue
            # verbose=False: the text is cut into windows below, so the tokenizer's length warning does not apply
            ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            documents.append(torch.tensor(ids, dtype=torch.int64))
            total += len(ids)
            if max_tokens is not None and total >= max_tokens:
                return documents
    return documents


def _first_tokens(documents: list[Tensor], max_tokens: int) -> list[Tensor]:
    kept, left = [], max_tokens
    for ids in documents:
        if left <= 0:
            break
        kept.append(ids[:left])
        left -= len(kept[-1])
    return kept


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS in front by itself, which is what pruning papers score with."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
