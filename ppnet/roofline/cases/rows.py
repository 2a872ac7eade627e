"""gather_rows and scatter_rows against index_select and index_copy, on weights of (11008, 4096).

Bytes are those that must move: whole rows are touched where columns are taken, since every cache line holds some.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ppnet.ops import gather_rows, scatter_rows
from ppnet.roofline.case import Case, Providers, Size, Traffic, copies, each, operator, pick

KEEP = 0.5


def _weights(size: Size, dim: int, dtype: torch.dtype, device: torch.device):
    """(make a weight, kept indices, their scales, units, bytes of one unit)."""
    units, width = pick(size, full=(11008, 4096), tiny=(24, 40))
    generator = torch.Generator().manual_seed(0)
    idx = torch.randperm(units, generator=generator)[: int(KEEP * units)].sort().values.to(device)
    scale = torch.rand(len(idx), generator=generator).to(device)
    shape = (units, width) if dim == 0 else (width, units)
    return lambda: torch.randn(shape, device=device).to(dtype), idx, scale, units, dtype.itemsize * width


def _variants(size: Size) -> Iterator[tuple[int, torch.dtype]]:
    for dim in pick(size, full=(0, 1), tiny=(0, 1)):
        for dtype in pick(
            size, full=(torch.bfloat16, torch.float32), quick=(torch.bfloat16,), tiny=(torch.bfloat16, torch.float32)
        ):
            yield dim, dtype


@operator("gather_rows")
def gather(size: Size, device: torch.device) -> Iterator[Case]:
    for dim, dtype in _variants(size):
        make, idx, scale, units, row = _weights(size, dim, dtype, device)
        moved = row * (2 * len(idx) if dim == 0 else len(idx) + units)
        shape = {"units": units, "width": row // dtype.itemsize}

        def exact(make=make, idx=idx, dim=dim, moved=moved) -> Providers:
            weights = copies(make, moved, device)
            providers: Providers = {
                "ppnet": each(weights, lambda w: gather_rows([w], [idx], [None], [dim])[0]),
                "index_select": each(weights, lambda w: w.index_select(dim, idx)),
            }
            if device.type == "cuda" or size == "tiny":  # on a processor it is index by index
                full = make().shape
                index = idx[:, None].expand(-1, full[1]) if dim == 0 else idx.expand(full[0], -1)
                providers["torch.gather"] = each(weights, lambda w: torch.gather(w, dim, index))
            return providers

        def scaled(make=make, idx=idx, scale=scale, dim=dim, moved=moved) -> Providers:
            weights = copies(make, moved, device)
            z = scale[:, None] if dim == 0 else scale
            return {
                "ppnet": each(weights, lambda w: gather_rows([w], [idx], [scale], [dim])[0]),
                "index_select, multiply": each(weights, lambda w: (w.index_select(dim, idx) * z).to(w.dtype)),
            }

        taken = "rows" if dim == 0 else "columns"
        traffic: Traffic = "copy" if dim == 0 else "2:1"
        flops = moved / dtype.itemsize / 2
        yield Case("gather_rows", taken, dtype, shape, KEEP, moved, 0, traffic, exact)
        yield Case("gather_rows", f"scaled {taken}", dtype, shape, KEEP, moved, flops, traffic, scaled)


@operator("scatter_rows")
def scatter(size: Size, device: torch.device) -> Iterator[Case]:
    for dim, dtype in _variants(size):
        make, idx, scale, units, row = _weights(size, dim, dtype, device)
        moved = row * (len(idx) + units)
        # The dot reads the kept rows of the weight too, and all rows where columns are taken.
        moved_dot = moved + row * (len(idx) if dim == 0 else units)
        shape = {"units": units, "width": row // dtype.itemsize}

        def exact(make=make, idx=idx, dim=dim, moved=moved, units=units) -> Providers:
            grads = copies(lambda: make().index_select(dim, idx), moved, device)
            full = make().shape
            return {
                "ppnet": each(grads, lambda g: scatter_rows([g], [idx], [None], [dim], [units], [None])[0][0]),
                "index_copy": each(grads, lambda g: g.new_zeros(full).index_copy_(dim, idx, g)),
            }

        def with_dot(make=make, idx=idx, scale=scale, dim=dim, moved=moved_dot, units=units) -> Providers:
            pairs = copies(lambda: (make().index_select(dim, idx), make()), moved, device)
            z = scale[:, None] if dim == 0 else scale

            def ours(pair):
                out, dot = scatter_rows([pair[0]], [idx], [scale], [dim], [units], [pair[1]])
                return out[0], dot[0]

            def torch_only(pair):
                grad, weight = pair
                out = torch.zeros_like(weight).index_copy_(dim, idx, (grad * z).to(grad.dtype))
                return out, (grad.float() * weight.index_select(dim, idx)).sum(1 - dim)

            return {"ppnet": each(pairs, ours), "index_copy, multiply, sum": each(pairs, torch_only)}

        # Rows that are absent are only written: there a mix of 1:2, which reads all the time, is no bound.
        taken = "rows" if dim == 0 else "columns"
        traffic: Traffic = "copy" if dim == 0 else "1:2"
        traffic_dot: Traffic = "copy" if dim == 0 else "3:2"
        flops = 3 * row / dtype.itemsize * len(idx)
        yield Case("scatter_rows", taken, dtype, shape, KEEP, moved, 0, traffic, exact)
        yield Case(
            "scatter_rows",
            f"scaled {taken}, dot",
            dtype,
            shape,
            KEEP,
            moved_dot,
            flops,
            traffic_dot,
            with_dot,
            tolerance=1e-5,
        )
