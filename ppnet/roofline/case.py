"""One case: an operator at one shape, dtype and keep fraction, beside every honest baseline, against the machine.

To add an operator, add one file `ppnet/roofline/cases/<operator>.py`; `ppnet bench`, the benchmarks, the plot and the
test that all providers agree follow. It registers a function that yields cases::

    @operator("my_op")
    def my_op(size: Size, device: torch.device) -> Iterator[Case]:
        rows, width = pick(size, full=(11008, 4096), tiny=(24, 40))  # quick: as full, unless given
        for dtype in (torch.bfloat16, torch.float32):

            def setup(dtype=dtype) -> Providers:  # bind the loop's variables as defaults: setup runs later
                weights = copies(lambda: torch.randn(rows, width, device=device).to(dtype), moved, device)
                return {
                    "ppnet": each(weights, lambda w: ops.my_op(w)),  # ours first
                    "dense": each(weights, lambda w: torch...),  # without any sparsity
                    "dense+mask": each(weights, ...),  # dense times gates
                    "oneDNN prepacked": each(weights, ...),  # any other name: the best other is the one to beat
                }

            shape = {"rows": rows, "width": width}
            yield Case("my_op", "keep 0.5", dtype, shape, 0.5, bytes=moved, flops=0, traffic="read", setup=setup)

- `bytes`: what must move for the kept part (inputs read once + outputs written once), `flops`: its multiply-adds x 2.
- `traffic`: the bandwidth that bounds it, in read + write bytes: "read" where next to nothing is written, "copy" where
  as much, else the nearest of the mixes of bytes read to bytes written, such as "2:1": memory sustains less of them.
  Ideal seconds = max(bytes / bandwidth, flops / matmul rate of the dtype).
- `copies` makes as many inputs as no cache holds; `each` gives a provider its own turn through them, so that the first
  call of every provider has the same input. Make inputs under a fixed seed and nothing else inside a provider: what is
  prepared once in real use (prepacked or neuron-major weights, kept rows compacted) is prepared in setup.
- Every provider returns the same tensor, or (nested) list of tensors, up to `tolerance` (relative to the largest
  element); only "dense" may differ. tests/test_roofline.py checks that at size "tiny".
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

import ppnet.extension as extension
from ppnet.roofline.timing import Timed

Size = Literal["full", "quick", "tiny"]
Traffic = Literal["copy", "read", "2:1", "3:2", "1:2"]
MIXES = ((2, 1), (3, 2), (1, 2))  # of arrays read and written
Providers = dict[str, Callable[[], Any]]
Cases = Callable[[Size, torch.device], "Iterator[Case]"]
Value = TypeVar("Value")

OPERATORS: dict[str, Cases] = {}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
DEFAULT_CACHE = 32 << 20  # bytes, where the system does not say
MOST_ON_GPU = 12288  # copies: 16 KB each exceed three times an L2 of 60 MB
WINDOW = 0.02  # seconds that one provider, or one sample of a ceiling, gets per round


def operator(name: str) -> Callable[[Cases], Cases]:
    """Registers the function that yields an operator's cases."""

    def register(cases: Cases) -> Cases:
        OPERATORS[name] = cases
        return cases

    return register


def pick(size: Size, *, full: Value, tiny: Value, quick: Value | None = None) -> Value:
    """The value for a size; quick is as full unless it is given."""
    return {"full": full, "quick": full if quick is None else quick, "tiny": tiny}[size]


def copies(make: Callable[[], Value], size: float, device: torch.device | str = "cpu") -> list[Value]:
    """As many inputs as exceed three times the last cache, `size` bytes being touched of each; at least 2."""
    if torch.device(device).type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # A graph has no calls to wait for, so that small cases have to leave the cache too.
        most = min(MOST_ON_GPU, int(torch.cuda.mem_get_info(device)[0] / (8 * max(size, 1))))
    else:
        caches = extension.build_info().get("caches", {})
        cache = max(caches.values(), default=0) if isinstance(caches, dict) else 0
        most = 64  # More would only take memory: cases that small are bound by the call itself.
    return [make() for _ in range(max(2, min(most, math.ceil(3 * (cache or DEFAULT_CACHE) / max(size, 1)))))]


class Each(Generic[Value]):
    """A provider that takes the next of its inputs at every call; its length is their number."""

    def __init__(self, inputs: Sequence[Value], run: Callable[[Value], Any]) -> None:
        self._inputs, self._run, self._turn = len(inputs), run, itertools.cycle(inputs)

    def __call__(self) -> Any:
        return self._run(next(self._turn))

    def __len__(self) -> int:
        return self._inputs


def each(inputs: Sequence[Value], run: Callable[[Value], Any]) -> Callable[[], Any]:
    """A provider that takes the next of `inputs` at every call (`Each`)."""
    return Each(inputs, run)


