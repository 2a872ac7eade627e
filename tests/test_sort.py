"""Sorting: the function stays, sizes become prefixes of every layer and views of its weights, old plans are refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers import DECODERS, MODEL_TYPES, generate, logits, tiny, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import relative
from refusals import refused
from scoring import permute

import ppnet
from ppnet.errors import PlanError, PPNetError, UnsupportedModelError
from ppnet.evaluate.memory import peak_bytes
from ppnet.families import structure_of
from ppnet.plan import Plan
from ppnet.units import ORDER, leaf_module
from ppnet.wrap import engine_of, is_accelerated

SIZES = (0.8, 0.65, 0.5)
# Odd numbers of everything that has units; head_dim keeps the heads' width.
ODD = {
    "gpt2": {"n_inner": 37, "n_head": 4},
    "bert": {"intermediate_size": 37},
    None: {"intermediate_size": 37, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
}


def trained(model, config=None, seed=5, **options):
    """Gates on a model whose numbers are random, as after training."""
    ppnet.wrap(model, config, **options)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    return model


def pair(model, *args, **options):
    """A model, and a copy that is sorted."""
    return model, ppnet.sort_(copy.deepcopy(model), *args, **options)


def is_prefix(plan):
    return all(units == list(range(len(units))) for units in plan.kept.values())


def assert_same_sizes(model, other, ids, tolerance=1e-5, sizes=SIZES, **options):
    for size in sizes:
        with ppnet.resize(model, size, **options) as left, ppnet.resize(other, size, **options) as right:
            assert left.plan.cost == right.plan.cost and is_prefix(right.plan) and not is_prefix(left.plan)
            assert left.plan.u == pytest.approx(right.plan.u, abs=1e-5)
            expected = logits(model, ids)
            assert relative(expected, logits(other, ids)) < tolerance
            assert relative(logits(model.eval(), token_ids(3, 17, seed=2)), expected) > 1e-3


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_function_stays_at_every_size(model_type, tied, odd):
    changes = ODD.get(model_type, ODD[None]) if odd else {}
    model = tiny(model_type, dtype=torch.float64, tie_word_embeddings=tied, **changes)
    model, other = pair(trained(model))
    ids = token_ids()
    assert other.puppet.structure.order and not model.puppet.structure.order
    assert relative(logits(model, ids), logits(other, ids)) < 1e-12
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert_same_sizes(model, other, ids)
    assert other.get_output_embeddings() is None or tied == (
        other.get_output_embeddings().weight is other.get_input_embeddings().weight
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_units_are_moved_and_nothing_else(model_type):
    """To the bit, against a permutation of the weights that shares no code; the gates' numbers follow."""
    model, other = pair(trained(tiny(model_type)))
    keys = model.puppet.order_key().split([site.units for site in model.puppet.structure.sites])
    expected = copy.deepcopy(model)
    for name in ("s_gate", "s_out"):
        parts = getattr(model.puppet, name).split([len(key) for key in keys])
        moved = [part[key.argsort(descending=True)] for part, key in zip(parts, keys, strict=True)]
        assert torch.equal(getattr(other.puppet, name), torch.cat(moved))
    for site, key in zip(model.puppet.structure.sites, keys, strict=True):
        permute(expected, site, key.argsort(descending=True))
    for name, tensor in expected.state_dict().items():
        if name not in ("puppet.s_gate", "puppet.s_out"):
            assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("kinds", [("neuron",), ("kv_group",)])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_options_of_gates(preset, kinds):
    scores = ppnet.score(tiny("qwen2"), method="random")
    for config, options in (
        (ppnet.PuppetConfig(preset=preset, kinds=kinds, hierarchy="pooled"), {}),
        (ppnet.PuppetConfig(kinds=kinds, amplitudes=False), {}),
        (ppnet.PuppetConfig(kinds=kinds), {"scores": scores}),
    ):
        model, other = pair(trained(tiny("qwen2"), config, **options))
        assert relative(logits(model, token_ids()), logits(other, token_ids())) < 1e-5
        assert_same_sizes(model, other, token_ids(), sizes=(0.9,))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_without_gates(model_type):
    model = tiny(model_type, dtype=torch.float64)
    scores = ppnet.score(model, method="magnitude")
    model, other = pair(model, scores)
    assert relative(logits(model, token_ids()), logits(other, token_ids())) < 1e-12
    for size in SIZES:
        small = ppnet.compact(model, size, scores=scores)
        again = ppnet.compact(other, size, scores="position")
        assert is_prefix(again.ppnet_plan) and again.ppnet_plan.cost == small.ppnet_plan.cost
        assert relative(logits(small, token_ids()), logits(again, token_ids())) < 1e-12
    assert (
        relative(logits(other, token_ids()), logits(ppnet.sort_(copy.deepcopy(model), dict(scores)), token_ids())) == 0
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sorting_twice_changes_nothing(model_type):
    _, once = pair(trained(tiny(model_type)))
    _, twice = pair(once)
    assert getattr(once.config, ORDER) == getattr(twice.config, ORDER)
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())


