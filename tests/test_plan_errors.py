"""Plans that do not fit, and plan files that are damaged or foreign."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers import tiny
from refusals import gated, refused

import ppnet
from ppnet.errors import CheckpointError, PlanError
from ppnet.plan import Plan


def changed(plan, site, units):
    return replace(plan, kept={**plan.kept, site: units})


PLANS = {
    "another type": (lambda p: replace(p, model_type="qwen2"), r"made for model_type 'qwen2', the model is 'llama'"),
    "another width": (
        lambda p: replace(p, dense_units={**p.dense_units, "layers.0.neuron": 48}),
        r"dense widths differ from the model's, first at .*layers\.0\.neuron",
    ),
    "another depth": (
        lambda p: replace(p, dense_units={**p.dense_units, "layers.3.neuron": 44}),
        r"dense widths differ from the model's, first at .*layers\.3\.neuron",
    ),
    "empty": (
        lambda p: changed(p, "layers.1.kv_group", []),
        r"keeps no unit of layers\.1\.kv_group; at least one unit",
    ),
    "missing": (
        lambda p: replace(p, kept={k: v for k, v in p.kept.items() if k != "layers.1.neuron"}),
        r"keeps no unit of layers\.1\.neuron",
    ),
    "stranger": (
        lambda p: changed(p, "layers.9.neuron", [0]),
        r"keeps units of \['layers\.9\.neuron'\], which the model",
    ),
    "unsorted": (
        lambda p: changed(p, "layers.0.neuron", [3, 1]),
        r"layers\.0\.neuron must hold sorted, unique indices",
    ),
    "repeated": (lambda p: changed(p, "layers.0.neuron", [3, 3]), r"sorted, unique indices in \[0, 44\); got \[3, 3\]"),
    "negative": (lambda p: changed(p, "layers.0.neuron", [-1, 3]), r"sorted, unique indices in \[0, 44\)"),
    "beyond": (lambda p: changed(p, "layers.0.kv_group", [0, 4]), r"layers\.0\.kv_group must hold .* in \[0, 4\)"),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("call", [ppnet.resize, ppnet.compact])
def test_plans_that_do_not_fit(call, kind):
    change, message = PLANS[kind]
    model = gated()
    ppnet.resize(model, 0.7)
    bad = change(ppnet.plan(model, 0.5))
    with refused(model, PlanError, message):
        call(model, bad)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.json"
    ppnet.plan(tiny("llama"), 0.5, scores="magnitude").save(path)
    return path


def edited(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_plan_files(saved):
    text = saved.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 1):
        saved.write_text(text[:length])
        with pytest.raises(CheckpointError, match=r"plan: cannot read .*plan\.json: "):
            Plan.load(saved)
    saved.write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(CheckpointError, match=r"plan: cannot read .*plan\.json: .*codec can't decode"):
        Plan.load(saved)
    with pytest.raises(CheckpointError, match=r"plan: cannot read .*absent\.json: .*No such file"):
        Plan.load(saved.with_name("absent.json"))
    for foreign, found in (("[1, 2]", "'list'"), ('{"format": "other/3"}', "'other/3'"), ("{}", "None")):
        saved.write_text(foreign)
        with pytest.raises(CheckpointError, match=rf"not a ppnet plan \(format {found}, expected 'ppnet\.plan/1'\)"):
            Plan.load(saved)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"kept": {"layers.0.neuron": ["x"]}}, "ValueError"),
        ({"kept": {"layers.0.neuron": 3}}, "TypeError"),
        ({"kept": [1]}, "AttributeError"),
        ({"cost": {"params": 1}}, "TypeError"),
        ({"u": "high"}, "ValueError"),
    ],
)
def test_damaged_plan_fields(saved, fields, word):
    edited(saved, **fields)
    with pytest.raises(CheckpointError, match=rf"plan: incomplete or damaged: {word}"):
        Plan.load(saved)


@pytest.mark.parametrize("field", ["model_type", "kept", "dense_units", "cost", "dense_cost", "asked", "metric", "u"])
def test_missing_plan_fields(saved, field):
    data = json.loads(saved.read_text())
    del data[field]
    with pytest.raises(CheckpointError, match=rf"plan: incomplete or damaged: KeyError\('{field}'\)"):
        Plan.from_dict(data)
