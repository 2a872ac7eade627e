"""Tokens of the studies that train their own models: TinyStories, or Python's standard library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from subjects import SEPARATOR, TINYSTORIES, stories_tokenizer
from torch import Tensor

from ppnet.demo import library_text, train_tokenizer
from ppnet.train import text_blocks

HELD_OUT = 96  # blocks


@dataclass(frozen=True)
class Text:
    """Blocks of one length.

    Attributes:
        train, valid: int64 ``(blocks, length)``.
    """

    tokenizer: Any
    train: Tensor
    valid: Tensor

    def blocks(self, seed: int, first: int, count: int) -> list[dict[str, Tensor]]:
        """Training blocks in an order that the seed decides, epoch after epoch, from block `first` of that order on."""
        found: list[dict[str, Tensor]] = []
        epoch, offset = divmod(first, len(self.train))
        while len(found) < count:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            ids = self.train[order[offset : offset + count - len(found)]]
            found += [{"input_ids": row, "labels": row} for row in ids]
            epoch, offset = epoch + 1, 0
        return found


def load(name: str, length: int) -> Text:
    """The text of that name: ``"stories"`` (../shared; needed) or ``"library"`` (everywhere)."""
    if name == "stories":
        tokenizer = stories_tokenizer()
        train, valid = (
            text_blocks(TINYSTORIES / f"{part}.txt", tokenizer, length, separator=SEPARATOR, bos=True, progress=False)
            for part in ("train", "valid")
        )
    else:
        texts, held_out = library_text()
        tokenizer = train_tokenizer(texts, 1024)
        train, valid = (text_blocks(part, tokenizer, length, progress=False) for part in (texts, held_out))
    return Text(tokenizer, train.ids.long().view(-1, length), valid.ids.long().view(-1, length)[:HELD_OUT])
