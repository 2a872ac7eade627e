"""gated_mlp, one pass and one training step, against F.linear on gathered weights and against all neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ppnet.ops import gated_mlp, gather_rows
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick

Mlp = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _swiglu(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def _forward(run: Mlp) -> Callable[[list[Tensor]], Tensor]:
    return lambda tensors: run(*tensors[:4])


def _step(run: Mlp) -> Callable[[list[Tensor]], list[Tensor]]:
    """Forward and backward: the output and all gradients."""

    def step(tensors: list[Tensor]) -> list[Tensor]:
        *inputs, dy = tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = run(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return step


@operator("gated_mlp")
def cases(size: Size, device: torch.device) -> Iterator[Case]:
    t, d, f = pick(size, full=(1024, 2048, 5632), quick=(2048, 512, 2048), tiny=(6, 16, 24))
    for dtype in (torch.bfloat16, torch.float32):
        for keep in pick(size, full=(0.25, 0.5, 1.0), quick=(0.5,), tiny=(0.5,)):
            for trained in (False, True):
                generator = torch.Generator().manual_seed(0)
                idx = torch.randperm(f, generator=generator)[: int(keep * f)].sort().values.to(device)
                z = torch.rand(len(idx), generator=generator).to(device)
                moved = (3 * len(idx) * d + 2 * t * d) * dtype.itemsize * (3 if trained else 1)

                def setup(idx=idx, z=z, dtype=dtype, trained=trained, moved=moved) -> Providers:
                    def tensors() -> list[Tensor]:
                        shapes = ((t, d), (f, d), (f, d), (d, f), (t, d))
                        return [(torch.randn(s, device=device) / s[1] ** 0.5).to(dtype) for s in shapes]

                    def ours(x, up, gate, down):
                        return gated_mlp(x, up, down.t(), gate, idx=idx, z=z)

                    def gathered(x, up, gate, down):
                        return _swiglu(x, *gather_rows([up, gate, down], [idx] * 3, [None, None, z], [0, 0, 1]))

                    mask = torch.zeros(f, device=device).index_copy(0, idx, z).to(dtype)

                    def masked(x, up, gate, down):
                        h = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
                        return functional.linear(h * mask, down)

                    inputs = copies(tensors, moved, device)
                    runs = {"ppnet": ours, "gathered F.linear": gathered, "dense": _swiglu, "dense+mask": masked}
                    if trained:
                        return {name: each(inputs, _step(run)) for name, run in runs.items()}
                    return {name: each(inputs, _forward(run)) for name, run in runs.items()}

                yield Case(
                    "gated_mlp",
                    f"{'step' if trained else 'forward'}, keep {keep}",
                    dtype,
                    {"tokens": t, "width": d, "units": f},
                    keep,
                    moved,
                    (18 if trained else 6) * len(idx) * d * t,
                    "copy",
                    setup,
                    tolerance=5e-2 if dtype == torch.bfloat16 else 1e-4,
                )
