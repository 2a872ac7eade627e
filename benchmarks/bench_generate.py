"""Greedy decoding of a whole model, batch 1, through `model.generate()`: ours, Hugging Face, torch.compile, llama.cpp.

Run: python -m pytest benchmarks/bench_generate.py --benchmark-only, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for huge
pages in llama.cpp too. Every round lets all variants generate, one after the other, and samples the read bandwidth in
between, so that load on the machine hits them alike; ratios are medians of the rounds' ratios. Time is counted between
the first new token and the last: prefill is not in it. llama.cpp (`pip install xllamacpp gguf`) is left out where it is
not installed; it computes with the same weights, which `test_llama_cpp_computes_the_same` holds it to.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import ppnet.extension as extension
from ppnet import accelerate, compact, resize, wrap
from ppnet.roofline.case import DTYPES
from ppnet.roofline.machine import out_of_cache, pages, processor

WIDTH, LAYERS, HEADS, GROUPS, NEURONS, VOCABULARY = 2048, 8, 32, 8, 5632, 32000
PROMPT, NEW, ROUNDS = 96, 17, 7
EAGER = "Hugging Face, eager"


def llama(dtype: torch.dtype, **changed: int) -> LlamaForCausalLM:
    """Random weights. The head is tied to the embedding, so that a token reads every parameter once."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": NEURONS,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            **changed,
        },
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(dtype)


