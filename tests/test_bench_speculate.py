"""The wide model of benchmarks/bench_speculate.py is the trained one's function, at every size; the benchmark runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import logits, tiny, token_ids
from plans import relative
from test_sort import trained

import ppnet


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def llama():
    plain = {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": 8, "tie_word_embeddings": True}
    model = trained(tiny("llama", **plain), scores=ppnet.score(tiny("llama", **plain), method="random"))
    return ppnet.sort_(model)


def test_the_wide_model_is_the_same_function(benchmarks):
    from speculate_model import widen

    model, ids = llama(), token_ids()
    wide = widen(model, 3, torch.float64)
    assert wide.model.layers[0].mlp.up_proj.weight.shape == (132, 96)
    assert relative(logits(model, ids).double(), logits(wide, ids)) < 1e-5
    plan = ppnet.plan(wide, 0.5, of="gated", multiple_of={"neuron": 3, "kv_group": 3})
    kept = {name: [unit // 3 for unit in units[::3]] for name, units in plan.kept.items()}
    assert all(len(kept[name]) * 3 == len(units) for name, units in plan.kept.items())
    same = ppnet.Plan.from_dict(
        {**plan.to_dict(), "kept": kept, "dense_units": {n: u // 3 for n, u in plan.dense_units.items()},
         "order": model.config.ppnet_order}
    )  # fmt: skip
    with ppnet.resize(wide, plan), ppnet.resize(model, same):
        small = logits(model, ids)
        assert relative(small.double(), logits(wide, ids)) < 1e-5
    assert relative(small, logits(model, ids)) > 0.01


def test_the_benchmark_runs(benchmarks, tmp_path, monkeypatch):
    import bench_speculate

    ppnet.save(llama(), tmp_path / "model")
    monkeypatch.setattr(bench_speculate, "prompts", lambda count, length: [token_ids(1, 5)] * count)
    monkeypatch.setattr(bench_speculate, "SIZES", (0.6, 0.9))
    out = tmp_path / "result.json"
    options = f"--model {tmp_path / 'model'} --factor 2 --rounds 1 --prompts 1 --new 12 --passes 1 --out {out}"
    monkeypatch.setattr(sys, "argv", ["bench_speculate", *options.split()])
    bench_speculate.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["draft size, of the gated parameters"] for row in rows] == [0.6, 0.9]
    for row in rows:
        assert 0 <= row["acceptance"] <= 1 <= row["tokens per verification"] and row["x target alone"] > 0
        assert row["draft_own bytes"] < row["weights bytes"]
