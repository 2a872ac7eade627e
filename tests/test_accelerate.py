"""ppnet.accelerate: same results in every family, form and mode of use, weights untouched, and off again."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODEL_TYPES, tiny, token_ids
from transformers import AutoModelForCausalLM

import ppnet.extension as extension
from ppnet import accelerate, compact, decelerate, pages, resize, unwrap, wrap
from ppnet.decode import recognise
from ppnet.errors import UnsupportedModelError
from ppnet.train.checkpointing import load_optimizer, save_optimizer
from ppnet.units import leaf_module
from ppnet.wrap import is_accelerated, structure_for

TOLERANCE = 4e-6


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


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


@pytest.mark.parametrize("model_type", MODEL_TYPES)
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


@pytest.mark.parametrize("model_type", MODEL_TYPES)
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


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_compile_and_export(model_type):
    model, ids = accelerate(tiny(model_type)), token_ids(2, 3)
    expected = logits(model, ids)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert (compiled(ids, use_cache=False).logits - expected).abs().max() <= TOLERANCE
        exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        assert (exported.module()(ids, use_cache=False).logits - expected).abs().max() <= TOLERANCE


def test_compiled_resized_model():
    ids, model = token_ids(2, 3), accelerate(wrap(tiny("llama")))
    resize(model, 0.6)
    expected = logits(model, ids)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert (compiled(ids, use_cache=False).logits - expected).abs().max() <= TOLERANCE


def test_saved_model_is_a_plain_one(tmp_path):
    """save_pretrained of an accelerated model; a process that never saw ppnet loads it and computes the same."""
    model, ids = tiny("llama"), token_ids(2, 5)
    expected = generate(model, ids)
    accelerate(model).save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "out = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)\n"
        "assert 'ppnet' not in sys.modules\n"
        "print(out.tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(expected.tolist())
    again = accelerate(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(generate(again, ids), expected)


def test_deep_copies_are_independent():
    model, ids = accelerate(wrap(tiny("llama"))), token_ids(1, 2)
    clone = copy.deepcopy(model)
    resize(clone, 0.5)
    small = logits(clone, ids)
    assert (logits(model, ids) - small).abs().max() > 1e-3
    decelerate(clone)
    assert (logits(clone, ids) - small).abs().max() <= TOLERANCE
    assert is_accelerated(model)


def test_decelerate_and_unwrap():
    ids = token_ids(1, 3)
    plain = tiny("llama")
    expected, forward = logits(plain, ids), type(plain.model.layers[0].mlp).forward
    decelerate(accelerate(plain))
    assert plain.config._attn_implementation == "sdpa"
    assert plain.model.layers[0].mlp.forward.__func__ is forward
    assert not any("_ppnet_binding" in module.__dict__ for module in plain.modules())
    assert (logits(plain, ids) - expected).abs().max() <= TOLERANCE
    gated = accelerate(wrap(plain))
    assert (logits(unwrap(gated), ids) - expected).abs().max() <= TOLERANCE
    assert not is_accelerated(gated)


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


class Adapter(torch.nn.Module):
    """As PEFT puts one in the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.extra = torch.nn.Parameter(torch.full_like(base.weight, 0.05))

    def forward(self, x):
        return self.base(x) + torch.nn.functional.linear(x, self.extra)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_adapters_and_hooks_are_heeded(name):
    ids = token_ids(2, 4)
    block, _, leaf = name.rpartition(".")
    results = []
    for faster in (False, True):
        model = tiny("llama")
        if faster:
            accelerate(model)
        parent = model.model.layers[1].get_submodule(block)
        handle = getattr(parent, leaf).register_forward_hook(lambda module, args, output: 2 * output)
        results.append([logits(model, ids)])
        handle.remove()
        setattr(parent, leaf, Adapter(getattr(parent, leaf)))
        results[-1].append(logits(model, ids))
    for ours, own in zip(*results, strict=True):
        assert (ours - own).abs().max() <= 4 * TOLERANCE
    assert (results[0][0] - results[0][1]).abs().max() > 1e-3


