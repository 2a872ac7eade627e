"""linear: F.linear through the faster of torch's own matrix products on this processor.

    y[..., f] = Σ_d x[..., d] · weight[f, d] + bias[f]

On the CPU torch gives float32 products to MKL, whose best kernels run on Intel processors only; oneDNN, which torch
holds as well (`torch.ops.mkldnn._linear_pointwise`), has AVX-512 kernels for every vendor. Which of the two computes is
decided by what the processor *is*, from a table of measurements in this file, and never by a race at run time: the two
sum in different orders, so a race would let the noise of the machine choose the last bits, and a run of a program would
not repeat another bit for bit (a killed training that is resumed must). For the same reason the choice depends on
nothing but processor, dtype and size, neither on load nor on the number of threads. `measure_linear` measures here, on
request; `linear_path` pins a path: on a processor that is not in the table, or for the same bits on all of them.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ppnet.ops.library import LIBRARY, define, explain_types, same_device

PATHS = ("auto", "torch", "onednn")

# Products of fewer floating point operations are torch's: the detour through a Python operator would show.
MIN_FLOP = 50_000_000

# Median time of torch's path / of oneDNN's, typical of forward and dX: measure_linear() on 2 vCPUs of an AMD EPYC of
# family 25 (Zen 4) while the host was busy, torch 2.13, gave 1.14 to 1.40 with 2 threads and 1.19 to 1.48 with one for
# 2048 x 512 -> 2048, 2048 x 2048 -> 512 and 512 x 4096 -> 11008. bfloat16 is oneDNN's in torch too: about 1.
# A processor without a line computes with torch's path.
MEASURED: dict[tuple[str, str, torch.dtype], float] = {
    ("AuthenticAMD", "AVX512", torch.float32): 1.24,
}

define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _vendor() -> str:
    """As the processor names itself; "" where that is unknown."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return ""


# Constants of the process, so that a trace sees them as such.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PROCESSOR = (_vendor(), torch.backends.cpu.get_cpu_capability())
_FASTER = tuple(dtype for (*processor, dtype), ratio in MEASURED.items() if tuple(processor) == PROCESSOR and ratio > 1)

_path = "auto"


@explain_types
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ + bias: F.linear, by the path that `linear_choice` names, forward and backward.

    x: (..., D); weight: (F, D), any strides (a transposed view costs no copy); bias: (F,) or None; one floating dtype.
    Returns y (..., F). Differentiable (twice too): dx = dy · weight and dweight = dyᵀ · x are this operator again, on
    transposed views. Under autocast the inputs are cast to its dtype, as F.linear's are. Off the CPU, below MIN_FLOP
    operations and where the table has no faster path it is F.linear itself. Errors are F.linear's.
    """
    if not _may_differ(x):
        return functional.linear(x, weight, bias)
    # While tracing the size may be a symbol: the operator decides when it runs.
    if not torch.compiler.is_compiling() and _chosen(x, weight) == "torch":
        return functional.linear(x, weight, bias)
    return torch.ops.ppnet.linear(x, weight, bias)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear in plain torch."""
    return functional.linear(x, weight, bias)


