"""Setting a size: views of a sorted model's weights against weights gathered from an unsorted one, and passes on both.

Run: python -m pytest benchmarks/bench_resize.py --benchmark-only. A Llama of random weights and gates, and its sorted
copy. Every round sets every size on both, one after the other, so that load on the machine hits them alike, and then
lets them compute one token and many; ratios are medians of the rounds' ratios. A resize is given its plan: making one
reads all weights, and is timed beside it. As a resize is short, the shortest of three in a row counts in every round.
Bytes are the peak of what torch allocates for the resize.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ppnet.extension as extension
from ppnet import Plan, plan, resize, sort_, wrap
from ppnet.evaluate.memory import peak_bytes
from ppnet.roofline.machine import pages, processor

WIDTH, LAYERS, HEADS, GROUPS, NEURONS, VOCABULARY = 1024, 2, 16, 8, 2816, 2048
SIZES, TOKENS, ROUNDS = (0.75, 0.5, 0.25), (1, 64), 5
WAYS = ("gathered", "views")


def gated() -> Any:
    """A Llama whose gates have random numbers, so that every layer has an order and amplitudes of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        tie_word_embeddings=True,
    )
    model = wrap(LlamaForCausalLM(config).eval())
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


@dataclass
class Measured:
    """Seconds of every round by (what, way, size), bytes that a resize allocates, bytes of the units that stay."""

    models: dict[str, Any]
    plans: dict[tuple[str, float], Plan]
    seconds: dict[tuple[str, str, float], list[float]] = field(default_factory=dict)
    allocated: dict[tuple[str, float], int] = field(default_factory=dict)
    kept: dict[float, int] = field(default_factory=dict)

    def add(self, what: str, way: str, size: float, run: Callable[[], Any], times: int = 1) -> None:
        """One more round: by the clock, and (`what` with ", processor") by the processor, which load hardly slows."""
        for name, clock in ((what, time.perf_counter), (f"{what}, processor", time.process_time)):
            took = min(seconds(run, clock) for _ in range(times))
            self.seconds.setdefault((name, way, size), []).append(took)

    def median(self, what: str, way: str, size: float) -> float:
        return statistics.median(self.seconds[what, way, size])

    def ratio(self, what: str, size: float) -> float:
        """Time of views over that of gathered weights."""
        pairs = zip(self.seconds[what, "views", size], self.seconds[what, "gathered", size], strict=True)
        return statistics.median(views / gathered for views, gathered in pairs)


@pytest.fixture(scope="module")
def measured() -> Measured:
    unsorted = gated()
    models = dict(zip(WAYS, (unsorted, sort_(copy.deepcopy(unsorted))), strict=True))
    plans = {(way, size): plan(model, size, of="gated") for way, model in models.items() for size in SIZES}
    found = Measured(models, plans)
    generator = torch.Generator().manual_seed(1)
    prompts = {tokens: torch.randint(VOCABULARY, (1, tokens), generator=generator) for tokens in TOKENS}
    for way, model in models.items():
        for size in SIZES:
            found.add("plan", way, size, lambda m=model, s=size: plan(m, s, of="gated"))
    for (way, size), made in plans.items():
        resize(models[way], None)
        found.allocated[way, size] = peak_bytes(lambda way=way, made=made: resize(models[way], made))
        found.kept[size] = made.cost.bytes - models[way].puppet.costs.fixed.bytes
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for size in SIZES:
                for way, model in models.items():
                    found.add("resize", way, size, lambda m=model, p=plans[way, size]: resize(m, p), times=3)
                    for tokens, ids in prompts.items():
                        found.add(f"{tokens} tokens", way, size, lambda m=model, ids=ids: m(ids))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_resize(benchmark: Any, measured: Measured, way: str, size: float) -> None:
    """The columns are from the paired rounds; the row's own time is one more resize."""
    benchmark.pedantic(resize, args=(measured.models[way], measured.plans[way, size]), rounds=1)
    benchmark.extra_info |= {
        "resize, µs": round(1e6 * measured.median("resize", way, size), 1),
        "resize, µs of the processor": round(1e6 * measured.median("resize, processor", way, size), 1),
        "plan, µs": round(1e6 * measured.median("plan", way, size), 1),
        "bytes allocated": measured.allocated[way, size],
        "bytes kept": measured.kept[size],
        "processor": processor(),
        "isa": extension.isa(),
        "pages": pages(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for tokens in TOKENS:
        benchmark.extra_info[f"{tokens} tokens, ms"] = round(1e3 * measured.median(f"{tokens} tokens", way, size), 3)
    if way == "views":
        passes = [f"{tokens} tokens" for tokens in TOKENS]
        for what in ("resize", "resize, processor", *passes, *(f"{name}, processor" for name in passes)):
            benchmark.extra_info[f"{what}, x gathered"] = round(measured.ratio(what, size), 5)
