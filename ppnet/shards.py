"""Writing safetensors files from blocks that are made one after the other: no shard is ever held in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ppnet.errors import CheckpointError, PPNetError
from ppnet.stored import DTYPES

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Item = TypeVar("Item")


class Shards:
    """How tensors are spread over files: as `save_pretrained` does it.

    Attributes:
        tensors: name -> a tensor of its shape and dtype, e.g. on the meta device.
        files: file name -> names of its tensors.
        total_bytes: of all tensors.

    Raises:
        PPNetError: `max_shard_size` is no size.
    """

    def __init__(self, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        self.tensors = tensors
        try:
            split = split_torch_state_dict_into_shards(
                dict(tensors),
                filename_pattern=WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors"),
                max_shard_size=max_shard_size,
            )
        except (ValueError, TypeError) as error:
            raise PPNetError(
                f"max_shard_size: {max_shard_size!r} is no size; give bytes, or a number with KB, MB or GB."
            ) from error
        self.files: dict[str, list[str]] = split.filename_to_tensors
        self.total_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._index = split.tensor_to_filename if split.is_sharded else None
        self._metadata: dict[str, Any] = split.metadata

    def check_room(self, folder: Path) -> None:
        """Raises OSError where the disk has less room than the files need: before the time is spent, not after."""
        free = shutil.disk_usage(folder).free
        if free < self.total_bytes:
            full = f"{os.strerror(errno.ENOSPC)}: {self.total_bytes:,} bytes are needed, {free:,} are free"
            raise OSError(errno.ENOSPC, full, str(folder))

    def write(self, folder: Path, blocks: Callable[[str], Iterator[Tensor]], parameters: int) -> None:
        """Writes all files, and the index where there are several.

        Args:
            blocks: name -> its values in order, in pieces of any size.
            parameters: number of parameters, for the index.
        """
        for file, names in self.files.items():
            _write(folder / file, {name: self.tensors[name] for name in names}, blocks)
        if self._index is not None:
            about = {"total_parameters": parameters, **self._metadata}
            text = json.dumps({"metadata": about, "weight_map": self._index}, indent=2, sort_keys=True) + "\n"
            (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _write(file: Path, tensors: Mapping[str, Tensor], blocks: Callable[[str], Iterator[Tensor]]) -> None:
    names, header = _layout(tensors)
    with file.open("xb", buffering=0) as stream:
        _write_all(stream, header)
        sizes = dict.fromkeys(names, 0)
        for name, block in ahead((each, block) for each in names for block in blocks(each)):
            if block.dtype != tensors[name].dtype:
                raise CheckpointError(f"path: {name} was read as {block.dtype}, not {tensors[name].dtype}.")
            sizes[name] += block.nbytes
            _write_all(stream, block.contiguous().view(torch.uint8).numpy().reshape(-1))
    wrong = [name for name in names if sizes[name] != tensors[name].nbytes]
    if wrong:
        raise CheckpointError(f"path: {wrong[0]} has {sizes[wrong[0]]:,} bytes, not {tensors[wrong[0]].nbytes:,}.")


def _layout(tensors: Mapping[str, Tensor]) -> tuple[Sequence[str], bytes]:
    """The order of the tensors in a file and its header: those of safetensors' own `save_file`, byte for byte."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + tensors[name].nbytes
        header[name] = {
            "dtype": codes[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return names, struct.pack("<Q", len(text)) + text


def _write_all(stream: Any, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each made on a thread while the one before is used: two are held."""
    source = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, source, None)
            yield item
