"""Redistribution: the refitted projections are the least-squares ones, exact where they can be, and never worse."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import MODEL_TYPES, auto_class, tiny
from plans import batch, logits, plan_of, random_plan, relative
from torch import Tensor, nn

import ppnet
from ppnet.compact import compact
from ppnet.families import structure_of
from ppnet.plan import Plan
from ppnet.redistribute import Moments, least_squares
from ppnet.units import leaf_module

METHODS = ("least_squares", "nearest", "mean")


def data(count: int = 12, length: int = 20, seed: int = 3) -> list[dict[str, Tensor]]:
    """Random tokens in two batches; the second is padded on the right."""
    ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[count // 2 :, length // 2 :] = 0
    half = count // 2
    return [{"input_ids": ids[:half]}, {"input_ids": ids[half:], "attention_mask": mask[half:]}]


def inputs_of(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What enters a linear module and what leaves it, (N, features), float64, without padding."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    for one in batches:
        mask = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
        with torch.no_grad():
            model(**one)
        seen[-1] = (seen[-1][0][mask], seen[-1][1][mask])
    handle.remove()
    return tuple(torch.cat(parts).detach().double() for parts in zip(*seen, strict=True))  # type: ignore[return-value]


def duplicated(model_type: str, noise: float = 0.0) -> tuple[nn.Module, Plan]:
    """A model whose every second unit is a multiple of the one before, and the plan that removes those."""
    model = tiny(model_type)
    with torch.no_grad():
        for site in structure_of(model).sites:
            one, two = torch.arange(0, site.units, 2), torch.arange(1, site.units, 2)
            for leaf in site.producers:
                module = leaf_module(model, leaf)
                values = module.weight.index_select(leaf.weight_dim, leaf.features(one))
                module.weight.index_copy_(leaf.weight_dim, leaf.features(two), values)
                if module.bias is not None:
                    module.bias[leaf.features(two)] = module.bias[leaf.features(one)]
    return model, plan_of(model, lambda site: range(0, site.units, 2))


# ---- the solution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_least_squares_is_that_of_lstsq(ridge: float) -> None:
    torch.manual_seed(0)
    a, y, folded = torch.randn(60, 7).double(), torch.randn(60, 5).double(), torch.randn(5, 7).double()
    moments = Moments()
    for part in (slice(0, 13), slice(13, 60)):
        moments.add(a[part], y[part], folded)
    # Ridge as rows that ask for zero.
    penalty = ridge * float((a.T @ a).diagonal().mean())
    rows = torch.cat([a, penalty**0.5 * torch.eye(7).double()])
    wanted = torch.cat([y - a @ folded.T, torch.zeros(7, 5).double()])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    change = least_squares(moments, ridge)
    torch.testing.assert_close(change, expected)
    left = y - a @ (folded + change).T
    assert moments.error_after(change, None) == pytest.approx(float(left.square().sum()))
    bias = torch.randn(5).double()
    assert moments.error_after(change, bias) == pytest.approx(float((left - bias).square().sum()))


def test_without_ridge_the_smallest_solution() -> None:
    torch.manual_seed(0)
    a, y = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    twice = torch.cat([a, a[:, :2]], dim=1)
    moments = Moments()
    moments.add(twice, y, torch.zeros(3, 6).double())
    expected = torch.linalg.lstsq(twice, y, driver="gelsd").solution.T
    torch.testing.assert_close(least_squares(moments, 0.0), expected)


def test_fewer_tokens_than_features_are_told() -> None:
    model = tiny("llama")
    with pytest.warns(UserWarning, match=r"redistribute: 8 tokens .* 64 features"):
        compact(model, plan_of(model, lambda site: range(min(site.units, 40))), redistribute=torch.arange(8)[None] + 3)


def test_a_ridge_that_is_lost_in_rounding_falls_back_and_says_so() -> None:
    a = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).double() * torch.ones(1, 3).double()
    moments = Moments()
    moments.add(a, a[:, :1], torch.zeros(1, 3).double())
    moments.gram[0, 0] -= 1e-6 * moments.gram[0, 0]  # as rounding may leave it: not positive
    with pytest.warns(UserWarning, match="too dependent for ridge=1e-30"):
        change = least_squares(moments, 1e-30, "here")
    assert float(change.sum()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("sequential", [False, True])
def test_the_first_layers_are_those_of_lstsq_on_the_models_own_activations(sequential: bool) -> None:
    """qwen2 has no biases in its projections, llama (tiny) has; the first site sees dense inputs in either order."""
    for model_type, bias in (("qwen2", False), ("llama", True)):
        model = tiny(model_type)
        plan = random_plan(model)
        small = compact(model, plan, redistribute=data(), ridge=1e-2, sequential=sequential)
        site = structure_of(model).sites[0]
        a, y = inputs_of(model, site.consumer.name, data())
        dense = model.get_submodule(site.consumer.name)
        a = a[:, site.consumer.features(torch.tensor(plan.kept[site.name]))]
        folded = dense.weight.double()[:, site.consumer.features(torch.tensor(plan.kept[site.name]))]
        y = y - dense.bias.double() if bias else y
        missing = y - a @ folded.T
        centre = [x - x.mean(0) if bias else x for x in (a, missing)]
        penalty = (1e-2 * centre[0].square().sum(0).mean()) ** 0.5
        rows = torch.cat([centre[0], penalty * torch.eye(a.shape[1]).double()])
        wanted = torch.cat([centre[1], torch.zeros(a.shape[1], y.shape[1]).double()])
        change = torch.linalg.lstsq(rows, wanted).solution.T
        got = small.get_submodule(site.consumer.name)
        torch.testing.assert_close(got.weight.double(), folded + change, rtol=1e-4, atol=1e-5)
        if bias:
            shift = missing.mean(0) - change @ a.mean(0)
            torch.testing.assert_close(got.bias.double(), dense.bias.double() + shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["kv_group", "neuron"])
def test_later_projections_make_up_for_all_that_is_missing(kind: str) -> None:
    """In sequence: (W_K + D) a_K is to give what the dense residual stream has more than the small one before it."""
    model = tiny("qwen2")
    plan = random_plan(model)
    small = compact(model, plan, redistribute=data(), ridge=1e-2)
    site = next(s for s in structure_of(model).sites if s.layer == 1 and s.kind == kind)
    a, out = inputs_of(small, site.consumer.name, data())
    _, dense_out = inputs_of(model, site.consumer.name, data())
    where = 1 if kind == "kv_group" else 2  # hidden states that enter the layer, and that leave it

    def stream(m: nn.Module) -> Tensor:
        parts = []
        for one in data():
            mask = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
            with torch.no_grad():
                parts.append(m(**one, output_hidden_states=True).hidden_states[where][mask])
        return torch.cat(parts).double()

    # Before the sub-layer's output was added: attention is the layer's first, the MLP its last.
    before = [stream(m) - (o if kind == "neuron" else 0.0) for m, o in ((model, dense_out), (small, out))]
    target = before[0] + dense_out - before[1]
    folded = model.get_submodule(site.consumer.name).weight.double()
    folded = folded[:, site.consumer.features(torch.tensor(plan.kept[site.name]))].detach()
    penalty = (1e-2 * a.square().sum(0).mean()) ** 0.5
    rows = torch.cat([a, penalty * torch.eye(a.shape[1]).double()])
    wanted = torch.cat([target - a @ folded.T, torch.zeros(a.shape[1], target.shape[1]).double()])
    expected = folded + torch.linalg.lstsq(rows, wanted).solution.T
    got = small.get_submodule(site.consumer.name).weight.double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_projections_behind_the_first_removal_are_refitted_too() -> None:
    model = tiny("qwen2")
    sites = structure_of(model).sites
    plan = plan_of(model, lambda s: range(0, s.units, 2) if s.name == sites[3].name else range(s.units))
    small = compact(model, plan, redistribute=data())
    assert list(small.ppnet_plan.extra["redistribution"]["errors"]) == [site.name for site in sites[3:]]
    alone = compact(model, plan, redistribute=data(), sequential=False)
    assert list(alone.ppnet_plan.extra["redistribution"]["errors"]) == [sites[3].name]
    # On the data itself: so few tokens say little of others.
    inputs = {"input_ids": data()[0]["input_ids"], "attention_mask": torch.ones_like(data()[0]["input_ids"])}
    expected = logits(model, inputs)
    missed = [float((logits(m, inputs) - expected).square().mean()) for m in (compact(model, plan), alone, small)]
    assert missed[2] < missed[1] < missed[0]


def test_mean_and_nearest_are_what_they_say() -> None:
    model = tiny("qwen3")
    plan = random_plan(model)
    site = next(s for s in structure_of(model).sites if s.kind == "neuron")
    kept = plan.kept[site.name]
    removed = [u for u in range(site.units) if u not in kept]
    weight = model.get_submodule(site.consumer.name).weight.double()

    def refitted(method: str) -> Tensor:
        only = plan_of(model, lambda s: kept if s.name == site.name else range(s.units))
        small = compact(model, only, redistribute=data(), redistribution=method)
        return small.get_submodule(site.consumer.name).weight.double()

    expected = weight[:, kept] + weight[:, removed].sum(1, keepdim=True) / len(kept)
    torch.testing.assert_close(refitted("mean"), expected, rtol=1e-5, atol=1e-6)
    a, _ = inputs_of(model, site.consumer.name, data())
    expected = weight[:, kept].clone()
    for unit in removed:
        products = a[:, kept].T @ a[:, unit]
        best = int((products.abs() / a[:, kept].norm(dim=0)).argmax())
        expected[:, best] += weight[:, unit] * products[best] / a[:, kept[best]].square().sum()
    torch.testing.assert_close(refitted("nearest"), expected, rtol=1e-4, atol=1e-5)


# ---- what it does to a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", ["least_squares", "nearest"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_duplicates_cost_nothing(model_type: str, method: str, sequential: bool) -> None:
    """Both kinds of units: removed units that equal kept ones are taken over to rounding (gpt2, llama: with biases)."""
    model, plan = duplicated(model_type)
    expected = logits(model, batch())
    assert relative(expected, logits(compact(model, plan), batch())) > 0.05
    # 12 x 20 tokens are more than any site's features; the ridge is what keeps least squares from being exact.
    small = compact(model, plan, redistribute=data(count=24), redistribution=method, ridge=1e-7, sequential=sequential)
    assert relative(expected, logits(small, batch())) < 2e-4
    assert sum(p.numel() for p in small.parameters()) == plan.cost.params


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_bias_takes_what_is_constant(model_type: str) -> None:
    """Removed neurons that give the same for every token belong into the bias, whatever the method."""
    model = tiny(model_type)
    with torch.no_grad():
        for site in structure_of(model).sites:
            if site.kind == "neuron":
                for leaf in site.producers:
                    module, last = leaf_module(model, leaf), leaf.features(torch.arange(30, site.units))
                    module.weight.index_fill_(leaf.weight_dim, last, 0.0)
                    module.bias[last] = 1.5
    plan = plan_of(model, lambda site: range(30 if site.kind == "neuron" else site.units))
    expected = logits(model, batch())
    assert relative(expected, logits(compact(model, plan), batch())) > 0.05
    for method in ("least_squares", "nearest"):
        assert relative(expected, logits(compact(model, plan, redistribute=data(), redistribution=method), batch())) < (
            1e-4
        )


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_least_squares_is_never_worse_and_is_recorded(model_type: str, sequential: bool, tmp_path) -> None:
    model = tiny(model_type)
    plan = random_plan(model)
    small = compact(model, plan, redistribute=data(), sequential=sequential)
    done = small.ppnet_plan.extra["redistribution"]
    assert (done["method"], done["ridge"], done["sequential"], done["tokens"]) == (
        "least_squares",
        0.1,
        sequential,
        180,
    )
    assert list(done["errors"]) == [site.name for site in structure_of(model).sites]
    assert all(entry["after"] < entry["before"] for entry in done["errors"].values())
    assert plan.extra == {} and small.ppnet_plan.kept == plan.kept
    small.ppnet_plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").extra["redistribution"] == json.loads(json.dumps(done))


@pytest.mark.parametrize("method", METHODS)
def test_recorded_errors_are_those_of_the_projection(method: str) -> None:
    """One site is pruned, so what its projection gives can be compared with the dense one's directly."""
    model = tiny("gpt2")
    site = structure_of(model).sites[3]
    plan = plan_of(model, lambda s: range(0, s.units, 3) if s.name == site.name else range(s.units))
    before = inputs_of(compact(model, plan), site.consumer.name, data())[1]
    small = compact(model, plan, redistribute=data(), redistribution=method)
    after = inputs_of(small, site.consumer.name, data())[1]
    dense = inputs_of(model, site.consumer.name, data())[1]
    energy = (dense - model.get_submodule(site.consumer.name).bias.detach().double()).square().sum()
    recorded = small.ppnet_plan.extra["redistribution"]["errors"][site.name]
    assert recorded["before"] == pytest.approx(float((before - dense).square().sum() / energy), rel=1e-4)
    assert recorded["after"] == pytest.approx(float((after - dense).square().sum() / energy), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_how_the_data_is_split_and_padded_does_not_matter(method: str) -> None:
    model = tiny("llama")
    plan = random_plan(model)
    found = []
    whole = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": nn.functional.pad(whole, (0, 5), value=7)}
    padded["attention_mask"] = nn.functional.pad(torch.ones_like(whole), (0, 5))
    left = {"input_ids": nn.functional.pad(whole, (5, 0), value=7)}
    left["attention_mask"] = nn.functional.pad(torch.ones_like(whole), (5, 0))
    for batches in ([{"input_ids": whole}], [{"input_ids": whole.flip(0)}], [padded], [left]):
        small = compact(model, plan, redistribute=batches, redistribution=method)
        assert small.ppnet_plan.extra["redistribution"]["tokens"] == 192
        found.append(small.state_dict())
    for other in found[1:]:
        for name, value in found[0].items():
            assert relative(value, other[name]) < 1e-3, name


def test_the_given_model_is_untouched_and_hooks_are_gone() -> None:
    model = tiny("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    small = compact(model, random_plan(model), redistribute=data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions and model.training and small.training
    for module in (*model.modules(), *small.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in small.parameters())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_reloads_in_plain_transformers(model_type: str, tie: bool, tmp_path) -> None:
    model = tiny(model_type, tie_word_embeddings=tie)
    small = compact(model, random_plan(model), redistribute=data())
    assert relative(logits(compact(model, random_plan(model)), batch()), logits(small, batch())) > 1e-3
    ppnet.save(small, tmp_path)
    loaded = auto_class(model_type).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(small, batch()))


def test_nothing_removed_and_one_unit_kept() -> None:
    model = tiny("qwen2")
    everything = compact(model, plan_of(model, lambda site: range(site.units)), redistribute=data())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in everything.state_dict().items())
    assert everything.ppnet_plan.extra["redistribution"]["errors"] == {}
    for method in METHODS:
        one = compact(model, plan_of(model, lambda site: [site.units - 1]), redistribute=data(), redistribution=method)
        assert torch.isfinite(logits(one, batch())).all()


def test_bf16_is_folded_wide_and_rounded_once() -> None:
    wide = tiny("qwen2")
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    plan = random_plan(wide)
    site = structure_of(wide).sites[0]
    fine, coarse = (compact(m, plan, redistribute=data()) for m in (wide, narrow))
    a, b = (m.get_submodule(site.consumer.name).weight for m in (fine, coarse))
    assert b.dtype == torch.bfloat16
    # Activations are rounded in bf16, weights once at the end.
    assert relative(a, b) < 0.02
    errors = coarse.ppnet_plan.extra["redistribution"]["errors"]
    assert all(entry["after"] < entry["before"] for entry in errors.values())
