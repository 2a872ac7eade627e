"""gated_mlp_decode of a SwiGLU MLP, D 4096 and F 11008, over kept neurons of the whole weights, against an MLP that was
compacted beforehand, computed in torch's own ways, and against the dense MLP times a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ppnet.ops import gated_mlp_decode
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick
from ppnet.roofline.cases.linear_decode import DTYPES, kept_rows
from ppnet.roofline.machine import linears

silu = torch.nn.functional.silu


def _library(up: Tensor, gate: Tensor, down: Tensor, tokens: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """x -> the MLP of already compacted weights, one entry per way that torch has to multiply."""
    ups, gates, downs = (linears(weight, tokens) for weight in (up, gate, down))

    def mlp(way: str, x: Tensor) -> Tensor:
        return downs[way](silu(gates[way](x)) * ups[way](x))

    return {way: partial(mlp, way) for way in ups}


def _plain(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    linear = torch.nn.functional.linear
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def _masked(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, mask: Tensor) -> Tensor:
    linear = torch.nn.functional.linear
    return linear(silu(linear(x, gate)) * linear(x, up) * mask, down)


@operator("gated_mlp_decode")
def gated_mlp(size: Size, device: torch.device) -> Iterator[Case]:
    neurons, width = pick(size, full=(11008, 4096), tiny=(24, 40))
    for dtype in DTYPES:
        for keep in pick(size, full=(1.0, 0.5, 0.25), tiny=(1.0, 0.5), quick=(1.0, 0.25)):
            for tokens in pick(size, full=(1, 8), tiny=(1, 3), quick=(1,)):
                idx = kept_rows(neurons, keep, device)
                count = neurons if idx is None else len(idx)
                bytes_read = 3 * count * width * dtype.itemsize

                def setup(dtype=dtype, idx=idx, tokens=tokens, moved=bytes_read) -> Providers:
                    generator = torch.Generator().manual_seed(1)
                    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
                    mask = torch.ones(neurons, dtype=dtype, device=device)
                    if idx is not None:
                        mask = torch.zeros_like(mask).index_fill(0, idx, 1)

                    def matrices() -> list[Tensor]:
                        return [(torch.randn(neurons, width, device=device) / width**0.5).to(dtype) for _ in range(3)]

                    whole = copies(matrices, moved, device)
                    kept = [[m if idx is None else m.index_select(0, idx) for m in ms] for ms in whole]
                    small = [(up, gate, down.t().contiguous()) for up, gate, down in kept]
                    dense = [(up, gate, down.t().contiguous()) for up, gate, down in whole]
                    providers: Providers = {
                        "ppnet": each(whole, lambda ms: gated_mlp_decode(x, ms[0], ms[2], ms[1], idx=idx)),
                        "dense": each(dense, lambda ms: _plain(x, *ms)),
                        "dense+mask": each(dense, lambda ms: _masked(x, *ms, mask)),
                    }
                    ways = [_library(*ms, tokens) for ms in small]
                    for way in ways[0]:
                        providers[f"compacted, {way}"] = each([found[way] for found in ways], lambda run: run(x))
                    if size != "tiny":  # the inductor needs seconds to compile, which the test of agreement does not
                        compiled = torch.compile(_plain, dynamic=False)
                        providers["compacted, torch.compile"] = each(small, lambda ms: compiled(x, *ms))
                    return providers

                yield Case(
                    "gated_mlp_decode",
                    f"keep {keep:g}, {tokens} token{'s' if tokens > 1 else ''}",
                    dtype,
                    {"neurons": neurons, "width": width, "tokens": tokens},
                    keep,
                    bytes_read,
                    6 * count * width * tokens,
                    "read",
                    setup,
                    tolerance=3e-2 if dtype == torch.bfloat16 else 1e-5,
                )
