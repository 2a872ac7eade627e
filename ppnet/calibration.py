"""Calibration data: from text, files, token ids, datasets or ready batches to the batches that scores are taken from.

There is one tokenising path, `ppnet.train.text_blocks`; this module decides which blocks are used and pads the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ppnet.chats import chat_column, chat_lines, templated
from ppnet.checks import integer, renamed
from ppnet.errors import DataError
from ppnet.evaluate.model_state import context_of
from ppnet.evaluate.tokens import IGNORED, adds_bos, looks_like_a_path
from ppnet.families import is_decoder

MAX_TOKENS = 2**16
DEFAULT_LENGTH = 512
# Blocks are drawn from the first so many times `max_tokens` tokens of the text, so that endless streams end.
POOL = 16
# One value per sequence, kept beside its tokens where the data has it (`ppnet.scores.rewards`).
PER_SEQUENCE = ("rewards", "groups")

Batch = dict[str, Tensor]


def calibration_batches(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    length: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = MAX_TOKENS,
    seed: int = 0,
    column: str = "text",
    separator: str | None = None,
    bos: bool | None = None,
) -> list[Batch]:
    """Reads calibration data once, into memory (8 bytes per token and tensor).

    Text is joined and cut into blocks of `length` tokens. Sequences of ids, and rows of a dataset that has
    ``input_ids``, stay sequences of their own (cut at `length`), padded on the right. So do the rows of ready batches:
    what their mask leaves out at either end is dropped, so that a sequence begins at position 0 however it was padded.
    Rows with rewards or groups are never cut. Rows of ``messages`` (``{"role": ..., "content": ...}``) are sequences,
    too: whole conversations as the tokenizer's chat template writes them.

    An encoder (`ppnet.families.is_decoder`) reads text document by document instead, with its tokenizer's special
    tokens ([CLS] and [SEP]) around each: a list of sentences gives padded batches of these, in their order. Longer
    documents go on in further sequences. There are no labels unless the data has them.

    Args:
        model: ids are checked against its vocabulary, `length` against its context.
        data: text or the name of a text file (a string is a name if such a file exists or if it can only be one); a
            path; a list of texts or of paths; token ids: 1-D (joined text), 2-D or a list of sequences; a
            `datasets.Dataset` or any iterable of mappings with `column`, ``messages`` or ``input_ids`` (and ``labels``,
            ``attention_mask``); an iterable of batches, e.g. a DataLoader; or one batch.
        tokenizer: the model's tokenizer; None if the data holds token ids.
        length: most tokens per sequence; None: 512, or what the model's context or a shorter text allows.
        batch_size: most sequences per batch.
        max_tokens: about as many tokens are used (whole sequences, at least one, and whole groups); None: all.
        seed: text has more than `max_tokens` tokens: which blocks are used, drawn from the first 16 x `max_tokens`.
            Sequences, rows and batches are taken in their order, and so is an encoder's text.
        column: key of the text, or of the messages, in mappings and ``.jsonl`` lines.
        separator: text between the documents of a text file, e.g. ``"<|endoftext|>"``.
        bos: put the beginning-of-sequence token before every document; None: if the tokenizer does so by itself. Not
            for encoders, whose tokenizers place all special tokens.

    Returns:
        Batches on the CPU: ``input_ids`` int64 (B, T); ``labels`` int64 (B, T), the ids with -100 where nothing is
        predicted (models shift them), of encoders those of the data or none; ``attention_mask`` int64 (B, T) where
        something is padded. ``rewards`` and ``groups`` (B,) are kept where a row or batch has them.

    Raises:
        DataError: nothing to read, sequences of fewer than 2 tokens only, ids outside the vocabulary, tensors of
            different shapes, positions that do not count from a sequence's start, rewarded sequences longer than
            `length`, chats without a chat template, or data of an unknown type.
    """
    # Here, since `ppnet.train` brings transformers' trainer, and callbacks that build on this module.
    from ppnet.train.data import check_vocabulary, sentences, text_blocks

    if length is not None:
        integer("length", length, 2, DataError, " (so that a sequence holds a prediction), or None")
    integer("batch_size", batch_size, 1, DataError)
    integer("seed", seed, 0, DataError)
    if max_tokens is not None:
        integer("max_tokens", max_tokens, 2, DataError, ", or None for all")
    context = context_of(model)
    if length is not None and context is not None and length > context:
        raise DataError(f"length: {length:,} tokens are more than the model's context of {context:,}; give less.")
    most = min(length or DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    scanned = isinstance(data, Sized)
    data, rows = _rows(data, tokenizer, column)
    decoder = is_decoder(model)
    if rows is not None:
        # Sequences given as ids may be as long as the model allows.
        batches = _sequence_batches(_sequences(rows, length or context, decoder), batch_size, max_tokens, scanned)
    elif not decoder:
        try:
            rows = sentences(data, tokenizer, most, column=column, separator=separator)
            batches = _sequence_batches(_sequences(rows, most, decoder), batch_size, max_tokens, scanned)
        except DataError as error:
            raise renamed(error, "data", "source") from error
    else:
        if bos is None:
            bos = getattr(tokenizer, "bos_token_id", None) is not None and adds_bos(tokenizer)
        most_read = None if max_tokens is None else POOL * max_tokens
        try:
            blocks = text_blocks(
                data, tokenizer, 2, column=column, separator=separator, bos=bos, max_tokens=most_read
            )  # fmt: skip
        except DataError as error:
            raise renamed(error, "data", "source") from error
        batches = _blocks(blocks.ids, most, length is not None, batch_size, max_tokens, seed)
    if not batches:
        raise DataError("data: holds no sequence of at least 2 tokens; give text, a file, token ids or a dataset.")
    for batch in batches:
        check_vocabulary(batch["input_ids"], model, "data")
    return batches


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch, without padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


# ---- text ------------------------------------------------------------------------------------------------------------


def _blocks(ids: Tensor, length: int, exact: bool, batch_size: int, max_tokens: int | None, seed: int) -> list[Batch]:
    """Blocks of joined text, drawn without replacement, in the text's order."""
    if ids.numel() < length:
        if exact:
            raise DataError(
                f"data: {ids.numel()} tokens are fewer than one block of length={length} needs; give more text or a "
                "smaller length."
            )
        length = ids.numel()
    blocks = ids[: ids.numel() // length * length].view(-1, length).long()
    wanted = len(blocks) if max_tokens is None else max(1, max_tokens // length)
    if wanted < len(blocks):
        drawn = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:wanted]
        blocks = blocks[drawn.sort().values]
    return [{"input_ids": part, "labels": part.clone()} for part in blocks.split(batch_size)]


# ---- sequences -------------------------------------------------------------------------------------------------------


def _sequence_batches(
    sequences: Iterator[Batch], batch_size: int, max_tokens: int | None, scanned: bool
) -> list[Batch]:
    return [batch for run in _alike(_limited(sequences, max_tokens, scanned)) for batch in _padded(run, batch_size)]


def _rows(data: Any, tokenizer: Any, column: str) -> tuple[Any, Iterable[Any] | None]:
    """The data and, if it holds sequences of ids rather than text, an iterable of them."""
    if isinstance(data, str) and not looks_like_a_path(data):
        if not data.strip():
            raise DataError("data: the given text is empty; give text with at least two tokens.")
        return [data], None
    data = chat_lines(data, column) or data
    if isinstance(data, str | os.PathLike):
        return data, None
    if isinstance(data, bytes | bytearray):
        raise DataError(f"data: {bytes(data[:20])!r} are bytes; give text (data.decode()) or a list of token ids.")
    if isinstance(data, Tensor | np.ndarray):
        return data, [{"input_ids": torch.as_tensor(data)}] if data.ndim == 2 else None
    if isinstance(data, Mapping):
        return data, [data] if "input_ids" in data else None
    if not isinstance(data, Iterable):
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise DataError(
                f"data: {type(data).__name__} cannot be read; give text, a file, token ids, a dataset or batches."
            )
        data = map(data.__getitem__, range(len(data)))  # a map-style torch Dataset
    stream = iter(data)
    first = list(islice(stream, 1))
    if not first:
        raise DataError("data: is empty; give text, a file, token ids, a dataset or batches.")
    if isinstance(first[0], int | np.integer) and not isinstance(first[0], bool):
        return torch.tensor([*first, *stream]), None
    everything = chain(first, stream)
    chats = chat_column(first[0], column)
    if chats is not None:
        return data, templated(everything, tokenizer, chats)
    ids = "input_ids" in first[0] if isinstance(first[0], Mapping) else not isinstance(first[0], str | os.PathLike)
    if ids:
        return data, everything
    return (data if isinstance(data, list | tuple) else everything), None


def _sequences(rows: Iterable[Any], longest: int | None, decoder: bool) -> Iterator[Batch]:
    """Mappings, batches and bare ids -> one sequence after the other: ``{"input_ids": (T,), ...}``."""
    for row in rows:
        fields = dict(row) if isinstance(row, Mapping) else {"input_ids": row}
        if "input_ids" not in fields:
            raise DataError(f"data: an example has no input_ids; its keys are {sorted(map(str, fields))}.")
        ids = _integers("input_ids", fields["input_ids"])
        if ids.ndim not in (1, 2):
            raise DataError(f"data: input_ids have shape {tuple(ids.shape)}; they must be (T,) or (B, T).")
        sequence = {"input_ids": ids}
        classes = None if decoder else _classes(fields.get("labels"), ids)
        if classes is not None:
            sequence["labels"] = classes
        for name in ("labels", "attention_mask"):
            if fields.get(name) is not None and name not in sequence:
                sequence[name] = _integers(name, fields[name])
                if sequence[name].shape != ids.shape:
                    raise DataError(
                        f"data: {name} have shape {tuple(sequence[name].shape)}, input_ids {tuple(ids.shape)}; both "
                        "must be the same."
                    )
        _check_positions(fields.get("position_ids"), sequence)
        if fields.get("token_type_ids") is not None and _integers("token_type_ids", fields["token_type_ids"]).any():
            raise DataError(
                "data: token_type_ids are not used, and these are not all 0; give the sentences of a pair as sequences "
                "of their own, or joined and without token_type_ids."
            )
        for name in PER_SEQUENCE:
            if fields.get(name) is not None:
                values = _numbers(name, fields[name])
                if values.numel() != (1 if ids.ndim == 1 else len(ids)):
                    raise DataError(f"data: {name} must be one number per sequence, got shape {tuple(values.shape)}.")
                sequence[name] = values.reshape(()) if ids.ndim == 1 else values.reshape(len(ids))
        singles = [sequence] if ids.ndim == 1 else [{k: v[i] for k, v in sequence.items()} for i in range(len(ids))]
        for single in singles:
            yield from _whole(single, longest, decoder)


def _classes(labels: Any, ids: Tensor) -> Tensor | None:
    """Labels of whole sequences, one class or number each, as classifiers take them; None if they are not that."""
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor if tensor.shape == ids.shape[:-1] else None


def _integers(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"data: {name} cannot be read as a tensor ({error}); give integers, (T,) or (B, T).") from error
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and name != "attention_mask"):
        if tensor.numel() == 0:  # torch makes an empty list float
            return tensor.long()
        raise DataError(f"data: {name} have dtype {tensor.dtype}; they must be integers.")
    return tensor.detach().cpu().long()


