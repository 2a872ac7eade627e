"""Tiny random models of every family, what they compute, and a reference of a gated pass: dense, times gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from ppnet.families import FAMILIES
from ppnet.units import Structure

EVERY_TYPE = sorted(FAMILIES)
# Between them they have every way in which ppnet itself treats units; `test_families.py` is for all types.
MODEL_TYPES = ["bert", "gpt2", "llama", "mistral", "qwen2", "qwen3"]
DECODERS = MODEL_TYPES[1:]
# For tests that hold for any family, whatever its modules are called and whatever its norms compute in.
WITH_SLOW_TYPES = [
    *MODEL_TYPES,
    *(pytest.param(other, marks=pytest.mark.slow) for other in EVERY_TYPE if other not in MODEL_TYPES),
]
TOLERANCE = 4e-6
"""Of the logits of tiny models in float32 that were added up in another order."""


def auto_class(model_type: str) -> Any:
    """The Auto class of a family's language models."""
    return AutoModelForCausalLM if FAMILIES[model_type].decoder else AutoModelForMaskedLM


def tiny(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A tiny random model in evaluation mode, with non-zero biases and norms so that mistakes in them show."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_configs(model_type), **changes})
    return randomised(auto_class(model_type).from_config(config)).to(dtype).eval()


def randomised(model: nn.Module) -> nn.Module:
    """The same model with random weights, non-zero biases and norms that are not 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                # Larger than the usual 0.02, so that every unit matters to the logits.
                parameter.normal_(std=0.15)
    return model


def token_ids(batch: int = 3, length: int = 17, seed: int = 1, vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Ten greedy tokens."""
    return model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)


class GatedReference:
    """Hooks on a plain model: each consumer's input times its units' gates, each MLP's input times f^in.

    Nothing is skipped, so plain autograd gives every gradient. `gates` is the flat (U,) vector.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, gates: Tensor, input_scale: Tensor | None = None
    ) -> None:
        self.handles = []
        row = 0
        for site, z in zip(structure.sites, gates.split([s.units for s in structure.sites]), strict=True):
            columns = torch.zeros(site.consumer.index.numel(), dtype=torch.int64)
            columns[site.consumer.index.flatten()] = torch.arange(site.units).repeat_interleave(
                site.consumer.features_per_unit
            )
            consumer = model.get_submodule(site.consumer.name)
            self.handles.append(consumer.register_forward_pre_hook(self._times(z[columns])))
            for norm in site.across:
                here = torch.zeros(norm.index.numel(), dtype=torch.bool)
                here[norm.index] = (z.detach() != 0)[:, None].expand(norm.index.shape)
                self.handles.append(model.get_submodule(norm.name).register_forward_hook(self._over(here)))
            if site.kind == "neuron":
                if input_scale is not None:
                    block = model.get_submodule(site.block)
                    self.handles.append(block.register_forward_pre_hook(self._times(input_scale[row])))
                row += 1

    @staticmethod
    def _times(factor: Tensor) -> Any:
        return lambda module, args: (args[0] * factor.to(args[0].dtype), *args[1:])

    @staticmethod
    def _over(here: Tensor) -> Any:
        """A norm over all units whose mean square is of those that are here; the others are divided by it, too."""

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].float()
            mean_square = (x * here).square().mean(-1, keepdim=True)
            return (module.weight * (x * torch.rsqrt(mean_square + module.variance_epsilon))).to(output.dtype)

        return hook

    def __enter__(self) -> GatedReference:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
