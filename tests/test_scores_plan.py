"""From scores to plans: sources, allocations, floors, saved and combined scores; measured latency as a size."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from helpers import tiny
from scoring import IDS

import ppnet
from ppnet import latency
from ppnet.cost import cost_model
from ppnet.errors import CheckpointError, PlanError, PPNetError, SizeError
from ppnet.families import structure_of
from ppnet.metrics import METERS, get_meter, total
from ppnet.plan import Plan
from ppnet.scores import Scores
from ppnet.scores.combine import combined, rank

MODEL = tiny("llama")
STRUCTURE = structure_of(MODEL)
COSTS = cost_model(MODEL, STRUCTURE)
TAYLOR = ppnet.score(MODEL, IDS, "taylor")


def counts(made, kind):
    return [len(units) for name, units in made.kept.items() if name.endswith(kind)]


def test_plans_take_scores_as_they_are():
    made = ppnet.plan(MODEL, 0.6, scores=TAYLOR)
    assert made.source == "taylor" and made.u == 0.0
    for name, kept in made.kept.items():
        rest = [unit for unit in range(len(TAYLOR[name])) if unit not in kept]
        assert not rest or TAYLOR[name][kept].min() >= TAYLOR[name][rest].max()
    small = ppnet.compact(MODEL, 0.6, scores=TAYLOR)
    assert small.ppnet_plan == made == Plan.from_dict(json.loads(made.to_json()))
    wrapped = ppnet.wrap(tiny("llama"))
    assert ppnet.plan(wrapped, 0.6, scores=TAYLOR).kept == made.kept
    with ppnet.resize(wrapped, 0.6, scores=TAYLOR) as resized:
        assert resized.plan.kept == made.kept
    other = Scores(dict(TAYLOR), method="taylor", model_type="qwen2")
    with pytest.raises(PlanError, match="scores: were made for model_type 'qwen2', the model is 'llama'"):
        ppnet.plan(MODEL, 0.6, scores=other)


def test_scores_survive_a_file(tmp_path):
    made = ppnet.score(MODEL, IDS, "mama", weights={"kl": 0.0}, sft=TAYLOR)
    file = tmp_path / "deep" / "scores.safetensors"
    made.save(file)
    again = Scores.load(file)
    assert list(again) == list(made) and all(torch.equal(again[name], made[name]) for name in made)
    assert (again.method, again.options, again.model_type, again.tokens) == (
        made.method, made.options, made.model_type, made.tokens,
    )  # fmt: skip
    assert again.tokens == 44 and again.options["weights"] == {"kl": 0.0} and "taylor" in again.options["sft"]
    assert repr(again) == repr(made) and "144 units of 6 sites, llama, 44 tokens" in repr(made)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert ppnet.plan(MODEL, 0.5, scores=again).kept == ppnet.plan(MODEL, 0.5, scores=made).kept
    for bad in (b"", file.read_bytes()[:200], b"not a file of tensors at all"):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="scores: cannot read"):
            Scores.load(file)
    with pytest.raises(CheckpointError, match="scores: cannot read"):
        Scores.load(tmp_path / "missing")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"is not a file of scores \(format None"):
        Scores.load(file)


def test_ranks():
    x = torch.tensor([3.0, -1.0, 3.0, 7.0, 0.0])
    assert rank(x).tolist() == pytest.approx([0.7, 0.2, 0.7, 1.0, 0.4])
    parts = [[torch.tensor([1.0, 5.0]), torch.tensor([3.0])], [torch.tensor([9.0, 8.0]), torch.tensor([7.0])]]
    together = combined(parts, [1.0, 0.5], ["neuron", "neuron"])
    assert together[0].tolist() == pytest.approx([1 / 3 + 0.5, 1 + 1 / 3])
    assert together[1].tolist() == pytest.approx([2 / 3 + 0.5 / 3])
    apart = combined(parts, [1.0, 0.0], ["neuron", "kv_group"])
    assert apart[0].tolist() == [0.5, 1.0] and apart[1].tolist() == [1.0]
    product = combined(parts, [1.0, 2.0], ["neuron", "neuron"], "product")
    assert product[0].tolist() == pytest.approx([1 / 3 * (9 / 8) ** 2, 5 / 3], rel=1e-4)


def test_scores_combine():
    magnitude = ppnet.score(MODEL, method="magnitude")
    both = Scores.combine([TAYLOR, magnitude], [2.0, 1.0])
    assert both.method == "taylor+magnitude" and both.tokens == 44 and both.model_type == "llama"
    alone = Scores.combine([TAYLOR])
    for name in TAYLOR:
        assert torch.equal(alone[name].argsort(), TAYLOR[name].argsort())
    mama = ppnet.score(MODEL, IDS, "mama", weights={"magnitude": 1, "sft": 2, "activation": 0, "obs": 0, "bias": 0})
    paths = ppnet.score(MODEL, method="magnitude", form="paths")
    expected = Scores.combine([paths, TAYLOR], [1.0, 2.0])
    for name in mama:
        torch.testing.assert_close(mama[name], expected[name])
    collected = ppnet.score(MODEL, IDS, "mama", weights={"kl": 0})
    given = ppnet.score(MODEL, IDS, "mama", weights={"kl": 0}, sft=TAYLOR)
    assert all(torch.equal(collected[name], given[name]) for name in given)
    for scores, weights, message in (
        ([], None, "none given"),
        (TAYLOR, None, "must be a list of ppnet.Scores"),
        ([TAYLOR, magnitude], ["a", 1], r"weights\[0\]: must be a finite number >= 0, got 'a'"),
        ([TAYLOR, magnitude], [1.0], "must be 2 numbers"),
        ([TAYLOR, Scores(dict(TAYLOR), method="x", model_type="gpt2")], None, "are not of the same units"),
    ):
        with pytest.raises(PPNetError, match=message):
            Scores.combine(scores, weights)
    signed = ppnet.score(MODEL, IDS, "movement")
    with pytest.raises(PPNetError, match="'product' needs scores >= 0"):
        Scores.combine([signed, TAYLOR], form="product")


def test_scores_compare_and_load_from_files(tmp_path):
    TAYLOR.save(tmp_path / "taylor.safetensors")
    loaded = Scores.load(tmp_path / "taylor.safetensors")
    assert loaded == TAYLOR and ppnet.score(MODEL, IDS, "taylor", sign="token") != TAYLOR and TAYLOR != "taylor"
    name = str(tmp_path / "taylor.safetensors")
    made = ppnet.plan(MODEL, 0.6, scores=name)
    assert made.kept == ppnet.plan(MODEL, 0.6, scores=TAYLOR).kept and made.source == "taylor"
    weights = {"kl": 0}
    assert ppnet.score(MODEL, IDS, "mama", weights=weights, sft=name) == ppnet.score(
        MODEL, IDS, "mama", weights=weights, sft=TAYLOR
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_magnitude_is_one_ranking(model_type):
    model = tiny(model_type)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(index)))
    own, scored = (ppnet.plan(model, 0.6, scores=s) for s in ("magnitude", ppnet.score(model, method="magnitude")))
    assert own.source == scored.source == "magnitude" and own.kept == scored.kept


@pytest.mark.parametrize("options", [{"allocation": "cost"}, {"allocation": "global", "normalise": "site"}])
def test_gates_take_no_allocation(options):
    gated = ppnet.wrap(tiny("llama"))
    with pytest.raises(PlanError, match=r"allocation: .* is for scores, and this model's gates rank"):
        ppnet.plan(gated, 0.6, **options)
    assert ppnet.plan(gated, 0.6, scores=TAYLOR, **options).source == "taylor"


def test_allocation_by_cost_is_the_knapsack():
    source = torch.Generator().manual_seed(3)
    scores = {site.name: torch.rand(site.units, generator=source) for site in STRUCTURE.sites}
    prices = {site.name: unit.params for site, unit in zip(STRUCTURE.sites, COSTS.unit, strict=True)}
    for size in (0.5, 0.7, 0.9):
        by_cost = ppnet.plan(MODEL, size, scores=scores, allocation="cost")
        by_score = ppnet.plan(MODEL, size, scores=scores, allocation="global")
        value = {name: sum(float(scores[n][u]) for n, units in p.kept.items() for u in units)
                 for name, p in (("cost", by_cost), ("score", by_score))}  # fmt: skip
        assert value["cost"] > value["score"]
        # kept units are worth more for their cost than dropped ones, but for what ended a site early
        dropped = [
            float(scores[n][u]) / prices[n] for n in scores for u in range(len(scores[n])) if u not in by_cost.kept[n]
        ]
        kept = [
            min(float(scores[n][u]) / prices[n] for u in units) for n, units in by_cost.kept.items() if len(units) > 1
        ]
        assert sum(density > min(kept) for density in dropped) <= len(STRUCTURE.sites) * 2


def test_normalisation():
    scores = {
        site.name: torch.linspace(1, 2, site.units) * (1000 if site.kind == "kv_group" else 1)
        for site in STRUCTURE.sites
    }
    raw = ppnet.plan(MODEL, 0.7, scores=scores, allocation="global")
    assert counts(raw, "kv_group") == [4, 4, 4]
    even = ppnet.plan(MODEL, 0.7, scores=scores, allocation="global", normalise="kind")
    assert max(counts(even, "kv_group")) < 4
    scores["layers.1.neuron"] = scores["layers.1.neuron"] * 50
    by_kind = ppnet.plan(MODEL, 0.7, scores=scores, allocation="global", normalise="kind")
    by_site = ppnet.plan(MODEL, 0.7, scores=scores, allocation="global", normalise="site")
    assert counts(by_kind, "neuron")[1] == 44 > counts(by_site, "neuron")[1]


def test_floors():
    scores = dict(TAYLOR)
    scores["layers.0.neuron"] = scores["layers.0.neuron"] * 1e-6
    starved = ppnet.plan(MODEL, 0.6, scores=scores, allocation="global")
    assert counts(starved, "neuron")[0] == 1
    for floor, least in ((0.5, 22), ({"neuron": 0.25}, 11), (0.26, 12)):
        made = ppnet.plan(MODEL, 0.6, scores=scores, allocation="global", floor=floor)
        assert counts(made, "neuron")[0] == least and made.cost.params <= 0.6 * COSTS.dense.params
    assert (
        counts(
            ppnet.plan(MODEL, 0.6, scores=scores, allocation="global", floor=0.2, multiple_of={"neuron": 4}), "neuron"
        )[0]
        == 12
    )
    with pytest.raises(SizeError, match=r"is not possible; the smallest is .* or lower the floor"):
        ppnet.plan(MODEL, 0.6, scores="magnitude", floor=0.9)
    assert ppnet.plan(MODEL, 1.0, scores="magnitude", floor=1.0).is_dense()
    gated = ppnet.wrap(tiny("llama"))
    assert min(counts(ppnet.plan(gated, 0.7, floor={"kv_group": 0.75}), "kv_group")) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "knapsack"}, "allocation: 'knapsack' is not known; use one of uniform, global, cost"),
        ({"normalise": "layer", "allocation": "global"}, "normalise: 'layer' is not known"),
        ({"normalise": "kind"}, "normalise: 'kind' has no meaning for allocation='uniform'"),
        ({"scores": torch.ones(4)}, "scores: a Tensor; give ppnet.Scores, the name of a file"),
        ({"floor": 1.5}, r"floor: 1.5 for 'kv_group' must be a fraction in \[0, 1\]"),
        ({"floor": {"heads": 0.5}}, "floor: 0.5 for 'heads'"),
        ({"floor": {"neuron": True}}, "floor: True for 'neuron'"),
        ({"scores": ppnet.score(MODEL, IDS, "movement"), "allocation": "cost"}, "some are negative"),
    ],
)
def test_options_of_allocation(options, message):
    with pytest.raises(PlanError, match=message):
        ppnet.plan(MODEL, 0.7, **{"scores": "magnitude", **options})


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """The table of latencies in a folder of its own, and how often something was measured."""
    measured = []
    own = latency._measure
    monkeypatch.setattr(latency, "CACHE", tmp_path / "cache" / "latency.json")
    monkeypatch.setattr(latency, "_TABLE", {})
    monkeypatch.setattr(latency, "FOOTPRINT", 2**22)
    monkeypatch.setattr(latency, "_measure", lambda runs: measured.append(len(runs)) or own(runs))
    return measured


WIDE = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2}


def test_latency_is_measured_once_and_met(clock, monkeypatch):
    model = tiny("llama", **WIDE)
    structure = structure_of(model)
    meter = get_meter(model, structure, cost_model(model, structure), "latency")
    assert clock == [4, 5, 1]  # KV groups at 1..4 units, neurons on the grid, a step: the layers are alike
    for index, site in enumerate(structure.sites):
        curve = [meter.site(index, kept) for kept in range(site.units + 1)]
        assert curve[0] == 0 and all(a <= b for a, b in pairwise(curve))
    neurons = next(i for i, site in enumerate(structure.sites) if site.kind == "neuron")
    assert meter.site(neurons, 2048) > 1.2 * meter.site(neurons, 256)
    assert meter.site(neurons, 300.5) == pytest.approx((meter.site(neurons, 300) + meter.site(neurons, 301)) / 2)
    whole = total(meter, meter.dense_units)
    for of, asked in (("gated", meter.fixed + 0.6 * (whole - meter.fixed)), ("model", 0.99 * whole)):
        made = ppnet.plan(model, 0.6 if of == "gated" else 0.99, scores="magnitude", metric="latency", of=of)
        achieved = total(meter, made.counts(structure))
        assert made.asked == pytest.approx(asked) and made.achieved == pytest.approx(achieved)
        assert made.achieved <= made.asked
        steps = [
            meter.site(i, n + 1) - meter.site(i, n)
            for i, n in enumerate(made.counts(structure))
            if n < structure.sites[i].units
        ]
        assert achieved + min(steps) > asked
        assert made.dense == pytest.approx(whole) and made.extra["unit"] == "microseconds" and made.extra["device"]
        assert Plan.from_dict(json.loads(made.to_json())) == made
    absolute = ppnet.plan(model, math.floor(0.99 * whole), scores="magnitude", metric="latency")
    assert absolute.achieved <= math.floor(0.99 * whole)
    assert len(clock) == 3  # from memory
    monkeypatch.setattr(latency, "_TABLE", {})
    again = ppnet.plan(model, 0.99, scores="magnitude", metric="latency")
    assert again.dense == pytest.approx(whole) and len(clock) == 3  # from the file
    latency.CACHE.write_text("{ damaged")
    monkeypatch.setattr(latency, "_TABLE", {})
    ppnet.plan(model, 1.0, scores="magnitude", metric="latency")
    assert len(clock) == 6 and json.loads(latency.CACHE.read_text())


def test_the_table_of_latencies(clock, monkeypatch):
    model = tiny("llama")
    torch.manual_seed(4)
    expected = float(torch.rand(()))
    torch.manual_seed(4)
    ppnet.plan(model, 1.0, scores="magnitude", metric="latency")
    assert float(torch.rand(())) == expected and len(clock) == 3
    ppnet.plan(model, 1.0, scores="magnitude", metric="latency")
    assert len(clock) == 3
    latency.CACHE.unlink()  # to measure anew
    ppnet.plan(model, 1.0, scores="magnitude", metric="latency")
    assert len(clock) == 6
    stored = json.loads(latency.CACHE.read_text())
    for wrong in (float("nan"), -1.0, float("inf"), 0.0):
        latency.CACHE.write_text(json.dumps(dict.fromkeys(stored, wrong)))
        latency._TABLE.clear()
        assert 0 < ppnet.plan(model, 1.0, scores="magnitude", metric="latency").dense < float("inf")
    measured = len(clock)
    ppnet.accelerate(model)
    ppnet.plan(model, 1.0, scores="magnitude", metric="latency")
    assert len(clock) == measured + 1  # of other operators: a step of its own
    monkeypatch.setattr(latency, "CACHE", None)
    latency._TABLE.clear()
    assert ppnet.plan(model, 1.0, scores="magnitude", metric="latency").dense > 0
    monkeypatch.setattr(latency.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert latency._default_cache() is None


def test_latency_of_gates(clock):
    model = ppnet.wrap(tiny("llama", **WIDE))
    made = ppnet.plan(model, 0.6, metric="latency", of="gated")
    assert made.source == "gates" and 0 < made.u < 1 and made.achieved <= made.asked
    with ppnet.resize(model, 0.6, metric="latency", of="gated") as resized:
        assert "latency" in repr(resized) and resized.plan.kept == made.kept
    latency._TABLE.clear()
    latency.CACHE.unlink()
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: seen.append(model._ppnet_engine.force_dense)
    )
    with ppnet.resize(model, 0.7):
        ppnet.plan(model, 0.8, metric="latency", of="gated")
    handle.remove()
    assert seen and all(seen)  # it is the dense model that is timed
    with torch.device("meta"):
        meta = type(model)(tiny("llama").config)
    with pytest.raises(PPNetError, match="'latency' is measured"):
        ppnet.plan(meta, 0.5, metric="latency", scores=TAYLOR)
    assert set(METERS) == {"params", "flops", "bytes", "latency"}
