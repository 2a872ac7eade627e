"""The metric ``latency``: microseconds of one decoding step on the model's device, from a table of measured shapes.

For every shape of sub-layer in the model, its matrix products are timed at a few widths (`GRID`, as fractions of the
units), for one token in the model's dtype; between them time is interpolated, and never falls with width. What is never
removed takes the rest of a measured step of the whole model. Weights take turns over several copies, so that they come
from memory as in a whole model and not from the cache. The machine should be idle.

The table is kept in memory and in `CACHE` (``~/.cache/ppnet/latency.json``), by device, number of threads, dtype, torch
version and shape; delete that file to measure anew. The products are torch's, also for an accelerated model; the step
is the model's own, accelerated or not.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.cost import CostModel
from ppnet.errors import PPNetError
from ppnet.evaluate.model_state import device_of
from ppnet.families import check_decoder
from ppnet.files import write_atomic
from ppnet.metrics import meter
from ppnet.modes import evaluating
from ppnet.units import Site, Structure, leaf_module
from ppnet.wrap import engine_of, is_accelerated, is_wrapped


def _default_cache() -> Path | None:
    try:
        return Path.home() / ".cache" / "ppnet" / "latency.json"
    except RuntimeError:  # no home: the table lives as long as the process
        return None


CACHE = _default_cache()
GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
ROUNDS = 15
LEAST_SECONDS = 5e-4
# The copies of a sub-layer's weights hold at least this many bytes together, more than most last-level caches.
FOOTPRINT = 2**27
MOST_COPIES = 64

_TABLE: dict[str, float] = {}
# Files that held the table: where one is gone, somebody wants to measure anew.
_ON_DISK: set[Path] = set()


@dataclass(frozen=True)
class Latency:
    """A meter of measured time (`ppnet.metrics.Meter`).

    Attributes:
        curves: per site, (kept units, microseconds) from 0 to the dense width, both increasing.
        device: where it was measured.
    """

    fixed: float
    dense_units: tuple[int, ...]
    curves: tuple[tuple[tuple[float, float], ...], ...]
    device: str
    metric: str = "latency"
    unit: str = "microseconds"

    def site(self, index: int, kept: float) -> float:
        curve = self.curves[index]
        for (left, low), (right, high) in pairwise(curve):
            if kept <= right:
                return low + (high - low) * (kept - left) / (right - left)
        return curve[-1][1]

    def about(self) -> dict[str, Any]:
        return {"unit": self.unit, "device": self.device}


@meter("latency")
def latency(model: nn.Module, structure: Structure, costs: CostModel) -> Latency:
    """Times what is not yet in the table; about a second per shape.

    Raises:
        PPNetError: weights without values (meta device). UnsupportedModelError: an encoder.
    """
    check_decoder(model, "decoding steps to measure the latency of")
    device = device_of(model)
    if device.type == "meta":
        raise PPNetError("metric: 'latency' is measured, and this model is on the meta device; load its weights first.")
    place = _place(device)
    table = _read()
    curves = tuple(_curve(model, site, place, table) for site in structure.sites)
    step = _timed(f"{place}/step/{_step_shape(model, structure)}", table, lambda: [_step(model, device)])
    fixed = max(step - sum(curve[-1][1] for curve in curves), 0.0)
    return Latency(fixed, costs.dense_units, curves, place)


def _place(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu":
        name = f"{_processor() or name}, {torch.get_num_threads()} threads"
    return f"{device.type} {name}, torch {torch.__version__}"


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _curve(model: nn.Module, site: Site, place: str, table: dict[str, float]) -> tuple[tuple[float, float], ...]:
    widths = sorted({max(1, round(part * site.units)) for part in GRID})
    shapes = [_shape(model, site, width) for width in widths]
    keys = [f"{place}/{shape}" for shape in shapes]
    missing = [(key, width) for key, width in zip(keys, widths, strict=True) if key not in table]
    if missing:
        # All widths in turns, so that a machine that slows down slows every one.
        names = [key for key, _ in missing]
        _store(dict(zip(names, _measure(_products(model, site, [w for _, w in missing])), strict=True)), table)
    points = [(0.0, 0.0)]
    for key, width in zip(keys, widths, strict=True):
        points.append((float(width), max(table[key], points[-1][1])))
    return tuple(points)


def _shape(model: nn.Module, site: Site, width: int) -> str:
    """What decides the time: the products' shapes and their dtype."""
    parts = []
    for leaf in site.leaves:
        module = leaf_module(model, leaf)
        other = module.weight.shape[1 - leaf.weight_dim]
        features = leaf.features_per_unit * width
        parts.append(f"{features}x{other}" if leaf.role == "out" else f"{other}x{features}")
    return f"{leaf_module(model, site.consumer).weight.dtype}/{'+'.join(parts)}"


