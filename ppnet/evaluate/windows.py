"""From data to the windows that are scored: what every measure of next-token predictions has in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppnet.errors import DataError
from ppnet.evaluate.model_state import context_of, vocabulary_of
from ppnet.evaluate.tokens import Bos, Data, token_sequences

DEFAULT_WINDOW = 2048
MAX_LOGITS = 2**28  # elements of one batch of logits: 1 GiB in float32


@dataclass(frozen=True)
class Window:
    """Ids of one forward sequence, int64 ``(L,)``; targets ``first..L-1`` are scored."""

    ids: Tensor
    first: int

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Windows:
    """The windows of some data.

    Attributes:
        items: one entry per forward sequence.
        documents: sequences that were cut into windows.
        length: most tokens of one window, BOS included.
        stride: tokens between the starts of two windows.
        bos: where BOS was put: ``document``, ``window`` or ``none``.
    """

    items: list[Window]
    documents: int
    length: int
    stride: int
    bos: Bos

    @property
    def tokens(self) -> int:
        """Scored tokens of all windows."""
        return sum(window.tokens for window in self.items)


@dataclass(frozen=True)
class Batch:
    """Windows of one forward pass: ids int64 ``(B, L)`` on the CPU, padded behind; which windows they are ``(B,)``."""

    ids: Tensor
    rows: list[int]


def windows_of(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    *,
    window: int | None,
    stride: int | None,
    batch_size: int,
    bos: Bos,
    separator: str | None,
    max_tokens: int | None,
) -> Windows:
    """Tokenises and cuts; arguments as for `ppnet.evaluate.perplexity`.

    Raises:
        DataError: empty or too short data, ids outside the model's vocabulary, a window, stride or batch size that
            does not fit.
    """
    length = _window_length(model, window)
    step = length if stride is None else stride
    if not 1 <= step <= length:
        raise DataError(f"stride: must be in [1, window = {length}], got {step}.")
    if batch_size < 1:
        raise DataError(f"batch_size: must be at least 1, got {batch_size}.")
    documents, bos, bos_id = token_sequences(tokenizer, data, bos=bos, separator=separator, max_tokens=max_tokens)
    _check_ids(documents, vocabulary_of(model))
    items = _cut(documents, length, step, bos_id if bos == "window" else None)
    if not items:
        raise DataError(
            f"data: too short: {sum(map(len, documents))} tokens in {len(documents)} documents leave no token with a "
            "predecessor; give at least two tokens, or bos='document'."
        )
    return Windows(items, len(documents), length, step, bos)


def batches(windows: list[Window], batch_size: int, vocabulary: int, most: int = MAX_LOGITS) -> Iterator[Batch]:
    """Batches of at most `batch_size` windows and, unless one window has more, `most` logits."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))  # equal lengths meet: little padding
    at = 0
    while at < len(order):
        longest = len(windows[order[at]].ids)
        rows = order[at : at + max(1, min(batch_size, most // (longest * vocabulary)))]
        at += len(rows)
        # Padding follows the text, so causal attention never sees it and no mask is needed.
        ids = torch.stack(
            [F.pad(windows[i].ids, (0, longest - len(windows[i].ids)), value=int(windows[i].ids[-1])) for i in rows]
        )
        yield Batch(ids, rows)


def _window_length(model: nn.Module, window: int | None) -> int:
    context = context_of(model)
    if window is None:
        return min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    if window < 2:
        raise DataError(f"window: must be at least 2 tokens, got {window}.")
    if context is not None and window > context:
        raise DataError(
            f"window: {window} tokens exceed the model's context of {context}; use window={context} or less."
        )
    return window


def _check_ids(documents: list[Tensor], vocabulary: int) -> None:
    full = [ids for ids in documents if len(ids)]
    if not full:
        raise DataError("data: holds no tokens; give text, a file name or token ids.")
    low, high = min(int(ids.min()) for ids in full), max(int(ids.max()) for ids in full)
    if low < 0 or high >= vocabulary:
        odd = low if low < 0 else high
        raise DataError(
            f"data: token id {odd} is outside the model's vocabulary [0, {vocabulary}); the tokenizer does not belong "
            "to this model. Use the tokenizer the model was trained with."
        )


def _cut(documents: list[Tensor], length: int, step: int, window_bos: int | None) -> list[Window]:
    """Cuts every document; a window scores the tokens that no earlier one has and that have a predecessor in it."""
    front = torch.empty(0, dtype=torch.int64) if window_bos is None else torch.tensor([window_bos])
    room = length - len(front)
    found = []
    for ids in documents:
        scored = 0  # tokens of this document that earlier windows held
        for begin in range(0, len(ids), min(step, room)):
            end = min(begin + room, len(ids))
            sequence = torch.cat([front, ids[begin:end]])
            first = max(scored - begin + len(front), 1)
            if first < len(sequence):
                found.append(Window(sequence, first))
            scored = end
            if end == len(ids):
                break
    return found
