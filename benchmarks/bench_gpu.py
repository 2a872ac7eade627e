"""Whole models on a GPU, with random weights: a training step, compact(), and generation with compacted models.

Run: python benchmarks/bench_gpu.py --out models.json [step] [compact] [generate] [compiled]; default: all, in turn.
The file is written anew after every row, so that a run that is stopped loses nothing. --tiny runs the same code on a
model of some neurons, on the CPU too, where its times mean nothing and a graph's replay is one more call.

All variants of a part are timed in turns; figures are medians, ratios those of paired rounds.
- step: one training step in bf16, optimizer included, at fractions of kept units against the dense model, with the
  seconds of its forward, backward, clipping and optimizer.
- compact: seconds of `compact(model, plan, check=False)` against those of copying the parameters it keeps.
- generate: prefill of all tokens at once and decoding of one sequence, of the dense model and of compacted ones at
  fractions of the gated FLOPs, as they come, under a CUDA graph, and with ppnet's operators under them (`accelerate`).
- compiled: the same through torch.compile, with and without a CUDA graph around it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_step import draw_with
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ppnet import PuppetConfig, accelerate, compact, plan, wrap
from ppnet.roofline.case import Band
from ppnet.roofline.machine import setting
from ppnet.roofline.timing import Cuda

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A Llama with equally many heads and KV heads, and what is asked of it."""

    width: int = 2048
    layers: int = 16
    heads: int = 16
    neurons: int = 8192
    vocabulary: int = 100_278
    batch: int = 8
    length: int = 1024
    new: int = 32
    rounds: int = 7
    multiple: int = 64  # of kept neurons

    def model(self, dtype: torch.dtype, device: torch.device) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2 * self.length,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
        )
        with device:
            return LlamaForCausalLM(config).to(device, dtype)

    def ids(self, batch: int, device: torch.device) -> torch.Tensor:
        source = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocabulary, (batch, self.length), generator=source).to(device)


TINY = Shape(64, 2, 16, 512, 100, 2, 16, 3, 2, 8)
KEPT = (1.0, 0.5, 0.2)  # of the units, in training
FRACTIONS = (0.24, 0.117)  # of the gated FLOPs, of compacted models
PAPER = {0.24: 2.59, 0.117: 3.52}  # times faster than dense, compiled


class Host:
    """In the GPU's place for --tiny."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def elapsed(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class Place:
    """Where it runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = Cuda(device) if device.type == "cuda" else Host()

    def mark(self) -> Any:
        """A point in time of the GPU's work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds between two marks."""
        if self.device.type != "cuda":
            return second - first
        second.synchronize()
        return first.elapsed_time(second) * 1e-3

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Most that torch holds during `run`, models included."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 4)


# ---- a training step -------------------------------------------------------------------------------------------------

PHASES = ("forward", "backward", "clip", "optimizer")


class Step:
    """A model with its optimizer."""

    def __init__(self, net: Any, shape: Shape, place: Place) -> None:
        self.net, self.place = net.train(), place
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ids = shape.ids(shape.batch, place.device)

    def run(self) -> dict[str, float]:
        """Seconds of the phases of one step, and of the "step"."""
        marks = [self.place.mark()]
        loss = self.net(self.ids, labels=self.ids, use_cache=False).loss
        if hasattr(self.net, "puppet"):
            loss = loss + self.net.puppet.penalty()
            self.net.puppet.clear()
        marks.append(self.place.mark())
        loss.backward()
        marks.append(self.place.mark())
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        marks.append(self.place.mark())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self.place.mark())
        parts = [self.place.between(first, second) for first, second in itertools.pairwise(marks)]
        return {**dict(zip(PHASES, parts, strict=True)), "step": self.place.between(marks[0], marks[-1])}


