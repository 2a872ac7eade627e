"""Scores as the importance inside gates: their ranks, kept through saving, training, sizes and other processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import MODEL_TYPES, tiny, token_ids
from tiny_folders import run_command, write_folders
from training import one_thread, trainer  # noqa: F401

import ppnet
from ppnet.errors import CheckpointError, PlanError, PPNetError
from ppnet.families import structure_of
from ppnet.gates import PuppetConfig


def given(model: Any, seed: int = 0) -> ppnet.Scores:
    """Random scores of any sign and scale, other in every site, without ties."""
    source = torch.Generator().manual_seed(seed)
    units = {}
    for number, site in enumerate(structure_of(model).sites):
        units[site.name] = (10.0**number) * (torch.randn(site.units, generator=source, dtype=torch.float64) - number)
    return ppnet.Scores(units, method="taylor", model_type=model.config.model_type)


def changed(scores: ppnet.Scores, function: Any) -> ppnet.Scores:
    return ppnet.Scores({k: function(v) for k, v in scores.items()}, method="taylor", model_type=scores.model_type)


def by_site(model: Any) -> list[torch.Tensor]:
    structure = model.puppet.structure
    return list(model.puppet.given_importance.split([site.units for site in structure.sites]))


def test_importance_is_the_normal_score_of_the_rank() -> None:
    """By scipy: 2 Phi(z) with z = Phi^-1((r - 1/2) / N), and r the mean rank of equal scores."""
    from scipy.stats import norm, rankdata

    model = tiny("llama")
    scores = given(model)
    tied = {name: torch.where(units > units.median(), units, units.min()) for name, units in scores.items()}
    for within in ("site", "kind"):
        for values in (dict(scores), tied):
            wrapped = ppnet.wrap(tiny("llama"), PuppetConfig(normalise_scores=within), scores=values)
            sites = wrapped.puppet.structure.sites
            for site, found in zip(sites, by_site(wrapped), strict=True):
                others = [s.name for s in sites if (s.kind if within == "kind" else s.name) in (site.kind, site.name)]
                ranks = rankdata(torch.cat([values[name] for name in others]).numpy())
                start = sum(len(values[name]) for name in others[: others.index(site.name)])
                expected = 2 * norm.cdf(norm.ppf((ranks - 0.5) / len(ranks)))[start : start + site.units]
                torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-6, atol=1e-6)
            assert wrapped.puppet.given_importance.mean() == pytest.approx(1.0, abs=1e-6)
    one = ppnet.wrap(tiny("llama", num_key_value_heads=1), PuppetConfig(kinds=("kv_group",)),
                     scores={f"layers.{i}.kv_group": [float(i)] for i in range(3)})  # fmt: skip
    assert one.puppet.given_importance.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("within", ["site", "kind"])
def test_only_the_order_counts(within: str) -> None:
    scores = given(tiny("llama"))
    importance = []
    for function in (lambda s: s, lambda s: 3 * s - 7e5, lambda s: torch.asinh(s / 100), lambda s: -s):
        model = ppnet.wrap(tiny("llama"), PuppetConfig(normalise_scores=within), scores=changed(scores, function))
        importance.append(model.puppet.given_importance)
    assert torch.equal(importance[0], importance[1]) and torch.equal(importance[0], importance[2])
    torch.testing.assert_close(importance[3], 2 - importance[0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_are_prefixes_of_the_scores(model_type: str) -> None:
    """Before training, what a site keeps at lambda is the best of its scores, and inclusion rises with the score."""
    plain = tiny(model_type)
    scores = given(plain)
    model = ppnet.wrap(plain, scores=scores)
    for u in (0.3, 0.6, 0.9):
        rho = model.puppet.inclusion(u).split([site.units for site in model.puppet.structure.sites])
        for site, part in zip(model.puppet.structure.sites, rho, strict=True):
            assert torch.equal(part.argsort(), scores[site.name].argsort())
    for size in (0.8, 0.6, 0.4):
        plan = ppnet.plan(model, size)
        assert plan.source == "gates" and not plan.is_dense()
        for name, kept in plan.kept.items():
            assert set(kept) == set(scores[name].argsort(descending=True)[: len(kept)].tolist())
    with ppnet.resize(model, 0.6) as resized:
        logits = model(token_ids()).logits
        small = ppnet.compact(model, resized.plan)
    torch.testing.assert_close(small(token_ids()).logits, logits, rtol=1e-4, atol=1e-4)


def test_kind_compares_layers_and_site_does_not() -> None:
    """Layer i's scores are far below layer i - 1's: within a kind the last layers go first."""
    scores = given(tiny("llama"))
    kept = {}
    for within in ("site", "kind"):
        model = ppnet.wrap(tiny("llama"), PuppetConfig(normalise_scores=within, kinds=("neuron",)), scores=scores)
        kept[within] = [len(units) for units in ppnet.plan(model, 0.5, of="gated").kept.values()]
    assert len(set(kept["site"])) == 1 or max(kept["site"]) - min(kept["site"]) == 1
    first, _, last = kept["kind"]
    assert first == 44 and last == 1


def test_gates_train_around_fixed_numbers_and_resume_exactly(tmp_path: Path) -> None:
    def made() -> Any:
        plain = tiny("llama")
        return ppnet.wrap(plain, PuppetConfig(lambda_warmup=3), scores=given(plain))

    whole = trainer(made(), tmp_path / "run")
    before, thresholds = whole.model.puppet.given_importance.clone(), whole.model.puppet.theta.clone()
    whole.train()
    assert torch.equal(whole.model.puppet.given_importance, before)
    assert not torch.equal(whole.model.puppet.theta, thresholds)
    plain = tiny("llama")
    resumed = trainer(ppnet.wrap(plain, PuppetConfig(lambda_warmup=3), scores=given(plain, seed=9)), tmp_path / "run")
    assert not torch.equal(resumed.model.puppet.given_importance, before)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"'puppet\.given_importance', which the model has not"):
        trainer(ppnet.wrap(tiny("llama")), tmp_path / "run").train(str(tmp_path / "run/checkpoint-4"))


FRESH = """
import json, sys, torch, ppnet
model = ppnet.load(sys.argv[1])
print(json.dumps([model.puppet.given_importance.tolist(), ppnet.plan(model, 0.6).kept, str(model.puppet.config)]))
"""


def test_a_fresh_process_needs_no_scores(tmp_path: Path) -> None:
    plain = tiny("qwen3")
    given(plain).save(tmp_path / "scores.safetensors")
    model = ppnet.wrap(plain, PuppetConfig(hierarchy="pooled", normalise_scores="kind"),
                       scores=tmp_path / "scores.safetensors")  # fmt: skip
    ppnet.save(model, tmp_path / "gated")
    (tmp_path / "scores.safetensors").unlink()
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "gated")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(ppnet.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    importance, kept, config = json.loads(done.stdout)
    assert torch.equal(torch.tensor(importance), model.puppet.given_importance)
    assert kept == ppnet.plan(model, 0.6).kept and config == str(model.puppet.config)
    half = ppnet.load(tmp_path / "gated", dtype=torch.bfloat16)
    assert torch.equal(half.puppet.given_importance, model.puppet.given_importance)
    assert half.half().puppet.given_importance.dtype == torch.float32


def test_a_folder_without_its_importance_is_damaged(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = tiny("llama")
    ppnet.save(ppnet.wrap(plain, scores=given(plain)), tmp_path / "gated")
    weights = load_file(tmp_path / "gated/model.safetensors")
    del weights["puppet.given_importance"]
    save_file(weights, tmp_path / "gated/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"puppet\.given_importance is missing"):
        ppnet.load(tmp_path / "gated")


@pytest.mark.parametrize("hierarchy", ["independent", "pooled", "shared"])
def test_some_kinds_taking_off_and_presets(hierarchy: str) -> None:
    plain = tiny("llama")
    scores = given(plain)
    before = plain(token_ids()).logits
    config = PuppetConfig(preset="paper", kinds=("neuron",), hierarchy=hierarchy)
    model = ppnet.wrap(plain, config, scores=scores)  # those of KV groups have no gate
    assert config.importance == "row_norm" and config.train_importance is True  # the caller's is not changed
    assert model.puppet.config.importance == "scores" and model.puppet.config.train_importance is False
    importance = model.puppet.given_importance.clone()
    assert len(importance) == 3 * 44
    assert ppnet.inspect(model).to_dict()["importance"] == "scores, ranked within each site"
    assert "scores, ranked within" in str(ppnet.inspect(model))
    again = ppnet.score(model, method="random")
    ppnet.unwrap(model)
    assert torch.equal(plain(token_ids()).logits, before) and "puppet.given_importance" not in plain.state_dict()
    assert len(again) == 3
    ppnet.wrap(plain, config, scores=again)  # of a model that had gates on neurons only
    assert not torch.equal(plain.puppet.given_importance, importance)
    assert ppnet.inspect(ppnet.unwrap(plain)).importance is None


def test_scores_and_importances_that_exclude_each_other() -> None:
    model = tiny("llama")
    scores = given(model)
    with pytest.raises(PPNetError, match=r"scores: None, but importance='scores' .*scores=ppnet\.score\("):
        ppnet.wrap(model, PuppetConfig(importance="scores"))
    with pytest.raises(PPNetError, match=r"scores: are an importance .* importance='scale_free'"):
        ppnet.wrap(model, PuppetConfig(importance="scale_free"), scores=scores)
    with pytest.raises(PPNetError, match="train_importance: True, but importance='scores'"):
        PuppetConfig(importance="scores", train_importance=True)
    with pytest.raises(PPNetError, match="train_importance: True, but importance='scores'"):
        ppnet.wrap(model, PuppetConfig(train_importance=True), scores=scores)
    with pytest.raises(PPNetError, match="normalise_scores: 'layer' is not known; use one of site, kind"):
        PuppetConfig(normalise_scores="layer")
    with pytest.raises(PPNetError, match="importance: 'norm' is not known; use one of row_norm, scale_free, scores"):
        ppnet.wrap(model, PuppetConfig(importance="norm"))
    assert PuppetConfig(importance="scores", preset="paper").train_importance is False
    assert not hasattr(model, "puppet")


def test_scores_that_do_not_fit_say_what_plan_says(tmp_path: Path) -> None:
    model = tiny("llama")
    good = dict(given(model))
    (tmp_path / "scores.safetensors").write_bytes(b"nothing")
    nan = good["layers.1.neuron"].clone()
    nan[3] = torch.nan
    cases: list[Any] = [
        {name: units for name, units in good.items() if name != "layers.1.neuron"},
        {**good, "layers.1.neuron": good["layers.1.neuron"][:-1]},
        {**good, "layers.1.neuron": nan},
        {**good, "layers.9.neuron": nan},
        given(tiny("qwen2")),
        tmp_path / "scores.safetensors",
        3,
    ]
    for scores in cases:
        messages = []
        for call in (lambda scores=scores: ppnet.plan(model, 0.5, scores=scores),
                     lambda scores=scores: ppnet.wrap(model, scores=scores)):  # fmt: skip
            with pytest.raises((PlanError, CheckpointError), match=r"^scores: ") as error:
                call()
            messages.append(str(error.value))
        assert messages[0] == messages[1] and not hasattr(model, "puppet")


def test_the_command_line(capsys: Any, tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    file, out = tmp_path / "scores.safetensors", tmp_path / "gated"
    assert run_command(capsys, "score", folders["dense"], "--method", "magnitude", "--out", file)[0] == 0
    options = ["--data", folders["text"], "--length", 16, "--batch", 2, "--steps", 2, "--scores", file, "--json"]
    code, _, err = run_command(capsys, "train", folders["dense"], "--out", out, *options)
    assert code == 0, err
    scores, model = ppnet.Scores.load(file), ppnet.load(out)
    for units, found in zip(scores.values(), by_site(model), strict=True):
        assert all(found[a] <= found[b] for a, b in pairwise(units.argsort().tolist()))
    code, _, err = run_command(capsys, "train", out, "--out", tmp_path / "more", *options)
    assert code == 1 and "scores: the gates of" in err and "keep the form" in err
    ppnet.Scores(dict(scores), method="magnitude", model_type="gpt2").save(file)
    code, _, err = run_command(capsys, "train", folders["dense"], "--out", tmp_path / "x", "--dense-steps", 9, *options)
    assert code == 1 and "scores: were made for model_type 'gpt2'" in err and not (tmp_path / "x").exists()


def _process(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE="2", OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    plain = tiny("llama")
    model = ppnet.wrap(plain, PuppetConfig(distill=0.0), scores=given(plain, seed=rank))
    trainer(model, Path(folder), max_steps=1, save_strategy="no").train()
    torch.save(model.puppet.given_importance, os.path.join(folder, f"{rank}.pt"))


@pytest.mark.slow
def test_processes_share_the_first_ones(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, args=(str(tmp_path), port), nprocs=2, start_method="spawn")
    plain = tiny("llama")
    first = ppnet.wrap(plain, scores=given(plain, seed=0)).puppet.given_importance
    assert all(torch.equal(torch.load(tmp_path / f"{rank}.pt"), first) for rank in range(2))
