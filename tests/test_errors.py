"""Bad input (DESIGN section 8): every message names the argument and what to do, and nothing is changed.

Errors of data, checkpoints, operators and training are tested beside them (test_evaluate, test_train_data,
test_checkpoint, ops/test_rows, test_trainer).
"""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from helpers import tiny, token_ids
from refusals import gated, refused
from torch import nn

import ppnet
from ppnet.errors import PlanError, PPNetError, SizeError, UnsupportedModelError
from ppnet.gates import PuppetConfig
from ppnet.wrap import engine_of

# ---- models ----------------------------------------------------------------------------------------------------------


def compacted():
    model = tiny("llama")
    scores = {site.name: torch.arange(1.0, site.units + 1) for site in ppnet.inspect(model).structure.sites}
    scores["layers.0.neuron"] += 100
    return ppnet.compact(model, 0.6, scores=scores, allocation="global")


def electra():
    from transformers import ElectraConfig, ElectraModel

    return ElectraModel(ElectraConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))


class Quantised(nn.Linear):
    pass


def quantised():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = Quantised(32, 44)
    return model


def adapters():
    model = tiny("llama")
    model.peft_config = {"default": object()}
    return model


def unequal_groups():
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=2)
    attention = model.model.layers[2].self_attn
    attention.q_proj, attention.o_proj = nn.Linear(32, 24), nn.Linear(24, 32)
    return model


MODELS = {
    "unknown": (
        electra,
        r"model_type 'electra' is not supported\. Supported: bert, .*discover.*add an entry to ppnet/families/",
    ),
    "compacted": (compacted, r"model_type is 'ppnet_llama', so this model was already compacted.*the dense model"),
    "quantised": (
        quantised,
        r"model\.layers\.1\.mlp\.up_proj is a test_errors\.Quantised; only .* Dequantise the model",
    ),
    "adapters": (adapters, r"PEFT adapters are attached.*merge_and_unload\(\)"),
    "unequal": (unequal_groups, r"model\.layers\.2\.self_attn has 3 query heads for 2 KV heads.*same number"),
}


@pytest.mark.parametrize(
    "call", [ppnet.wrap, ppnet.inspect, lambda m: ppnet.plan(m, 0.5), lambda m: ppnet.compact(m, 0.5)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_gated(kind, call):
    build, message = MODELS[kind]
    model = build()
    with refused(model, UnsupportedModelError, message):
        call(model)


def test_a_module_without_a_config():
    with pytest.raises(UnsupportedModelError, match=r"Linear has no config\.model_type; ppnet needs a Hugging Face"):
        ppnet.wrap(nn.Linear(2, 2))


def test_a_gated_model_is_not_gated_again():
    model = gated()
    with refused(model, UnsupportedModelError, r"LlamaForCausalLM is already gated.*ppnet\.unwrap\(model\) first"):
        ppnet.wrap(model)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny("llama")(ids).logits)


@pytest.mark.parametrize("call", [lambda m: ppnet.resize(m, 0.5), ppnet.size_curve, ppnet.unwrap])
def test_a_model_without_gates(call):
    model = tiny("llama")
    with refused(model, UnsupportedModelError, r"LlamaForCausalLM carries no gates; call ppnet\.wrap\(model\) first"):
        call(model)


def test_an_unknown_importance_stops_before_the_model_is_touched():
    model = tiny("llama")
    with refused(model, PPNetError, r"importance: 'norm' is not known; use one of row_norm, scale_free"):
        ppnet.wrap(model, PuppetConfig(importance="norm"))
    ppnet.wrap(model)


@pytest.mark.parametrize("config", [{}, {"penalty": 1.0}, "paper"])
def test_options_that_are_no_config(config):
    model = tiny("llama")
    with refused(model, PPNetError, rf"config: a {type(config).__name__}; give a ppnet\.PuppetConfig"):
        ppnet.wrap(model, config)


# ---- options of gates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("control_points", 10.0, "an integer"),
        ("align", "8", "an integer"),
        ("seed", True, "an integer"),
        ("seed", None, "an integer"),
        ("penalty", math.inf, "a finite number or None"),
        ("temperature", math.nan, "a finite number"),
        ("gate_lr", "fast", "a finite number or None"),
        ("distill", True, "a finite number or None"),
        ("lambda_rate", [0.5], "a finite number or None"),
        ("amplitudes", 1, "True or False"),
        ("pin_dense", "no", "True or False or None"),
        ("preset", ["paper"], "a string"),
        ("importance", 3, "a string or None"),
        ("hierarchy", None, "a string"),
    ],
)
def test_options_of_another_type(name, value, allowed):
    with pytest.raises(PPNetError) as error:
        PuppetConfig(**{name: value})
    assert str(error.value) == f"{name}: {value!r} must be {allowed}."


@pytest.mark.parametrize("kinds", ["neuron", 3, None])
def test_kinds_are_a_tuple(kinds):
    with pytest.raises(PPNetError, match=r"kinds: .* is a (str|int|NoneType); give a tuple, e\.g\. \('neuron',\)"):
        PuppetConfig(kinds=kinds)


def test_numbers_of_other_libraries_are_stored_as_pythons_own():
    config = PuppetConfig(seed=torch.arange(3).numpy()[2], penalty=torch.ones(1).numpy()[0], temperature=1)
    assert config == PuppetConfig(seed=2, penalty=1.0, temperature=1.0)
    assert PuppetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- sizes -----------------------------------------------------------------------------------------------------------

