"""The demo, in its short form: every step runs, and what it says can be found in what it wrote."""

from __future__ import annotations

import contextlib
import io
import itertools
import json

import pytest

from ppnet.cli import main
from ppnet.demo import FRACTIONS, Recipe, library_text, schedule, train_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output folder and JSON result of two runs into the same folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    for _ in range(2):
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as stop:
            main(["demo", "--fast", "--out", str(folder), "--force", "--json"])
        assert not stop.value.code
    return folder, json.loads(stdout.getvalue())


def test_it_reports_every_fraction_against_ungated_own_dense_and_paper(demo):
    _, result = demo
    rows = result["quality"]
    assert [row["gated FLOPs"] for row in rows] == list(FRACTIONS)
    for row in rows:
        assert row["/ ungated"] == pytest.approx(row["perplexity"] / result["ungated_perplexity"])
        assert row["/ own dense"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
    assert [row["paper / own dense"] for row in rows[1:]] == [1.067, 1.121, 1.164, 1.198, 1.29]
    assert all(a["params"] > b["params"] for a, b in itertools.pairwise(rows))


def test_what_it_wrote_loads(demo):
    import ppnet

    folder, result = demo
    puppet = ppnet.load(folder / "puppet")
    assert ppnet.inspect(puppet).gated
    for row in result["compacted"]:
        small = ppnet.load(folder / row["folder"])
        assert sum(p.numel() for p in small.parameters()) == row["params"] <= row["params asked"]
    report = json.loads((folder / "report" / "report.json").read_text())
    assert len(report["rows"]) >= 10
    assert (folder / "report" / "report.html").stat().st_size > 10_000


def test_text_is_real_and_the_held_out_files_are_apart():
    train, valid = library_text()
    assert sum(map(len, train)) > 2_000_000 and sum(map(len, valid)) > 100_000
    assert not set(train) & set(valid)
    tokenizer = train_tokenizer(valid[:2], 400)
    text = valid[0][:2000]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_both_phases_share_one_schedule():
    recipe = Recipe(steps=100, dense_steps=60, warmup=5)
    assert schedule(recipe, 60)(10) == schedule(recipe, 0)(70)
    assert schedule(recipe, 0)(0) == pytest.approx(0.2)
    assert schedule(recipe, 0)(100) == pytest.approx(0.1)
