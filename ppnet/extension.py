"""The compiled extension: loads `ppnet._C` (operators) and `ppnet._host` (probes) if they were built."""

import importlib
import sys
import warnings
from types import ModuleType

import torch


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module `ppnet.<name>`, or None and why it could not be loaded."""
    try:
        return importlib.import_module(f"ppnet.{name}"), ""
    except ModuleNotFoundError as error:
        if error.name != f"ppnet.{name}":
            return None, str(error)
        return None, f"ppnet.{name} was not built: no C++ compiler, cmake or pybind11 when ppnet was installed"
    except ImportError as error:  # built, but for another torch or another system
        return None, f"ppnet.{name} does not load: {error}"


_C, _reason = _load("_C")
_host, _host_reason = _load("_host")


def available() -> bool:
    """Whether the compiled operators are loaded; without them every operator runs its plain torch reference."""
    return _C is not None


def cuda_available() -> bool:
    """Whether the operators have CUDA kernels (there may still be no GPU)."""
    return _C is not None and torch._C._dispatch_has_kernel_for_dispatch_key("ppnet::gather_rows", "CUDA")


def cuda_status(device: int) -> str:
    """ "ok", "not built", or why the CUDA kernels cannot run on the GPU of this index and what to do.

    Asks the driver for a kernel, which makes the GPU's context if there is none yet: some hundred MB of its memory.
    """
    if _C is None:
        return "not built"
    if not torch.cuda.is_available():
        return _C.cuda_status(device)  # what is missing
    with torch.cuda.device(device):
        status = _C.cuda_status(device)
        major, minor = torch.cuda.get_device_capability(device)
    if status in ("ok", "not built"):
        return status
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    return f"{status}; build ppnet for it: PPNET_CUDA_ARCHS={arch}-real pip install ."


_RUN: dict[int, bool] = {}


@torch.compiler.assume_constant_result
def cuda_runs(device: int) -> bool:
    """Whether the CUDA kernels run on the GPU of this index; asked once."""
    if device not in _RUN:
        _RUN[device] = cuda_status(device) == "ok"
    return _RUN[device]


def host() -> ModuleType:
    """`ppnet._host`. Errors: RuntimeError where it was not built."""
    if _host is None:
        raise RuntimeError(f"the compiled module ppnet._host is needed here: {_host_reason}. {HOW_TO_BUILD}")
    return _host


def isa() -> str:
    """Instruction set of the CPU kernels in use, one of `supported_isas()`; "torch" without the extension."""
    return _C.isa() if _C else "torch"


def set_isa(name: str) -> None:
    """Use the CPU kernels of one of `supported_isas()`; "auto" is the best. Errors: ValueError if it cannot run."""
    if _C is None:
        raise RuntimeError(f"set_isa needs the compiled extension: {_reason}. {HOW_TO_BUILD}")
    _C.set_isa(name)


def supported_isas() -> list[str]:
    """Instruction sets that were compiled and that this processor has; empty without the extension."""
    return _C.supported_isas() if _C else []


def build_info() -> dict[str, object]:
    """What was built and what runs: extension, why not, isa, torch (and torch_built), compiler, cuda.

    "cuda" is `cuda_status` of the current GPU, whose context this makes.
    """
    gpu = torch.cuda.is_available()
    info: dict[str, object] = {
        "extension": available(),
        "reason": _reason or _host_reason,
        "isa": isa(),
        "supported_isas": supported_isas(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": cuda_status(torch.cuda.current_device() if gpu else 0),
        "gpu": torch.cuda.get_device_name() if gpu else "",
    }
    if _host is not None:
        built = _host.build_info()
        info |= {
            "torch_built": built["torch"],
            "compiler": built["compiler"],
            "nvcc": built["nvcc"],
            "cuda_archs": built["cuda_archs"].split(",") if built["cuda_archs"] else [],
            "cuda_reason": built["cuda_reason"],
            "cores": _host.cores(),
            "caches": _host.cache_sizes(),
        }
    return info


HOW_TO_BUILD = (
    "To build it, install a C++ compiler (Debian: apt install g++), then run "
    "`pip install --force-reinstall --no-deps .` in ppnet's source folder"
)

if _C is None:
    warnings.warn(
        f"ppnet runs without its compiled extension, on slower plain torch operators: {_reason}. {HOW_TO_BUILD}.",
        UserWarning,
        stacklevel=2,
    )
