"""gated_mlp_fused of a SwiGLU MLP, 16 to 1024 tokens in bf16 over kept neurons of the whole weights.

Against gather_rows with the library's products, an MLP that was compacted beforehand, and all neurons. Off GPUs it is
the library's path, and there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ppnet.ops import gated_mlp, gated_mlp_fused
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick


def _swiglu(ts: list[Tensor]) -> Tensor:
    x, up, gate, down = ts
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down.t())


@operator("gated_mlp_fused")
def cases(size: Size, device: torch.device) -> Iterator[Case]:
    if device.type != "cuda" and size != "tiny":
        return
    shapes = pick(size, full=((2048, 5632), (4096, 14336)), quick=((2048, 5632),), tiny=((16, 24),))
    for width, units in shapes:
        for tokens in pick(size, full=(16, 64, 128, 256, 512, 1024), quick=(16, 128, 1024), tiny=(6,)):
            for keep in pick(size, full=(0.25, 0.5, 1.0), quick=(0.5,), tiny=(0.5,)):
                generator = torch.Generator().manual_seed(0)
                idx = torch.randperm(units, generator=generator)[: int(keep * units)].sort().values.to(device)
                z = torch.rand(len(idx), generator=generator).to(device)
                moved = 2 * (3 * len(idx) * width + 2 * tokens * width)

                def setup(tokens=tokens, width=width, units=units, idx=idx, z=z, moved=moved) -> Providers:
                    def tensors() -> list[Tensor]:
                        shapes = ((tokens, width), *[(units, width)] * 3)
                        return [(torch.randn(s, device=device) / width**0.5).bfloat16() for s in shapes]

                    def fused(tile: int) -> Callable[[list[Tensor]], Tensor]:
                        return lambda ts: gated_mlp_fused(ts[0], ts[1], ts[3], ts[2], idx=idx, z=z, tile=tile)

                    def library(ts: list[Tensor]) -> Tensor:
                        return gated_mlp(ts[0], ts[1], ts[3], ts[2], idx=idx, z=z)

                    def compacted(ts: list[Tensor]) -> list[Tensor]:
                        x, up, gate, down = ts
                        return [x, up[idx], gate[idx], (down[idx].float() * z[:, None]).bfloat16()]

                    whole = copies(tensors, moved, device)
                    small = [compacted(inputs) for inputs in whole]
                    providers: Providers = {
                        "ppnet": each(whole, fused(0)),
                        "gather_rows + library": each(whole, library),
                        "compacted": each(small, _swiglu),
                        "dense": each(whole, _swiglu),
                    }
                    for tile, name in ((1, "32x64"), (2, "64x128"), (3, "128x128")):
                        providers[f"ppnet, tiles of {name}"] = each(whole, fused(tile))
                    return providers

                yield Case(
                    "gated_mlp_fused",
                    f"keep {keep:g}, {tokens} tokens",
                    torch.bfloat16,
                    {"tokens": tokens, "width": width, "units": units},
                    keep,
                    moved,
                    6 * len(idx) * width * tokens,
                    "read",
                    setup,
                    tolerance=5e-2,
                )
