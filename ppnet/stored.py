"""Weights as they lie in safetensors files: found by name, read in parts, in blocks of bounded size.

Files are read, not mapped: a mapped page counts as the process's own until it is unmapped, so that reading a large
model through `safe_open` looks, and under a memory limit is, as large as the model.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppnet.errors import CheckpointError
from ppnet.kept import Kept
from ppnet.ops.rows import gather_rows

# safetensors' own limit; a larger "header length" means that the first bytes are something else.
LONGEST_HEADER = 100_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCK_BYTES = 16 << 20
# Kept rows that are closer than this are asked for ahead as one stretch: what lies between is read faster than skipped.
NEAR_BYTES = 256 << 10


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its dtype as safetensors names it, its shape, where its first byte is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, whose size is compared with what the header announces.

    Raises:
        CheckpointError: truncated, or not a safetensors file.
    """
    size = file.stat().st_size
    foreign = (
        f"path: {file} ({size:,} bytes) is not a safetensors file; save the model with ppnet.save or save_pretrained."
    )
    if size < 8:
        raise CheckpointError(f"path: {file} is truncated: {size} bytes, not even a header; copy or save it again.")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > LONGEST_HEADER:
            raise CheckpointError(foreign)
        raw = stream.read(length)
    if len(raw) < length:
        raise CheckpointError(
            f"path: {file} is truncated: {size:,} bytes, its header alone needs {8 + length:,}; copy or save it again."
        )
    try:
        header = {name: about for name, about in json.loads(raw).items() if name != "__metadata__"}
        ends = [about["data_offsets"][1] for about in header.values()]
        entries = {
            name: Entry(file, about["dtype"], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
            for name, about in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(foreign) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"path: {file} is {state}: {size:,} bytes, its header announces {expected:,}; copy or save it again."
        )
    return entries


class StoredWeights:
    """The tensors of some safetensors files, read on request. A context manager: files are closed at its end.

    Attributes:
        entries: name -> where it lies.
        dtype: what is read is given in it, whatever it is stored in.
        bytes_read: so far.
    """

    def __init__(self, entries: Mapping[str, Entry], dtype: torch.dtype) -> None:
        self.entries, self.dtype, self.bytes_read = entries, dtype, 0
        self._open: dict[Path, int] = {}
        self._buffers: list[Tensor] = []
        self._turn = 0

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *error: Any) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self.entries[name]
        return self._block(entry, range(_matrix(entry)[0])).to(self.dtype).view(entry.shape)

    def read_dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return _dtype(self.entries[name])

    def row(self, name: str, row: int) -> Tensor:
        """One row of a tensor as a matrix: (1, width)."""
        return self._block(self.entries[name], range(row, row + 1)).to(self.dtype)

    def blocks(self, name: str, part: Kept | None = None) -> Iterator[Tensor]:
        """A tensor, or the features of one axis of it, in blocks of consecutive rows: (n, width), in order.

        A block is there until two more have been read: memory is used again, which the system need not clear anew.
        """
        entry = self.entries[name]
        length, _, row_bytes = _matrix(entry)
        rows = part.features.tolist() if part is not None and part.dim == 0 else range(length)
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for first in range(0, len(rows), step):
            block = self._block(entry, rows[first : first + step], self._buffer)
            if part is not None and part.dim == 1:
                block = gather_rows([block], [part.features], [None], [1])[0]
            yield block.to(self.dtype)

    def _buffer(self, size: int) -> Tensor:
        """One of three buffers in turn: uint8 (size,)."""
        if not self._buffers:
            self._buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(3)]
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._buffers[self._turn].numel() < size:  # one row is longer than a block
            self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[self._turn][:size]

    def _block(self, entry: Entry, rows: range | list[int], memory: Callable[[int], Tensor] | None = None) -> Tensor:
        """Rows of a tensor as it is stored: (n, width). Consecutive rows are one read."""
        _, width, row_bytes = _matrix(entry)
        size = len(rows) * row_bytes
        buffer = torch.empty(size, dtype=torch.uint8) if memory is None else memory(size)
        block = buffer.view(_dtype(entry)).view(len(rows), width)
        raw: Any = buffer.numpy()
        into = memoryview(raw)
        runs = list(_runs(rows))
        descriptor = self._descriptor(entry.file)
        if len(runs) > 1:
            for first, number in _near(runs, max(1, NEAR_BYTES // max(row_bytes, 1))):
                start = entry.start + first * row_bytes
                os.posix_fadvise(descriptor, start, number * row_bytes, os.POSIX_FADV_WILLNEED)
        for first, number in runs:
            self._fill(descriptor, into[: number * row_bytes], entry, entry.start + first * row_bytes)
            into = into[number * row_bytes :]
        return block

    def _fill(self, descriptor: int, into: memoryview, entry: Entry, start: int) -> None:
        while into:
            size = os.preadv(descriptor, [into], start)
            if size == 0:
                raise CheckpointError(
                    f"path: {entry.file} ends at byte {start:,}, within a tensor; it was changed while it was read."
                )
            self.bytes_read += size
            into, start = into[size:], start + size

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            os.posix_fadvise(self._open[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[file]


def _dtype(entry: Entry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"path: {entry.file} stores tensors as {entry.dtype}; ppnet reads {', '.join(DTYPES)}. Dequantise it first."
        )
    return DTYPES[entry.dtype]


def _matrix(entry: Entry) -> tuple[int, int, int]:
    """Rows, width and bytes of a row of a tensor as a matrix; a vector has rows of one entry."""
    length = entry.shape[0] if entry.shape else 1
    width = prod(entry.shape[1:])
    return length, width, width * _dtype(entry).itemsize


def _runs(rows: range | list[int]) -> Iterable[tuple[int, int]]:
    """Stretches of consecutive rows: (first, number)."""
    if isinstance(rows, range):
        return [(rows.start, len(rows))] if rows else []
    kept = torch.tensor(rows)
    starts = torch.cat([torch.tensor([0]), (kept.diff() != 1).nonzero().flatten() + 1, torch.tensor([len(rows)])])
    return zip(kept[starts[:-1]].tolist(), starts.diff().tolist(), strict=True)


def _near(runs: list[tuple[int, int]], gap: int) -> Iterator[tuple[int, int]]:
    """Runs joined where at most `gap` rows lie between."""
    first, number = runs[0]
    for start, length in runs[1:]:
        if 0 <= start - (first + number) <= gap:
            number = start + length - first
        else:
            yield first, number
            first, number = start, length
    yield first, number
