"""Training that skips against a reference that computes everything and multiplies by the gates."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import WITH_SLOW_TYPES, GatedReference, tiny, token_ids

import ppnet.skip
from ppnet.evaluate.memory import peak_bytes
from ppnet.gates import PuppetConfig
from ppnet.gates.draw import Draw, draw_masks, generator
from ppnet.size import resize
from ppnet.straight_through import _sample_sequences, _sample_tokens
from ppnet.wrap import engine_of, unwrap, wrap


def randomised(model, seed=5):
    """Moves every gate parameter off its start, so that all amplitude terms and splines take part."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source).to(parameter))
    return model


def gated(model_type, dtype=torch.float64, **config):
    options = {"gate_gradient": "exact", "dense_fraction": 0.0, "lambda_rate": 0.8, "align": 4, **config}
    return randomised(wrap(tiny(model_type, dtype=dtype), PuppetConfig(**options)))


def reference_gradients(model, ids, draw_number):
    """Loss and gradients of the same draw by plain autograd on a dense copy."""
    wrapped = copy.deepcopy(model)
    puppet = wrapped.puppet
    puppet.draws.fill_(draw_number)
    puppet._draw_count = None
    draw = puppet.draw()
    plain = unwrap_keeping_gates(wrapped)
    with GatedReference(plain, puppet.structure, draw.gate, draw.input_scale):
        loss = plain(ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    gradients |= {f"puppet.{name}": p.grad for name, p in puppet.named_parameters()}
    return loss.detach(), gradients, draw


def unwrap_keeping_gates(wrapped):
    puppet = wrapped.puppet
    plain = unwrap(wrapped).train()
    puppet.__dict__["root"] = plain
    return plain


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_gradients_of_every_parameter_equal_autograd(model_type, preset):
    model = gated(model_type, preset=preset).train()
    ids = token_ids()
    expected_loss, expected, draw = reference_gradients(model, ids, 0)
    assert 0.1 < float(draw.mask.double().mean()) < 0.9
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(float(loss.detach() - expected_loss)) < 1e-6
    for name, parameter in model.named_parameters():
        want = expected[name]
        if want is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        # Gates are folded in float32, so agreement is to float32 rounding of the largest entry.
        assert (parameter.grad - want).abs().max() <= 3e-6 * want.abs().max() + 1e-9, name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_and_padding_mask_change_nothing(model_type):
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    grads = []
    for checkpointing in (False, True):
        model = gated(model_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], rtol=1e-9, atol=1e-12), name


def record_dropped(patch):
    """A list that collects the dropped-unit records of a pass (its autograd graph holds them too)."""
    original, recorded = ppnet.skip.straight_through, []

    def recording(y, dropped, args, kwargs):
        recorded.append(dropped)
        return original(y, dropped, args, kwargs)

    patch.setattr(ppnet.skip, "straight_through", recording)
    return recorded


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_sampled_gate_gradient_is_unbiased(model_type, monkeypatch):
    """The mean over many token samples lies within the standard error of the exact gradient, unit by unit."""
    ids = token_ids(batch=3, length=16)
    exact = gated(model_type).train()
    exact(ids, labels=ids).loss.backward()
    want = exact.puppet.s_gate.grad.clone()
    model = gated(model_type, gate_gradient="sampled", sampled_fraction=0.25).train()
    with monkeypatch.context() as patch:
        recorded = record_dropped(patch)
        loss = model(ids, labels=ids).loss
    samples = []
    for seed in range(300):
        for dropped in recorded:
            dropped.draw = f"{seed}/{dropped.index}"
        (gradient,) = torch.autograd.grad(loss, model.puppet.s_gate, retain_graph=True)
        samples.append(gradient)
    stack = torch.stack(samples).double()
    mean, error = stack.mean(0), stack.std(0) / len(samples) ** 0.5
    varies = error > 1e-9
    assert varies.sum() > 10
    z = (mean - want)[varies] / error[varies]
    assert z.abs().max() < 4.5
    assert 0.6 < z.square().mean() < 1.6
    assert torch.allclose(mean[~varies], want.double()[~varies], atol=1e-6)


