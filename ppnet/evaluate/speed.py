"""Measured speed: prefill and greedy decoding with a key-value cache through the model's own forward.

Nothing is derived from FLOPs. One round is one prefill of ``(B, prompt_tokens)`` ids and `new_tokens` decode steps of
``(B, 1)``. With a baseline the two models take turns in every round, so that a machine that slows down slows both.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import PPNetError
from ppnet.evaluate.model_state import context_of, device_of, vocabulary_of
from ppnet.evaluate.progress import Progress
from ppnet.families import check_decoder
from ppnet.modes import evaluating

LEAST_SECONDS = 0.05  # a shorter prefill is repeated within its round, so that a scheduler's slice does not decide


@dataclass(frozen=True)
class Timing:
    """Seconds of one phase: every round, their median and the 20th and 80th percentile."""

    seconds: tuple[float, ...]
    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        values = torch.tensor(sorted(seconds), dtype=torch.float64)
        low, middle, high = (float(torch.quantile(values, q)) for q in (0.2, 0.5, 0.8))
        return cls(tuple(seconds), middle, low, high)


@dataclass(frozen=True)
class Speed:
    """What was measured on one model.

    Attributes:
        prefill_tokens_per_s, decode_tokens_per_s: tokens of the whole batch per second, from the median round.
        prefill, decode: seconds of a phase (`Timing`).
        params: parameters, tied ones once, gate parameters not counted.
        weight_bytes: bytes of these parameters as stored.
        kv_bytes_per_token: bytes that one token adds to the key-value cache, read off the cache.
        prompt_tokens, new_tokens, batch_size, rounds: the workload.
        setting: processor, threads, load of the machine before, dtype, device, versions (`setting`).
        prefill_ratio, decode_ratio: how many times faster than the baseline, median of the rounds' ratios; None
            without a baseline.
        baseline: the baseline's own figures.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill: Timing
    decode: Timing
    params: int
    weight_bytes: int
    kv_bytes_per_token: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int
    setting: dict[str, Any]
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    baseline: Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def against(ratio: float | None) -> str:
            return "" if ratio is None else f" ({ratio:.2f}x the baseline)"

        return (
            f"prefill {self.prefill_tokens_per_s:,.0f} tokens/s{against(self.prefill_ratio)}, "
            f"decode {self.decode_tokens_per_s:,.1f} tokens/s{against(self.decode_ratio)}, {self.params:,} parameters, "
            f"{self.weight_bytes:,} bytes of weights, {self.kv_bytes_per_token:,.0f} cache bytes per token"
        )


@dataclass
class _Runs:
    """Rounds of one model so far."""

    model: nn.Module
    prompt: Tensor
    prefill: list[float]
    decode: list[float]
    cache_bytes: int = 0


def speed(
    model: nn.Module,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_size: int = 1,
    rounds: int = 5,
    warmup: int = 1,
    baseline: nn.Module | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Speed:
    """Times prefill and greedy decoding; medians over `rounds` after `warmup` rounds that are thrown away.

    Args:
        model: causal language model that takes ``input_ids`` int64 ``(B, T)`` and ``past_key_values``.
        prompt_tokens: T of the prefill. new_tokens: decode steps. batch_size: B.
        baseline: a second model, measured in turns with the first; its figures and the ratios are reported too.
        seed: of the random prompt.
        progress: write progress to stderr when it takes longer than two seconds.

    Returns:
        Speed

    Raises:
        PPNetError: a count below 1, or a prompt plus new tokens beyond the model's context.
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("new_tokens", new_tokens),
        ("batch_size", batch_size),
        ("rounds", rounds),
    ):
        if value < 1:
            raise PPNetError(f"{name}: must be at least 1, got {value}.")
    if warmup < 0:
        raise PPNetError(f"warmup: must be at least 0, got {warmup}.")
    generator = torch.Generator().manual_seed(seed)
    models = [model] if baseline is None else [model, baseline]
    runs = []
    for each in models:
        check_decoder(each, "decoding steps to time")
        context = context_of(each)
        if context is not None and prompt_tokens + new_tokens > context:
            raise PPNetError(
                f"prompt_tokens: {prompt_tokens} plus new_tokens {new_tokens} exceed the model's context of {context}."
            )
        prompt = torch.randint(vocabulary_of(each), (batch_size, prompt_tokens), generator=generator)
        runs.append(_Runs(each, prompt.to(device_of(each)), [], []))
    with Progress((rounds + warmup) * len(runs), "speed, rounds") as report:
        for index in range(warmup + rounds):
            for run in runs if index % 2 else reversed(runs):
                prefill, decode, run.cache_bytes = _round(run.model, run.prompt, new_tokens)
                if index >= warmup:
                    run.prefill.append(prefill)
                    run.decode.append(decode)
                if progress:
                    report.advance()
    results = [_result(run, prompt_tokens, new_tokens, batch_size, rounds) for run in runs]
    if baseline is None:
        return results[0]
    ours, theirs = runs
    return Speed(
        **{
            **vars(results[0]),
            "prefill_ratio": statistics.median(b / a for a, b in zip(ours.prefill, theirs.prefill, strict=True)),
            "decode_ratio": statistics.median(b / a for a, b in zip(ours.decode, theirs.decode, strict=True)),
            "baseline": results[1],
        }
    )


def fitting_workload(model: nn.Module) -> dict[str, int]:
    """128 prompt tokens and 64 new ones, or half and a quarter of a context that is shorter than that."""
    context = context_of(model) or 2048
    return {"prompt_tokens": max(1, min(128, context // 2)), "new_tokens": max(1, min(64, context // 4)), "rounds": 5}


def _round(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of one prefill, seconds of all decode steps, and bytes of the cache after the prefill."""
    with evaluating(model):
        started, elapsed, repeats = _now(prompt.device), 0.0, 0
        while elapsed < LEAST_SECONDS:
            output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(dim=-1)
            repeats += 1
            elapsed = _now(prompt.device) - started
        cache = output.past_key_values
        cache_bytes = _cache_bytes(cache)
        resumed = _now(prompt.device)
        for _ in range(new_tokens):
            output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(dim=-1)
        ended = _now(prompt.device)
    return elapsed / repeats, ended - resumed, cache_bytes


def _now(device: torch.device) -> float:
    """A clock that waits for the work queued on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _result(run: _Runs, prompt_tokens: int, new_tokens: int, batch_size: int, rounds: int) -> Speed:
    own = [p for name, p in run.model.named_parameters() if not name.startswith("puppet.")]
    prefill, decode = Timing.of(run.prefill), Timing.of(run.decode)
    return Speed(
        prefill_tokens_per_s=batch_size * prompt_tokens / prefill.median,
        decode_tokens_per_s=batch_size * new_tokens / decode.median,
        prefill=prefill,
        decode=decode,
        params=sum(p.numel() for p in own),
        weight_bytes=sum(p.numel() * p.element_size() for p in own),
        kv_bytes_per_token=run.cache_bytes / (batch_size * prompt_tokens),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        rounds=rounds,
        setting=setting(run.model),
    )


def setting(model: Any) -> dict[str, Any]:
    """What a speed depends on besides the model: processor, threads, load of the last minute, dtype, device."""
    import transformers

    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "processor": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The CPU's model name where Linux tells it, else what the platform module knows."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