def training(shape: Shape, place: Place) -> Iterator[Row]:
    def gated(keep: float) -> Any:
        net = wrap(shape.model(torch.bfloat16, place.device), PuppetConfig())
        net.puppet.draw = lambda: draw_with(net.puppet, keep)
        return net

    steps = {"dense": Step(shape.model(torch.bfloat16, place.device), shape, place)}
    steps |= {f"keep {keep:g}": Step(gated(keep), shape, place) for keep in KEPT}
    for _ in range(2):
        for step in steps.values():
            step.run()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(shape.rounds):
        for name, step in steps.items():
            times[name].append(step.run())
    dense = [one["step"] for one in times["dense"]]
    for name, measured in times.items():
        whole = [one["step"] for one in measured]
        yield {
            "variant": name,
            "seconds": vars(Band.of(whole)),
            "x faster than dense": ratio(dense, whole),
            **{f"{phase} s": statistics.median(one[phase] for one in measured) for phase in PHASES},
            "tokens": shape.batch * shape.length,
            "peak bytes, all variants' weights included": place.peak_bytes(steps[name].run),
        }


# ---- compact() -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compacting(shape: Shape, place: Place) -> Iterator[Row]:
    model = shape.model(torch.bfloat16, place.device).eval()
    for size in (0.75, 0.5, 0.25):
        planned = plan(model, size, scores="magnitude")
        small = compact(model, planned, check=False)
        kept = list(small.parameters())
        ours, copying = [], []
        for _ in range(shape.rounds):
            ours.append(place.gpu.elapsed(lambda planned=planned: compact(model, planned, check=False)))
            copying.append(place.gpu.elapsed(lambda kept=kept: [parameter.clone() for parameter in kept]))
        yield {
            "variant": f"size {size:g}",
            "seconds": vars(Band.of(ours)),
            "copying s": statistics.median(copying),
            "x the time of copying": ratio(ours, copying),
            "plan s": place.gpu.elapsed(lambda size=size: plan(model, size, scores="magnitude")),
            "kept bytes": sum(parameter.numel() * parameter.element_size() for parameter in kept),
            "parameters before": sum(parameter.numel() for parameter in model.parameters()),
        }


# ---- generation ------------------------------------------------------------------------------------------------------

Sample = Callable[[], float]  # seconds, measured now