@dataclass(frozen=True)
class Case:
    """See the module's text. `shape`: sizes by name, for the record; `variant`: what tells it from its siblings."""

    operator: str
    variant: str
    dtype: torch.dtype
    shape: dict[str, int]
    keep: float
    bytes: float
    flops: float
    traffic: Traffic
    setup: Callable[[], Providers] = field(repr=False)
    tolerance: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.variant}, {DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Band:
    """Median and 20th and 80th percentile of the rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Band:
        ordered = sorted(values)

        def quantile(q: float) -> float:
            at = q * (len(ordered) - 1)
            low = int(at)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (at - low) * (ordered[high] - ordered[low])

        return cls(statistics.median(ordered), quantile(0.2), quantile(0.8))


@dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
        bound: the ceiling that its ideal time comes from: "copy", "read", a mix (GB/s) or "matmul" (GFLOP/s).
        ceiling: that ceiling, sampled in the same rounds. ideal: seconds that it allows.
        seconds: provider -> seconds per call. faster: provider -> how many times faster ours is (paired by round).
        rate: ours, in GB/s of `bytes`, or GFLOP/s where "matmul" is the bound.
        share: ideal / ours (1 is the roof), paired by round. best: the fastest baseline. best_share: its share.
        calls: calls per round of ours.
        timing: on a GPU, provider -> "graph" or "eager" (`ppnet.roofline.timing`). eager: provider -> seconds per call
            from Python, launches included, where `seconds` is of a graph.
    """

    operator: str
    variant: str
    dtype: str
    shape: dict[str, int]
    keep: float
    bytes: float
    flops: float
    bound: str
    ceiling: Band
    ideal: float
    rate: float
    share: Band
    seconds: dict[str, Band]
    faster: dict[str, float]
    best: str | None
    best_share: float | None
    rounds: int
    calls: int
    timing: dict[str, str] = field(default_factory=dict)
    eager: dict[str, Band] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Ceilings(Protocol):
    """What `measure` needs of a machine."""

    def sample(self, kind: str) -> float:
        """One short measurement now: kind "copy", "read" or a mix in GB/s, "matmul fp32" (a dtype) in GFLOP/s."""

    def known(self, kind: str) -> float | None:
        """The figure measured at the start; None where it has none."""

    def now(self) -> float:
        """Seconds, after all queued work is done."""

    def timed(self, run: Callable[[], Any]) -> Timed:
        """A provider, warmed up, as it is timed here."""


def measure(case: Case, machine: Ceilings, *, seconds: float = 2.0, least: int = 7, most: int = 25) -> Row:
    """Times all providers of a case in turns, and its ceilings in the same rounds.

    Args:
        seconds: about how long to measure; between `least` and `most` rounds.
    """
    # Or, from the ninth case on, a function that several cases compile would silently run as it is.
    torch.compiler.reset()
    providers = case.setup()
    kinds = _ceilings_of(case, machine)
    timed = {name: machine.timed(run) for name, run in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    eager: dict[str, list[float]] = {name: [] for name in providers}
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    started, rounds = machine.now(), 0
    while rounds < least or (rounds < most and machine.now() - started < seconds):
        order = list(providers) if rounds % 2 else list(reversed(providers))
        for name in order:
            times[name].append(timed[name].sample())
            called = timed[name].eager()
            if called is not None:
                eager[name].append(called)
        for kind in kinds:
            samples[kind].append(machine.sample(kind))
        rounds += 1
    row = row_of(case, times, samples, timed[next(iter(providers))].calls)
    return replace(
        row,
        timing={name: one.how for name, one in timed.items() if one.how != "host"},
        eager={name: Band.of(values) for name, values in eager.items() if values},
    )


def row_of(case: Case, times: dict[str, list[float]], samples: dict[str, list[float]], calls: int = 1) -> Row:
    """The figures of a case from the rounds' seconds per provider (ours first) and the rounds' ceilings per kind."""
    ours, *others = times
    ideals = {kind: [_ideal(case, kind, value) for value in values] for kind, values in samples.items()}
    decisive = max(ideals, key=lambda kind: statistics.median(ideals[kind]))
    ideal = ideals[decisive]
    seconds = {name: Band.of(values) for name, values in times.items()}
    best = min(others, key=lambda name: seconds[name].median, default=None)
    matmul = decisive.startswith("matmul")
    return Row(
        operator=case.operator,
        variant=case.variant,
        dtype=DTYPES[case.dtype],
        shape=dict(case.shape),
        keep=case.keep,
        bytes=case.bytes,
        flops=case.flops,
        bound="matmul" if matmul else decisive,
        ceiling=Band.of(samples[decisive]),
        ideal=statistics.median(ideal),
        rate=(case.flops if matmul else case.bytes) / seconds[ours].median * 1e-9,
        share=Band.of(_ratios(ideal, times[ours])),
        seconds=seconds,
        faster={name: statistics.median(_ratios(times[name], times[ours])) for name in others},
        best=best,
        best_share=None if best is None else statistics.median(_ratios(ideal, times[best])),
        rounds=len(times[ours]),
        calls=calls,
    )


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _ideal(case: Case, kind: str, ceiling: float) -> float:
    return (case.flops if kind.startswith("matmul") else case.bytes) / (ceiling * 1e9)


def _ceilings_of(case: Case, machine: Ceilings) -> list[str]:
    """The kinds worth sampling: the matmul rate only where it comes near to bounding the case."""
    matmul = f"matmul {DTYPES[case.dtype]}"
    rate, bandwidth = machine.known(matmul), machine.known(case.traffic)
    if not rate or not bandwidth or _ideal(case, matmul, rate) < 0.3 * _ideal(case, case.traffic, bandwidth):
        return [case.traffic]
    return [case.traffic, matmul]


def clock(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the work queued on an accelerator."""

    def waiting() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return waiting if device.type == "cuda" else time.perf_counter