def test_token_samples_have_the_right_size_and_weight():
    picked, weight = _sample_tokens(100, 0.125, generator(0, 0))
    assert len(picked) == 12 and weight == 100 / 12 and len(picked.unique()) == 12
    assert _sample_tokens(4, 1.0, generator(0, 0)) == (None, 1.0)
    counts = [len(_sample_sequences(4, 0.125, generator(0, i))[0]) for i in range(2000)]
    assert set(counts) == {0, 1} and abs(sum(counts) / len(counts) - 0.5) < 0.05


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_resized_logits_equal_the_masked_dense_model(model_type):
    model = gated(model_type, dtype=torch.float32).eval()
    ids = token_ids()
    puppet = model.puppet
    for size in (1.0, 0.7, 0.4):
        with resize(model, size, of="gated") as resized, torch.no_grad():
            logits = model(ids).logits
        plan = resized.plan
        gates = torch.zeros(puppet.structure.total_units)
        for site, start, (out, _) in zip(
            puppet.structure.sites, puppet.structure.offsets(), puppet.scales(plan.u), strict=False
        ):
            kept = torch.tensor(plan.kept[site.name])
            gates[start + kept] = 1.0 if out is None else out[kept]
        scales = torch.stack([s for _, s in puppet.scales(plan.u) if s is not None]) if plan.u else None
        plain = unwrap_keeping_gates(copy.deepcopy(model)).eval()
        with GatedReference(plain, puppet.structure, gates, scales), torch.no_grad():
            want = plain(ids).logits
        assert (logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_dense_evaluation_is_bit_exact_and_unwrap_restores_everything():
    plain = tiny("llama")
    before = copy.deepcopy(plain.state_dict())
    ids = token_ids()
    with torch.no_grad():
        want = plain(ids).logits
        model = randomised(wrap(plain))
        assert model is plain
        assert torch.equal(model(ids).logits, want)
        with resize(model, 0.5):
            assert not torch.equal(model(ids).logits, want)
        assert torch.equal(model(ids).logits, want)
        unwrap(model)
        assert torch.equal(model(ids).logits, want)
    assert not model._forward_pre_hooks and not hasattr(model, "puppet") and not hasattr(model.config, "ppnet")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stale_weights_are_gathered_again():
    model = wrap(tiny("llama"))
    ids = token_ids()
    resize(model, 0.5)
    with torch.no_grad():
        first = model(ids).logits
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        changed = model(ids).logits
        assert not torch.equal(first, changed)
        other = tiny("llama", seed=3)
        model.load_state_dict({**model.state_dict(), **other.state_dict()})
        wrap(other)
        resize(other, model.__dict__["_ppnet_engine"].fixed)
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "puppet.s_out", "puppet.s_in"])
def test_stale_biases_and_amplitudes_are_gathered_again(name):
    model = randomised(wrap(tiny("llama")))
    ids = token_ids()
    resize(model, 0.5)
    with torch.no_grad():
        first = model(ids).logits
        model.get_parameter(name).add_(0.2)
        changed = model(ids).logits
        assert not torch.equal(first, changed)
        assert torch.equal(copy.deepcopy(model)(ids).logits, changed)


def test_deepcopy_is_independent_and_survives_a_training_pass():
    model = randomised(wrap(tiny("llama"), PuppetConfig(dense_fraction=0.0))).train()
    ids = token_ids()
    model(ids, labels=ids)
    clone = copy.deepcopy(model)
    assert engine_of(clone).model is clone and clone.puppet.root is clone
    assert engine_of(clone) is not engine_of(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    clone(ids)
    assert int(clone.puppet.draws) == 2 and int(model.puppet.draws) == 1
    assert any(p.any() for p in model.parameters())


def test_to_keeps_gates_in_float32_and_state_dict_round_trips():
    model = randomised(wrap(tiny("qwen3")))
    state = model.state_dict()
    other = wrap(tiny("qwen3", seed=9))
    other.load_state_dict(state)
    ids = token_ids()
    with torch.no_grad(), resize(model, 0.6) as a, resize(other, 0.6) as b:
        assert a.plan == b.plan
        assert torch.equal(model(ids).logits, other(ids).logits)
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.puppet.parameters())
    with resize(model, 0.6), torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    model.train()
    model(ids, labels=ids).loss.backward()


def test_masks_are_a_function_of_seed_and_count():
    model = gated("llama").train()
    ids = token_ids()
    losses = []
    for _ in range(3):
        losses.append(float(model(ids, labels=ids).loss.detach()))
    assert len(set(losses)) == 3
    model.load_state_dict({**model.state_dict(), "puppet.draws": torch.tensor(1)})
    assert float(model(ids, labels=ids).loss.detach()) == losses[1]


def test_every_site_keeps_a_unit_when_everything_is_dropped():
    model = wrap(tiny("llama"))
    structure = model.puppet.structure
    rho = torch.full((structure.total_units,), 1e-12)
    rho[5] = 2e-12
    mask = draw_masks(rho, structure, generator(0, 0))
    assert [int(part.sum()) for part in mask.split([s.units for s in structure.sites])] == [1] * len(structure.sites)


def test_autocast_training_step_runs_in_bfloat16():
    model = gated("llama", dtype=torch.float32, gate_gradient="sampled").train()
    ids = token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.puppet.s_gate.grad.abs().sum() > 0


@pytest.mark.parametrize("fixed", [False, True])
def test_torch_compile_gives_the_eager_result(fixed):
    model = gated("llama", dtype=torch.float32).eval()
    ids = token_ids()
    if fixed:
        resize(model, 0.5)
    with torch.no_grad():
        want = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(ids).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_torch_compile_trains_with_fresh_masks():
    ids = token_ids()
    grads = []
    for compiled in (False, True):
        model = gated("llama", dtype=torch.float32).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            model.zero_grad()
            run(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, want in grads[0].items():
        assert torch.allclose(grads[1][name], want, atol=1e-5 * float(want.abs().max()) + 1e-8), name


def test_memory_of_a_step_follows_what_is_kept():
    """At a quarter of the units, the peak above the weights' gradients is below half of a dense step's."""
    ids = token_ids(8, 64)
    peaks, plain = {}, tiny("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=4, head_dim=16)
    gradients = sum(p.numel() * p.element_size() for p in plain.parameters())
    for keep in (None, 0.25):
        model = copy.deepcopy(plain).train()
        if keep is not None:
            wrap(model)
            units = model.puppet.structure.total_units
            mask = torch.zeros(units, dtype=torch.bool)
            for start, stop in itertools.pairwise(model.puppet.structure.offsets()):
                mask[start : start + round(keep * (stop - start))] = True
            gate = mask.float().requires_grad_()
            model.puppet.draw = lambda mask=mask, gate=gate: Draw(0.5, 1, mask, gate * 1.0, None)

        def step(model=model):
            model(ids, labels=ids).loss.backward()

        step()
        model.zero_grad()
        peaks[keep] = peak_bytes(step)
    assert peaks[0.25] - gradients <= 0.5 * (peaks[None] - gradients)
