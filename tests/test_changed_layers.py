"""A fused decoder layer in which something was changed computes as its class does, and the others go on as before."""

from __future__ import annotations

import pytest
import torch
from decoding import LAYERS, pair, same, step, twice
from torch import nn
from torch.nn.utils import parametrize, prune


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Adapter(nn.Module):
    """As PEFT puts one in the place of a module."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return 1.1 * self.base(*args, **kwargs)


def replaced(name):
    parent, _, child = name.rpartition(".")
    return lambda layer: setattr(layer.get_submodule(parent), child, Adapter(layer.get_submodule(name)))


def forward_replaced(name):
    def change(layer):
        module = layer.get_submodule(name)
        before = module.forward
        module.forward = lambda *args, **kwargs: twice(module, args, before(*args, **kwargs))

    return change


def weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    with torch.no_grad():
        layer.mlp.up_proj.parametrizations.weight.original0.mul_(1.5)


def narrowed(layer):
    layer.input_layernorm.to(torch.bfloat16)


MODULES = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm",
           "mlp.act_fn", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")  # fmt: skip
CHANGES = {
    **{f"hook on {n}": lambda m, n=n: m.get_submodule(n).register_forward_hook(twice) for n in MODULES},
    "hook before the MLP": lambda m: m.mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "hook with keywords": lambda m: m.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"hidden_states": 2 * kwargs["hidden_states"]}), with_kwargs=True
    ),
    **{f"adapter on {n}": replaced(n) for n in MODULES if n != "self_attn"},
    **{f"forward of {n}": forward_replaced(n) for n in MODULES[:6]},
    "another activation": lambda m: setattr(m.mlp, "act_fn", nn.Tanh()),
    "another norm": lambda m: setattr(m, "input_layernorm", nn.LayerNorm(m.mlp.up_proj.in_features)),
    "no norm": lambda m: setattr(m.self_attn, "q_norm", nn.Identity()),
    "another MLP": lambda m: setattr(m, "mlp", nn.Tanh()),
    "parametrized weight": lambda m: parametrize.register_parametrization(m.self_attn.k_proj, "weight", Twice()),
    "parametrized down": lambda m: parametrize.register_parametrization(m.mlp.down_proj, "weight", Twice()),
    "parametrized bias": lambda m: parametrize.register_parametrization(m.self_attn.q_proj, "bias", Twice()),
    "parametrized norm": lambda m: parametrize.register_parametrization(m.input_layernorm, "weight", Twice()),
    "parametrized q_norm": lambda m: parametrize.register_parametrization(m.self_attn.q_norm, "weight", Twice()),
    "weight norm": weight_norm,
    "masked weight": lambda m: prune.l1_unstructured(m.mlp.up_proj, "weight", 0.5),
    "norm of another dtype": narrowed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_computes_as_its_class(change):
    """And the other layer goes on as two operators."""
    results = []
    for model in pair("qwen3", attention_bias=True):
        unchanged = step(model)[0]
        CHANGES[change](model.model.layers[1])
        results.append(step(model))
        assert (results[-1][0] - unchanged).abs().max() > 1e-4
    (own, _), (ours, calls) = results
    assert calls.layers == LAYERS - 1
    assert same(ours, own, 8)


def test_hooks_and_adapters_that_are_taken_off_again():
    plain, model = pair()
    layer = model.model.layers[1]
    handle, leaf = layer.mlp.register_forward_hook(twice), layer.mlp.up_proj
    assert step(model)[1].layers == LAYERS - 1
    handle.remove()
    layer.mlp.up_proj = Adapter(leaf)
    assert step(model)[1].layers == LAYERS - 1
    layer.mlp.up_proj = leaf
    ours, calls = step(model)
    assert calls.layers == LAYERS and same(ours, step(plain)[0])


def test_a_hook_on_the_layer_itself_sees_both_ways():
    plain, model = pair()
    for each in (plain, model):
        each.model.layers[0].register_forward_hook(twice)
    ours, calls = step(model)
    assert calls.layers == LAYERS and same(ours, step(plain)[0])


def test_a_leaf_of_another_dtype_fails_as_in_the_class():
    for model in pair():
        model.model.layers[0].self_attn.q_proj.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            step(model)
