"""Running a model one decoder layer at a time, so that what is held for calibration is one layer's and not the model's.

A first pass over the data records how the model calls each of its layers; the layers are then called again with hidden
states of our choosing. The first batch is compared with what the model itself computed, so a model whose layers hand on
more than hidden states is refused, not miscalculated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import UnsupportedModelError
from ppnet.units import Site


class Stop(Exception):
    """Ends a forward whose rest is not needed."""


@dataclass
class Tap:
    """A forward hook that keeps the last input and output of a linear module, ``(B, T, features)``."""

    stop: bool = False
    input: Any = None
    output: Any = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.input, self.output = args[0], output
        if self.stop:
            raise Stop


@contextmanager
def hooked(*hooks: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks for a while."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def also_called(module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Every call of a module calls another one first, with the same arguments."""

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        other(*args, **kwargs)

    handle = module.register_forward_pre_hook(call, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Call:
    """What a decoder layer was called with, apart from its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's hidden states ``(B, T, D)`` for others than it was called with."""
        result = layer(hidden, *self.args, **self.kwargs)
        return result if isinstance(result, Tensor) else result[0]

    def run_until(self, layer: nn.Module, hidden: Tensor) -> None:
        """Runs a layer for its hooks, one of which may stop it."""
        with suppress(Stop):
            self.run(layer, hidden)


@dataclass
class Trace:
    """One batch on its way through the layers.

    Attributes:
        real: bool ``(B, T)``, the tokens that are not padding.
        calls: how each layer was called.
        dense, small: hidden states ``(B, T, D)`` that enter the present layer, of the dense model and of the small one.
        expected: the hidden states that entered each layer when the model ran by itself (of the first batch only).
    """

    real: Tensor
    calls: list[Call] = field(default_factory=list)
    dense: Any = None
    small: Any = None
    expected: list[Tensor] = field(default_factory=list)

    def check(self, hidden: Tensor, summed: Tensor | None, index: int) -> None:
        """Whether a layer that ran alone gave what the next one got when the model ran by itself.

        Args:
            hidden: what it gave, ``(B, T, D)``.
            summed: what its input and the outputs of its sub-layers come to (`stream`), which must be the same; None:
                not asked.

        Raises:
            UnsupportedModelError: one of them is something else.
        """
        if not _close(hidden, self.expected[index + 1], self.real):
            raise UnsupportedModelError(
                f"model: what decoder layer {index} returns is not what layer {index + 1} gets, so the layers cannot "
                'be run one by one; compact with redistribution="none" and heal the small model instead (ppnet.heal).'
            )
        if summed is not None and not _close(summed, hidden, self.real):
            raise UnsupportedModelError(
                f"model: decoder layer {index} does more than to add its sub-layers' outputs to its input (and to take "
                "the norms that its family names), so it is not known what they fail to give; use sequential=False."
            )


def stream(model: nn.Module, sites: Sequence[Site], start: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """The residual stream behind some sub-layers of one layer, in the dtype of `start`.

    Args:
        sites: the sub-layers, in order.
        start: the stream before them, ``(B, T, D)``.
        outputs: what their consumers gave, ``(B, T, D)`` each.
    """
    for site, output in zip(sites, outputs, strict=True):
        start = start + output.view_as(start).to(start.dtype)  # some layers flatten (B, T) before their MLP
        if site.norm:
            norm = model.get_submodule(site.norm)
            weight = next(norm.parameters(), start)
            start = norm(start.to(weight.dtype)).to(start.dtype)
    return start


def _close(found: Tensor, expected: Tensor, real: Tensor) -> bool:
    found, expected = found[real].float(), expected[real].float()
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def decoder_layer(model: nn.Module, site: Site) -> nn.Module:
    """The decoder layer that a site's sub-layer belongs to."""
    return model.get_submodule(site.block.rpartition(".")[0])


def capture(model: Any, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]) -> list[Trace]:
    """Runs the model over the data and records the calls of its layers; the output head is not computed.

    Held afterwards: the hidden states that enter the first layer, and what the calls share (masks, positions).

    Args:
        model: in evaluation mode.
        layers: its decoder layers, in order.
        batches: ``input_ids`` ``(B, T)`` and, where padded, ``attention_mask``; other entries are not used.
    """
    traces: list[Trace] = []
    device = model.get_input_embeddings().weight.device

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace = traces[-1]
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        if not trace.calls:
            trace.dense = trace.small = hidden
        if len(traces) == 1:
            trace.expected.append(hidden)
        trace.calls.append(Call(args[1:], rest))

    def stop(*unused: Any) -> None:
        raise Stop

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_pre_hook(stop))
    try:
        for batch in batches:
            ids = batch["input_ids"].to(device)
            mask = batch.get("attention_mask")
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device).bool()
            traces.append(Trace(real))
            with suppress(Stop):
                model(input_ids=ids, attention_mask=None if mask is None else mask.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return traces