@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 1000), st.floats(0.3, 1.0), st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_widths(neurons, groups, seed, size, equal):
    """Also where units are equal, which nothing tells apart."""
    shape = {
        "hidden_size": 24,
        "intermediate_size": neurons,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": groups,
    }
    model = tiny("llama", seed=seed, num_hidden_layers=2, **shape)
    if equal:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        ppnet.wrap(model)
    else:
        trained(model, seed=seed)
    before = copy.deepcopy(model)
    ppnet.sort_(model)
    assert (getattr(model.config, ORDER, None) is None) == all(
        torch.equal(value, model.state_dict()[name]) for name, value in before.state_dict().items()
    )
    floor = 1.001 * before.puppet.costs.total([1] * 4).params
    asked = min(max(size * before.puppet.costs.dense.params, floor), before.puppet.costs.dense.params)
    with ppnet.resize(before, asked), ppnet.resize(model, asked) as resized:
        assert is_prefix(resized.plan)
        assert relative(logits(before, token_ids()), logits(model, token_ids())) < 2e-5


# ---- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_size_is_a_view_of_the_weights(model_type):
    model = ppnet.sort_(trained(tiny(model_type)))
    engine = engine_of(model)
    for size in (*SIZES, 0.95):
        ppnet.resize(model, size)
        for site in engine.sites:
            for leaf in site.leaves:
                module, bound = leaf_module(model, leaf), engine.binding(leaf)
                assert bound.weight.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
                assert bound.weight.data_ptr() == module.weight.data_ptr()
                assert bound.bias is None or bound.bias.data_ptr() == module.bias.data_ptr()
    ppnet.resize(model, None)
    assert all(engine.binding(leaf).weight is None for site in engine.sites for leaf in site.leaves)


def test_a_resize_allocates_next_to_nothing():
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
    model, other = pair(trained(tiny("llama", **wide)))
    plans = [ppnet.plan(one, 0.6) for one in (model, other)]
    gathered, view = (
        peak_bytes(lambda m=m, p=p: ppnet.resize(m, p)) for m, p in zip((model, other), plans, strict=True)
    )
    kept = plans[0].cost.bytes - model.puppet.costs.fixed.bytes
    assert gathered > 0.9 * kept
    assert view < 0.02 * kept
    # Nor does a pass through them: activations alone.
    assert peak_bytes(lambda: logits(other, token_ids(1, 1))) < 0.02 * kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_views_in_half_precision(model_type, dtype):
    model = trained(tiny(model_type, dtype=dtype))
    other = ppnet.sort_(copy.deepcopy(model))
    exact = ppnet.sort_(copy.deepcopy(model).float())
    for size in SIZES:
        plan = ppnet.plan(other, size)
        plans = [ppnet.plan(model, size), plan, Plan.from_dict({**plan.to_dict(), "order": exact.config.ppnet_order})]
        assert [p.cost for p in plans] == [plan.cost] * 3
        found = []
        for one, its in zip((model, other, exact), plans, strict=True):
            with ppnet.resize(one, its):
                found.append(logits(one, token_ids()))
        assert relative(found[2], found[1]) < 2 * relative(found[2], found[0]) + torch.finfo(dtype).eps


