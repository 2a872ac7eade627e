"""Every scorer on every family: identities of gate gradients in float64, invariances, equivariance, what counts."""

from __future__ import annotations

import pytest
import torch
from helpers import DECODERS, MODEL_TYPES, GatedReference, tiny, token_ids
from scoring import DATA_METHODS, IDS, METHODS, REWARDED, autograd_gates, likelihoods, options_of, permute

import ppnet
from ppnet.errors import PPNetError
from ppnet.families import structure_of
from ppnet.scores import score, score_methods
from ppnet.scores.collect import Collector, as_dense
from ppnet.scores.registry import SCORERS
from ppnet.units import leaf_module

TOKENS = IDS[:, 1:].numel()


def double(model_type, **changes):
    return tiny(model_type, dtype=torch.float64, **changes)


def parameter_gradients(model, ids):
    model.zero_grad()
    (-likelihoods(model, ids).sum()).backward()


def inner(module, leaf, features):
    """<w, dL/dw> of the given features and their bias entries."""
    products = (module.weight.detach() * module.weight.grad).sum(1 - leaf.weight_dim)[features]
    if leaf.role != "out" and module.bias is not None:
        products = products + (module.bias.detach() * module.bias.grad)[features]
    return products.sum(1)


@pytest.mark.parametrize("model_type", DECODERS)
def test_gate_gradients_are_inner_products_of_weights_and_their_gradients(model_type):
    model = double(model_type)
    signed = score(model, IDS, "movement")
    parameter_gradients(model, IDS)
    for site in structure_of(model).sites:
        expected = -signed[site.name] * TOKENS
        scale = expected.abs().max()
        out = site.consumer
        assert (inner(leaf_module(model, out), out, out.index) - expected).abs().max() <= 1e-11 * scale
        linear = {"up": None, "v": None, "qkv": 2}  # what the unit's output is linear in
        for leaf in site.producers:
            if leaf.role not in linear or (leaf.role == "up" and len(site.producers) == 1):
                continue
            block = linear[leaf.role]
            index = leaf.index if block is None else leaf.index.split(list(leaf.blocks), dim=1)[block]
            found = inner(leaf_module(model, leaf), leaf, index)
            assert (found - expected).abs().max() <= 1e-11 * scale, (site.name, leaf.role)
            if leaf_module(model, leaf).bias is not None:
                weights_alone = (leaf_module(model, leaf).weight * leaf_module(model, leaf).weight.grad).sum(
                    1 - leaf.weight_dim
                )[index].sum(1)  # fmt: skip
                assert (weights_alone - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("model_type", DECODERS)
def test_scores_of_gradients_against_plain_autograd(model_type):
    model = double(model_type)
    gates = autograd_gates(model, IDS)
    made = score_methods(
        model,
        REWARDED,
        {
            "taylor": ("taylor", {}),
            "squared": ("taylor", {"sign": "squared"}),
            "batch": ("taylor", {"sign": "batch"}),
            "signed": ("taylor", {"sign": "signed"}),
            "movement": ("movement", {}),
            "reward": ("reward", {}),
            "reward signed": ("reward", {"form": "signed"}),
            "split": ("reward", {"form": "split", "kappa": 0.25}),
        },
        batch_size=3,
    )
    rewards = torch.tensor(REWARDED["rewards"], dtype=torch.float64).view(2, 2)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    for name, s in gates.items():
        weighted = advantages[:, None] * -s / (IDS.shape[1] - 1)
        groups = weighted.view(2, 2, -1).sum(1)
        better, worse = weighted.abs()[advantages > 0].sum(0), weighted.abs()[advantages < 0].sum(0)
        expected = {
            "taylor": s.abs().sum(0) / TOKENS,
            "squared": s.square().sum(0) / TOKENS,
            "batch": s.sum(0).abs() / TOKENS,
            "signed": -s.sum(0) / TOKENS,
            "movement": -s.sum(0) / TOKENS,
            "reward": groups.abs().sum(0) / 2,
            "reward signed": groups.sum(0) / 2,
            "split": (better - 0.25 * worse) / 2,
        }
        for method, units in expected.items():
            torch.testing.assert_close(made[method][name], units, rtol=1e-9, atol=1e-12, msg=f"{method} of {name}")


def test_per_token_terms_add_up():
    model = double("llama")
    collector = Collector(model, structure_of(model), frozenset({"gradients"}))
    with as_dense(model):
        collector.run([{"input_ids": IDS, "labels": IDS}], progress=False)
    gates = autograd_gates(model, IDS)
    for site in collector.sites:
        assert (site.gradients.by_token >= site.gradients.absolute - 1e-12).all()
        assert (site.gradients.absolute >= site.gradients.signed.abs() - 1e-12).all()
        torch.testing.assert_close(site.gradients.signed, gates[site.site.name].sum(0), rtol=1e-9, atol=1e-12)
        assert site.gradients.sequences == 4 and site.tokens == TOKENS


def test_kl_is_the_fisher_information_of_the_gates():
    model = double("qwen2", num_hidden_layers=1, vocab_size=24)
    structure = structure_of(model)
    ids = token_ids(1, 4, vocabulary=24)
    gates = torch.ones(structure.total_units, dtype=torch.float64, requires_grad=True)
    exact = torch.zeros_like(gates)
    with GatedReference(model, structure, gates):
        log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
    for position in range(3):
        for y in range(24):
            (row,) = torch.autograd.grad(log_p[position, y], gates, retain_graph=True)
            exact += 0.5 * log_p[position, y].exp().detach() * row.square() / 3
    made = score(model, ids.repeat(4000, 1), "kl", batch_size=1000, max_tokens=None)
    found = torch.cat([made[site.name] for site in structure.sites])
    # 12,000 draws: the mean of squares is within 5 standard errors, each at most sqrt(kurtosis / draws).
    assert ((found - exact).abs() <= 0.12 * exact + 1e-9).all()
    # to second order it is the divergence itself
    eps = 1e-3
    with torch.no_grad():
        for unit in (0, 3, 20):
            changed = torch.ones_like(gates)
            changed[unit] = 1 - eps
            with GatedReference(model, structure, changed):
                other = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
            divergence = (log_p.exp() * (log_p - other)).sum(-1).mean()
            assert divergence / eps**2 == pytest.approx(float(exact[unit]), rel=0.02)


@pytest.mark.parametrize("model_type", DECODERS)
def test_permuting_units_permutes_scores(model_type):
    model = double(model_type)
    methods = {method: (method, options_of(method)) for method in METHODS}
    methods["paths"] = ("magnitude", {"form": "paths"})
    before = score_methods(model, REWARDED, methods)
    orders = {}
    for site in structure_of(model).sites:
        orders[site.name] = torch.randperm(site.units, generator=torch.Generator().manual_seed(site.units))
        permute(model, site, orders[site.name])
    after = score_methods(model, REWARDED, methods)
    for method in methods:
        for name, order in orders.items():
            torch.testing.assert_close(after[method][name], before[method][name][order], rtol=1e-9, atol=1e-13)
            assert len(before[method][name].unique()) > 1


def scaled(model):
    """Input sides times c, output sides over c, another c for every unit; activations between them must be linear."""
    with torch.no_grad():
        for site in structure_of(model).sites:
            c = torch.linspace(0.3, 4.0, site.units, dtype=torch.float64)
            for leaf in site.leaves:
                module = leaf_module(model, leaf)
                if leaf.role not in ("up", "v", "qkv", "out"):
                    continue
                index = leaf.index if leaf.role != "qkv" else leaf.index.split(list(leaf.blocks), dim=1)[2]
                factor = torch.ones(module.weight.shape[leaf.weight_dim], dtype=torch.float64)
                factor[index] = (1 / c if leaf.role == "out" else c)[:, None]
                module.weight.mul_(factor[:, None] if leaf.weight_dim == 0 else factor)
                if leaf.role != "out" and module.bias is not None:
                    module.bias.mul_(factor)
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rescaling_inputs_against_outputs_changes_nothing(model_type):
    only = {"weights": {"activation": 0, "obs": 0, "magnitude": 1.0, "bias": 0, "sft": 0, "kl": 0}}
    methods = {"norms": ("magnitude", {}), "paths": ("magnitude", {"form": "paths"}), "mama": ("mama", only)}
    # Neurons without a gate are not linear in their input weights: scaled, they compute something else.
    if structure_of(tiny(model_type)).sites[1].leaf("gate"):
        methods |= {method: (method, options_of(method)) for method in DATA_METHODS}
    before = score_methods(double(model_type), REWARDED, methods)
    after = score_methods(scaled(double(model_type)), REWARDED, methods)
    for method in methods:
        for name, units in before[method].items():
            torch.testing.assert_close(after[method][name], units, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("model_type", DECODERS)
def test_norms_are_folded_into_paths(model_type):
    model = double(model_type)
    before = score(model, method="magnitude", form="paths")
    plain = score(model, method="magnitude")
    with torch.no_grad():
        layers = model.transformer.h if model_type == "gpt2" else model.model.layers
        for layer, module in enumerate(layers):
            norms = (module.ln_1, module.ln_2) if model_type == "gpt2" else (
                module.input_layernorm, module.post_attention_layernorm)  # fmt: skip
            for site in structure_of(model).sites:
                if site.layer != layer:
                    continue
                norm = norms[site.kind == "neuron"]
                for leaf in site.producers:
                    linear = leaf_module(model, leaf)
                    out_in = linear.weight if leaf.weight_dim == 0 else linear.weight.t()
                    if getattr(norm, "bias", None) is not None:
                        linear.bias.add_(out_in @ norm.bias)
                    out_in.mul_(norm.weight)
        for module in layers:
            norms = (module.ln_1, module.ln_2) if model_type == "gpt2" else (
                module.input_layernorm, module.post_attention_layernorm)  # fmt: skip
            for norm in norms:
                norm.weight.fill_(1.0)
                if getattr(norm, "bias", None) is not None:
                    norm.bias.zero_()
    after, changed = score(model, method="magnitude", form="paths"), score(model, method="magnitude")
    for name, units in before.items():
        torch.testing.assert_close(after[name], units, rtol=1e-6, atol=0)
        assert not torch.allclose(changed[name], plain[name], rtol=1e-3)


@pytest.mark.parametrize(("model_type", "role"), [("llama", "up"), ("llama", "v"), ("gpt2", "up"), ("gpt2", "qkv")])
def test_biases_count(model_type, role):
    model = double(model_type)
    site = next(s for s in structure_of(model).sites if s.leaf(role))
    leaf = site.leaf(role)
    before = [score(model, method="magnitude", form=form)[site.name] for form in ("norms", "paths")]
    with torch.no_grad():
        leaf_module(model, leaf).bias[leaf.index[2]] += 3.0
    after = [score(model, method="magnitude", form=form)[site.name] for form in ("norms", "paths")]
    for one, other in zip(before, after, strict=True):
        assert other[2] > 1.1 * one[2]
        assert torch.equal(other[:2], one[:2]) and torch.equal(other[3:], one[3:])


def test_magnitude_without_biases_is_the_one_that_plans_use():
    model = double("qwen3")
    made = score(model, method="magnitude")
    for size in (0.5, 0.8):
        assert ppnet.plan(model, size, scores=made).kept == ppnet.plan(model, size, scores="magnitude").kept


def test_activation_and_bias_by_hand():
    model = double("gpt2")
    made = score_methods(
        model, IDS, {m: (m, {}) for m in ("activation", "bias")} | {"centred": ("activation", {"centred": True})}
    )
    for site in structure_of(model).sites:
        seen = []
        consumer = model.get_submodule(site.consumer.name)
        handle = consumer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(IDS)
        handle.remove()
        rows, weight = seen[0].flatten(0, 1), consumer.weight.detach()  # Conv1D: (in, out)
        for unit in range(site.units):
            features = site.consumer.index[unit]
            a, w = rows[:, features], weight[features]
            power = (w.norm(dim=1) ** 2 * a.square().mean(0)).sum().sqrt()
            spread = (w.norm(dim=1) ** 2 * a.var(0, unbiased=False)).sum().sqrt()
            assert made["activation"][site.name][unit] == pytest.approx(float(power), rel=1e-9)
            assert made["centred"][site.name][unit] == pytest.approx(float(spread), rel=1e-6)
            assert made["bias"][site.name][unit] == pytest.approx(float((a.mean(0) @ w).norm()), rel=1e-9)


def entering(model, site, ids):
    """The features that enter a consumer, (N, F), and the gradients of the NLL there."""
    seen = []
    consumer = model.get_submodule(site.consumer.name)
    handle = consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.requires_grad_(True)
    loss = -likelihoods(model, ids).sum()
    handle.remove()
    (dx,) = torch.autograd.grad(loss, seen[0])
    return seen[0].detach().flatten(0, 1), dx.flatten(0, 1)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_obs_is_what_least_squares_of_the_other_units_leaves(model_type):
    model, ids = double(model_type), token_ids(batch=32, length=16)
    # A unit that another one says, and one that is never there.
    structure = structure_of(model)
    neurons = next(site for site in structure.sites if site.kind == "neuron")
    with torch.no_grad():
        for leaf in neurons.producers:
            module = leaf_module(model, leaf)
            rows = module.weight if leaf.weight_dim == 0 else module.weight.T
            rows[1] = rows[0]
            rows[2] = 0
            if module.bias is not None:
                module.bias[1], module.bias[2] = module.bias[0], 0
    made = score(model, ids, "obs", weighting="output", ridge=1e-9, max_tokens=None)
    assert made[neurons.name][:3].max() < 1e-6 * made[neurons.name][3:].min()
    for site in structure.sites:
        consumer = leaf_module(model, site.consumer)
        a, _ = entering(model, site, ids)
        a = a - a.mean(0) if consumer.bias is not None else a
        weight = consumer.weight.detach()
        weight = weight.T if site.consumer.weight_dim == 1 else weight  # (in, out)
        for unit in range(3 if site is neurons else 0, site.units):
            own = site.consumer.index[unit]
            rest = torch.ones(a.shape[1], dtype=torch.bool)
            rest[own] = False
            left = a[:, own] - a[:, rest] @ torch.linalg.pinv(a[:, rest]) @ a[:, own]
            exact = 0.5 * (left @ weight[own]).square().sum() / len(a)
            assert made[site.name][unit] == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_obs_weighted_by_the_gradients_of_a_given_loss(model_type):
    model, ids = double(model_type), token_ids(batch=32, length=16)
    made = score(model, ids, "obs", ridge=0.5, loss=lambda output, batch: -_sequence(output, batch), max_tokens=None)
    for site in structure_of(model).sites:
        a, dx = entering(model, site, ids)
        a = a - a.mean(0) if leaf_module(model, site.consumer).bias is not None else a
        gram = a.T @ a / len(a)
        inverse = torch.linalg.inv(gram + 0.5 * gram.diagonal().diag())
        for unit in range(site.units):
            own = site.consumer.index[unit]
            block = torch.linalg.inv(inverse[own][:, own])
            exact = 0.5 * (dx[:, own] @ block * dx[:, own]).sum() / len(ids)  # a given loss counts by sequence
            assert made[site.name][unit] == pytest.approx(float(exact), rel=1e-8)


def _sequence(output, batch):
    log_p = torch.log_softmax(output.logits[:, :-1], dim=-1)
    return log_p.gather(2, batch["input_ids"][:, 1:, None]).sum((1, 2))


def test_obs_with_drawn_labels_needs_no_labels_of_its_own():
    """In expectation over the draws it is that of all labels, each with its probability."""
    model = double("qwen2", num_hidden_layers=1, vocab_size=24)
    structure, ids = structure_of(model), token_ids(1, 4, vocabulary=24)
    made = score(model, ids.repeat(4000, 1), "obs", batch_size=1000, max_tokens=None, ridge=0.1)
    for site in structure.sites:
        seen = []
        handle = model.get_submodule(site.consumer.name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
        handle.remove()
        index = site.consumer.index
        exact = torch.zeros(site.units, index.shape[1], index.shape[1], dtype=torch.float64)
        # Labels of different positions are drawn independently, and their scores have mean zero.
        for position in range(3):
            for y in range(24):
                (dx,) = torch.autograd.grad(log_p[position, y], seen[0], retain_graph=True)
                units = dx[0][:, index]
                exact += log_p[position, y].exp().detach() * torch.einsum("nur,nus->urs", units, units) / 3
        a = seen[0].detach().flatten(0, 1)
        gram = a.T @ a / len(a)
        inverse = torch.linalg.inv(gram + 0.1 * gram.diagonal().diag())
        left = torch.stack([torch.linalg.inv(inverse[own][:, own]) for own in index])
        torch.testing.assert_close(made[site.name], 0.5 * (exact * left).sum((1, 2)), rtol=0.12, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1e-2, 1.0])
def test_obs_of_features_whose_means_are_far_above_their_spread(spread):
    """Where the output has a bias, means do not count; in float32 they must not cancel what does."""
    exact = double("gpt2")
    structure, ids = structure_of(exact), token_ids(batch=32, length=16)
    neurons = next(site for site in structure.sites if site.kind == "neuron")
    (up,) = (leaf_module(exact, leaf) for leaf in neurons.producers)
    with torch.no_grad():
        up.weight[:, :8] *= spread
        up.bias[:8] = torch.linspace(1, 5, 8)
    low = tiny("gpt2")
    low.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    for options in ({"weighting": "output"}, {"loss": lambda output, batch: -_sequence(output, batch)}):
        expected = score(exact, ids, "obs", max_tokens=None, **options)
        found = score(low, ids, "obs", max_tokens=None, **options)
        for site in structure.sites:
            torch.testing.assert_close(
                found[site.name], expected[site.name], rtol=1e-3, atol=1e-6 * float(expected[site.name].mean())
            )
    if spread == 0:
        assert found[neurons.name][:8].max() < 1e-6 * found[neurons.name][8:].min()


def test_obs_of_features_that_say_each_other_down_to_rounding():
    model = tiny("llama", intermediate_size=256)
    with pytest.raises(PPNetError, match=r"^ridge: 1e-09 is too small for the features of layers\.\d\.neuron"):
        score(model, token_ids(batch=4, length=16), "obs", ridge=1e-9)
    assert score(model, token_ids(batch=4, length=16), "obs")


def test_every_scorer_is_tested_here():
    assert set(SCORERS) == {*METHODS, "position", "random"}  # position: tests/test_sort.py
    model = tiny("llama")
    draws = [score(model, method="random", seed=seed)["layers.0.neuron"] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], score(model, method="random")["layers.1.neuron"])