def _numbers(name: str, values: Any) -> Tensor:
    """``rewards`` as they are, ``groups`` as int64."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"data: {name} must be one number per sequence, got {str(values)[:40]!r} ({error}).") from error
    if name == "groups":
        if not bool((tensor == tensor.round()).all()) or tensor.is_complex() or tensor.dtype == torch.bool:
            raise DataError(
                f"data: groups must be integers, equal for the completions of one prompt, got {str(values)[:40]}."
            )
        tensor = tensor.long()
    return tensor.detach().cpu()


def _check_positions(positions: Any, sequence: Batch) -> None:
    """Refuses positions that are not what every sequence gets anyway: 0, 1, ... from its first token."""
    if positions is None:
        return
    positions, ids = _integers("position_ids", positions), sequence["input_ids"]
    mask = sequence.get("attention_mask", torch.ones_like(ids))
    if positions.shape != ids.shape or bool(((positions - (mask.cumsum(-1) - 1)) * mask).any()):
        raise DataError(
            "data: position_ids are not used, and these do not count 0, 1, 2, ... from the first token of every "
            "sequence; give packed sequences as rows of their own, without position_ids."
        )


def _whole(sequence: Batch, longest: int | None, decoder: bool) -> Iterator[Batch]:
    """One sequence with mask and labels (of an encoder: those it has), without masked ends, cut at `longest` tokens;
    nothing where a decoder predicts nothing."""
    ids = sequence["input_ids"]
    mask = sequence.get("attention_mask")
    extra = {name: sequence[name] for name in PER_SEQUENCE if name in sequence}
    labels = sequence.get("labels")
    if labels is not None and labels.ndim == 0:
        extra["labels"], labels = labels, None
    if labels is None and decoder:
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    if mask is None and decoder and labels is not None:
        # Nothing depends on what follows the last label: it is padding, or as good as that.
        mask = (labels != IGNORED).flip(0).cumsum(0).flip(0).clamp(max=1)
    elif mask is None:
        mask = torch.ones_like(ids)
    real = mask.nonzero().flatten()
    if not len(real):
        return
    # Absolute positions count from the first token, not from the padding before it.
    ends = slice(int(real[0]), int(real[-1]) + 1)
    whole = {"input_ids": ids[ends], "attention_mask": mask[ends]}
    if labels is not None:
        whole["labels"] = labels[ends]
    size = ends.stop - ends.start
    step = size if longest is None else longest
    if extra and size > step:
        raise DataError(
            f"data: a sequence with {' and '.join(extra)} has {size:,} tokens, more than the {step:,} that length or "
            "the model's context allow; such sequences are not cut: give a larger length, or shorter ones."
        )
    for start in range(0, size, step):
        piece = {name: tensor[start : start + step] for name, tensor in whole.items()}
        if not decoder or (piece["labels"][1:] != IGNORED).any():
            yield {**piece, **extra}


def _limited(sequences: Iterator[Batch], max_tokens: int | None, scanned: bool) -> Iterator[Batch]:
    """Sequences up to `max_tokens`, and then what is left of the groups that have begun.

    Args:
        scanned: look for it in all of the data; else up to the first new group, since a stream may have no end.
    """
    total = 0
    begun: set[int] = set()
    for sequence in sequences:
        group = int(sequence["groups"]) if "groups" in sequence else None
        if max_tokens is not None and total >= max_tokens and group not in begun:
            if scanned and begun:
                continue
            return
        yield sequence
        total += int(sequence["attention_mask"].sum())
        if group is not None:
            begun.add(group)
        elif max_tokens is not None and total >= max_tokens:
            return


def _alike(sequences: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Runs of sequences with the same keys."""
    run: list[Batch] = []
    for sequence in sequences:
        if run and run[0].keys() != sequence.keys():
            yield run
            run = []
        run.append(sequence)
    if run:
        yield run


def _padded(sequences: Sequence[Batch], batch_size: int) -> list[Batch]:
    """Batches padded on the right to their longest sequence."""
    batches = []
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        batch = {
            name: pad_sequence([row[name] for row in part], batch_first=True, padding_value=value)
            for name, value in (("input_ids", 0), ("labels", IGNORED), ("attention_mask", 0))
            if name in part[0] and part[0][name].ndim
        }
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        single = [name for name, value in part[0].items() if not value.ndim]
        batch.update({name: torch.stack([row[name] for row in part]) for name in single})
        batches.append(batch)
    return batches