def prefill(call: Any, ids: torch.Tensor, place: Place, graph: bool) -> Sample:
    """Seconds of one pass over all tokens."""

    def run() -> Any:
        return call(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    run()
    run = place.gpu.capture(run) if graph else run
    return lambda: place.gpu.elapsed(run)


def decode(model: Any, call: Any, ids: torch.Tensor, new: int, place: Place, static: bool, graph: bool) -> Sample:
    """Seconds per token of greedy decoding after a prompt.

    Args:
        call: the model, or what it was compiled to. static: with a cache of fixed size, which graphs need.
    """
    options = {"past_key_values": StaticCache(model.config, max_cache_len=ids.shape[1] + new)} if static else {}
    made = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
    cache, token = made.past_key_values, made.logits[:, -1:].argmax(-1)

    def step() -> None:
        logits = call(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token.copy_(logits[:, -1:].argmax(-1))

    def rewind() -> None:
        if not static:
            added = cache.get_seq_length() - ids.shape[1]
            if added:
                cache.crop(-added)
            return
        for layer in cache.layers:
            layer.cumulative_length.fill_(ids.shape[1])

    step()
    rewind()
    one = place.gpu.capture(step) if graph else step

    def steps() -> None:
        for _ in range(new):
            one()

    def sample() -> float:
        rewind()
        return place.gpu.elapsed(steps) / new

    return sample


def models(shape: Shape, place: Place) -> dict[str, tuple[Any, Row]]:
    """The dense model and compacted ones by name, with what their FLOPs promise."""
    dense = shape.model(torch.bfloat16, place.device).eval()
    made: dict[str, tuple[Any, Row]] = {"dense": (dense, {})}
    multiples = {"neuron": shape.multiple}
    for fraction in FRACTIONS:
        kept = plan(dense, fraction, metric="flops", of="gated", multiple_of=multiples, scores="magnitude")
        promised = {
            "gated FLOPs asked": fraction,
            "ideal x, 1 / fraction": round(1 / fraction, 3),
            "FLOPs, of dense": round(kept.cost.flops / kept.dense_cost.flops, 4),
            "bytes, of dense": round(kept.cost.bytes / kept.dense_cost.bytes, 4),
            "paper's x": PAPER.get(fraction),
        }
        made[f"{fraction:g} of the gated FLOPs"] = compact(dense, kept, check=False), promised
    return made


def taking_turns(samples: dict[tuple[str, str], Callable[[], Sample]], shape: Shape, facts: dict[str, Row], what: str):
    """Rows of (model, way) -> how to prepare its sample; against the dense model in the same way."""
    ready, rows = {}, []
    for (name, way), prepare in samples.items():
        try:
            ready[name, way] = prepare()
            ready[name, way]()
        except Exception as error:
            ready.pop((name, way), None)
            rows.append({"variant": f"{what}, {name}", "way": way, "failed": f"{type(error).__name__}: {error}"[:500]})
    yield from rows
    times: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
    for number in range(shape.rounds):
        for key in ready if number % 2 else reversed(ready):
            times[key].append(ready[key]())
    for (name, way), seconds in times.items():
        row = {"variant": f"{what}, {name}", "way": way, "seconds": vars(Band.of(seconds)), **facts[name]}
        for other, label in ((("dense", way), "the same way"), (("dense", "eager"), "eager")):
            if other in times:
                row[f"x faster than dense, {label}"] = ratio(times[other], seconds)
        yield row


def compiled(model: Any, tiny: bool) -> Any:
    # Graphs are captured around it, as around everything else.
    return torch.compile(model, dynamic=False, backend="eager" if tiny else "inductor")


@torch.no_grad()
def generating(shape: Shape, place: Place, with_compile: bool = False) -> Iterator[Row]:
    torch.compiler.reset()
    made = models(shape, place)
    facts = {name: promised for name, (_, promised) in made.items()}
    many, one = shape.ids(shape.batch, place.device), shape.ids(1, place.device)
    tiny = shape == TINY
    prefills: dict[tuple[str, str], Callable[[], Sample]] = {}
    decodes: dict[tuple[str, str], Callable[[], Sample]] = {}
    for name, (model, _) in made.items():
        ours = accelerate(copy.deepcopy(model))
        for whose, used in (("", model), ("ours, ", ours)):
            call: Callable[[], Any] = partial(compiled, used, tiny) if with_compile else partial(_itself, used)
            way, graph = ("torch.compile", "torch.compile + CUDA graph") if with_compile else ("eager", "CUDA graph")
            static = with_compile
            decodes[name, whose + way] = partial(_decode, used, call, one, shape.new, place, static, False)
            decodes[name, whose + graph] = partial(_decode, used, call, one, shape.new, place, True, True)
            if not whose:
                prefills[name, way] = partial(_prefill, call, many, place, False)
                prefills[name, graph] = partial(_prefill, call, many, place, True)
    tokens = shape.batch * shape.length
    yield from taking_turns(prefills, shape, facts, f"prefill of {tokens} tokens")
    yield from taking_turns(decodes, shape, facts, f"decode after {shape.length} tokens")


def _itself(model: nn.Module) -> nn.Module:
    return model


def _prefill(call: Callable[[], Any], ids: torch.Tensor, place: Place, graph: bool) -> Sample:
    return prefill(call(), ids, place, graph)


def _decode(model: Any, call: Callable[[], Any], *given: Any) -> Sample:
    return decode(model, call(), *given)


PARTS: dict[str, Callable[[Shape, Place], Iterator[Row]]] = {
    "step": training,
    "compact": compacting,
    "generate": generating,
    "compiled": partial(generating, with_compile=True),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("build") / "models.json")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not known; known are {', '.join(PARTS)}")
    if not (torch.cuda.is_available() or options.tiny):
        parser.error("no GPU is here; --tiny runs the code on the CPU, and its times mean nothing")
    place = Place(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shape = TINY if options.tiny else Shape()
    result = {"setting": {**setting(place.device), "transformers": transformers.__version__}, "shape": vars(shape)}
    rows: list[Row] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        try:
            with torch._dynamo.config.patch(recompile_limit=64):  # the models share one forward
                for row in PARTS[part](shape, place):
                    rows.append({"part": part, **row})
                    options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
                    print(part, json.dumps(row), flush=True)
        except Exception as error:  # the other parts may still run
            rows.append({"part": part, "failed": f"{type(error).__name__}: {error}"[:500]})
            options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
            print(part, rows[-1]["failed"], flush=True)
    failed = sum("failed" in row for row in rows)
    print(f"{len(rows)} rows, {failed} failed, in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
