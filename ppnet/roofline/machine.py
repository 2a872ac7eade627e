"""What this machine sustains: copy and read bandwidth, and matrix products, each the best of what can be had here."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ppnet
import ppnet.extension as extension
from ppnet.roofline import case
from ppnet.roofline.case import DTYPES, MIXES, Band, clock
from ppnet.roofline.timing import Cuda, GpuTimed, HostTimed, Timed

ROOT = Path(ppnet.__file__).resolve().parents[1]  # of the source tree, where ppnet runs from one
TUNING = 0.1  # seconds to try each way of doing something
MATMUL = {"cpu": (512, 2048, 2048), "cuda": (8192, 8192, 8192)}  # M, K, N


@dataclass(frozen=True)
class Figure:
    """One ceiling: the rounds' band, its unit, and which way of doing it was the fastest."""

    value: Band
    unit: str
    by: str


class Machine:
    """Measures the ceilings once, and samples them again between timed calls.

    Args:
        device: "cpu" or "cuda". rounds: of each ceiling. seconds: about how long each round of each takes.

    Attributes:
        ceilings: "copy", "read", mixes such as "2:1" (GB/s), "matmul fp32", "matmul bf16" (GFLOP/s) and some for
            information -> Figure.
        setting: device, processor, driver, isa, threads, versions, commit, caches, pages, load before.
    """

    def __init__(self, device: torch.device | str = "cpu", *, rounds: int = 7, seconds: float = 0.05) -> None:
        self.device = torch.device(device)
        self._seconds = seconds
        self.now = clock(self.device)
        self._gpu = Cuda(self.device) if self.device.type == "cuda" else None
        self.setting = setting(self.device)
        samplers, extra = (_cuda_memory if self.device.type == "cuda" else _cpu_memory)(self.device)
        for dtype in (torch.float32, torch.bfloat16):
            samplers[f"matmul {DTYPES[dtype]}"] = _matmul(dtype, self.device, self.now)
        self._samplers: dict[str, tuple[Callable[[float], float], str]] = samplers
        # In turns: a disturbance of some tenths of a second must not hit all rounds of one ceiling.
        measured: dict[str, list[float]] = {kind: [] for kind in (*samplers, *extra)}
        for _ in range(rounds):
            for kind, (sample, _by) in (samplers | extra).items():
                measured[kind].append(sample(seconds))
        self.ceilings = {
            kind: Figure(
                Band.of(values), "GFLOP/s" if kind.startswith("matmul") else "GB/s", (samplers | extra)[kind][1]
            )
            for kind, values in measured.items()
        }

    def sample(self, kind: str) -> float:
        """One short measurement of a ceiling now, in GB/s or GFLOP/s."""
        return self._samplers[kind][0](min(self._seconds, case.WINDOW))

    def timed(self, run: Callable[[], Any]) -> Timed:
        """A provider, warmed up, as it is timed here."""
        return HostTimed(run, self.now, case.WINDOW) if self._gpu is None else GpuTimed(run, self._gpu, case.WINDOW)

    def known(self, kind: str) -> float | None:
        """The median measured at the start; None for a kind this machine was not measured for."""
        return self.ceilings[kind].value.median if kind in self._samplers else None

    def to_dict(self) -> dict[str, Any]:
        return {**self.setting, "ceilings": {kind: asdict(figure) for kind, figure in self.ceilings.items()}}


