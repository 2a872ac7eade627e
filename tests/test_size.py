"""Exact sizes: costs that are counted, sizes met to the unit, monotone and nested; resize, plans and the size curve."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import WITH_SLOW_TYPES, tiny, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ppnet
from ppnet.cost import METRICS, Cost, CostModel, cost_model
from ppnet.errors import SizeError
from ppnet.families import structure_of
from ppnet.plan import Plan
from ppnet.size import fill, resize, size_curve
from ppnet.wrap import engine_of, is_wrapped, wrap


def randomised(model, seed=5):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    return model


def models(model_type):
    """A gated model and one that magnitude ranks; both of the same costs."""
    plain = tiny(model_type)
    return randomised(wrap(tiny(model_type))), plain


def plan(model, size, **options):
    """`ppnet.plan`; magnitude ranks the units of models without gates."""
    ranking = {} if is_wrapped(model) else {"scores": "magnitude"}
    return ppnet.plan(model, size, **{**ranking, **options})


GATED, PLAIN = models("llama")
COSTS = cost_model(PLAIN, structure_of(PLAIN))
FLOOR = COSTS.total([1] * 6).params / COSTS.dense.params


def smallest_unit_left_out(made, costs):
    """Cost of the cheapest unit that was not kept: the size would have been met better with it."""
    return min(
        unit.of(made.metric)
        for unit, (name, units) in zip(costs.unit, made.dense_units.items(), strict=True)
        if len(made.kept[name]) < units
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_sizes_are_met_to_the_unit(model_type, metric):
    gated, plain = models(model_type)
    costs = cost_model(plain, structure_of(plain))
    smallest = costs.total([1] * len(costs.unit)).of(metric)
    for model, options in ((gated, {}), (plain, {}), (plain, {"allocation": "global"})):
        for fraction in (0.33, 0.5, 0.77, 0.999):
            asked = smallest + fraction * (costs.dense.of(metric) - smallest)
            made = plan(model, asked, metric=metric, **options)
            achieved = costs.total([len(units) for units in made.kept.values()])
            assert made.cost == achieved and made.dense_cost == costs.dense
            gap = asked - achieved.of(metric)
            assert 0 <= gap < smallest_unit_left_out(made, costs)
            assert all(len(units) >= 1 for units in made.kept.values())
            assert made.source == ("gates" if model is gated else "magnitude")


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_costs_are_those_of_the_compacted_model(model_type):
    gated, _ = models(model_type)
    for dtype in (torch.float32, torch.bfloat16):
        model = gated.to(dtype)
        for size in (1.0, 0.7, 0.45):
            made = plan(model, size)
            small = ppnet.compact(model, made, check=False)
            assert made.cost.params == sum(p.numel() for p in small.parameters())
            assert made.cost.bytes == sum(p.numel() * p.element_size() for p in small.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                small(token_ids(1, 1), use_cache=False)
            # Linear modules run mm or addmm; the attention core and rotary angles run other operators: not counted.
            by_operator = counter.get_flop_counts()["Global"]
            linear = sum(by_operator.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
            assert made.cost.flops == linear


@given(st.lists(st.floats(FLOOR, 1.0), min_size=2, max_size=5), st.sampled_from(METRICS), st.booleans())
@settings(max_examples=25, deadline=None)
def test_sizes_are_monotone_and_nested(sizes, metric, gated):
    model = GATED if gated else PLAIN
    floor = COSTS.total([1] * 6).of(metric) / COSTS.dense.of(metric)
    plans = [plan(model, max(size, floor), metric=metric) for size in sorted(sizes)]
    for small, large in pairwise(plans):
        assert small.cost.of(metric) <= large.cost.of(metric)
        for name in small.kept:
            a, b = set(small.kept[name]), set(large.kept[name])
            assert a <= b or b <= a


@st.composite
def knapsacks(draw):
    sites = draw(st.integers(1, 4))
    counts = tuple(draw(st.integers(1, 12)) for _ in range(sites))
    unit = tuple(Cost(draw(st.integers(1, 50)), 0, 0) for _ in range(sites))
    multiples = [draw(st.integers(1, count)) for count in counts]
    costs = CostModel(Cost(draw(st.integers(0, 100)), 0, 0), unit, counts)
    number = st.floats(-5, 5)
    keys = [torch.tensor([draw(number) for _ in range(count)], dtype=torch.float64) for count in counts]
    return costs, keys, multiples


@given(knapsacks(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(max_examples=150, deadline=None)
def test_fill_with_any_costs(knapsack, fractions):
    costs, keys, multiples = knapsack
    order = [torch.argsort(key, descending=True, stable=True).tolist() for key in keys]
    floor = costs.total(multiples).params
    before = -1
    for fraction in sorted(fractions):
        target = floor + fraction * (costs.dense.params - floor)
        kept = fill(target, "params", costs, order, keys, multiples)
        spent = costs.total(kept).params
        assert spent <= target * (1 + 1e-9) and spent >= before
        before = spent
        for count, multiple, dense, unit in zip(kept, multiples, costs.dense_units, costs.unit, strict=True):
            assert count == dense or count % multiple == 0
            if count < dense:
                assert spent + unit.params * min(multiple, dense - count) > target
    assert fill(costs.dense.params, "params", costs, order, keys, multiples) == list(costs.dense_units)
    with pytest.raises(SizeError, match=f"the smallest is {floor:,}"):
        fill(floor - 1, "params", costs, order, keys, multiples)


def test_units_are_taken_in_order_of_their_key():
    model = wrap(tiny("llama"))
    key = engine_of(model).puppet.order_key()
    made = plan(model, 0.6)
    for site, part in zip(
        structure_of(model).sites, key.split([s.units for s in structure_of(model).sites]), strict=True
    ):
        kept = made.kept[site.name]
        dropped = [unit for unit in range(site.units) if unit not in kept]
        assert not dropped or part[kept].min() >= part[dropped].max()


def test_widths_in_multiples():
    model = randomised(wrap(tiny("llama", intermediate_size=172)))
    seen = set()
    for size in (0.45, 0.6, 0.75, 0.9, 1.0):
        made = plan(model, size, multiple_of={"neuron": 64})
        widths = {len(units) for name, units in made.kept.items() if name.endswith("neuron")}
        assert widths <= {64, 128, 172}
        assert made.cost.params <= made.asked
        seen |= widths
    assert seen == {64, 128, 172}
    assert ppnet.plan(model, 0.6, multiple_of={"neuron": 64, "kv_group": 2}).counts(structure_of(model))[0] % 2 == 0
    wider = plan(tiny("llama"), 0.9, multiple_of={"neuron": 64})
    assert all(len(units) == 44 for name, units in wider.kept.items() if name.endswith("neuron"))


@pytest.mark.parametrize("metric", METRICS)
def test_fractions_and_absolute_sizes(metric):
    dense, fixed = COSTS.dense.of(metric), COSTS.fixed.of(metric)
    for model in (GATED, PLAIN):
        kept = plan(model, 0.6, metric=metric).kept
        assert plan(model, 0.6 * dense, metric=metric).kept == kept
        assert (
            plan(model, fixed + 0.6 * (dense - fixed), metric=metric).kept
            == plan(model, 0.6, metric=metric, of="gated").kept
        )
        assert (
            plan(model, 0.6 * (dense - fixed), metric=metric, of="gated").kept
            == plan(model, 0.6, metric=metric, of="gated").kept
        )
        assert plan(model, int(dense), metric=metric).is_dense()


def test_size_1_is_dense():
    for model in (GATED, PLAIN):
        for of in ("model", "gated"):
            for size in (1, 1.0):
                made = plan(model, size, of=of)
                assert made.is_dense() and made.u == 0.0 and made.lambda_ == 0.0
                assert made.cost == made.dense_cost == COSTS.dense


def test_gated_plans_lie_where_the_masks_cost_as_much():
    puppet = GATED.puppet
    before = 1.0
    for size in (0.5, 0.7, 0.9):
        made = plan(GATED, size)
        rho = puppet.inclusion(made.u).detach().double().split([s.units for s in puppet.structure.sites])
        expected = COSTS.fixed.params + sum(
            float(part.sum()) * unit.params for part, unit in zip(rho, COSTS.unit, strict=True)
        )
        assert expected == pytest.approx(size * COSTS.dense.params, rel=1e-5)
        assert 0 < made.u < before
        before = made.u


def test_scores_rank_units():
    structure = structure_of(PLAIN)
    scores = {site.name: torch.arange(site.units, 0, -1.0) for site in structure.sites}
    for model in (PLAIN, GATED):
        made = plan(model, 0.6, scores=scores)
        assert made.source == "scores" and made.u == 0.0
        assert all(units == list(range(len(units))) for units in made.kept.values())
    shares = [len(units) / made.dense_units[name] for name, units in made.kept.items() if "neuron" in name]
    assert max(shares) - min(shares) <= 1 / 44 + 1e-9
    scores["layers.1.neuron"] = scores["layers.1.neuron"] + 1000.0
    best = plan(PLAIN, 0.6, scores=scores, allocation="global")
    assert len(best.kept["layers.1.neuron"]) == 44 > len(best.kept["layers.0.neuron"])


def test_plans_of_an_unwrapped_model_rank_by_magnitude_on_request():
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[5:].mul_(1e-3)
    made = ppnet.plan(model, 0.55, scores="magnitude")
    for name, units in made.kept.items():
        if name.endswith("neuron"):
            assert set(range(5)) <= set(units)
    assert not hasattr(model, "puppet") and not hasattr(model.config, "ppnet")


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_plan_round_trip(model_type, tmp_path):
    for model in models(model_type):
        made = plan(model, 0.6, metric="flops")
        made.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json")
        assert again == made == Plan.from_dict(made.to_dict())
        again.check(structure_of(model))
        assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_resize_nests_and_restores():
    model, ids = randomised(wrap(tiny("llama"))), token_ids()

    def logits():
        with torch.no_grad():
            return model(ids).logits

    dense = logits()
    with resize(model, 0.8) as outer:
        large = logits()
        assert outer.cost == outer.plan.cost and outer.cost.params <= 0.8 * COSTS.dense.params
        with resize(model, 0.5) as inner:
            small = logits()
            assert inner.cost.params < outer.cost.params
            with resize(model, None) as reset:
                assert torch.equal(logits(), dense) and reset.cost == COSTS.dense
                assert repr(reset) == "Resized(dense)"
            assert torch.equal(logits(), small)
        assert torch.equal(logits(), large)
        with pytest.raises(KeyError), resize(model, 0.5):
            logits()
            raise KeyError("inside")
        assert torch.equal(logits(), large)
        with pytest.raises(SizeError):
            resize(model, 1e-6)
        assert torch.equal(logits(), large)
    assert torch.equal(logits(), dense)
    assert not torch.equal(small, large) and not torch.equal(large, dense)
    kept = resize(model, 0.5)
    assert torch.equal(logits(), small) and "of dense)" in repr(kept)
    resize(model, kept.plan)
    assert torch.equal(logits(), small)
    resize(model, None)
    assert torch.equal(logits(), dense)


def test_size_curve_falls_with_lambda():
    model = wrap(tiny("llama"))
    with torch.no_grad():
        model.puppet.theta.add_(0.5 * torch.randn(model.puppet.theta.shape, generator=torch.Generator().manual_seed(0)))
    curve = size_curve(model, points=20)
    assert [point.u for point in curve] == [i / 20 for i in range(20)]
    assert curve[0].cost == COSTS.dense and curve[0].gated_flops == 1.0
    for left, right in pairwise(curve):
        assert right.cost.flops <= left.cost.flops and right.gated_flops <= left.gated_flops
    assert curve[-1].gated_flops < 0.5
    puppet, gated = model.puppet, (COSTS.dense - COSTS.fixed).flops
    one_unit = max(unit.flops for unit in COSTS.unit) / gated
    floor = COSTS.gated([1] * 6).flops / gated
    for point in curve[1:]:
        rho_bar = max(float(puppet.mean_inclusion(puppet.inclusion(point.u)).detach()), floor)
        assert rho_bar - one_unit < point.gated_flops <= rho_bar + 1e-6
        assert point.lambda_ == pytest.approx(point.u / (1 - point.u))


def test_numpy_sizes_are_sizes():
    import numpy as np

    model = tiny("llama")
    assert plan(model, np.float32(0.5)).cost == plan(model, 0.5).cost
    assert plan(model, np.int64(30_000)).cost == plan(model, 30_000).cost
