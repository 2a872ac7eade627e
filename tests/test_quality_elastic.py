"""benchmarks/quality elastic: anchors of the asked cost, training that is counted, studies that go on after a kill."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny, token_ids

import ppnet
from ppnet.cost import cost_model
from ppnet.families import structure_of
from ppnet.wrap import engine_of, wrap

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))


class Tokenizer:
    def __len__(self):
        return 96


@pytest.fixture
def study(monkeypatch, tmp_path):
    """A study of a model of 2 layers, 6 steps long, on random tokens."""
    import elastic
    import recipe as recipes
    import text
    from store import Rows

    recipe = recipes.Recipe(width=32, neurons=96, layers=2, heads=8, length=16, batch=4, steps=6, retrofit_steps=3,
                            warmup=2, calibration=8)  # fmt: skip
    ids = token_ids(batch=70, length=16)
    monkeypatch.setitem(elastic.SUBJECTS, "tiny", recipe)
    monkeypatch.setattr(elastic.text, "load", lambda name, length: text.Text(Tokenizer(), ids[:64], ids[64:]))
    rows = Rows(tmp_path / "elastic-tiny.jsonl", {"subject": "tiny"})
    return lambda: elastic.Study("tiny", Rows(rows.path, {"subject": "tiny"}), tmp_path / "models", 0)


def test_blocks_go_through_every_epoch_once():
    from text import Text

    ids = torch.arange(10).view(10, 1).repeat(1, 4)
    data = Text(None, ids, ids)
    seen = [int(block["input_ids"][0]) for block in data.blocks(3, 0, 25)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert [int(block["input_ids"][0]) for block in data.blocks(3, 7, 12)] == seen[7:19]


def test_a_model_alone_costs_its_fraction():
    from recipe import FRACTIONS, SUBJECTS, new_model, widths

    recipe = SUBJECTS["tiny"]
    whole = new_model(recipe, 512, 0)
    gated = cost_model(whole, structure_of(whole)).dense.flops - fixed(whole)
    for fraction in FRACTIONS:
        small = new_model(recipe, 512, 0, *widths(recipe, fraction))
        own = cost_model(small, structure_of(small)).dense.flops - fixed(whole)
        neuron = 3 / (4 * recipe.width + 3 * recipe.neurons)
        assert own / gated == pytest.approx(fraction, abs=0.51 * neuron)


def fixed(model):
    structure = structure_of(model)
    return cost_model(model, structure).total([0] * len(structure.sites)).flops


def test_training_flops_are_those_of_the_kept_units():
    from recipe import Meter

    model = wrap(tiny("llama"), ppnet.PuppetConfig(dense_fraction=0.0, gate_gradient="exact")).train()
    meter, ids = Meter(model), token_ids(batch=2, length=8)
    kept = []
    handle = model.register_forward_pre_hook(lambda *_: kept.extend(len(a.computed) for a in engine_of(model).active))
    model(ids)
    handle.remove()
    costs = cost_model(model, model.puppet.structure)
    drawn = 16 * (3 * costs.total(kept).flops + costs.dense.flops - costs.total(kept).flops)
    assert meter.flops == pytest.approx(drawn)
    with model.puppet.dense(), torch.no_grad():
        model(ids)
    assert meter.flops == pytest.approx(drawn + 16 * costs.dense.flops)


def test_prefixes_are_the_first_units_of_every_layer(study):
    import nested

    model = tiny("llama")
    plan = nested.first_units(model, 0.5)
    assert all(units == list(range(len(units))) for units in plan.kept.values())
    sites = {site.name: site.units for site in structure_of(model).sites}
    assert all(0.2 < len(units) / sites[name] < 0.8 for name, units in plan.kept.items())


def test_runs_of_every_kind_and_a_study_that_goes_on(study, tmp_path):
    from elastic_table import plot, table
    from recipe import FRACTIONS
    from store import read

    names = ["dense", "alone", "longer", "matformer", "sandwich", "mama", "mama healed", "sparsegpt",
             "paper", "retrofit prefix sandwich 1", "retrofit lora", "retrofit gates alone", "scratch",
             "retrofit prefix healed 1/4"]  # fmt: skip
    for name in names:
        study().run(name)
    recipe, rows = read(tmp_path / "elastic-tiny.jsonl")
    before = (tmp_path / "elastic-tiny.jsonl").read_text()
    for name in names:
        study().run(name)
    assert (tmp_path / "elastic-tiny.jsonl").read_text() == before
    for name in names[3:]:
        sizes = {row["fraction"] for row in rows if row["run"] == name and "fraction" in row}
        assert sizes >= set(FRACTIONS[1:]), name
    assert all(math.isfinite(row["value"]) for row in rows if "fraction" in row)
    taken = {row["run"]: row for row in rows if row.get("what") == "training"}
    assert taken["retrofit prefix sandwich 1"]["training_tokens"] == 3 * 4 * 16
    assert taken["scratch"]["training_tokens"] == taken["dense"]["training_tokens"] == 6 * 4 * 16
    assert taken["alone 0.3"]["training_flops"] < 0.8 * taken["dense"]["training_flops"]
    assert taken["sandwich"]["training_flops"] > 1.5 * taken["dense"]["training_flops"]
    ungated = next(row["value"] for row in rows if row["run"] == "dense" and row.get("fraction") == 1.0)
    retrofit = next(row for row in rows if row["run"] == "longer" and "fraction" in row)
    assert retrofit["value"] != ungated
    recipe |= {
        name: 1 for name in ("width", "neurons", "layers", "heads", "steps", "batch", "length", "retrofit_steps")
    }
    text = table(recipe, rows, FRACTIONS)
    assert "| alone (1) |" in text and "| mama healed (1) |" in text and "| sandwich (1) |" in text
    plot(recipe, rows, FRACTIONS, tmp_path / "elastic.png")
    assert (tmp_path / "elastic.png").stat().st_size > 10_000


def test_a_trained_model_can_stand_for_the_dense_one(study, monkeypatch, tmp_path):
    import dataclasses

    import elastic
    from elastic_table import table
    from recipe import new_model
    from store import read

    own = dataclasses.replace(elastic.SUBJECTS["tiny"], pretrained="stories260K")
    monkeypatch.setitem(elastic.SUBJECTS, "tiny", own)
    monkeypatch.setattr(elastic, "pretrained", lambda name, folder: new_model(own, 96, 7).eval())
    for name in ("dense", "retrofit prefix"):
        study().run(name)
    recipe, rows = read(tmp_path / "elastic-tiny.jsonl")
    dense = next(row["value"] for row in rows if row["run"] == "dense")
    assert dense == pytest.approx(study().nll(new_model(own, 96, 7).eval()))
    text = table({**own.about(), **recipe}, rows, own.fractions)
    assert "a trained model, retrofits 192 tokens more" in text and "| retrofit prefix (1) |" in text


def test_the_area_is_that_of_the_curve():
    from elastic_table import area

    assert area({1.0: 1.5, 0.1: 1.5}) == pytest.approx(1.5)
    assert area({1.0: 1.0, 0.1: 2.0, 0.01: 3.0}) == pytest.approx(2.0)


def test_uncertainty_measures_draws_of_trained_gates(study, monkeypatch, tmp_path):
    import uncertainty
    from store import Rows, read

    monkeypatch.setattr(uncertainty, "DRAWS", 4)
    monkeypatch.setattr(uncertainty, "FRESH", 6)
    rows = Rows(tmp_path / "uncertainty.jsonl", {"subject": "tiny", "draws": 4, "fresh": 6, "level": 0.9})
    for _ in range(2):
        uncertainty.measure(study(), "retrofit prefix", rows)
    assert [row["fraction"] for row in rows.rows] == list(uncertainty.FRACTIONS)
    for row in rows.rows:
        # A mixture is never worse than its parts on average (Jensen), by as much as they disagree.
        assert row["average_nll"] <= row["draws_nll"] and row["mutual_information"] > 0
        assert {6 * row["covered_params"], 6 * row["covered_perplexity"]} <= set(range(7))
    assert "| retrofit prefix | 0.3 |" in "\n".join(uncertainty.table(*read(rows.path)))
