"""gated_act and its backward against torch's eager operators and torch.compile of them, on (4096, 5632) activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ppnet.ops import gated_act, gated_act_backward
from ppnet.roofline.case import Case, Providers, Size, copies, each, operator, pick

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "gelu": functional.gelu}
DTYPES = (torch.bfloat16, torch.float32)


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype == torch.bfloat16 else 1e-5


def _activations(size: Size, dtype: torch.dtype, device: torch.device, count: int):
    """(make `count` activations (T, K), z (K,), the shape, bytes of one)."""
    t, k = pick(size, full=(4096, 5632), tiny=(33, 40))
    z = torch.rand(k, generator=torch.Generator().manual_seed(0)).to(device)
    shape = {"tokens": t, "units": k}
    return lambda: [torch.randn(t, k, device=device).to(dtype) for _ in range(count)], z, shape, t * k * dtype.itemsize


@operator("gated_act")
def forward(size: Size, device: torch.device) -> Iterator[Case]:
    for act, function in ACTS.items():
        for dtype in DTYPES:
            make, z, shape, one = _activations(size, dtype, device, 2)

            def setup(make=make, z=z, act=act, function=function, one=one, dtype=dtype) -> Providers:
                inputs = copies(make, 3 * one, device)
                factor = z.to(dtype)

                def eager(ug):
                    return function(ug[1]) * ug[0] * factor

                providers = {
                    "ppnet": each(inputs, lambda ug: gated_act(ug[0], ug[1], z, act)),
                    "eager": each(inputs, eager),
                }
                if size != "tiny":
                    providers["torch.compile"] = each(inputs, torch.compile(eager))
                return providers

            yield Case("gated_act", act, dtype, shape, 1.0, 3 * one, 0, "2:1", setup, tolerance=_tolerance(dtype))


@operator("gated_act_backward")
def backward(size: Size, device: torch.device) -> Iterator[Case]:
    for act, function in ACTS.items():
        for dtype in DTYPES:
            make, z, shape, one = _activations(size, dtype, device, 3)

            def setup(make=make, z=z, act=act, function=function, one=one, dtype=dtype) -> Providers:
                inputs = copies(make, 5 * one, device)
                factor = z.to(dtype)
                slope = torch.ops.aten.silu_backward if act == "silu" else torch.ops.aten.gelu_backward

                def eager(duh):
                    dh, up, gate = duh
                    f, through = function(gate), dh * factor
                    return [through * f, slope(through * up, gate), (dh * f * up).sum(0, dtype=torch.float32)]

                providers = {
                    "ppnet": each(inputs, lambda duh: gated_act_backward(duh[0], duh[1], duh[2], z, act)),
                    "eager": each(inputs, eager),
                }
                if size != "tiny":
                    providers["torch.compile"] = each(inputs, torch.compile(eager))
                return providers

            yield Case(
                "gated_act_backward",
                act,
                dtype,
                shape,
                1.0,
                5 * one,
                0,
                "3:2",
                setup,
                tolerance=_tolerance(dtype),
            )