def _step_shape(model: nn.Module, structure: Structure) -> str:
    dense = "+".join(f"{site.kind}{site.units}" for site in structure.sites if site.layer == 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(model.parameters()).dtype
    way = "/accelerated" if is_accelerated(model) else ""
    return f"{type(model).__name__}{way}/{structure.layers}/{structure.width}/{dense}/{parameters}/{dtype}"


def _products(model: nn.Module, site: Site, widths: Sequence[int]) -> list[Callable[[], Any]]:
    """For each width a function that computes the sub-layer's products for one token, with the next weights in turn."""
    return [_product(model, site, width) for width in widths]


def _product(model: nn.Module, site: Site, width: int) -> Callable[[], Any]:
    shapes = []
    for leaf in site.leaves:
        weight = leaf_module(model, leaf).weight
        features, other = leaf.features_per_unit * width, weight.shape[1 - leaf.weight_dim]
        shapes.append((other, features) if leaf.role == "out" else (features, other))  # (out, in)
    like = leaf_module(model, site.consumer).weight
    size = sum(out * into for out, into in shapes) * like.element_size()
    copies = min(MOST_COPIES, max(1, -(-FOOTPRINT // size)))
    own = torch.Generator(like.device).manual_seed(0)  # the global one is the user's

    def drawn(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=own)

    weights: list[list[Tensor]] = [[drawn(shape) for shape in shapes] for _ in range(copies)]
    inputs = [drawn((1, into)) for _, into in shapes]
    turn = 0

    def run() -> None:
        nonlocal turn
        turn = (turn + 1) % copies
        for x, weight in zip(inputs, weights[turn], strict=True):
            nn.functional.linear(x, weight)

    return run


def _step(model: Any, device: torch.device) -> Callable[[], Any]:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def run() -> None:
        dense = engine_of(model).puppet.dense() if is_wrapped(model) else nullcontext()
        with evaluating(model), dense:
            model(input_ids=ids, use_cache=False)

    return run


# ---- clocks ----------------------------------------------------------------------------------------------------------


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@torch.no_grad()
def _measure(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds of each, the median of `ROUNDS` rounds in turns."""
    repeats = []
    for run in runs:
        run()  # warm
        _synchronise()
        start = time.perf_counter()
        run()
        _synchronise()
        repeats.append(max(1, round(LEAST_SECONDS / max(time.perf_counter() - start, 1e-7))))
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for index, run in enumerate(runs):
            _synchronise()
            start = time.perf_counter()
            for _ in range(repeats[index]):
                run()
            _synchronise()
            seconds[index].append((time.perf_counter() - start) / repeats[index])
    return [1e6 * statistics.median(values) for values in seconds]


def _timed(key: str, table: dict[str, float], runs: Callable[[], Sequence[Callable[[], Any]]]) -> float:
    if key not in table:
        _store({key: _measure(runs())[0]}, table)
    return table[key]


# ---- the table -------------------------------------------------------------------------------------------------------


def _read() -> dict[str, float]:
    """The table in memory, with what the file holds beside it. What cannot be read counts as absent."""
    if CACHE is None:
        return _TABLE
    try:
        stored = json.loads(CACHE.read_text())
        entries = {str(key): float(value) for key, value in stored.items()}
        _ON_DISK.add(CACHE)
    except FileNotFoundError:
        entries = {}
        if CACHE in _ON_DISK:
            _ON_DISK.discard(CACHE)
            _TABLE.clear()
    except (OSError, ValueError, TypeError, AttributeError):
        entries = {}
    for key, value in entries.items():
        if math.isfinite(value) and value > 0:
            _TABLE.setdefault(key, value)
    return _TABLE


def _store(entries: dict[str, float], table: dict[str, float]) -> None:
    table.update(entries)
    if CACHE is None:
        return
    try:
        write_atomic(CACHE, json.dumps(table, indent=0))
        _ON_DISK.add(CACHE)
    except OSError:  # a home that cannot be written to
        return