def linear_choice(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Which path computes CPU products of at least MIN_FLOP operations: path, why, and the measured ratio, if any.

    Returns {"path": "torch" or "onednn", "ratio": torch's time / oneDNN's in the table or None, "because": ...}.
    """
    vendor, isa = PROCESSOR
    ratio = MEASURED.get((vendor, isa, dtype))
    path = _path_for(dtype)
    if _path != "auto":
        because = f"pinned to {_path} by linear_path"
    elif not HAS_ONEDNN:
        because = "this torch is built without oneDNN"
    elif ratio is None:
        because = f"no measurement for {dtype} on {vendor} {isa}: torch's own choice"
    else:
        because = f"measured on {vendor} {isa}: oneDNN takes 1 / {ratio} of the time"
    return {"path": path, "ratio": ratio, "because": because}


@contextlib.contextmanager
def linear_path(path: str) -> Iterator[None]:
    """Pins the path of `linear` in this process: "torch", "onednn", or "auto" for the table's. Errors: ValueError.

    The backward of a product follows the path that is pinned when it runs.
    """
    global _path
    if path not in PATHS:
        raise ValueError(f"linear_path: path is {path!r}; allowed are {', '.join(PATHS)}")
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def measure_linear(
    tokens: int = 2048, d: int = 512, f: int = 2048, dtype: torch.dtype = torch.float32, rounds: int = 5
) -> dict[str, float]:
    """Measures here: median time of torch's path / of oneDNN's, of {"forward", "dx", "dw"}. Changes no choice.

    Takes some 6 · rounds products. On a processor without a line in the table, more than 1 says that
    `linear_path("onednn")` pays.
    """
    x, weight, dy = (torch.randn(n, m).to(dtype) for n, m in ((tokens, d), (f, d), (tokens, f)))
    products = {"forward": (x, weight), "dx": (dy, weight.t()), "dw": (dy.t(), x.t())}
    ratios = {}
    for name, (a, b) in products.items():
        times: dict[str, list[float]] = {"torch": [], "onednn": []}
        for _ in range(rounds + 1):
            for path, spent in times.items():
                start = time.perf_counter()
                _product(a, b, None, path)
                spent.append(time.perf_counter() - start)
        ratios[name] = statistics.median(times["torch"][1:]) / statistics.median(times["onednn"][1:])
    return ratios


def _path_for(dtype: torch.dtype) -> str:
    if not HAS_ONEDNN or dtype not in (torch.float32, torch.bfloat16):
        return "torch"
    if _path != "auto":
        return _path
    return "onednn" if dtype in _FASTER else "torch"


def _may_differ(x: Tensor) -> bool:
    """Whether a path other than F.linear may be chosen for some size: device and dtype alone."""
    if x.device.type != "cpu":
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return _path_for(dtype) == "onednn"


def _chosen(x: Tensor, weight: Tensor) -> str:
    if x.device.type != "cpu" or 2 * x.numel() * weight.shape[0] < MIN_FLOP:
        return "torch"
    # oneDNN is slow with a first operand in column order, as that of dW, unless it is the smaller one: measured 0.85
    # for (2048, T) (T, 512), 0.87 to 1.0 for a square, 1.12 for (512, T) (T, 2048).
    if x.dim() == 2 and x.stride(0) == 1 and x.stride(1) != 1 and x.shape[0] >= weight.shape[0]:
        return "torch"
    return _path_for(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, path: str) -> Tensor:
    """x weightᵀ + bias by one path. Transposed views go to both as they are: a copy never paid."""
    # oneDNN's operator checks less than torch's: what does not fit goes to F.linear for its error.
    fits = weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    # A weight whose rows lie apart, as the first columns of a matrix, took oneDNN's operator 72 times as long; MKL and
    # torch's half-precision products take it as it is.
    fits = fits and (weight.is_contiguous() or weight.t().is_contiguous())
    fits = fits and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
    if path == "onednn" and fits and x.numel() > 0 and weight.numel() > 0:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


@torch.library.impl(LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias, _chosen(x, weight))


@torch.library.register_fake("ppnet::linear", lib=LIBRARY)
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    same_device("linear", x=x, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(LIBRARY, "linear", "AutocastCPU")
def _linear_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    with torch.amp.autocast("cpu", enabled=False):
        return linear(_cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype))


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does: float64 stays."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def _save_for_gradient(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    need_x, need_weight = x.requires_grad, weight.requires_grad
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _linear_gradient(ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    rows = dy.reshape(-1, dy.shape[-1])
    dx = linear(dy, weight.t()) if need_x else None
    dweight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if need_weight else None
    return dx, dweight, rows.sum(0) if need_bias else None


torch.library.register_autograd("ppnet::linear", _linear_gradient, setup_context=_save_for_gradient, lib=LIBRARY)
