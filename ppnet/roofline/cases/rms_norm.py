"""rms_norm of (8192, 4096) against torch's and the arithmetic of transformers' modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ppnet.ops import rms_norm, rms_norm_ref
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick


@operator("rms_norm")
def norms(size: Size, device: torch.device) -> Iterator[Case]:
    tokens, width = pick(size, full=(8192, 4096), tiny=(5, 40))
    both = (torch.bfloat16, torch.float32)
    for dtype in pick(size, full=both, quick=both[:1], tiny=both):
        moved = 2 * tokens * width * dtype.itemsize

        def setup(dtype=dtype, moved=moved) -> Providers:
            inputs = copies(lambda: torch.randn(tokens, width, device=device).to(dtype), moved, device)
            weight = torch.rand(width, device=device).to(dtype)
            return {
                "ppnet": each(inputs, lambda x: rms_norm(x, weight, 1e-6)),
                "F.rms_norm": each(inputs, lambda x: functional.rms_norm(x, (width,), weight, 1e-6)),
                "transformers": each(inputs, lambda x: rms_norm_ref(x, weight, 1e-6)),
            }

        shape = {"tokens": tokens, "width": width}
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        yield Case(
            "rms_norm", f"{tokens} tokens", dtype, shape, 1.0, moved, 4 * tokens * width, "copy", setup, tolerance
        )
