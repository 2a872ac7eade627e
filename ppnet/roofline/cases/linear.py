"""linear, forward and the two products of its backward, against F.linear and oneDNN through torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ppnet.ops import linear, linear_path
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick


@operator("linear")
def cases(size: Size, device: torch.device) -> Iterator[Case]:
    shapes = pick(
        size,
        full=((2048, 512, 2048), (2048, 2048, 512), (512, 4096, 11008)),
        quick=((2048, 512, 2048), (2048, 2048, 512)),
        tiny=((9, 16, 24),),
    )
    for dtype in (torch.bfloat16, torch.float32):
        for t, d, f in shapes:
            moved = (t * d + t * f + d * f) * dtype.itemsize
            for product in ("forward", "dx", "dw"):

                def setup(t=t, d=d, f=f, dtype=dtype, product=product, moved=moved) -> Providers:
                    def operands():
                        x, weight, dy = (
                            torch.randn(n, m, device=device).to(dtype) for n, m in ((t, d), (f, d), (t, f))
                        )
                        return {"forward": (x, weight), "dx": (dy, weight.t()), "dw": (dy.t(), x.t())}[product]

                    def onednn(ab):
                        with linear_path("onednn"):
                            return linear(*ab)

                    inputs = copies(operands, moved, device)
                    return {
                        "ppnet": each(inputs, lambda ab: linear(*ab)),
                        "F.linear": each(inputs, lambda ab: functional.linear(*ab)),
                        "oneDNN": each(inputs, onednn),
                    }

                shape = {"tokens": t, "in": d, "out": f}
                variant = f"{product} {t} x {d} -> {f}"
                yield Case("linear", variant, dtype, shape, 1.0, moved, 2 * t * d * f, "copy", setup, tolerance=2e-2)