@pytest.mark.parametrize("model_type", DECODERS)
def test_generate_with_a_cache(model_type):
    model, other = pair(trained(tiny(model_type)))
    ids = token_ids(2, 7)
    for size in (None, *SIZES):
        with ppnet.resize(model, size), ppnet.resize(other, size):
            expected = generate(model, ids)
            assert torch.equal(generate(other, ids), expected)
            assert torch.equal(generate(other, ids, cache_implementation="static"), expected)


def test_views_follow_the_weights():
    model = ppnet.sort_(trained(tiny("gpt2")))
    ppnet.resize(model, 0.6)
    before = logits(model, token_ids())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(1.5)
    expected = logits(copy.deepcopy(model), token_ids())
    assert torch.equal(logits(model, token_ids()), expected) and not torch.equal(before, expected)
    assert relative(expected, logits(model.double(), token_ids())) < 1e-5


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_of_a_size_and_of_draws(model_type):
    config = ppnet.PuppetConfig(gate_gradient="exact", dense_fraction=0.0)
    model, other = pair(trained(tiny(model_type, dtype=torch.float64), config))
    sites = model.puppet.structure.sites
    orders = [key.argsort(descending=True) for key in model.puppet.order_key().split([site.units for site in sites])]
    with ppnet.resize(model, 0.6), ppnet.resize(other, 0.6):
        expected = logits(other, token_ids())
        for one in (model, other):
            one(token_ids()).logits.square().mean().backward()
        assert relative(expected, logits(other, token_ids())) == 0
        assert relative(other(token_ids()).logits, expected) < 1e-6
    for site, order in zip(sites, orders, strict=True):
        permute(grads := grad_model(model), site, order)
        for leaf in site.leaves:
            left, right = leaf_module(grads, leaf).weight, leaf_module(other, leaf).weight.grad
            assert relative(left, right) < 1e-5
    # A backward whose pass was drawn before a size was bound leaves that size as it is.
    loss = other.train()(token_ids()).logits.square().mean()
    with ppnet.resize(other.eval(), 0.6):
        loss.backward()
        assert torch.equal(logits(other, token_ids()), expected)
    assert other.puppet.s_gate.grad.abs().sum() > 0


def grad_model(model):
    """A model whose parameters are the gradients of another's."""
    plain = ppnet.unwrap(copy.deepcopy(model))
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=False):
        mine.data = theirs.grad.clone()
    return plain


# ---- beside the other verbs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_compact_of_a_sorted_model(model_type):
    model, other = pair(trained(tiny(model_type)))
    for size in SIZES:
        small, again = ppnet.compact(model, size), ppnet.compact(other, size)
        assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
        assert relative(logits(small, token_ids()), logits(again, token_ids())) < 1e-5


PLAIN = """
import sys, torch, transformers
model = transformers.{auto}.from_pretrained({folder!r}).eval()
with torch.no_grad():
    torch.save(model(torch.load({folder!r} + "/ids.pt")).logits, {folder!r} + "/logits.pt")
assert not any(name.startswith("ppnet") for name in sys.modules)
"""


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert"])
def test_saved_and_reloaded(model_type, tmp_path):
    model, other = pair(trained(tiny(model_type)))
    folder = tmp_path / "sorted"
    ppnet.save(other, folder)
    loaded = ppnet.load(folder).eval()
    assert torch.equal(logits(loaded, token_ids()), logits(other, token_ids()))
    assert loaded.puppet.structure.order == other.puppet.structure.order
    assert_same_sizes(model, loaded, token_ids(), sizes=(0.6,))
    plan = ppnet.plan(other, 0.6)
    plan.save(tmp_path / "plan.json")
    with ppnet.resize(loaded, Plan.load(tmp_path / "plan.json")) as resized, ppnet.resize(other, plan):
        assert resized.plan == plan
        assert relative(logits(other, token_ids()), logits(loaded, token_ids())) < 1e-6
    torch.save(token_ids(), folder / "ids.pt")
    auto = "AutoModelForMaskedLM" if model_type == "bert" else "AutoModelForCausalLM"
    code = PLAIN.format(auto=auto, folder=str(folder))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert relative(logits(other, token_ids()), torch.load(folder / "logits.pt")) < 1e-6


