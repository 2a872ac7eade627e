"""The gates' closed forms (DESIGN section 2) and their gradients against scipy splines and float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import WITH_SLOW_TYPES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from ppnet.gates import PuppetConfig
from ppnet.gates.importance import IMPORTANCES
from ppnet.gates.spline import basis, knots
from ppnet.wrap import wrap

T = 0.5


def scipy_basis(u, n, degree):
    """Values of the n clamped B-splines at u, from knots laid out here."""
    t = np.concatenate([np.zeros(degree), np.linspace(0, 1, n - degree + 1), np.ones(degree)])
    return BSpline(t, np.eye(n), degree)(u)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.data())
@settings(max_examples=200, deadline=None)
def test_splines_equal_scipy(degree, extra, u, data):
    n = degree + extra
    at = [u, 0.0, 1.0, data.draw(st.sampled_from(knots(n, degree)))]
    for x in at:
        row = basis(x, n, degree)
        assert np.abs(row.numpy() - scipy_basis(x, n, degree)).max() < 1e-13
        assert row.min() >= 0 and abs(float(row.sum()) - 1) < 1e-14
    assert basis(0.0, n, degree)[0] == 1 and basis(1.0, n, degree)[-1] == 1


@pytest.mark.parametrize("u", [-1e-9, 1.0 + 1e-9, float("nan")])
def test_splines_end_at_0_and_1(u):
    with pytest.raises(ValueError, match=r"u: .* must be in \[0, 1\]"):
        basis(u, 10, 3)


def randomised(model, seed=5, scale=0.3):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    return model


LLAMA = wrap(tiny("llama"))


@given(st.integers(0, 2**31), st.floats(0.01, 30), st.lists(st.floats(0, 1), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_threshold_never_falls_with_lambda(seed, spread, positions):
    puppet = LLAMA.puppet
    with torch.no_grad():
        puppet.theta.copy_(spread * torch.randn(puppet.theta.shape, generator=torch.Generator().manual_seed(seed)))
        taus = torch.stack([puppet.threshold(u) for u in sorted([0.0, *positions, 1.0])])
        # Equal up to float32 rounding of a sum of at most ten control points.
        assert (taus.diff(dim=0) >= -1e-6 * taus.abs().max()).all()
        assert (taus[0] == -1 / T).all()
        puppet.theta.zero_()


class Reference:
    """DESIGN section 2 in float64 from tensor names alone, with its own leaves for gradients."""

    def __init__(self, model, model_type, preset):
        self.values = {
            name: p.detach().double().requires_grad_() for name, p in model.named_parameters() if p.requires_grad
        }
        self.gpt2, self.paper = model_type == "gpt2", preset == "paper"
        config = model.config
        self.layers = config.num_hidden_layers
        self.width = config.hidden_size
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", self.heads)
        self.head = self.width // self.heads if self.gpt2 else config.head_dim
        self.neurons = config.n_inner if self.gpt2 else config.intermediate_size

    def gate(self, name):
        return self.values[f"puppet.{name}"]

    def amplitude(self, kind, u, rows):
        row = torch.tensor(scipy_basis(u, 10, 3))
        if not self.paper:
            row[0] = 0  # pinned: the amplitudes' splines start at 0
        return torch.exp(self.gate(f"s_{kind}") * (self.gate(f"u_{kind}") @ row)[rows])

    def matrices(self, layer):
        """(V (G, Dh * D), O (G, q * Dh * D)), (gate or None, up, down), each (units, features)."""
        d, g = self.width, self.groups
        if self.gpt2:
            at = f"transformer.h.{layer}"
            v = self.values[f"{at}.attn.c_attn.weight"][:, 2 * d :].reshape(d, g, self.head).transpose(0, 1)
            o = self.values[f"{at}.attn.c_proj.weight"].reshape(g, -1)
            return (v.reshape(g, -1), o), (
                None,
                self.values[f"{at}.mlp.c_fc.weight"].t(),
                self.values[f"{at}.mlp.c_proj.weight"],
            )
        at = f"model.layers.{layer}"
        v = self.values[f"{at}.self_attn.v_proj.weight"].reshape(g, -1)
        o = self.values[f"{at}.self_attn.o_proj.weight"].reshape(d, g, -1).transpose(0, 1).reshape(g, -1)
        gate, up, down = (self.values[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (v, o), (gate, up, down.t())

    def importance(self, u):
        inputs = self.amplitude("in", u, torch.arange(self.layers)[:, None])
        parts = []
        for layer in range(self.layers):
            (v, o), (gate, up, down) = self.matrices(layer)
            if self.paper:
                first = up if gate is None else gate
                parts += [o.norm(dim=1), (first * inputs[layer]).norm(dim=1)]
                continue
            neurons = up.norm(dim=1) * down.norm(dim=1) * (1 if gate is None else gate.norm(dim=1))
            for product in (v.norm(dim=1) * o.norm(dim=1), neurons):
                log = product.log()
                z = (log - log.mean()) / log.std(correction=0)
                parts.append(2 * torch.distributions.Normal(0.0, 1.0).cdf(z))
        importance = torch.cat(parts)
        return importance if self.paper else importance.detach()

    def sites(self):
        """Which site each unit belongs to; attention before MLP, layer by layer."""
        counts = torch.tensor([self.groups, self.neurons]).repeat(self.layers)
        return torch.arange(2 * self.layers).repeat_interleave(counts), counts

    def tau(self, u):
        theta = self.gate("theta")
        c = [torch.full((len(theta),), -1 / T, dtype=torch.float64)]
        for k in range(theta.shape[1]):
            c.append(c[-1] + torch.log1p(torch.exp(theta[:, k])))
        return torch.stack(c, dim=1) @ torch.tensor(scipy_basis(u, 10, 3))

    def rho(self, u):
        rows, _ = self.sites()
        return torch.sigmoid((self.amplitude("gate", u, rows) * self.importance(u) - self.tau(u)[rows]) / T)

    def rho_bar(self, u):
        queries = 2 * self.width * self.heads * self.head * 2
        attention = queries + 2 * self.width * self.groups * self.head * 2
        mlp = (4 if self.gpt2 else 6) * self.width * self.neurons
        flops = torch.tensor([attention, mlp], dtype=torch.float64).repeat(self.layers)
        rows, counts = self.sites()
        means = torch.zeros(2 * self.layers, dtype=torch.float64).index_add(0, rows, self.rho(u)) / counts
        return (means * flops).sum() / flops.sum()


def agree(got, want, tolerance):
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max() + 1e-12


@pytest.mark.parametrize("preset", ["paper", "default"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_closed_forms(model_type, preset):
    model = randomised(wrap(tiny(model_type), PuppetConfig(preset=preset)))
    puppet, want = model.puppet, Reference(model, model_type, preset)
    rows, _ = want.sites()
    assert torch.equal(puppet.site_of_unit, rows)
    # float32 against float64: a few rounding errors. scale_free divides logarithms of about 4 (rounded to 2e-7) by
    # their deviation within a site, which is 0.06 for KV groups here.
    rounding = 1e-6 if preset == "paper" else 1e-5
    with torch.no_grad():
        for u in (0.0, 0.1, 2 / 7, 0.5, 0.93, 1.0):
            agree(puppet.threshold(u), want.tau(u), 1e-6)
            agree(puppet.importance(u), want.importance(u), rounding)
            agree(puppet.gate_amplitude(u), want.amplitude("gate", u, rows), 1e-6)
            agree(puppet.out_amplitude(u), want.amplitude("out", u, rows), 1e-6)
            agree(puppet.in_amplitude(u), want.amplitude("in", u, torch.arange(want.layers)[:, None]), 1e-6)
            agree(puppet.inclusion(u), want.rho(u), 2 * rounding)
            agree(puppet.mean_inclusion(puppet.inclusion(u)), want.rho_bar(u), rounding)


@pytest.mark.parametrize("preset", ["paper", "default"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_penalty_and_all_its_gradients(model_type, preset):
    config = PuppetConfig(preset=preset, penalty=0.7, dense_fraction=0.4)
    model = randomised(wrap(tiny(model_type), config))
    puppet, reference = model.puppet, Reference(model, model_type, preset)
    lambdas = []
    for _ in range(6):
        puppet.draw()
        lambdas.append(puppet.last_lambda)
    assert 0.0 in lambdas and sum(value > 0 for value in lambdas) >= 2
    penalty = puppet.penalty()
    penalty.backward()
    want = sum(0.7 * value * reference.rho_bar(value / (1 + value)) for value in lambdas) / len(lambdas)
    want.backward()
    agree(penalty.detach(), want.detach(), 1e-5)
    touched = set()
    for name, parameter in model.named_parameters():
        expected = reference.values[name].grad
        if expected is None or not expected.any():
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        touched.add(name)
        # rho (1 - rho) amplifies the float32 rounding of margins up to about 10.
        agree(parameter.grad, expected, 2e-5)
    gates = {"theta", "s_gate", "u_gate"} | ({"s_in", "u_in"} if preset == "paper" else set())
    assert {name for name in touched if name.startswith("puppet.")} == {f"puppet.{name}" for name in gates}
    assert any("mlp" in name for name in touched) == (preset == "paper")
    puppet.clear()
    assert float(puppet.penalty()) == 0.0


def test_gates_of_a_draw_carry_the_straight_through_gradient():
    model = randomised(wrap(tiny("llama"), PuppetConfig(preset="paper", dense_fraction=0.0)))
    puppet, reference = model.puppet, Reference(model, "llama", "paper")
    draw = puppet.draw()
    rows, _ = reference.sites()
    mask, rho = draw.mask.double(), reference.rho(draw.u)
    want = (mask + rho - rho.detach()) * reference.amplitude("out", draw.u, rows)
    agree(draw.gate.detach(), want.detach(), 1e-6)
    assert (draw.gate.detach()[~draw.mask] == 0).all()
    weights = torch.randn(len(want), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (draw.gate * weights.float()).sum().backward()
    (want * weights).sum().backward()
    for name, parameter in puppet.named_parameters():
        agree(parameter.grad, reference.values[f"puppet.{name}"].grad, 2e-5)


def test_rho_bar_weighs_sites_by_their_flops():
    puppet = wrap(tiny("llama")).puppet
    d, f, heads, groups, head = 32, 44, 8, 4, 8
    attention, mlp = 2 * d * head * (2 * heads + 2 * groups), 6 * d * f
    for index, site in enumerate(puppet.structure.sites):
        only = (puppet.site_of_unit == index).float()
        share = (mlp if site.kind == "neuron" else attention) / (3 * (attention + mlp))
        assert float(puppet.mean_inclusion(only)) == pytest.approx(share, rel=1e-6)
        half = only * (torch.arange(len(only)) % 2)
        assert float(puppet.mean_inclusion(half)) == pytest.approx(share / 2, rel=1e-6)


def scaled_(model, site, role, factors):
    """Multiplies a leaf's slice of every unit of a site by a factor per unit, by the index tables of the site."""
    leaf = site.consumer if role == "out" else site.producer(role)
    weight, index = model.get_submodule(leaf.name).weight, leaf.parts[role]
    per_feature = torch.ones(weight.shape[leaf.weight_dim])
    per_feature[index.flatten()] = factors.repeat_interleave(index.shape[1])
    with torch.no_grad():
        weight.mul_(per_feature if leaf.weight_dim == 1 else per_feature[:, None])


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_scale_free_importance_is_invariant_to_rescaling(model_type):
    model = wrap(tiny(model_type))
    puppet = model.puppet
    before = puppet.importance(0.3)
    source = torch.Generator().manual_seed(0)
    for site in puppet.structure.sites:
        factors = torch.exp(torch.randn(site.units, generator=source))
        scaled_(model, site, "up" if site.kind == "neuron" else "v", factors)
        scaled_(model, site, "out", 1 / factors)
    # float32 logarithms: absolute rounding 1e-6 over the deviation within a site, about 0.1.
    assert torch.allclose(puppet.importance(0.3), before, atol=2e-5)
    for site in puppet.structure.sites:
        scaled_(model, site, "out", torch.full((site.units,), 40.0))
    assert torch.allclose(puppet.importance(0.3), before, atol=2e-5)
    neurons = next(site for site in puppet.structure.sites if site.kind == "neuron")
    scaled_(model, neurons, "up", 1.0 + torch.arange(neurons.units) / 4)
    assert not torch.allclose(puppet.importance(0.3), before, atol=0.1)


