"""Speculative decoding with one set of weights: tokens/s, acceptance and memory at draft sizes, greedy, batch 1.

Run: python benchmarks/bench_speculate.py --factor 10 --threads 1 (--model FOLDER: a gated Llama; see speculate_model.py
for the one that is taken otherwise, and for what --factor does). Every round lets the target alone (`generate`, and our
loop without a draft) and every draft size generate from each prompt, one after the other, on the same accelerated
weights; ratios are to the faster of the two baselines, medians over rounds and prompts. With one thread the processor's
time counts beside the clock's, as a busy machine hardly changes it. Beside each measurement stands the closed form of
Leviathan et al. 2023: theorem 3.8 with the measured acceptance and draft cost, and the same with the measured cost of a
verification, which the theorem takes to be that of one token. Writes benchmarks/results/speculate_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speculate_model import TRAINED, prompts, widen

import ppnet
from ppnet.evaluate.speed import setting
from ppnet.speculation import draft, expected_speedup, speculate
from ppnet.speculation.decoding import _Reader
from ppnet.speculation.pace import LONGEST

SIZES = (0.1, 0.2, 0.3, 0.5)
Seconds = tuple[float, float]  # of the clock, of the processor


def timed(run: Callable[[], Any]) -> tuple[Any, Seconds]:
    clock, processor = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - clock, time.process_time() - processor)


def medians(every: list[Seconds]) -> Seconds:
    return statistics.median(one[0] for one in every), statistics.median(one[1] for one in every)


@torch.no_grad()
def passes(models: dict[Any, Any], prompt: torch.Tensor, rounds: int) -> dict[tuple[Any, int], Seconds]:
    """Seconds of passes of so many tokens after a prompt, of every model in turns; of drafts of one token."""
    readers = {name: _Reader(model) for name, model in models.items()}
    for reader in readers.values():
        reader.read(prompt[0].tolist(), 1)
    found: dict[tuple[Any, int], list[Seconds]] = {}
    for _ in range(rounds + 1):
        for name, reader in readers.items():
            for tokens in range(1, LONGEST + 2) if name == "target" else (1,):
                _, seconds = timed(lambda reader=reader, tokens=tokens: reader.read([5] * tokens, tokens))
                reader.keep(prompt.shape[1])
                found.setdefault((name, tokens), []).append(seconds)
    return {key: medians(values[1:]) for key, values in found.items()}


def draft_sizes(model: Any, factor: int) -> dict[float, Any]:
    """Drafts of fractions of the gated parameters, of all copies of a unit or none."""
    multiple = {"neuron": factor, "kv_group": factor}
    return {size: draft(model, size, of="gated", multiple_of=multiple) for size in SIZES}


def resize_seconds(model: Any, plan: Any, rounds: int = 5) -> Seconds:
    """Of going to the draft's size and back on one model object: what a second object saves, every round."""

    def there_and_back() -> None:
        with ppnet.resize(model, plan):
            pass

    return medians([timed(there_and_back)[1] for _ in range(rounds)])


