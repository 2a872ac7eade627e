"""Arguments of the decoder layer's operators, for their tests."""

import torch
from any_input import place

SHAPES = [  # B, T, D, H, Hkv, Dh: 1 to 8 tokens
    (1, 1, 1, 1, 1, 2),
    (1, 7, 7, 7, 1, 14),
    (2, 3, 172, 6, 2, 8),
    (8, 1, 300, 4, 4, 32),
    (2, 4, 64, 8, 2, 172),
]


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype)


def by_unit(t, layout="contiguous"):
    """A weight (D, units) that is stored unit by unit, as `accelerate` leaves it."""
    return place(t.t().contiguous(), layout).t()


def heads_of(kept, width):
    return (kept[:, None] * width + torch.arange(width)).flatten()


def selection(units, kept):
    """None for all; else so many in any order."""
    return None if kept == "all" else torch.randperm(units)[: {"none": 0, "one": 1, "odd": units // 2 | 1}[kept]]


def qkv(batch, tokens, features, heads, groups, width, dtype, kept="all", bias=False, norms=False):
    turns = 100 * torch.rand(batch if tokens % 2 or not batch else 1, tokens, width // 2)
    turns = torch.cat([turns, turns], -1)
    sizes = (heads, groups, groups)
    chosen = [selection(n, kept) for n in sizes[:2]]
    return {
        "x": normal(batch, tokens, features, dtype=dtype),
        "norm": normal(features, dtype=dtype),
        "eps": 1e-5,
        "weight": [normal(n * width, features, dtype=dtype, scale=max(features, 1) ** -0.5) for n in sizes],
        "bias": [normal(n * width, dtype=dtype) if bias else None for n in sizes],
        "cos": turns.cos().to(dtype),
        "sin": turns.sin().to(dtype),
        "idx": [None if c is None else heads_of(c, width) for c in (*chosen, chosen[1])],
        "q_norm": normal(width, dtype=dtype) if norms else None,
        "k_norm": normal(width, dtype=dtype) if norms else None,
    }


def attend(batch, tokens, features, heads, groups, width, dtype, keys=37, neurons=41, kept="all", **others):
    """A layer's second half; `kept` are KV groups, whose queries' heads `query` then has, and neurons."""
    chosen, idx = selection(groups, kept), selection(neurons, kept)
    own = torch.arange(groups) if chosen is None else chosen
    columns = heads_of((own[:, None] * (heads // groups) + torch.arange(heads // groups)).flatten(), width)
    bias, gated = others.get("bias", False), others.get("gated", True)
    count, k = len(own) * heads // groups, neurons if idx is None else len(idx)

    def maybe(wanted, *shape, dtype=dtype, **options):
        return normal(*shape, dtype=dtype, **options) if wanted else None

    return {
        "residual": normal(batch, tokens, features, dtype=dtype),
        "query": normal(batch, tokens, count, width, dtype=dtype).transpose(1, 2),
        "key": normal(batch, len(own), keys, width, dtype=dtype),
        "value": normal(batch, len(own), keys, width, dtype=dtype),
        "out": by_unit(normal(features, heads * width, dtype=dtype, scale=(heads * width) ** -0.5)),
        "norm": normal(features, dtype=dtype),
        "eps": 1e-5,
        "up": normal(neurons, features, dtype=dtype, scale=max(features, 1) ** -0.5),
        "down": by_unit(normal(features, neurons, dtype=dtype, scale=neurons**-0.5)),
        "gate": maybe(gated, neurons, features, scale=max(features, 1) ** -0.5),
        "mask": others.get("mask"),
        "scale": others.get("scale"),
        "out_bias": maybe(bias, features),
        "out_idx": None if chosen is None else columns,
        "out_z": maybe(others.get("z"), count * width, dtype=torch.float32),
        "up_bias": maybe(bias, neurons),
        "gate_bias": maybe(bias and gated, neurons),
        "down_bias": maybe(bias, features),
        "idx": idx,
        "z": maybe(others.get("z"), k, dtype=torch.float32),
        "act": others.get("act", "silu"),
    }