def test_equal_and_zero_units_have_finite_importance():
    model = wrap(tiny("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0" in name:
                parameter.fill_(0.1)
        model.model.layers[1].mlp.up_proj.weight[3].zero_()
    importance = model.puppet.importance(0.0).split([site.units for site in model.puppet.structure.sites])
    assert torch.allclose(torch.cat(importance[:2]), torch.ones(48), atol=5e-3)  # rounding 2e-7 over 1e-4
    assert torch.isfinite(torch.cat(importance)).all() and importance[3].argmin() == 3
    assert set(IMPORTANCES) >= {"row_norm", "scale_free"}


def test_shared_hierarchy_closes_equal_layers_alike():
    model = wrap(tiny("llama"), PuppetConfig(hierarchy="shared"))
    puppet = model.puppet
    kinds = sorted({site.kind for site in puppet.structure.sites})
    with torch.no_grad():
        puppet.theta_kind.normal_(generator=torch.Generator().manual_seed(0))
    assert set(puppet._parameters) & {"theta", "theta_kind", "eta", "log_sigma"} == {"theta_kind"}
    assert puppet.theta_kind.shape == (len(kinds), puppet.config.control_points - 1)
    thresholds = puppet.threshold(0.6)
    for number, site in enumerate(puppet.structure.sites):
        control = puppet.control_points()[number]
        expected = torch.nn.functional.softplus(puppet.theta_kind[kinds.index(site.kind)]).cumsum(0) - 2
        torch.testing.assert_close(control, torch.cat([torch.tensor([-2.0]), expected]))
    of_kind = {site.kind: thresholds[number].item() for number, site in enumerate(puppet.structure.sites)}
    assert [of_kind[site.kind] for site in puppet.structure.sites] == thresholds.tolist()
    (gradient,) = torch.autograd.grad(thresholds[::2].sum(), puppet.theta_kind)
    assert (gradient[kinds.index(puppet.structure.sites[0].kind)] > 0).any() and float(puppet.prior()) == 0


def test_pooled_hierarchy():
    model = randomised(wrap(tiny("llama"), PuppetConfig(hierarchy="pooled", pooled_scale=0.4)))
    puppet = model.puppet
    value = {name: p.detach().double().requires_grad_() for name, p in puppet.named_parameters()}
    kind = torch.tensor([0, 1] * 3)
    sigma = value["log_sigma"].exp()
    theta = value["theta_kind"][kind] + sigma[kind, None] * value["eta"]
    reference = Reference(model, "llama", "default")
    reference.values["puppet.theta"] = theta
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    want = (reference.tau(0.37) * weights).sum()
    prior = (value["eta"] ** 2).sum() / 2 + ((sigma / 0.4) ** 2).sum() / 2
    got = (puppet.threshold(0.37) * weights.float()).sum()
    agree(got.detach(), want.detach(), 5e-6)
    agree(puppet.prior().detach(), prior.detach(), 1e-6)
    puppet.set_tokens(1000)
    agree(puppet.penalty().detach(), prior.detach() / 1000, 1e-6)
    (got + puppet.prior()).backward()
    (want + prior).backward()
    for name in ("theta_kind", "eta", "log_sigma"):
        agree(getattr(puppet, name).grad, value[name].grad, 1e-5)
    assert float(wrap(tiny("llama")).puppet.prior()) == 0.0


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_order_key_is_the_last_u_at_which_a_unit_stays(preset):
    # f^gate bends the margin, so that units leave, re-enter, never leave and never stay.
    model = randomised(wrap(tiny("llama"), PuppetConfig(preset=preset)), scale=1.0)
    puppet = model.puppet
    with torch.no_grad():
        puppet.s_in.mul_(0.2)
        puppet.theta.sub_(0.8)
        key = puppet.order_key()
        scan = torch.linspace(0, 1, 2049, dtype=torch.float64)

        def margin_at(u):
            return puppet.gate_amplitude(u) * puppet.importance(u) - puppet.threshold(u)[puppet.site_of_unit]

        margin = torch.stack([margin_at(u).double() for u in scan.tolist()])
    stays = margin > 0
    last = torch.where(stays.any(0), scan[2048 - stays.flip(0).int().argmax(0)], -1.0)
    always, never = stays[-1], ~stays.any(0)
    between = ~always & ~never
    assert between.sum() > 10 and always.sum() > 3
    # The root lies in (last, last + 1/2048]. order_key interpolates on a grid of 1/256, and reads the row norms of the
    # paper's form, which depend on u, from a table: that moves a root by up to 1.6/2048 (measured).
    slack = 0.1 if preset == "default" else 2.0
    cells = (key[between] - last[between]) * 2048
    assert cells.min() > -slack and cells.max() < 1 + slack
    assert torch.allclose(key[always], 1 + margin[-1][always], atol=1e-4)
    assert (key[always] > 1).all() and (key[never] <= 0).all()
