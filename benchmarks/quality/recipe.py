"""Models of the elasticity study: their shapes, training recipes and training cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ppnet import demo
from ppnet.cost import cost_model
from ppnet.wrap import engine_of, is_wrapped, structure_for

FRACTIONS = (1.0, 0.6, 0.4, 0.3, 0.2, 0.13, 0.09, 0.057)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its training: tokens per step = batch * length.

    Attributes:
        text: `text.load`.
        pretrained: a model that stands for the dense one, with no models alone beside it: ``"stories260K"``
            (../shared) or ``"stories5m"`` (`subjects.train_stories_model`); None: a model of the shape below.
        retrofit_steps: of the phase that begins at the dense model.
        lr, retrofit_lr: peak learning rates of the weights; warm-up, then a cosine to a tenth.
        gate_lr: peak learning rate of the gates.
        calibration: blocks of training text that scores and redistribution see.
    """

    text: str = "stories"
    width: int = 128
    neurons: int = 512
    layers: int = 4
    heads: int = 8
    length: int = 128
    batch: int = 8
    steps: int = 600
    retrofit_steps: int = 120
    warmup: int = 20
    lr: float = 2e-3
    retrofit_lr: float = 1e-3
    gate_lr: float = 0.05
    calibration: int = 96
    pretrained: str | None = None

    @property
    def fractions(self) -> tuple[float, ...]:
        """Of the gated FLOPs; a KV group and a neuron per layer of the pretrained models are 0.06 and 0.07."""
        return FRACTIONS[:-1] if self.pretrained else FRACTIONS

    def about(self) -> dict[str, Any]:
        """What is kept with the rows: the fields that say something."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


SUBJECTS = {
    "tiny": Recipe(),
    "long": Recipe(steps=3000, retrofit_steps=600, warmup=60),
    "library": Recipe(text="library"),
    "stories260K": Recipe(width=64, neurons=172, layers=5, length=256, retrofit_steps=300, pretrained="stories260K"),
    "stories5M": Recipe(
        width=256, neurons=832, layers=6, length=256, batch=16, steps=1000, retrofit_steps=100, pretrained="stories5m"
    ),
}


def new_model(recipe: Recipe, vocabulary: int, seed: int, heads: int | None = None, neurons: int | None = None) -> Any:
    """A randomly initialised Llama, or one of fewer heads and neurons."""
    torch.manual_seed(seed)
    heads = recipe.heads if heads is None else heads
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=recipe.width, intermediate_size=neurons or recipe.neurons,
        num_hidden_layers=recipe.layers, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=recipe.width // recipe.heads, max_position_embeddings=2 * recipe.length, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def widths(recipe: Recipe, fraction: float) -> tuple[int, int]:
    """Heads and neurons of a dense model with that fraction of the gated FLOPs, both kinds to the same share."""
    head, neuron = 4 * recipe.width // recipe.heads, 3  # matrices of the model's width each
    budget = fraction * (recipe.heads * head + recipe.neurons * neuron)
    # A Llama is as wide as a whole number of heads times anything.
    allowed = [heads for heads in range(1, recipe.heads + 1) if recipe.width % heads == 0]
    heads = min(allowed, key=lambda heads: abs(heads - fraction * recipe.heads))
    return heads, max(1, round((budget - heads * head) / neuron))


class Meter:
    """Training FLOPs of linear layers, counted at every forward: backward costs twice the forward."""

    def __init__(self, model: nn.Module) -> None:
        self.flops, self.model = 0.0, model
        self.costs = cost_model(model, structure_for(model))
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = (args[0] if args else kwargs["input_ids"]).numel()
        flops, extra = self.costs.dense.flops, 0.0
        if is_wrapped(self.model):
            engine = engine_of(self.model)
            kept = [
                site.units if active is None else len(active.computed)
                for site, active in zip(engine.sites, engine.active, strict=True)
            ]
            flops = self.costs.total(kept).flops
            if any(active is not None and active.dropped is not None for active in engine.active):
                config = engine.puppet.config
                share = config.sampled_fraction if config.gate_gradient == "sampled" else 1.0
                extra = share * (self.costs.dense.flops - flops)
        self.flops += tokens * (3 * flops + extra if torch.is_grad_enabled() else flops)


def schedule(steps: int, warmup: int, start: int = 0) -> Callable[[int], float]:
    """Warm-up from `start`, then the rest of one cosine over `steps` steps, to a tenth: the demo's."""
    return demo.schedule(demo.Recipe(steps=steps, warmup=warmup), start)