def setting(device: torch.device) -> dict[str, Any]:
    """What has to be known to compare numbers: where and with what they were measured."""
    built = extension.build_info()
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "driver": driver() if device.type == "cuda" else None,
        "cores": os.cpu_count(),
        "isa": extension.isa(),
        "threads": torch.get_num_threads(),
        "caches": built.get("caches", {}),
        "pages": pages(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "ppnet": ppnet.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _said(*command: str) -> str | None:
    """The first line that a program says; None where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return next(iter(done.stdout.splitlines()), "").strip() or None
    return None


def driver() -> str | None:
    """Version of NVIDIA's driver."""
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit(root: Path = ROOT) -> str | None:
    """The commit of the source tree ppnet runs from, "-dirty" where files differ from it; None where it is installed.

    Without .git it is what build/commit says, which benchmarks/gpu.sh --commit writes.
    """
    if (root / ".git").exists():
        # A pattern that no tag has: the hash alone.
        found = _said("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        if found:
            return found
    with suppress(OSError, UnicodeDecodeError):
        return (root / "build" / "commit").read_text().strip() or None
    return None


def processor() -> str:
    """The processor's name, with family and model where the name alone says little (virtual machines)."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        found = {
            key: re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")
        }
        if all(found.values()):
            name, family, model = (match.group(1) for match in found.values() if match)
            return f"{name} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def steady_memory() -> None:
    """Huge pages for large tensors, and freed memory kept, for the rest of the process: for every provider alike.

    Without them, what is measured of a large output is page faults, and of a large weight page walks. To be called
    before the first tensor is made; torch reads its switch then. `pages` tells whether it worked.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if extension.available():
        extension.host().keep_freed_memory()


def pages() -> str:
    """What large tensors get in this process: "huge" pages, or "ordinary" ones."""
    probe = torch.ones(64 << 20, dtype=torch.uint8)
    found = {"Rss": 0, "AnonHugePages": 0}  # of the mapping that holds it, in KB
    inside = False
    with suppress(OSError):
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                first, end = (int(address, 16) for address in mapping.groups())
                inside = first <= probe.data_ptr() < end
            elif inside and (size := re.match(r"(Rss|AnonHugePages):\s+(\d+)", line)):
                found[size[1]] = int(size[2])
    return "huge" if found["AnonHugePages"] > found["Rss"] // 2 else "ordinary"


def out_of_cache(last: int) -> int:
    """Bytes per buffer that a last cache of `last` bytes does not help with."""
    return max(256 << 20, 4 * last)


def _cpu_memory(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    threads = torch.get_num_threads()
    caches = extension.build_info().get("caches", {})
    last = caches.get("l3", 0) if isinstance(caches, dict) else 0
    size = out_of_cache(last)
    try:
        host = extension.host()
    except RuntimeError:  # a pure Python installation
        return _torch_memory(device, size, time.perf_counter), {}

    def probe(size: int, huge_pages: bool) -> Any:
        made = host.MemoryProbe(size, threads, huge_pages)
        made.tune(TUNING)
        return made

    main, ordinary = probe(size, True), probe(size, False)
    extra = {
        "read, 4 KB pages": (ordinary.read, ordinary.read_body),
        "copy, 4 KB pages": (ordinary.copy, ordinary.copy_body),
    }
    if last:
        cached = probe(last // 3, True)
        extra["read, L3"] = (cached.read, cached.read_body)
    mixes = {f"{r}:{w}": (partial(main.mix, r, w), main.mix_body) for r, w in MIXES}
    return {"read": (main.read, main.read_body), "copy": (main.copy, main.copy_body), **mixes}, extra


def _cuda_memory(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    # Some milliseconds per pass: the wait for the GPU after each is then below 1 %.
    size = min(4 << 30, torch.cuda.get_device_properties(device).total_memory // 16)
    return _torch_memory(device, size, clock(device)), {}


def _torch_memory(device: torch.device, size: int, now: Callable[[], float]) -> dict[str, Any]:
    """Bandwidth through torch's own operators."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    read = (lambda seconds: size / _mean(source.sum, now, seconds) * 1e-9, "torch sum")
    copy = (lambda seconds: 2 * size / _mean(lambda: target.copy_(source), now, seconds) * 1e-9, "torch copy_")
    # torch has no operator for every mix; a copy bounds them from above.
    return {"read": read, "copy": copy, **{f"{r}:{w}": copy for r, w in MIXES}}


def _matmul(dtype: torch.dtype, device: torch.device, now: Callable[[], float]) -> tuple[Callable[[float], float], str]:
    """Samples GFLOP/s of the fastest way to make x · wᵀ here, and that way's name."""
    m, k, n = MATMUL[device.type]
    x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    ways = matmuls(x, w)
    times = {name: _mean(run, now, TUNING) for name, run in ways.items()}
    name = min(times, key=lambda each: times[each])
    return lambda seconds: 2 * m * k * n / _mean(ways[name], now, seconds) * 1e-9, name


def linears(w: Tensor, tokens: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """x (tokens, K) -> x wᵀ for w (N, K), in every way torch has: its own, oneDNN, oneDNN with the weight prepacked."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {"torch linear": lambda x: torch.nn.functional.linear(x, w)}
    if w.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return ways
    with suppress(AttributeError, RuntimeError):  # a torch without these operators, or a dtype the processor lacks
        pointwise = torch.ops.mkldnn._linear_pointwise
        probe = w.new_zeros(tokens, w.shape[1])
        pointwise(probe, w, None, "none", [], "")
        ways["oneDNN"] = lambda x: pointwise(x, w, None, "none", [], "")
        packed = torch.ops.mkldnn._reorder_linear_weight(w, tokens)
        pointwise(probe, packed, None, "none", [], "")
        ways["oneDNN prepacked"] = lambda x: pointwise(x, packed, None, "none", [], "")
    return ways


def matmuls(x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    """x (M, K) times w (N, K) transposed, in every way of `linears`."""
    return {name: partial(run, x) for name, run in linears(w, x.shape[0]).items()}


def _mean(run: Callable[[], Any], now: Callable[[], float], seconds: float) -> float:
    """Mean seconds of the calls within `seconds`, at least one, after one that does not count."""
    run()
    start, calls = now(), 0
    while True:
        run()
        calls += 1
        elapsed = now() - start
        if elapsed >= seconds:
            return elapsed / calls