def test_another_attention_is_heeded():
    model, ids = tiny("qwen3"), token_ids(2, 4)
    expected = logits(model, ids)
    accelerate(model).set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    assert (out.logits - expected).abs().max() <= TOLERANCE
    assert out.attentions[0].shape == (2, model.config.num_attention_heads, 4, 4)


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


@pytest.mark.parametrize("model_type", MODEL_TYPES)
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


@pytest.mark.parametrize("form", ["accelerated", "wrapped", "both"])
def test_a_pickled_model_is_the_same(form, tmp_path):
    model, ids = tiny("llama"), token_ids(2, 3)
    model = model if form == "accelerated" else wrap(model)
    model = model if form == "wrapped" else accelerate(model)
    expected = logits(model, ids)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert is_accelerated(again) == is_accelerated(model)
    assert torch.equal(logits(again, ids), expected)
    if form != "accelerated":
        for each in (again, model):
            resize(each, 0.5)
        assert torch.equal(logits(again, ids), logits(model, ids))


def test_replaced_activation_and_dropout_are_heeded():
    ids, results = token_ids(1, 3), []
    for faster in (False, True):
        model = tiny("llama", attention_dropout=0.5)
        if faster:
            accelerate(model)
        model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
        results.append(logits(model, ids))
        model.train()
        assert (logits(model, ids) - logits(model, ids)).abs().max() > 1e-4
    assert (results[0] - results[1]).abs().max() <= TOLERANCE


def test_global_and_backward_hooks_are_called():
    model, ids, called = accelerate(tiny("llama")), token_ids(1, 3), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    logits(model, ids)
    handle.remove()
    leaf = model.model.layers[0].mlp.up_proj
    assert leaf in called
    leaf.register_full_backward_hook(lambda *_: called.append("backward"))
    model(ids, labels=ids).loss.backward()
    assert called[-1] == "backward"


@pytest.mark.parametrize("tokens", [3, 12])
def test_torch_func_runs_the_models_own_way(tokens):
    """Tangents, gradients and batches of torch.func are those of the model as it was."""
    results = []
    for faster in (False, True):
        model = tiny("llama", attn_implementation="eager")
        if faster:
            accelerate(model)
        embedded = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

        def run(x, model=model):
            return model(inputs_embeds=x, use_cache=False).logits

        def loss(parameters, model=model, x=embedded):
            return torch.func.functional_call(model, parameters, (), {"inputs_embeds": x}).logits.square().mean()

        _, tangent = torch.func.jvp(run, (embedded,), (torch.ones_like(embedded),))
        gradients = torch.func.grad(loss)(dict(model.named_parameters()))
        results.append([tangent, *gradients.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_optimizer_state_is_loaded_in_the_weights_memory_order(tmp_path):
    """A resumed update rounds as the uninterrupted one."""
    model, ids, states = accelerate(tiny("llama")), token_ids(2, 12), []
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path)
    again = torch.optim.AdamW(model.parameters())
    load_optimizer(again, model, tmp_path)
    for each in (optimizer, again):
        states.append([each.state[p]["exp_avg"] for p in model.parameters()])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_export_for_any_number_of_tokens():
    model, ids = accelerate(tiny("llama")), token_ids(1, 6)
    length = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}}
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=length | {
            "use_cache": None}, strict=False)  # fmt: skip
    for tokens in (3, 20):
        ids = token_ids(1, tokens)
        out = exported.module()(input_ids=ids, use_cache=False).logits
        assert (out - logits(model, ids)).abs().max() <= TOLERANCE


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


def test_decelerate_after_changes():
    model = accelerate(tiny("llama"))
    del model.model.layers[1]
    model.set_attn_implementation("eager")
    decelerate(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in module.__dict__ for module in model.modules())