class Bench:
    """Target and drafts; seconds per token of every variant, by round."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trained = ppnet.sort_(ppnet.load(options.model).eval())
        self.target = ppnet.accelerate(widen(self.trained, options.factor, getattr(torch, options.dtype)))
        ppnet.accelerate(self.trained)
        self.drafts = draft_sizes(self.target, options.factor)
        self.prompts = prompts(options.prompts, 24)
        self.costs = passes({"target": self.target, **self.drafts}, self.prompts[0], options.passes)
        self.seconds: dict[Any, list[Seconds]] = {}
        self.results: dict[float, list[Any]] = {size: [] for size in SIZES}
        self.lengths: dict[float, int] = {}

    def cost(self, name: Any, tokens: int = 1) -> float:
        """Of a pass, as a fraction of the target's of one token, by the processor's time."""
        return self.costs[name, tokens][1] / self.costs["target", 1][1]

    def speedup(self, size: float, length: int, acceptance: float) -> float:
        return expected_speedup(acceptance, length, self.cost(size), self.cost("target", length + 1))

    def add(self, name: Any, run: Callable[[], Any], count: Callable[[Any], int]) -> Any:
        result, seconds = timed(run)
        tokens = count(result)
        self.seconds.setdefault(name, []).append((seconds[0] / tokens, seconds[1] / tokens))
        return result

    def alone(self, ids: torch.Tensor) -> torch.Tensor:
        new = self.options.new
        output = self.add(
            "generate",
            lambda: self.target.generate(
                ids, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
            ),
            lambda found: found.shape[1] - ids.shape[1],
        )
        self.add(
            "loop",
            lambda: self.speculate(SIZES[0], ids, 0),
            lambda found: found.new_tokens,
        )
        return output

    def speculate(self, size: float, ids: torch.Tensor, length: int | None) -> Any:
        return speculate(
            self.target, self.drafts[size], ids, max_new_tokens=self.options.new, eos_token_id=None, draft_length=length
        )

    def choose_lengths(self) -> None:
        """By the acceptance of the trained model itself, which takes no time, and the costs of the wide one."""
        for size, small in draft_sizes(self.trained, 1).items():
            found = [
                speculate(self.trained, small, ids, max_new_tokens=self.options.new, eos_token_id=None, draft_length=4)
                for ids in prompts(8, 24)
            ]
            acceptance = sum(one.accepted for one in found) / sum(one.accepted + one.rejected for one in found)
            speeds = {length: self.speedup(size, length, acceptance) for length in range(1, LONGEST + 1)}
            self.lengths[size] = max(speeds, key=lambda length, speeds=speeds: speeds[length])

    def run(self) -> None:
        self.choose_lengths()
        for _ in range(self.options.rounds):
            for ids in self.prompts:
                expected = self.alone(ids)
                for size in SIZES:
                    for name, length in ((size, self.lengths[size]), (f"{size} adaptive", None)):
                        run = partial(self.speculate, size, ids, length)
                        found = self.add(name, run, lambda one: one.new_tokens)
                        assert torch.equal(found.sequences, expected)
                        if length is not None:
                            self.results[size].append(found)

    def ratio(self, name: Any, clock: int) -> float:
        """Seconds of the faster baseline over those of a variant, median over rounds and prompts."""
        every = zip(self.seconds["generate"], self.seconds["loop"], self.seconds[name], strict=True)
        return statistics.median(min(a[clock], b[clock]) / own[clock] for a, b, own in every)

    def row(self, size: float) -> dict[str, Any]:
        found, length = self.results[size], self.lengths[size]
        acceptance = sum(one.accepted for one in found) / sum(one.accepted + one.rejected for one in found)
        memory = max((one.memory for one in found), key=lambda one: one.draft_cache)
        return {
            "draft size, of the gated parameters": size,
            "draft length": length,
            "acceptance": acceptance,
            "tokens per verification": statistics.mean(one.tokens_per_verification for one in found),
            "tokens/s": 1 / medians(self.seconds[size])[0],
            "x target alone": self.ratio(size, 0),
            "x target alone, processor": self.ratio(size, 1),
            "x target alone, adaptive length": self.ratio(f"{size} adaptive", 0),
            "x target alone, adaptive length, processor": self.ratio(f"{size} adaptive", 1),
            "draft cost": self.cost(size),
            "verification cost": self.cost("target", length + 1),
            "closed form": expected_speedup(acceptance, length, self.cost(size)),
            "closed form, measured verification": self.speedup(size, length, acceptance),
            **{f"{name} bytes": value for name, value in vars(memory).items()},
            "resize there and back, s": resize_seconds(self.target, self.drafts[size]._ppnet_engine.fixed),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=TRAINED)
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--new", type=int, default=80)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speculate_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    bench.run()
    rows = [bench.row(size) for size in SIZES]
    result = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "parameters": sum(p.numel() for name, p in bench.target.named_parameters() if not name.startswith("puppet.")),
        "setting": setting(bench.target),
        "target alone, tokens/s": {name: 1 / medians(bench.seconds[name])[0] for name in ("generate", "loop")},
        "target alone, tokens per s of the processor": {
            name: 1 / medians(bench.seconds[name])[1] for name in ("generate", "loop")
        },
        "target pass of n tokens, of one": {n: bench.cost("target", n) for n in range(1, LONGEST + 2)},
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}))
    for row in rows:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
