"""Perplexity of a causal language model: exp of the mean negative log-likelihood (NLL) per scored token.

    nll = - sum_t log p(x_t | x_<t in its window) / tokens,     perplexity = exp(nll)

The convention of the pruning papers: the text is tokenised once and cut into windows that do not overlap, and the first
token of a window is context only. `stride` smaller than `window` gives every token after the first window at least
``window - stride`` tokens of context. The last, shorter window is scored too, and every token weighs the same.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppnet.errors import DataError
from ppnet.evaluate.model_state import context_of, device_of, vocabulary_of
from ppnet.evaluate.progress import Progress
from ppnet.evaluate.tokens import Bos, Data, token_sequences
from ppnet.families import check_decoder
from ppnet.modes import evaluating

DEFAULT_WINDOW = 2048
MAX_LOGITS = 2**28  # elements of one batch of logits: 1 GiB in float32


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        nll: mean negative log-likelihood per scored token, in nats.
        perplexity: exp(nll).
        stderr: standard error of `nll`, from the spread between windows (0 for a single window).
        tokens: scored tokens.
        windows: forward sequences.
        documents: sequences that were cut into windows.
        window: most tokens of one window, BOS included.
        stride: tokens between the starts of two windows.
        bos: where BOS was put: ``document``, ``window`` or ``none``.
        seconds: wall time.
    """

    nll: float
    perplexity: float
    stderr: float
    tokens: int
    windows: int
    documents: int
    window: int
    stride: int
    bos: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4g} (NLL {self.nll:.4f} +- {self.stderr:.4f} nats per token) over "
            f"{self.tokens:,} tokens, {self.windows:,} windows of at most {self.window}, stride {self.stride}, "
            f"BOS: {self.bos}"
        )


@dataclass(frozen=True)
class _Window:
    """Ids of one forward sequence, int64 ``(L,)``; targets ``first..L-1`` are scored."""

    ids: Tensor
    first: int


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: Bos = "auto",
    separator: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Scores text with a causal language model, on the model's device and in its dtype; sums in float64.

    Args:
        model: maps ids int64 ``(B, L)`` to ``.logits`` ``(B, L, V)``. Gated models are scored at their present size.
        tokenizer: Hugging Face tokenizer; may be None when `data` holds ids.
        data: text, a UTF-8 file's name, ids int ``(T,)`` or ``(documents, T)``, or a list of these.
        window: most tokens per forward sequence. Default: 2048, or the model's context if shorter.
        stride: tokens between window starts, at most `window`. Default: `window` (no overlap).
        batch_size: most windows per forward pass; fewer where the logits would exceed 1 GiB in float32.
        bos: ``document`` puts BOS before every document, ``window`` before every window, ``none`` nowhere. ``auto``:
            ``document`` if the tokenizer adds BOS by itself or `separator` is given (and a BOS exists), else ``none``.
        separator: splits the text into documents, each its own sequence, e.g. ``<|endoftext|>`` for TinyStories.
        max_tokens: score only the first so many tokens of the data.
        progress: write progress to stderr when it takes longer than two seconds.

    Returns:
        Perplexity

    Raises:
        UnsupportedModelError: the model is an encoder.
        DataError: empty or too short data, ids outside the model's vocabulary, a window or stride that does not fit.
    """
    check_decoder(model, "perplexity of next tokens")
    length = _window_length(model, window)
    step = length if stride is None else stride
    if not 1 <= step <= length:
        raise DataError(f"stride: must be in [1, window = {length}], got {step}.")
    if batch_size < 1:
        raise DataError(f"batch_size: must be at least 1, got {batch_size}.")
    documents, bos, bos_id = token_sequences(tokenizer, data, bos=bos, separator=separator, max_tokens=max_tokens)
    _check_ids(documents, vocabulary_of(model))
    windows = _windows(documents, length, step, bos_id if bos == "window" else None)
    if not windows:
        raise DataError(
            f"data: too short: {sum(map(len, documents))} tokens in {len(documents)} documents leave no token with a "
            "predecessor; give at least two tokens, or bos='document'."
        )
    start = time.perf_counter()
    sums, counts = _score(model, windows, batch_size, progress)
    tokens = int(counts.sum())
    nll = float(sums.sum() / tokens)
    return Perplexity(
        nll=nll,
        perplexity=math.inf if nll >= 700 else math.exp(nll),
        stderr=_stderr(sums, counts, nll),
        tokens=tokens,
        windows=len(windows),
        documents=len(documents),
        window=length,
        stride=step,
        bos=bos,
        seconds=time.perf_counter() - start,
    )


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


def _windows(documents: list[Tensor], length: int, step: int, window_bos: int | None) -> list[_Window]:
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
                found.append(_Window(sequence, first))
            scored = end
            if end == len(ids):
                break
    return found


def _score(model: nn.Module, windows: list[_Window], batch_size: int, progress: bool) -> tuple[Tensor, Tensor]:
    """Summed NLL and scored tokens of every window: float64 ``(N,)`` and int64 ``(N,)``."""
    device, vocabulary = device_of(model), vocabulary_of(model)
    sums = torch.zeros(len(windows), dtype=torch.float64)
    counts = torch.tensor([len(w.ids) - w.first for w in windows])
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))  # equal lengths meet: little padding
    report = Progress(int(counts.sum()), "perplexity, tokens")
    with evaluating(model), report:
        at = 0
        while at < len(order):
            longest = len(windows[order[at]].ids)
            rows = order[at : at + max(1, min(batch_size, MAX_LOGITS // (longest * vocabulary)))]
            at += len(rows)
            # Padding follows the text, so causal attention never sees it and no mask is needed.
            batch = torch.stack(
                [F.pad(windows[i].ids, (0, longest - len(windows[i].ids)), value=int(windows[i].ids[-1])) for i in rows]
            ).to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, i in enumerate(rows):
                first, last = windows[i].first, len(windows[i].ids)
                losses = F.cross_entropy(
                    logits[row, first - 1 : last - 1].float(), batch[row, first:last], reduction="none"
                )
                sums[i] = losses.sum(dtype=torch.float64).cpu()
            if progress:
                report.advance(int(counts[rows].sum()))
    return sums, counts


def _stderr(sums: Tensor, counts: Tensor, nll: float) -> float:
    """Standard error of a ratio of sums: windows are the independent samples, weighted by their tokens."""
    n = len(sums)
    if n < 2:
        return 0.0
    residual = sums - nll * counts
    return float(torch.sqrt(residual.square().sum() * n / (n - 1)) / counts.sum())
