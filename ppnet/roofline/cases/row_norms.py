"""row_norms and its gradient against torch's vector_norm, on weights of (11008, 4096) and (4096, 11008)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ppnet.ops.row_norms import row_norms, row_norms_ref
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick


@operator("row_norms")
def norms(size: Size, device: torch.device) -> Iterator[Case]:
    units, width = pick(size, full=(11008, 4096), tiny=(24, 40))
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(width, generator=generator).to(device)
    grad = torch.rand(units, generator=generator).to(device)
    both = (torch.bfloat16, torch.float32)
    dtypes = pick(size, full=both, quick=both[:1], tiny=both)
    for dim, dtype in ((dim, dtype) for dim in (0, 1) for dtype in dtypes):
        moved = units * width * dtype.itemsize

        def forward(dim=dim, dtype=dtype, moved=moved) -> Providers:
            shape = (units, width) if dim == 0 else (width, units)
            weights = copies(lambda: torch.randn(shape, device=device).to(dtype), moved, device)
            return {
                "ppnet": each(weights, lambda w: row_norms([w], [scale], [dim])[0]),
                "vector_norm": each(weights, lambda w: row_norms_ref([w], [scale], [dim])[0]),
            }

        def backward(dim=dim, dtype=dtype, moved=moved) -> Providers:
            shape = (units, width) if dim == 0 else (width, units)
            weights = copies(lambda: torch.randn(shape, device=device).to(dtype), moved, device)

            def gradients(run):
                leaves = [w.clone().requires_grad_() for w in weights]
                factor = scale.clone().requires_grad_()
                with torch.enable_grad():  # cases are measured without
                    graphs = [(run([w], [factor], [dim])[0], w) for w in leaves]
                return each(graphs, lambda g: torch.autograd.grad(g[0], (g[1], factor), grad, retain_graph=True))

            return {"ppnet": gradients(row_norms), "vector_norm": gradients(row_norms_ref)}

        shape = {"units": units, "width": width}
        taken = "rows" if dim == 0 else "columns"
        flops = 3 * units * width
        yield Case("row_norms", taken, dtype, shape, 1.0, moved, flops, "read", forward, tolerance=1e-5)
        # The gradient of a bf16 weight is rounded once here, and twice in torch.
        yield Case(
            "row_norms", f"gradient, {taken}", dtype, shape, 1.0, 2 * moved, 2 * flops, "copy", backward, tolerance=2e-2
        )
