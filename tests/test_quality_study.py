"""benchmarks/quality: rows that survive a kill, masks against their definitions, tables that say what is noise."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_kept_and_a_torn_line_is_made_again(tmp_path):
    from store import Rows

    path = tmp_path / "deep" / "rows.jsonl"
    rows = Rows(path, {"steps": 3})
    rows.add(time.perf_counter(), {"method": "a", "seed": 0}, value=1.5)
    rows.add(time.perf_counter(), {"method": "b", "seed": 0}, value=2.5)
    path.write_bytes(path.read_bytes()[:-7])
    again = Rows(path, {"steps": 3})
    assert again.done(method="a", seed=0) and not again.done(method="b")
    again.add(time.perf_counter(), {"method": "b", "seed": 0}, value=3.5)
    assert [row["value"] for row in Rows(path, {"steps": 3}).rows] == [1.5, 3.5]
    assert json.loads(path.read_text().partition("\n")[0]) == {"steps": 3}


def test_rows_of_another_recipe_are_refused(tmp_path):
    from store import Rows

    Rows(tmp_path / "rows.jsonl", {"steps": 3, "rate": 1.0})
    with pytest.raises(SystemExit, match=r"steps differ.*another --out"):
        Rows(tmp_path / "rows.jsonl", {"steps": 4, "rate": 1.0})


# ---- masks -----------------------------------------------------------------------------------------------------------


def data(rows, columns, tokens):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def error(weight, masked, x):
    return float((x @ (weight - masked).T).square().sum())


@pytest.mark.parametrize("columns", [7, 172])
@pytest.mark.parametrize("removed", [0.25, 0.5, 1.0])
def test_wanda_removes_the_smallest_of_every_row(columns, removed):
    import masks

    weight, x = data(5, columns, 400)
    masked = masks.wanda(weight, x.T @ x, len(x), removed)
    metric = weight.abs() * x.norm(dim=0)
    for row, kept, scores in zip(weight, masked, metric, strict=True):
        gone = kept == 0
        assert int(gone.sum()) == round(removed * columns) and torch.equal(kept[~gone], row[~gone])
        assert gone.all() or scores[gone].max() <= scores[~gone].min()


@pytest.mark.parametrize("columns", [7, 172])
def test_sparsegpt_beats_its_own_mask_without_updates_and_wanda(columns):
    import masks

    weight, x = data(16, columns, 2000)
    masked = masks.sparsegpt(weight, x.T @ x, len(x), 0.5)
    assert int((masked == 0).sum()) == sum(
        round(0.5 * 16 * min(128, columns - first)) for first in range(0, columns, 128)
    )
    assert error(weight, masked, x) < 0.8 * error(weight, torch.where(masked == 0, 0.0, weight), x)
    assert error(weight, masked, x) < error(weight, masks.wanda(weight, x.T @ x, len(x), 0.5), x)


def test_sparsegpt_of_one_block_solves_the_last_column_exactly():
    """With everything but the last column gone, that column is the least-squares answer to all the others."""
    import masks

    weight, x = data(3, 2, 500)
    weight[:, 0] *= 1e-6  # so that column 0 is the one that goes
    masked = masks.sparsegpt(weight, x.T @ x, len(x), 0.5, damp=0.0)
    assert torch.equal(masked[:, 0] == 0, torch.ones(3, dtype=torch.bool))
    exact = x[:, 1:].pinverse() @ (x @ weight.T)
    torch.testing.assert_close(masked[:, 1:], exact.T, rtol=1e-9, atol=1e-12)


def test_sparsegpt_of_inputs_that_are_never_there():
    import masks

    weight, x = data(4, 9, 300)
    x[:, 3] = 0
    masked = masks.sparsegpt(weight, x.T @ x, len(x), 0.25)
    assert (masked[:, 3] == 0).all() and torch.isfinite(masked).all()


def test_masked_models_have_the_asked_share_and_keep_the_rest():
    import masks
    from helpers import tiny

    model = tiny("llama").eval()
    ids = torch.randint(0, model.config.vocab_size, (6, 24), generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = masks.masked(model, [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}], "wanda", 0.5)
    for name, module in small.named_modules():
        if isinstance(module, nn.Linear):
            zeros = float((module.weight == 0).float().mean())
            assert zeros == (0 if "lm_head" in name else pytest.approx(0.5, abs=0.02))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- tables ----------------------------------------------------------------------------------------------------------


def rows_of(values, **key):
    return [
        {"section": "gated", "removed": 0.5, "seed": seed, "method": method, "value": value, **key}
        for method, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]


def test_the_best_is_bold_and_what_is_within_noise_is_marked():
    from scores_table import column

    rows = rows_of({"best": [1.0, 1.1, 1.2], "near": [1.3, 1.0, 1.2], "far": [1.1, 1.2, 1.3]})
    assert column(rows, True, removed=0.5) == {"best": "**1.100**", "near": "1.167*", "far": "1.200"}
    assert column(rows, False, removed=0.5)["far"] == "**1.200**"
    assert column(rows, True, removed=0.25) == {}


def test_only_seeds_that_all_methods_have_are_compared():
    from scores_table import column

    rows = rows_of({"one": [1.0, 1.2, 9.0], "other": [1.5, 1.6]})
    assert column(rows, True, removed=0.5) == {"one": "**1.100**", "other": "1.550"}


def test_losers_to_random_are_named():
    from scores_table import losers

    rows = rows_of({"random": [1.0, 1.2], "worse": [1.5, 1.7], "level": [0.9, 1.4]}, redistributed=False, healed=False)
    (line,) = losers({"lower_is_better": True}, rows)
    assert line.startswith("worse at 50% cut: 0.500 worse")
    assert [name.split()[0] for name in losers({"lower_is_better": False}, rows)] == []


# ---- the study of scores ---------------------------------------------------------------------------------------------


class Tiny:
    """A subject of one tiny model; its metric is the distance of its logits from the dense model's."""

    metric, lower_is_better, language_model, loss, without, score_batch = "distance", True, True, None, ("kl",), 8
    gate_steps, heal_rate, heal_batch = 2, 1e-3, 4

    def __init__(self):
        from helpers import tiny, token_ids

        self.recipe = {"metric": self.metric, "lower_is_better": True, "subject": "tiny"}
        self.model, self.ids = tiny("llama").eval(), token_ids(batch=8, length=24)
        self.healed = 0

    def calibration(self, seed):
        return [{"input_ids": self.ids.roll(seed), "labels": self.ids.roll(seed)}]

    def training_blocks(self, seed, steps):
        return self.ids[: steps * self.heal_batch]

    @torch.no_grad()
    def measure(self, model):
        return float((model(self.ids).logits - self.model(self.ids).logits).norm())

    def heal(self, small, seed):
        self.healed += 1
        with torch.no_grad():
            small.lm_head.weight.zero_()
        return small


