"""ppnet.accelerate: same results in every family, form and mode of use, weights untouched."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import DECODERS, TOLERANCE, generate, logits, tiny, token_ids

import ppnet.extension as extension
from ppnet import accelerate, compact, decelerate, pages, resize, wrap
from ppnet.decode import recognise
from ppnet.errors import UnsupportedModelError
from ppnet.units import leaf_module
from ppnet.wrap import is_accelerated, structure_for


@pytest.fixture
def used(monkeypatch):
    """Counts the calls of the decode operators."""
    calls = {}
    for module, name in (
        ("ppnet.ops", "gated_mlp_decode"),
        ("ppnet.ops", "linear_decode"),
        ("ppnet.ops", "linears_decode"),
        ("ppnet.ops", "rms_norm"),
        ("ppnet.ops", "rotary"),
        ("ppnet.ops", "linear_t_decode"),
        ("ppnet.attention", "gated_attention_decode"),
    ):
        original = getattr(sys.modules[module], name)

        def counted(*args, _name=name, _original=original, **options):
            calls[_name] = calls.get(_name, 0) + 1
            return _original(*args, **options)

        monkeypatch.setattr(sys.modules[module], name, counted)
    return calls


@pytest.mark.parametrize("model_type", DECODERS)
def test_dense_model_decodes_the_same(model_type, used):
    model, ids = tiny(model_type), token_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    expected, tokens = logits(model, ids[:, :3]), generate(model, ids)
    padded = generate(model, ids, attention_mask=mask)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert accelerate(model) is model
    used.clear()  # of the comparison of each MLP with its class's forward
    assert (logits(model, ids[:, :3]) - expected).abs().max() <= TOLERANCE
    assert torch.equal(generate(model, ids), tokens)
    assert torch.equal(generate(model, ids, attention_mask=mask), padded)
    assert torch.equal(generate(model, ids, cache_implementation="static"), tokens)
    everywhere = {"gated_mlp_decode", "linear_decode", "linear_t_decode", "gated_attention_decode"}
    assert set(used) == everywhere | (set() if model_type == "gpt2" else {"linears_decode", "rms_norm", "rotary"})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_size_on_the_same_weights(model_type):
    """A resized model computes through indices: no copies of weights, same logits, tokens and gates as before."""
    ids, model = token_ids(2, 7), wrap(tiny(model_type))
    with torch.no_grad():
        for parameter in model.puppet.parameters():  # amplitudes and thresholds that are not neutral
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    expected = {}
    for size in (1.0, 0.7, 0.5):
        with resize(model, size):
            expected[size] = logits(model, ids), logits(model, ids[:, :2]), generate(model, ids)
    accelerate(model)
    site = structure_for(model).sites[1]
    for size, (long, few, tokens) in expected.items():
        with resize(model, size):
            assert leaf_module(model, site.consumer)._ppnet_binding.weight is None
            assert (logits(model, ids) - long).abs().max() <= TOLERANCE
            assert (logits(model, ids[:, :2]) - few).abs().max() <= TOLERANCE
            assert torch.equal(generate(model, ids), tokens)
            small = compact(model, size)
        assert not hasattr(small, "puppet") and not is_accelerated(small)
        accelerate(small)
        assert (logits(small, ids[:, :2]) - few).abs().max() <= TOLERANCE
        assert torch.equal(generate(small, ids), tokens)


def test_resizing_moves_no_weights():
    model = accelerate(wrap(tiny("llama")))
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for size in (0.8, 0.5):
        resize(model, size)
        logits(model, token_ids(1, 1))
    assert before == {name: value.data_ptr() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = tiny("llama", dtype=dtype), token_ids(2, 4)
    exact, own = logits(copy.deepcopy(model).double(), ids), logits(model, ids)
    ours = logits(accelerate(model), ids)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().mean() <= 2 * (own.double() - exact).abs().mean()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_training_is_as_before(model_type):
    """Gates draw, gradients flow and checkpointing recomputes on an accelerated model as on any other."""
    ids = token_ids(3, 11)
    gradients = []
    for faster in (False, True):
        model = wrap(tiny(model_type)).train()
        if faster:
            accelerate(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_autocast_runs_the_models_own_way(used):
    model, ids = accelerate(tiny("llama")), token_ids(2, 3)
    used.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = logits(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ours - logits(decelerate(model), ids)).abs().max() <= 0.05
    assert not {"linear_decode", "linear_t_decode", "gated_mlp_decode"} & set(used)


def test_activations_are_recognised_by_what_they_do():
    from transformers.activations import ACT2FN

    known = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    known |= {"relu": "relu", "relu2": "relu2"}
    for name, act in known.items():
        assert recognise(ACT2FN[name]) == act
    assert recognise(ACT2FN["tanh"]) is None
    assert recognise(torch.nn.Linear(3, 3)) is None


def test_an_unknown_activation_is_left_alone():
    model, ids = tiny("llama", hidden_act="tanh"), token_ids(1, 2)
    expected = logits(model, ids)
    assert accelerate(model).__dict__["_ppnet_accelerated"]["mlps"] == []
    assert (logits(model, ids) - expected).abs().max() <= TOLERANCE


@pytest.mark.skipif(not pages.available(), reason="no large pages here")
def test_weights_get_large_pages_in_place():
    weights = [torch.randn(3 << 10, 1 << 10), torch.randn(8)]
    before = [(weight.data_ptr(), weight.clone()) for weight in weights]
    pages.use_large_pages(weights)
    for weight, (address, values) in zip(weights, before, strict=True):
        assert weight.data_ptr() == address and torch.equal(weight, values)
    if extension.host().use_large_pages(weights[0].data_ptr(), weights[0].nbytes):
        found = re.search(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())
        assert found is not None and int(found[1]) >= 8 << 10


def test_float64_runs_the_librarys_products():
    model, ids = tiny("qwen3").double(), token_ids(2, 3)
    expected = logits(model, ids)
    assert (logits(accelerate(model), ids) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize(
    "learns", ["bias", ("down_proj.weight", "mlp.c_proj.weight"), ("v_proj.weight", "c_attn.weight")], ids=str
)
def test_parts_of_a_model_learn_from_few_tokens(model_type, learns):
    gradients, ids = [], token_ids(1, 4)
    for faster in (False, True):
        model = tiny(model_type)
        named = [(name, p.requires_grad_(name.endswith(learns))) for name, p in model.named_parameters()]
        if not any(p.requires_grad for _, p in named):
            return  # a family without biases
        if faster:
            accelerate(model)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in named if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_refusals_leave_the_model_alone():
    model = accelerate(tiny("llama"))
    with pytest.raises(UnsupportedModelError, match="already accelerated"):
        accelerate(model)
    with pytest.raises(UnsupportedModelError, match=r"is accelerated; call ppnet\.decelerate"):
        wrap(model)
    decelerate(model)
    with pytest.raises(UnsupportedModelError, match="is not accelerated"):
        decelerate(model)
    with pytest.raises(UnsupportedModelError, match="is not supported"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="got str; it must be a transformers model"):
        accelerate("gpt2")
    part = tiny("llama")
    accelerate(part.model)
    with pytest.raises(UnsupportedModelError, match="its part 'model' is already accelerated"):
        accelerate(part)
    empty = tiny("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight is on the meta device"):
        accelerate(empty)
    assert not any("forward" in module.__dict__ for module in empty.modules())
