"""The rule for results that cannot be exact: at most twice torch's own error in the same dtype, against float64."""

import torch
from torch import Tensor

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_as_accurate(ours: Tensor, torch_own: Tensor, exact: Tensor, magnitude: Tensor | None = None) -> None:
    """Root mean square and largest error over the tensor; what no kernel can avoid is free, so that luck is no bar.

    Args:
        ours, torch_own: results in one dtype. exact: float64.
        magnitude: the sums of the products' absolute values, float64, of which a float32 sum cannot avoid a rounding;
            None: that of the results themselves.
    """
    assert ours.shape == exact.shape and ours.dtype == torch_own.dtype
    if not exact.numel():
        return

    def error(value: Tensor) -> Tensor:
        return (value.double() - exact).abs()

    size = exact.abs() if magnitude is None else magnitude
    free = 0.5 * EPSILON[ours.dtype] * exact.abs().max() + EPSILON[torch.float32] * size.max()
    spread, own = (error(value).square().mean().sqrt() for value in (ours, torch_own))
    assert spread <= 2 * own + free, (spread, own, free)
    # No single element may be far off either: a wrong lane would drown in the mean.
    assert error(ours).max() <= 4 * error(torch_own).max() + 2 * free, (error(ours).max(), error(torch_own).max(), free)
