"""A report of a real tiny puppet: figures decode, the page loads nothing, CSV and JSON say the same."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from tiny_folders import TEXT, model, puppet, tokenizer

from ppnet.errors import DataError, PPNetError, SizeError
from ppnet.evaluate import perplexity
from ppnet.reporting import report, write
from ppnet.reporting.page import page
from ppnet.reporting.plots import figures
from ppnet.reporting.style import DARK, LIGHT, nice_ticks, short, spread_out
from ppnet.size import resize

SIZES = (1.0, 0.7, 0.4)
SPEED = {"prompt_tokens": 8, "new_tokens": 4, "rounds": 2, "warmup": 0}
TABLES = {"Runs <b>": [{"step": 1, "note": "a & b"}, {"step": 2, "loss": 0.5}]}
OTHERS = [{"label": "half width", "perplexity": 50.0, "params": 17_000, "flops": 33_000, "bytes": 68_000}]


@pytest.fixture(scope="module")
def gated():
    return puppet()


@pytest.fixture(scope="module")
def made(gated, tmp_path_factory):
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    result = report(
        gated, tokenizer(), TEXT * 8, tmp_path_factory.mktemp("report") / "new", sizes=SIZES, draws=3,
        speed_options=SPEED, dense_anchor=40.0, comparisons=OTHERS, extra_tables=TABLES, title="tiny <puppet>",
        window=32,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())
    return result


def test_rows_are_what_was_asked_for(made, gated):
    assert [row.size for row in made.rows] == list(SIZES)
    dense = made.rows[0]
    assert dense.ratio == pytest.approx(1.0, abs=1e-5) and dense.flops_fraction == 1.0 and dense.draws == 0
    for row in made.rows:
        assert row.flops_fraction <= row.size + 1e-9
        assert row.anchor_ratio == pytest.approx(row.perplexity / 40.0)
        assert set(row.keep) == {"kv_group", "neuron"}
        assert row.prefill_p20 <= row.prefill_tokens_per_s <= row.prefill_p80
        assert row.decode_ratio > 0
    smallest = made.rows[-1]
    assert smallest.draws == 3
    assert smallest.draws_min <= smallest.draws_p10 <= smallest.draws_mean <= smallest.draws_max
    assert smallest.draws_p90 <= smallest.draws_max
    assert smallest.kv_bytes_per_token < dense.kv_bytes_per_token
    with resize(gated, 0.4, "flops"):
        masked = perplexity(gated, tokenizer(), TEXT * 8, window=32)
    assert smallest.perplexity == pytest.approx(masked.perplexity, rel=1e-4)


def test_draws_are_scored_at_their_own_masks(made, gated):
    draw = next(entry for entry in made.draws if entry["size"] == 0.4 and entry["seed"] == 1)
    plan = gated.puppet.draw_plan(draw["u"], 1)
    assert draw["flops_fraction"] == pytest.approx(plan.cost.flops / plan.dense_cost.flops)
    with resize(gated, plan):
        assert draw["perplexity"] == pytest.approx(perplexity(gated, tokenizer(), TEXT * 8, window=32).perplexity)


def test_units_leave_in_order(made, gated):
    for site in made.sites:
        assert len(site.leaves_at) == site.units and len(site.tau) == len(made.u_grid)
        assert list(site.leaves_at) == sorted(site.leaves_at) and site.leaves_at[0] == 0.0
        assert list(site.tau) == sorted(site.tau)
    assert max(max(site.leaves_at) for site in made.sites) == pytest.approx(1.0)


def test_csv_is_json(made):
    data = json.loads((made.folder / "report.json").read_text(), parse_constant=pytest.fail)
    lines = list(csv.DictReader(io.StringIO((made.folder / "report.csv").read_text())))
    assert len(lines) == len(data["rows"]) == len(SIZES)
    for line, row in zip(lines, data["rows"], strict=True):
        assert list(line) == list(row)
        for name, text in line.items():
            assert (row[name] is None) if text == "" else (float(text) == row[name])
    assert [set(kept) for kept in data["kept"]] == [{site["name"] for site in data["sites"]}] * len(SIZES)


def test_figures_decode(made):
    from PIL import Image

    images = sorted(made.folder.glob("*.png"))
    assert {image.stem for image in images} == {
        "perplexity_params", "perplexity_flops", "perplexity_bytes", "perplexity_prefill", "perplexity_decode",
        "speedup", "thresholds", "survival", "kept_widths",
    }  # fmt: skip
    for file in images:
        with Image.open(file) as image:
            image.load()
            assert min(image.size) > 500
            assert len(image.convert("RGB").getcolors(2**24)) > 20


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_figures_say_what_they_show(made, theme):
    for name, figure in figures(made, theme).items():
        panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
        assert panels, name
        for axis in panels:
            assert axis.get_xlabel() and axis.get_ylabel(), name


def test_page_holds_everything_and_loads_nothing(made):
    text = (made.folder / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert len(sources) == 2 * 9 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "tiny &lt;puppet&gt;" in text and "<puppet>" not in text and "Runs &lt;b&gt;" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    for word in ("half width", "20th to 80th pct.", "scored tokens", "draws: mean", "a &amp; b"):
        assert word in text


def test_writing_again_replaces_ours_and_keeps_theirs(made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.csv").write_text("old")
    written = write(made, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "report.csv").read_text() == made.to_csv()
    assert written.folder == tmp_path and not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    with pytest.raises(PPNetError, match="is a file"):
        write(made, tmp_path / "notes.txt")


def test_an_infinite_perplexity_is_drawn_around(made):
    broken = [dataclasses.replace(row, perplexity=math.inf, ratio=math.inf) for row in made.rows]
    one = dataclasses.replace(made, rows=(*made.rows[:-1], broken[-1]))
    assert set(figures(one, LIGHT)) == set(figures(made, LIGHT))
    assert one.to_dict()["rows"][-1]["perplexity"] is None and "∞" in page(one, {}, {})
    everything = dataclasses.replace(made, rows=tuple(broken))
    assert set(figures(everything, LIGHT)) == {"speedup", "thresholds", "survival", "kept_widths"}


def test_without_speed_and_draws(gated, tmp_path):
    made = report(gated, tokenizer(), TEXT * 3, tmp_path / "short", sizes=(1, 0.5), draws=0, measure_speed=False)
    assert not (tmp_path / "short" / "speedup.png").exists()
    assert "Measured speed" not in (tmp_path / "short" / "report.html").read_text()
    assert made.rows[1].draws == 0 and made.rows[1].prefill_ratio is None


def test_bad_requests(gated, tmp_path):
    words = tokenizer()
    with pytest.raises(PPNetError, match="no gates"):
        report(model(), words, TEXT, tmp_path / "a")
    with pytest.raises(SizeError, match="smallest"):
        report(gated, words, TEXT, tmp_path / "a", sizes=(0.5, 0.001))
    with pytest.raises(PPNetError, match="metric"):
        report(gated, words, TEXT, tmp_path / "a", metric="speed")
    with pytest.raises(PPNetError, match="draws"):
        report(gated, words, TEXT, tmp_path / "a", draws=-1)
    with pytest.raises(PPNetError, match="sizes"):
        report(gated, words, TEXT, tmp_path / "a", sizes=())
    broken = puppet()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(PPNetError, match="perplexity of the dense model is nan"):
        report(broken, words, TEXT, tmp_path / "a")
    with pytest.raises(DataError, match="empty"):
        report(gated, words, " ", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_missing_plotting_library_names_the_extra(made, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PPNetError, match=r"pip install 'ppnet\[report\]'"):
        write(made, tmp_path / "a")


def test_ticks_numbers_and_labels():
    assert nice_ticks(1.0, 1000.0) == [1, 3, 10, 30, 100, 300, 1000]
    for low, high in ((3.4, 9.0), (0.1, 1.0), (950, 2100), (1.0, 1e6)):
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
    assert [short(v) for v in (0, 0.25, 950, 1200, 34e6, 1e9)] == ["0", "0.25", "950", "1.2k", "34M", "1G"]
    placed = spread_out([0.5, 0.5, 0.51, 0.9], 0.1, 0.0, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