def test_plans_of_another_order_are_refused():
    model = trained(tiny("llama"))
    old, plain = ppnet.plan(model, 0.6), ppnet.unwrap(copy.deepcopy(model))
    ppnet.resize(model, old)
    inner = ppnet.resize(model, 0.5)
    with pytest.raises(PlanError, match="plan: was made for units in their first order"), inner:
        ppnet.resize(model, None)
        ppnet.sort_(model)  # leaving the context would restore the size that was set before
    assert engine_of(model).fixed is None
    for call in (ppnet.resize, ppnet.compact):
        with refused(model, PlanError, "so its indices name other units; make a plan for this model"):
            call(model, old)
    new = ppnet.plan(model, 0.6)
    assert new.order == model.config.ppnet_order and old.order == "" and "order" not in old.to_dict()
    assert Plan.from_dict(new.to_dict()) == new
    with pytest.raises(PlanError, match=f"units in order {new.order}, those of the model are in their first order"):
        ppnet.resize(ppnet.wrap(plain), new)


def test_scores_of_another_order_are_refused(tmp_path):
    model = tiny("llama")
    old = ppnet.score(model, method="magnitude")
    ppnet.sort_(model, old)
    for call in (ppnet.plan, ppnet.compact):
        with refused(model, PlanError, "scores: ppnet.sort_ has put the model's units into another order"):
            call(model, 0.6, scores=old)
    with refused(model, PPNetError, "sft: ppnet.sort_ has put"):
        ppnet.score(model, token_ids(), "mama", sft=old)
    new = ppnet.score(model, method="magnitude")
    new.save(tmp_path / "scores.safetensors")
    assert ppnet.Scores.load(tmp_path / "scores.safetensors").order == new.order == model.config.ppnet_order
    with pytest.raises(PPNetError, match="are not of the same units"):
        ppnet.Scores.combine([new, old])


def test_an_accelerated_model_is_sorted_in_place():
    model, ids = trained(tiny("llama")), token_ids(1, 7)
    expected = {}
    for size in (None, *SIZES):
        with ppnet.resize(model, size):
            expected[size] = generate(model, ids)
    ppnet.sort_(ppnet.accelerate(model))
    for _ in range(2):
        for size, tokens in expected.items():
            with ppnet.resize(model, size) as resized:
                assert torch.equal(generate(model, ids), tokens)
                assert size is None or is_prefix(resized.plan)
        if is_accelerated(model):
            ppnet.decelerate(model)
    plain = ppnet.accelerate(tiny("llama"))
    expected = generate(plain, ids)
    assert torch.equal(generate(ppnet.sort_(plain, "magnitude"), ids), expected)


def test_refusals():
    model = tiny("llama")
    with refused(model, PlanError, "scores: None, and this LlamaForCausalLM has no gates"):
        ppnet.sort_(model)
    wrapped = trained(tiny("llama"))
    with ppnet.resize(wrapped, 0.6), refused(wrapped, PlanError, "model: a size is set"):
        ppnet.sort_(wrapped)
    small = ppnet.compact(wrapped, 0.6)
    with refused(small, UnsupportedModelError, "was already compacted"):
        ppnet.sort_(small, "magnitude")
    shared = tiny("llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with refused(shared, UnsupportedModelError, r"layers\.1\.mlp\.up_proj and model\.layers\.0\.mlp\.up_proj share"):
        ppnet.sort_(shared, "magnitude")
    with pytest.raises(UnsupportedModelError, match="is on the meta device"):
        ppnet.sort_(tiny("llama").to("meta"), "magnitude")
    with torch.no_grad():
        wrapped.puppet.s_gate[0] = torch.nan
    with pytest.raises(PlanError, match="cannot be ranked"):
        ppnet.sort_(wrapped)


def test_position_ranks_by_place():
    model = tiny("gpt2")
    assert is_prefix(ppnet.plan(model, 0.6, scores="position"))
    names = [site.name for site in structure_of(model).sites]
    assert list(ppnet.score(model, method="position")) == names
