"""linear_decode and linear_t_decode of one token over kept rows of a (11008, 4096) weight, against the dense layer on a
weight that was compacted beforehand: what is fastest among torch's own ways of that is the one to beat."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppnet.ops import linear_decode, linear_t_decode
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick
from ppnet.roofline.machine import linears

DTYPES = (torch.bfloat16, torch.float32)


def kept_rows(n: int, keep: float, device: torch.device) -> Tensor | None:
    """Sorted indices of a random part of n rows; None for all."""
    if keep == 1.0:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[: int(keep * n)].sort().values.to(device)


def _cases(name: str, size: Size, device: torch.device) -> Iterator[Case]:
    rows, width = pick(size, full=(11008, 4096), tiny=(24, 40))
    by_input = name == "linear_t_decode"
    for dtype in DTYPES:
        for keep in pick(size, full=(1.0, 0.5), tiny=(1.0, 0.5), quick=(1.0,)):
            idx = kept_rows(rows, keep, device)
            count = rows if idx is None else len(idx)
            bytes_read = count * width * dtype.itemsize

            def setup(dtype=dtype, idx=idx, count=count, moved=bytes_read) -> Providers:
                generator = torch.Generator().manual_seed(1)
                x = torch.randn(1, count if by_input else width, generator=generator).to(device, dtype)
                weights = copies(
                    lambda: (torch.randn(rows, width, device=device) / width**0.5).to(dtype), moved, device
                )

                def compacted(weight: Tensor) -> Tensor:
                    kept = weight if idx is None else weight.index_select(0, idx)
                    return kept.t().contiguous() if by_input else kept

                small = [compacted(weight) for weight in weights]
                ours = linear_t_decode if by_input else linear_decode
                providers: Providers = {"ppnet": each(weights, lambda w: ours(x, w, idx=idx))}
                ways = [linears(weight, 1) for weight in small]
                for way in ways[0]:
                    providers[way] = each([each_way[way] for each_way in ways], lambda run: run(x))
                return providers

            yield Case(
                name,
                f"keep {keep:g}",
                dtype,
                {"rows": rows, "width": width, "tokens": 1},
                keep,
                bytes_read,
                2 * count * width,
                "read",
                setup,
                tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
            )


@operator("linear_decode")
def outputs(size: Size, device: torch.device) -> Iterator[Case]:
    return _cases("linear_decode", size, device)


@operator("linear_t_decode")
def inputs(size: Size, device: torch.device) -> Iterator[Case]:
    return _cases("linear_t_decode", size, device)
