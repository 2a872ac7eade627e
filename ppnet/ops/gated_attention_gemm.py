"""The "gemm" path of gated_attention: batched matrix products around a softmax, a block of queries at a time.

Scores are of query's dtype: for bfloat16 that is what makes the products fast, and what transformers' eager attention
does too. Nothing is computed where a causal rule or a window masks a whole block of keys.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A block of scores, and its queries: 8 MB of bf16 stay in the last-level cache; fewer queries slow the products down.
_BLOCK_SCORES = 1 << 22
_BLOCK_QUERIES = 256


@dataclass(frozen=True)
class Rules:
    """What a call of gated_attention asks for beside query, key and value."""

    mask: Tensor | None
    is_causal: bool
    scale: float
    window: int  # 0: none


def attended(mask: Tensor) -> Tensor:
    """Where a mask lets attend; see gated_attention."""
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min)


def empty_by_token(query: Tensor) -> Tensor:
    """(B, H, T, Dh) laid out as (B, T, H, Dh): what the output projection reads as rows."""
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _block_queries(heads: int, keys: int) -> int:
    return min(max(_BLOCK_SCORES // (heads * keys) // 32 * 32, 32), _BLOCK_QUERIES)


class _Blocks:
    """Heads of one sequence in blocks of queries: scores of (Hkv, H / Hkv · queries, keys) at a time."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, rules: Rules, memory: list[Tensor]) -> None:
        self.heads, self.tokens, self.width = query.shape
        self.kv_heads, self.keys = key.shape[:2]
        self.query = query.view(self.kv_heads, -1, self.tokens, self.width)
        self.key, self.value = key.contiguous(), value.contiguous()
        self.rules, self.memory = rules, memory

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Queries and the keys that some of them attend to."""
        size = _block_queries(self.heads, self.keys)
        before = self.keys - self.tokens
        for first in range(0, self.tokens, size):
            last = min(first + size, self.tokens)
            end = min(self.keys, before + last) if self.rules.is_causal else self.keys
            start = max(0, before + first - self.rules.window + 1) if self.rules.window else 0
            if start < end:
                yield slice(first, last), slice(start, end)

    def buffer(self, which: int, shape: Sequence[int]) -> Tensor:
        """Scores of a block: memory fresh from the system would cost as much as the product that fills it."""
        return self.memory[which][: math.prod(shape)].view(shape)

    def product(self, which: int, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        out = self.buffer(which, (left.shape[0], left.shape[1], right.shape[2]))
        return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)

    def rows(self, t: Tensor, queries: slice) -> Tensor:
        """A block of (H, T, Dh) as (Hkv, H / Hkv · queries, Dh)."""
        block = t.view(self.kv_heads, -1, self.tokens, self.width)[:, :, queries]
        return block.reshape(self.kv_heads, -1, self.width)

    def weights(self, rows: Tensor, queries: slice, keys: slice) -> Tensor:
        """softmax of the masked scores; 0 in rows that attend to nothing."""
        by_key = self.key[:, keys].transpose(1, 2)
        scores = self.product(0, rows, by_key, self.rules.scale)
        self._mask_(scores.view(self.kv_heads, self.heads // self.kv_heads, -1, scores.shape[-1]), queries, keys)
        alone = None  # rows that attend to nothing
        if self.rules.mask is not None or (self.rules.is_causal and self.tokens > self.keys):
            alone = scores.amax(-1, keepdim=True) == -torch.inf
        # In place: the kernel reads a row before it writes it, and half of the cache is saved.
        weights = torch._softmax(scores, -1, False, out=scores)
        return weights if alone is None else weights.masked_fill_(alone, 0)

    def _mask_(self, scores: Tensor, queries: slice, keys: slice) -> None:
        before = self.keys - self.tokens
        own = torch.arange(before + queries.start, before + queries.stop)[:, None]
        mask, window = self.rules.mask, self.rules.window
        if self.rules.is_causal:  # only the block's last keys lie after some query
            start = max(keys.start, before + queries.start + 1)
            scores[..., start - keys.start :].masked_fill_(torch.arange(start, keys.stop) > own, -torch.inf)
        if window:  # and only its first keys before some query's window
            stop = min(keys.stop, before + queries.stop - window)
            first = torch.arange(keys.start, max(stop, keys.start)) <= own - window
            scores[..., : first.shape[1]].masked_fill_(first, -torch.inf)
        if mask is not None:
            mask = mask[:, queries if mask.shape[1] > 1 else slice(None)]
            mask = mask[..., keys if mask.shape[2] > 1 else slice(None)]
            if mask.shape[0] > 1:
                mask = mask.reshape(self.kv_heads, -1, *mask.shape[1:])
            if mask.dtype != torch.bool:
                scores.add_(mask)
            scores.masked_fill_(~attended(mask), -torch.inf)


def _parts(
    query: Tensor, key: Tensor, value: Tensor, rules: Rules, buffers: int
) -> Iterator[tuple[int, slice, slice, _Blocks]]:
    """Sequence, heads, KV heads and their blocks: as few heads at a time as fill a block of scores."""
    mask = None if rules.mask is None else rules.mask[(None,) * (4 - rules.mask.dim())]
    (batch, heads, tokens, width), kv_heads, keys = query.shape, key.shape[1], key.shape[2]
    repeat = heads // kv_heads
    step = min(kv_heads, max(1, _BLOCK_SCORES // (repeat * keys * min(_BLOCK_QUERIES, tokens))))
    size = step * repeat * max(keys * min(_block_queries(step * repeat, keys), tokens), keys * width, tokens * width)
    memory = [query.new_empty(size) for _ in range(buffers)]
    for b, kv_first in itertools.product(range(batch), range(0, kv_heads, step)):
        of_kv = slice(kv_first, min(kv_first + step, kv_heads))
        of_query = slice(of_kv.start * repeat, of_kv.stop * repeat)
        own = None
        if mask is not None:
            own = mask[b if mask.shape[0] > 1 else 0, of_query if mask.shape[1] > 1 else slice(None)]
        part = query[b, of_query].contiguous(), key[b, of_kv], value[b, of_kv]
        yield b, of_query, of_kv, _Blocks(*part, replace(rules, mask=own), memory)


def gemm(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    out = empty_by_token(query).zero_()
    for b, heads, _, blocks in _parts(query, key, value, rules, 2):
        to = out[b, heads].unflatten(0, (blocks.kv_heads, -1))
        for queries, keys in blocks:
            weights = blocks.weights(blocks.rows(blocks.query, queries), queries, keys)
            product = blocks.product(1, weights, blocks.value[:, keys])
            to[:, :, queries] = product.view(to[:, :, queries].shape)
    return out


def gemm_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, rules: Rules, dkey: Tensor, dvalue: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients; those of key and value are written to `dkey` and `dvalue`."""
    dquery = empty_by_token(query).zero_()
    for b, heads, kv_heads, blocks in _parts(query, key, value, rules, 3):
        to = dquery[b, heads].unflatten(0, (blocks.kv_heads, -1))
        dout_b = dout[b, heads].contiguous()
        # Sums over blocks in float32, rounded once.
        dkey_b, dvalue_b = (torch.zeros(t.shape, dtype=wide(t)) for t in (blocks.key, blocks.value))
        for queries, keys in blocks:
            rows, drows = blocks.rows(blocks.query, queries), blocks.rows(dout_b, queries)
            weights = blocks.weights(rows, queries, keys)
            dvalue_b[:, keys] += blocks.product(1, weights.transpose(1, 2), drows)
            dweights = blocks.product(1, drows, blocks.value[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(
                dweights, weights, -1, weights.dtype, grad_input=blocks.buffer(2, weights.shape)
            )
            product = blocks.product(1, dscores, blocks.key[:, keys], rules.scale)
            to[:, :, queries] = product.view(to[:, :, queries].shape)
            dkey_b[:, keys] += blocks.product(1, dscores.transpose(1, 2), rows)
        dkey[b, kv_heads], dvalue[b, kv_heads] = dkey_b * rules.scale, dvalue_b
    return dquery, dkey, dvalue