def prompt(model: Any, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(300, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def weight_bytes(model: Any) -> int:
    """Read per token: every parameter; gates and thresholds, which a size has folded into indices, are not."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not name.startswith("puppet."))


class Clock(BaseStreamer):
    """Notes when each token comes out of `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        """Per token, after the first new one; the first call brought the prompt."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


@dataclass(frozen=True)
class Variant:
    """`run` generates once and returns seconds per token; `bytes` of weights are read for each."""

    run: Callable[[], float]
    bytes: int


def greedy(model: Any, **options: Any) -> Callable[[], float]:
    ids = prompt(model)

    def run() -> float:
        clock = Clock()
        model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=clock, **options)
        return clock.seconds()

    return run


def compiled(model: Any, freezing: bool = False) -> Callable[[], float]:
    """What transformers offers: a static cache, and the forward of one token compiled as one graph.

    Args:
        freezing: weights become constants of the graph, which Inductor may store anew for oneDNN.
    """
    how = CompileConfig(fullgraph=True, dynamic=False, mode=None)
    how._compile_all_devices = True
    # The same weights: transformers keeps the compiled forward on the model.
    run = greedy(copy.copy(model), cache_implementation="static", compile_config=how)

    def with_setting() -> float:
        with inductor.patch(freezing=freezing):
            return run()

    return with_setting


def variants(dtype: torch.dtype, folder: Path) -> dict[str, Variant]:
    """Every variant by name, all on the same weights or the units of them that a size keeps."""
    dense = llama(dtype)
    made = {EAGER: Variant(greedy(dense), weight_bytes(dense))}

    def add(name: str, model: Any, read: int, with_compile: bool = True) -> None:
        made[name] = Variant(greedy(model), read)
        if with_compile:
            made[f"{name}, torch.compile"] = Variant(compiled(model), read)

    made["torch.compile"] = Variant(compiled(dense), weight_bytes(dense))
    made["torch.compile, frozen weights"] = Variant(compiled(dense, freezing=True), weight_bytes(dense))
    small = {size: compact(dense, size, scores="magnitude", check=False) for size in (0.5, 0.25)}
    add("ours", accelerate(copy.deepcopy(dense)), weight_bytes(dense))
    for size, model in small.items():
        add(f"ours, size {size}", accelerate(model), weight_bytes(model))
    resized = accelerate(wrap(copy.deepcopy(dense)))
    resize(resized, 0.5)
    add("ours, resized 0.5", resized, weight_bytes(small[0.5]), with_compile=False)
    with_llama_cpp(made, dense, folder)
    return made


def with_llama_cpp(made: dict[str, Variant], dense: Any, folder: Path) -> None:
    """Adds llama.cpp on the same weights, in float16 too: both where its kernels may be better."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError:
        return
    from llama_cpp import TYPES, LlamaCpp, write_gguf

    own = next(dense.parameters()).dtype
    for dtype in [own] if own == torch.float32 else [own, torch.float16]:
        path = folder / "model.gguf"
        write_gguf(dense, path, dtype)
        server = LlamaCpp(path)
        path.unlink()
        made[f"llama.cpp {TYPES[dtype]}"] = Variant(partial(server.seconds, prompt(dense), NEW), weight_bytes(dense))


def test_llama_cpp_computes_the_same(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    from llama_cpp import LlamaCpp, write_gguf

    model = llama(
        torch.float32,
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1)  # logits far enough apart
    write_gguf(model, tmp_path / "model.gguf", torch.float32)
    ids = prompt(model, 12)
    accelerate(model)
    with torch.no_grad():
        likely = torch.log_softmax(model(ids).logits[0, -1], -1)
    tokens = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, 12:].tolist()
    answer = LlamaCpp(tmp_path / "model.gguf").generate(ids, 16, likely=3)["choices"][0]["logprobs"]["content"]
    assert [each["id"] for each in answer] == tokens
    for each in answer[0]["top_logprobs"]:
        assert abs(each["logprob"] - likely[each["id"]].item()) < 0.01


NAMES = [
    EAGER,
    "torch.compile",
    "torch.compile, frozen weights",
    "ours",
    "ours, torch.compile",
    "ours, size 0.5",
    "ours, size 0.5, torch.compile",
    "ours, size 0.25",
    "ours, size 0.25, torch.compile",
    "ours, resized 0.5",
    "llama.cpp F32",
    "llama.cpp BF16",
    "llama.cpp F16",
]


@dataclass(frozen=True)
class Measured:
    """Every round's seconds per token of each variant, and its read bandwidth in bytes/s; why a variant did not run."""

    dtype: str
    variants: dict[str, Variant]
    seconds: dict[str, list[float]]
    bandwidth: list[float]
    failed: dict[str, str]

    def ratio(self, name: str, other: str) -> float:
        """Time of `other` over that of `name`."""
        pairs = zip(self.seconds[other], self.seconds[name], strict=True)
        return round(statistics.median(theirs / own for theirs, own in pairs), 3)


def measure(every: dict[str, Variant], probe: Any) -> tuple[dict[str, list[float]], list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in every}
    bandwidth = []
    for _ in range(ROUNDS):
        for name, each in every.items():
            seconds[name].append(each.run())
        bandwidth.append(probe.read(0.2) * 1e9)
    return seconds, bandwidth


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def measured(request, tmp_path_factory):
    every, failed = variants(request.param, tmp_path_factory.mktemp("gguf")), {}
    for name in list(every):
        try:
            every[name].run()  # compiles
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            del every[name]
    probe = extension.host().MemoryProbe(
        out_of_cache(extension.build_info()["caches"]["l3"]), torch.get_num_threads(), True
    )
    probe.tune(0.1)
    return Measured(DTYPES[request.param], every, *measure(every, probe), failed)


@pytest.mark.parametrize("name", NAMES)
def test_generate(benchmark, measured, name):
    """The columns are from the paired rounds; the row's own time is one more generation, prefill included."""
    if name in measured.failed:
        pytest.fail(measured.failed[name])
    if name not in measured.seconds:
        pytest.skip(f"{name}: not of this dtype, or not installed")
    variant, seconds = measured.variants[name], measured.seconds[name]
    benchmark.pedantic(variant.run, rounds=1)
    read = [variant.bytes / time for time in seconds]
    share = statistics.median(mine / most for mine, most in zip(read, measured.bandwidth, strict=True))
    benchmark.extra_info |= {
        "variant": name,
        "dtype": measured.dtype,
        "tokens/s": round(1 / statistics.median(seconds), 2),
        "x eager": measured.ratio(name, EAGER),
        "MB of weights per token": round(variant.bytes / 1e6, 1),
        "GB/s": round(statistics.median(read) / 1e9, 2),
        "% of read bandwidth": round(100 * share),
        "read bandwidth GB/s": round(statistics.median(measured.bandwidth) / 1e9, 2),
        "ms per token": [round(1e3 * time, 2) for time in seconds],
        "processor": processor(),
        "isa": extension.isa(),
        "pages": pages(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for rival in ("torch.compile", "llama.cpp F32", "llama.cpp BF16", "llama.cpp F16"):
        if name.startswith("ours") and rival in measured.seconds:
            benchmark.extra_info[f"x {rival}"] = measured.ratio(name, rival)
    if "0." in name:
        whole = "ours, torch.compile" if name.endswith("torch.compile") else "ours"
        bytes_ratio = variant.bytes / measured.variants[whole].bytes
        benchmark.extra_info |= {
            "time, of whole": round(1 / measured.ratio(name, whole), 3),
            "bytes, of whole": round(bytes_ratio, 3),
            "time over bytes": round(1 / measured.ratio(name, whole) / bytes_ratio, 3),
        }