def test_the_study_of_scores_goes_on_where_it_was(tmp_path, monkeypatch):
    import scores
    from scores_table import losers, plot, table
    from store import Rows, read

    monkeypatch.setattr(scores, "METHODS", methods := ("random", "obs", "mama"))
    monkeypatch.setattr(scores, "REMOVED", shares := (0.25, 0.75))
    path, subject = tmp_path / "scores-tiny.jsonl", Tiny()
    scores.Study(subject, Rows(path, subject.recipe), healing=False).run(1, ["gated", "masks"])
    rows = Rows(path, subject.recipe)
    assert len(rows.rows) == 1 + len(methods) * len(shares) * 2 + 2 * len(shares) and subject.healed == 0
    assert rows.select(section="dense")[0]["value"] == 0
    for method in methods:
        cut = {row["removed"]: row for row in rows.select(section="gated", method=method, redistributed=False)}
        assert cut[0.25]["value"] > 0 and cut[0.75]["params"] < cut[0.25]["params"]
    before = path.read_text()
    scores.Study(subject, rows, healing=False).run(1, ["gated", "masks"])
    assert path.read_text() == before
    scores.Study(subject, rows).run(1, ["gated"])
    assert path.read_text().startswith(before) and subject.healed == len(methods) * len(shares) * 2
    nothing = float(subject.model(subject.ids).logits.norm())
    healed = Rows(path, subject.recipe).select(healed=True)
    assert len(healed) == subject.healed and all(row["value"] == pytest.approx(nothing) for row in healed)
    assert all(row["value"] != pytest.approx(nothing) for row in rows.select(healed=False))
    recipe, found = read(path)
    text = table(recipe, found)
    assert (
        "| heads and neurons (1 seed) | 25% cut | 25% +R | 25% +H | 25% +RH | 75% cut |" in text and "| obs |" in text
    )
    assert "| wanda |" in text and all(isinstance(line, str) for line in losers(recipe, found))
    plot(recipe, found, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_gates_and_neurons_of_the_study(tmp_path, monkeypatch):
    import scores
    from store import Rows

    monkeypatch.setattr(scores, "NEURON_METHODS", ("random", "mama"))
    monkeypatch.setattr(scores, "PEERS", {})
    monkeypatch.setattr(scores.peers, "optipfair_depth", lambda model, data, layers: model)
    monkeypatch.setattr(scores, "REMOVED", (0.5,))
    subject = Tiny()
    rows = Rows(tmp_path / "scores-tiny.jsonl", subject.recipe)
    scores.Study(subject, rows).run(1, ["gates", "neurons", "mama"])
    gated = rows.select(section="gates")
    assert {row["method"] for row in gated} == {"gates on mama", "gates on scale_free"} and len(gated) == 8
    assert all(torch.isfinite(torch.tensor(row["value"])) for row in gated)
    assert len(rows.select(section="mama")) == 2 * (len(scores.MAMA) - 1)  # this subject has no kl
    (cut,) = rows.select(section="neurons", method="mama", redistributed=False, healed=False)
    mlps = sum(p.numel() for name, p in subject.model.named_parameters() if ".mlp." in name)
    assert cut["params"] == pytest.approx(subject.model.num_parameters() - mlps / 2, rel=0.01)
    assert not hasattr(subject.model, "puppet")


def test_other_libraries_remove_as_many_neurons():
    import peers

    pytest.importorskip("torch_pruning")
    pytest.importorskip("optipfair")
    subject = Tiny()
    data, neurons = subject.calibration(0), subject.model.config.intermediate_size
    layers = len(subject.model.model.layers)
    for peer, options in (
        (peers.torch_pruning_mlp, ("magnitude", "taylor")),
        (peers.optipfair_mlp, ("MAW", "MAW data")),
    ):
        for option in options:
            small = peer(subject.model, data, 0.25, option).eval()
            assert {layer.mlp.down_proj.in_features for layer in small.model.layers} == {round(0.75 * neurons)}
            assert subject.measure(small) > 0 and all(p.grad is None for p in small.parameters())
    assert len(peers.optipfair_depth(subject.model, data, 1).model.layers) == layers - 1
    assert len(subject.model.model.layers) == layers and subject.measure(subject.model) == 0
