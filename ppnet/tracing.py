"""Watching what goes through the first layer of a decoder of which nothing is known (`ppnet.discover`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import UnsupportedModelError
from ppnet.layerwise import Stop
from ppnet.modes import evaluating

TRACING = "ppnet_tracing"
MOST_ROWS = 64


def unknown(why: str) -> UnsupportedModelError:
    """What is raised where a model cannot be looked into, or is not laid out as ppnet knows it."""
    return UnsupportedModelError(
        f"model: cannot find its units: {why}. To support it, describe it in ppnet/families (ppnet.families.layout)."
    )


@dataclass
class Seen:
    """What went through the first layer in one pass. Rows are the batch: ``(B, features)``, heads ``(B, H, Dh)``.

    Attributes:
        attention: the module that called the attention function; heads: role -> what it was given.
        inputs, outputs: of the linear modules, by name, in the order of their calls. normed: what entered RMSNorms.
    """

    attention: Any = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    normed: dict[str, Tensor] = field(default_factory=dict)


class Watch:
    """Runs a model up to the end of its first layer.

    Attributes:
        layer: that layer. linears: its linear modules by name; norms: its RMSNorms.
    """

    def __init__(self, model: Any, layer: nn.Module) -> None:
        from transformers.pytorch_utils import Conv1D

        self.model, self.layer = model, layer
        self.linears = {
            name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)
        }
        self.norms = {name: module for name, module in layer.named_modules() if hasattr(module, "variance_epsilon")}
        self.device = next(layer.parameters()).device

    def run(self, rows: int, change: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Seen:
        """One pass of a token, `rows` times over, with the outputs ``(B, features)`` of some linear modules changed."""
        seen = Seen()
        handles = []

        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            if seen.attention is None:
                seen.attention = module
                seen.heads = {"q": q[:, :, 0], "k": k[:, :, 0], "v": v[:, :, 0]}
            # Of one token alone, attention gives its value.
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous(), None

        def linear(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
                made = output.reshape(rows, -1)
                if change and name in change:
                    made = change[name](made.clone())
                seen.inputs[name], seen.outputs[name] = args[0].reshape(rows, -1), made
                return made.view(output.shape)

            return hook

        def norm(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                seen.normed[name] = args[0].reshape(rows, -1)

            return hook

        def stop(*unused: Any) -> None:
            raise Stop

        try:
            handles = [module.register_forward_hook(linear(name)) for name, module in self.linears.items()]
            handles += [module.register_forward_pre_hook(norm(name)) for name, module in self.norms.items()]
            handles.append(self.layer.register_forward_hook(stop))
            with _attention_function(self.model, attention), evaluating(self.model), suppress(Stop):
                self.model(input_ids=torch.full((rows, 1), 3, device=self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def follow(self, name: str) -> tuple[list[int], Seen]:
        """A pass in which row b has NaN in one output feature of a linear module, and which feature that is."""
        total = self.outputs_of(name)
        count = min(total, MOST_ROWS)
        picked = sorted({row * (total - 1) // max(count - 1, 1) for row in range(count)})

        def change(made: Tensor) -> Tensor:
            made[torch.arange(len(picked)), torch.tensor(picked)] = float("nan")
            return made

        return picked, self.run(len(picked), {name: change})

    def outputs_of(self, name: str) -> int:
        module: Any = self.linears[name]
        return int(module.out_features if isinstance(module, nn.Linear) else module.nf)

    def inputs_of(self, name: str) -> int:
        module: Any = self.linears[name]
        return int(module.in_features if isinstance(module, nn.Linear) else module.nx)


# Under way: what is registered stays registered, and should not keep a model alive.
_functions: list[Callable[..., Any]] = []


@contextmanager
def _attention_function(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """A model whose attentions call a function of ours, through transformers' registry."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    before = model.config._attn_implementation
    AttentionInterface.register(TRACING, lambda *args, **kwargs: _functions[-1](*args, **kwargs))
    AttentionMaskInterface.register(TRACING, eager_mask)
    _functions.append(function)
    try:
        try:
            model.set_attn_implementation(TRACING)
        except ValueError as error:
            raise unknown(f"a {type(model).__name__} does not let its attention function be chosen") from error
        yield
    finally:
        model.set_attn_implementation(before)
        _functions.pop()
