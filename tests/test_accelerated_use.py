"""What users do with an accelerated model: hooks, adapters, copies, files, compilers, torch.func, and taking it off."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers import DECODERS, TOLERANCE, generate, logits, tiny, token_ids
from transformers import AutoModelForCausalLM

from ppnet import accelerate, decelerate, resize, unwrap, wrap
from ppnet.train.checkpointing import load_optimizer, save_optimizer
from ppnet.wrap import is_accelerated


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
    code = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"print(model(torch.tensor({ids.tolist()})).logits.sum().item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert abs(float(ran.stdout.splitlines()[-1]) - expected.sum().item()) <= expected.numel() * TOLERANCE


@pytest.mark.parametrize("shared", [True, False], ids=["config", "copy of config"])
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_model_made_from_the_config_computes_as_with_sdpa(model_type, shared):
    model, ids = tiny(model_type), token_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    state, expected, tokens = model.state_dict(), logits(model, ids), generate(model, ids, attention_mask=mask)
    accelerate(model)
    other = AutoModelForCausalLM.from_config(model.config if shared else copy.deepcopy(model.config)).eval()
    other.load_state_dict(state)
    assert not is_accelerated(other)
    for change in (lambda each: each, accelerate, decelerate):
        change(other)
        assert (logits(other, ids) - expected).abs().max() <= TOLERANCE
        assert torch.equal(generate(other, ids, attention_mask=mask), tokens)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, ids, attention_mask=mask), tokens)


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


def test_decelerate_after_changes():
    model = accelerate(tiny("llama"))
    del model.model.layers[1]
    model.set_attn_implementation("eager")
    decelerate(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in module.__dict__ for module in model.modules())