DENSE = sum(p.numel() for p in tiny("llama").parameters())
CALLS = {
    "plan": (tiny, partial(ppnet.plan, scores="magnitude")),
    "plan gated": (lambda name: gated(), ppnet.plan),
    "resize": (lambda name: gated(), ppnet.resize),
    "compact": (tiny, partial(ppnet.compact, scores="magnitude")),
}
calls = pytest.mark.parametrize("build, call", CALLS.values(), ids=CALLS)


@calls
@pytest.mark.parametrize(
    "size", [math.nan, math.inf, -math.inf, 0, 0.0, -0.5, True, False, "0.5", [0.5], 1j], ids=lambda size: repr(size)
)
def test_sizes_that_are_no_size(build, call, size):
    model = build("llama")
    with refused(
        model, SizeError, r"size: .* must be a positive finite number \(a fraction <= 1, or an absolute params\)"
    ):
        call(model, size)


@calls
def test_sizes_that_cannot_be_met(build, call):
    model = build("llama")
    report = ppnet.inspect(model)
    floor, gated_dense = report.smallest, (report.costs.dense - report.costs.fixed).params
    message = rf"size: .* params is not possible; the smallest is {floor.params:,} \(0\.\d+ of dense, {DENSE:,}\)"
    for size in (0.01, floor.params - 1):
        with refused(model, SizeError, message):
            call(model, size)
    with refused(model, SizeError, rf"the smallest is {floor.flops:,} .*Ask for at least that, or gate more kinds"):
        call(model, 2, metric="flops")
    with refused(
        model, SizeError, rf"size: {DENSE + 1:,} params is above the dense model's {DENSE:,}; ask for at most"
    ):
        call(model, DENSE + 1)
    with refused(model, SizeError, rf"above the dense gated's {gated_dense:,}"):
        call(model, gated_dense + 1, of="gated")
    call(model, floor.params)
    call(model, DENSE)


@calls
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"metric": "time"}, PPNetError, r"metric: 'time' is not known; use one of 'params', 'flops', 'bytes'"),
        ({"of": "layers"}, PPNetError, r"of: 'layers' is not known; use 'model' or 'gated'"),
        ({"allocation": "best"}, PlanError, r"allocation: 'best' is not known; use one of uniform, global"),
        (
            {"multiple_of": {"head": 2}},
            PlanError,
            r"multiple_of: \{'head': 2\} must map one of \['kv_group', 'neuron'\]",
        ),
        ({"multiple_of": {"neuron": 0}}, PlanError, r"multiple_of: \{'neuron': 0\} must map .* to an integer >= 1"),
        ({"multiple_of": {"neuron": 8.0}}, PlanError, r"multiple_of: \{'neuron': 8\.0\} must map"),
        ({"scores": "stranger"}, PlanError, r"scores: \['layers\.9\.neuron'\] are no sites of this model"),
        ({"scores": {}}, PlanError, r"scores: no entry for site 'layers\.0\.kv_group'; give one score per unit"),
        ({"scores": "short"}, PlanError, r"scores: 'layers\.2\.neuron' needs 44 finite scores, got 43 values"),
        ({"scores": "nan"}, PlanError, r"scores: .* needs 44 finite scores, got 44 values, 44 of"),
    ],
)
def test_options_of_sizes(build, call, options, error, message):
    model = build("llama")
    if isinstance(options.get("scores"), str):
        scores = {site.name: torch.ones(site.units) for site in ppnet.inspect(model).structure.sites}
        last = scores["layers.2.neuron"]
        if options["scores"] == "stranger":
            scores["layers.9.neuron"] = last
        else:
            scores["layers.2.neuron"] = last[:43] if options["scores"] == "short" else last * math.nan
        options = {"scores": scores}
    with refused(model, error, message):
        call(model, 0.6, **options)


@pytest.mark.parametrize("options", [{"metric": "flops"}, {"of": "gated"}, {"multiple_of": {"neuron": 8}}, {"foo": 3}])
def test_options_beside_a_plan_are_refused(options):
    model = gated()
    (name,) = options
    for size, reason in ((ppnet.plan(model, 0.5), "size is already a Plan"), (None, "size=None resets")):
        ppnet.resize(model, 0.7)
        with refused(model, PPNetError, rf"^{name}: only used to make a plan from a size; {reason}, so leave it out"):
            ppnet.resize(model, size, **options)
        ppnet.resize(model, size, "params", of="model")


def poisoned(model, name, value):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "build, options", [(gated, {}), (lambda: tiny("llama"), {"scores": "magnitude"})], ids=["gates", "magnitude"]
)
def test_weights_that_are_not_finite_are_not_ranked(build, options, value):
    model = poisoned(build(), "model.layers.1.mlp.up_proj.weight", value)
    message = r"model: the (gates|weights) of site 'layers\.1\.neuron' cannot be ranked: NaN or infinite for \d+ of 44"
    for call in (ppnet.plan, ppnet.compact):
        with pytest.raises(PlanError, match=message):
            call(model, 0.6, **options)


def test_gates_that_are_not_finite_rank_nothing():
    model = poisoned(gated(), "puppet.theta", math.nan)
    for call in (lambda m: ppnet.plan(m, 0.6), lambda m: ppnet.resize(m, 0.6), ppnet.size_curve):
        with pytest.raises(PlanError, match=r"the gates of site 'layers\.2\.neuron' .* 44 of 44 units"):
            call(model)
    assert engine_of(model).fixed is None


def test_a_size_curve_needs_two_points():
    with pytest.raises(PPNetError, match=r"points: 1 must be at least 2"):
        ppnet.size_curve(gated(), points=1)
