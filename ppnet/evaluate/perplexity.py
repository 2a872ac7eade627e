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

from ppnet.evaluate.model_state import device_of, vocabulary_of
from ppnet.evaluate.progress import Progress
from ppnet.evaluate.tokens import Bos, Data
from ppnet.evaluate.windows import Window, batches, windows_of
from ppnet.families import check_decoder
from ppnet.modes import evaluating


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
    windows = windows_of(
        model,
        tokenizer,
        data,
        window=window,
        stride=stride,
        batch_size=batch_size,
        bos=bos,
        separator=separator,
        max_tokens=max_tokens,
    )
    start = time.perf_counter()
    sums, counts = _score(model, windows.items, batch_size, progress)
    tokens = int(counts.sum())
    nll = float(sums.sum() / tokens)
    return Perplexity(
        nll=nll,
        perplexity=perplexity_of(nll),
        stderr=_stderr(sums, counts, nll),
        tokens=tokens,
        windows=len(windows.items),
        documents=windows.documents,
        window=windows.length,
        stride=windows.stride,
        bos=windows.bos,
        seconds=time.perf_counter() - start,
    )


def perplexity_of(nll: float) -> float:
    """exp(nll), infinite where float64 ends."""
    return math.inf if nll >= 700 else math.exp(nll)


def _score(model: nn.Module, windows: list[Window], batch_size: int, progress: bool) -> tuple[Tensor, Tensor]:
    """Summed NLL and scored tokens of every window: float64 ``(N,)`` and int64 ``(N,)``."""
    device, vocabulary = device_of(model), vocabulary_of(model)
    sums = torch.zeros(len(windows), dtype=torch.float64)
    counts = torch.tensor([window.tokens for window in windows])
    report = Progress(int(counts.sum()), "perplexity, tokens")
    with evaluating(model), report:
        for part in batches(windows, batch_size, vocabulary):
            batch = part.ids.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, i in enumerate(part.rows):
                first, last = windows[i].first, len(windows[i].ids)
                losses = F.cross_entropy(
                    logits[row, first - 1 : last - 1].float(), batch[row, first:last], reduction="none"
                )
                sums[i] = losses.sum(dtype=torch.float64).cpu()
            if progress:
                report.advance(int(counts[part.rows].sum()))
    return sums, counts


def _stderr(sums: Tensor, counts: Tensor, nll: float) -> float:
    """Standard error of a ratio of sums: windows are the independent samples, weighted by their tokens."""
    n = len(sums)
    if n < 2:
        return 0.0
    residual = sums - nll * counts
    return float(torch.sqrt(residual.square().sum() * n / (n - 1)) / counts.sum())
