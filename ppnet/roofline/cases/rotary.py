"""rotary of 4096 tokens with 32 query heads and 8 KV heads of 128, against the arithmetic of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ppnet.ops import rotary, rotary_ref
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick


@operator("rotary")
def positions(size: Size, device: torch.device) -> Iterator[Case]:
    tokens, heads, groups, width = pick(size, full=(4096, 32, 8, 128), tiny=(5, 4, 2, 16))
    both = (torch.bfloat16, torch.float32)
    for dtype in pick(size, full=both, quick=both[:1], tiny=both):
        moved = 2 * tokens * (heads + groups) * width * dtype.itemsize

        def setup(dtype=dtype, moved=moved) -> Providers:
            def states() -> tuple[torch.Tensor, torch.Tensor]:
                query, key = (torch.randn(1, tokens, n, width, device=device).to(dtype) for n in (heads, groups))
                return query.transpose(1, 2), key.transpose(1, 2)

            inputs = copies(states, moved, device)
            angle = torch.rand(1, tokens, width // 2, device=device).repeat(1, 1, 2)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            return {
                "ppnet": each(inputs, lambda both: rotary(*both, cos, sin)),
                "transformers": each(inputs, lambda both: rotary_ref(*both, cos, sin)),
            }

        shape = {"tokens": tokens, "heads": heads, "groups": groups, "width": width}
        flops = 3 * tokens * (heads + groups) * width
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        yield Case("rotary", f"{tokens} tokens", dtype, shape, 1.0, moved, flops, "copy", setup, tolerance)
