"""linears_decode of one token with q, k and v projections, against three layers of torch's fastest kind each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ppnet.ops import linears_decode
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick
from ppnet.roofline.machine import linears


@operator("linears_decode")
def projections(size: Size, device: torch.device) -> Iterator[Case]:
    width, groups = pick(size, full=(4096, 1024), tiny=(40, 16))
    rows = (width, groups, groups)
    both = (torch.bfloat16, torch.float32)
    for dtype in pick(size, full=both, quick=both[:1], tiny=both):
        moved = sum(rows) * width * dtype.itemsize

        def setup(dtype=dtype, moved=moved) -> Providers:
            x = torch.randn(1, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)

            def layers() -> list[torch.Tensor]:
                return [(torch.randn(n, width, device=device) / width**0.5).to(dtype) for n in rows]

            sets = copies(layers, moved, device)
            providers: Providers = {"ppnet": each(sets, lambda weights: linears_decode(x, weights))}
            ways: list[list[dict[str, Any]]] = [[linears(weight, 1) for weight in weights] for weights in sets]
            for way in ways[0][0]:
                providers[way] = each(
                    [[layer[way] for layer in one] for one in ways], lambda one: [run(x) for run in one]
                )
            return providers

        yield Case(
            "linears_decode",
            "q, k, v",
            dtype,
            {"width": width, "groups": groups, "tokens": 1},
            1.0,
            moved,
            2 * sum(rows) * width,
            "read",
            setup,
            tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
        )
