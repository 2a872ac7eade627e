"""From text to blocks of token ids for causal language modelling."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppnet.errors import DataError
from ppnet.evaluate.model_state import context_of
from ppnet.evaluate.tokens import IGNORED

_DOCUMENTS_PER_BATCH = 256
_SHOWN = 40


class TextBlocks(torch.utils.data.Dataset):
    """N blocks of L tokens, as ``{"input_ids": int64 (L,), "labels": int64 (L,)}``.

    Labels are the ids themselves (models shift them); padding, which only unpacked documents have, is -100.

    Attributes:
        tokens: number of training tokens, without padding.
        dropped: tokens at the end that did not fill a block.
    """

    def __init__(self, ids: Tensor, length: int, lengths: Tensor | None = None, dropped: int = 0) -> None:
        self.ids = ids
        self.length = length
        self.lengths = lengths
        self.dropped = dropped
        self.tokens = int(ids.numel() if lengths is None else lengths.sum())

    def __len__(self) -> int:
        return self.ids.numel() // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: {index} must be in [{-len(self)}, {len(self)}).")
        start = (index % len(self)) * self.length
        ids = self.ids[start : start + self.length].long()
        labels = ids.clone()
        if self.lengths is not None:
            labels[int(self.lengths[index]) :] = IGNORED
        return {"input_ids": ids, "labels": labels}


def text_blocks(
    source: Any,
    tokenizer: Any = None,
    length: int = 512,
    *,
    column: str = "text",
    separator: str | None = None,
    pack: bool = True,
    bos: bool = False,
    model: nn.Module | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> TextBlocks:
    """Tokenises text and cuts it into blocks of `length` tokens, in memory (4 bytes per token).

    Args:
        source: a path (str or Path) of a text file or of a ``.jsonl`` file with one object per line; a list of paths; a
            list of strings, one per document; a `datasets.Dataset`, `IterableDataset` or any iterable of mappings that
            hold `column` or ``input_ids``; or a 1-D integer tensor of token ids.
        tokenizer: a `transformers` tokenizer; None if the source holds token ids.
        length: tokens per block, L >= 2.
        column: key of the text in mappings and ``.jsonl`` lines.
        separator: text between the documents of a text file, e.g. ``"<|endoftext|>"``; None: a file is one document.
        pack: True: documents, each followed by the end-of-sequence token, are joined and cut into full blocks. False:
            each document begins its own block (long ones go on in further blocks); blocks are padded at the end.
        bos: puts the beginning-of-sequence token before every document.
        model: if given, `length` is checked against its context, and ids against its vocabulary (`check_vocabulary`).
        max_tokens: stop reading after this many tokens (needed for endless iterables); None: read all.
        progress: show a bar with the remaining time if reading takes longer than 2 seconds.

    Raises:
        DataError: a file is missing or not UTF-8, the source is empty, of an unknown type or shorter than one block, a
            special token is missing, `length` is above the model's context, or an id is outside its vocabulary.
    """
    if length < 2:
        raise DataError(f"length: {length!r} must be >= 2, so that a block holds at least one prediction.")
    context = None if model is None else context_of(model)
    if context is not None and length > context:
        raise DataError(
            f"length: {length:,} tokens are more than the model's context of {context:,}; give at most that."
        )
    if isinstance(source, Tensor | np.ndarray):
        documents: Iterator[np.ndarray] = iter([_checked_ids(source)])
        join_with = None
    else:
        # Rows that hold ids already need no tokenizer, and then have their end-of-sequence tokens.
        join_with = None if tokenizer is None else _special_token(tokenizer, "eos_token_id", "to join documents with")
        documents = _tokenised(_documents(source, column, separator), tokenizer, column, progress)
    first = _special_token(tokenizer, "bos_token_id", "for bos=True") if bos else None
    parts, total = [], 0
    for document in documents:
        if document.size == 0:
            continue
        before = [] if first is None else [np.array([first], np.int32)]
        after = [] if join_with is None else [np.array([join_with], np.int32)]
        parts.append(np.concatenate([*before, document, *after]))
        total += parts[-1].size
        if max_tokens is not None and total >= max_tokens:
            parts[-1] = parts[-1][: parts[-1].size - (total - max_tokens)]
            break
    if not parts:
        raise DataError(f"source: {_shown(source)} holds no text; give at least one document that is not empty.")
    blocks = _packed(parts, length, source) if pack else _padded(parts, length, join_with)
    if model is not None:
        check_vocabulary(blocks.ids, model)
    return blocks


def sentences(
    source: Any, tokenizer: Any, length: int, *, column: str = "text", separator: str | None = None
) -> Iterator[Any]:
    """Token ids of one document after the other, with the special tokens that the tokenizer puts around each.

    Documents of more than `length` tokens go on in further sequences, each with its own special tokens. Empty ones are
    left out.

    Args:
        source, column, separator: as `text_blocks` reads them.
        tokenizer: a `transformers` tokenizer; None if the source holds token ids, which are taken as they are.

    Raises:
        DataError: as `text_blocks`, or a `length` that leaves no room between the special tokens.
    """
    if isinstance(source, Tensor | np.ndarray):
        yield _checked_ids(source)
        return
    special = 0 if tokenizer is None else tokenizer.num_special_tokens_to_add()
    if length <= special:
        raise DataError(f"length: {length} leaves no room beside the tokenizer's {special} special tokens; give more.")
    stream = iter(_documents(source, column, separator))
    while batch := list(islice(stream, _DOCUMENTS_PER_BATCH)):
        texts = [_text(document, column) for document in batch]
        for text in texts:
            if not isinstance(text, str):
                yield _checked_ids(text)
            elif tokenizer is None:
                raise DataError("tokenizer: None is allowed for token ids only; give the model's tokenizer.")
            elif text.strip() and tokenizer.is_fast:
                pieces = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)
                yield from pieces["input_ids"]
            elif text.strip():  # those in Python give only the first piece
                ids, room = tokenizer.encode(text, add_special_tokens=False), length - special
                for start in range(0, len(ids), room):
                    yield tokenizer.build_inputs_with_special_tokens(ids[start : start + room])


def check_vocabulary(ids: Tensor, model: nn.Module, name: str = "ids") -> None:
    """Checks that token ids (any integer shape) are rows of the model's input embedding.

    Raises:
        DataError: an id is negative or too large: the tokenizer is not the model's.
    """
    if ids.numel() == 0:
        return
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise DataError(
            f"{name}: token id {low if low < 0 else high} is outside the model's vocabulary of {size} (allowed 0 to "
            f"{size - 1}): the tokenizer does not match the model; load both from the same checkpoint."
        )


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _packed(parts: list[np.ndarray], length: int, source: Any) -> TextBlocks:
    ids = torch.from_numpy(np.concatenate(parts))
    count = ids.numel() // length
    if count == 0:
        raise DataError(
            f"source: {_shown(source)} has {ids.numel()} tokens, fewer than one block of length={length} needs; give "
            "more text, a smaller length, or pack=False."
        )
    return TextBlocks(ids[: count * length], length, dropped=ids.numel() - count * length)


def _padded(parts: list[np.ndarray], length: int, pad: int | None) -> TextBlocks:
    pieces = [part[i : i + length] for part in parts for i in range(0, part.size, length)]
    # One token alone predicts nothing.
    kept = [piece for piece in pieces if piece.size > 1]
    if not kept:
        raise DataError("source: every document has fewer than 2 tokens; give longer documents or pack=True.")
    # Padding follows the document, where causal attention does not see it, and has no labels: any id does.
    ids = np.full((len(kept), length), 0 if pad is None else pad, np.int32)
    for row, piece in zip(ids, kept, strict=True):
        row[: piece.size] = piece
    lengths = torch.tensor([piece.size for piece in kept])
    return TextBlocks(
        torch.from_numpy(ids.reshape(-1)), length, lengths, sum(p.size for p in pieces) - int(lengths.sum())
    )


def _checked_ids(source: Tensor | np.ndarray) -> np.ndarray:
    ids = torch.as_tensor(source)
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(
            f"source: token ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; they must be 1-D integers."
        )
    return ids.to(device="cpu", dtype=torch.int32).numpy()


def _special_token(tokenizer: Any, name: str, purpose: str) -> int:
    if tokenizer is None:
        raise DataError("tokenizer: None is allowed for token ids only; give the model's tokenizer.")
    token = getattr(tokenizer, name, None)
    if token is None:
        raise DataError(
            f"tokenizer: {type(tokenizer).__name__} has no {name} {purpose}; set tokenizer.{name.removesuffix('_id')}."
        )
    return int(token)


# ---- reading --------------------------------------------------------------------------------------------------------


def _documents(source: Any, column: str, separator: str | None) -> Iterable[Any]:
    """The documents of a source: strings, or mappings that hold text or ids. Sized where the number is known."""
    if isinstance(source, str | os.PathLike):
        return _read_files([source], column, separator)
    if isinstance(source, list | tuple):
        paths = [isinstance(item, os.PathLike) for item in source]
        # Strings may be texts or file names: they are names if the first one is an existing file.
        if any(paths) or (source and isinstance(source[0], str) and _is_file(source[0])):
            return _read_files(list(source), column, separator)
        return source
    if isinstance(source, Mapping):
        if column not in source:
            raise DataError(f"column: {column!r} is not a column or split; there are {sorted(map(str, source))}.")
        return _documents(source[column], column, separator)
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        return source
    raise DataError(
        f"source: {_shown(source)} is of type {type(source).__name__}; give a path, a list of paths or of strings, a "
        "dataset, or a 1-D tensor of token ids."
    )


def _is_file(name: str) -> bool:
    return len(name) < 4096 and "\n" not in name and "\0" not in name and os.path.isfile(name)


def _read_files(paths: list[Any], column: str, separator: str | None) -> list[Any]:
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(
                f"source: {_shown(path)} {kind}; give an existing file (text itself goes in a list: [text])."
            )
    documents: list[Any] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"source: {path} is not UTF-8 text (byte {error.start}); convert it, or load it with the datasets "
                "library."
            ) from error
        if path.suffix == ".jsonl":
            documents.extend(_json_lines(path, text))
        else:
            documents.extend(text.split(separator) if separator else [text])
    return documents


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"source: {path}, line {number} is not JSON ({error}).") from error


def _tokenised(documents: Iterable[Any], tokenizer: Any, column: str, progress: bool) -> Iterator[np.ndarray]:
    """Token ids of each document, int32 ``(n,)``. A tokenizer's own special tokens are left out."""
    total = len(documents) if isinstance(documents, Sized) else None
    stream = iter(documents)
    # `delay` keeps short work silent.
    with tqdm(total=total, desc="tokenising", unit=" docs", delay=2.0, disable=not progress) as bar:
        while batch := list(islice(stream, _DOCUMENTS_PER_BATCH)):
            texts = [_text(document, column) for document in batch]
            words = [text for text in texts if isinstance(text, str)]
            # `verbose` would warn about sequences longer than the model's context, which are cut into blocks anyway.
            if words and tokenizer is None:
                raise DataError("tokenizer: None is allowed for token ids only; give the model's tokenizer.")
            encoded = iter(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"] if words else [])
            for text in texts:
                yield np.asarray(next(encoded), np.int32) if isinstance(text, str) else _checked_ids(text)
            bar.update(len(batch))


def _text(document: Any, column: str) -> str | Tensor:
    if isinstance(document, str):
        return document
    if isinstance(document, Mapping):
        if isinstance(document.get(column), str):
            return document[column]
        if "input_ids" in document:
            return torch.as_tensor(document["input_ids"])
        raise DataError(
            f"column: {column!r} with text is not in an example; its keys are {sorted(map(str, document))}. Name the "
            "one that holds the text, column=... (on the command line --column)."
        )
    raise DataError(
        f"source: holds a {type(document).__name__}; documents must be strings or mappings with {column!r}."
    )


def _shown(source: Any) -> str:
    if not isinstance(source, str | os.PathLike):
        size = f" of length {len(source)}" if hasattr(source, "__len__") else ""
        return f"the given {type(source).__name__}{size}"
    text = repr(str(source))
    # Of a long path the end says most, of a long text the beginning.
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"
