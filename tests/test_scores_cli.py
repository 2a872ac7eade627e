"""``ppnet score``, and plans and small models by the scores that it wrote."""

from __future__ import annotations

import json

import pytest
from helpers import tiny
from scoring import TEXT, words

import ppnet
from ppnet.cli import main
from ppnet.plan import Plan


@pytest.fixture
def folder(tmp_path):
    model = tiny("llama", vocab_size=13, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(capsys, *arguments):
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_score_then_resize_then_compact(capsys, folder):
    model, scores, text = folder / "model", folder / "scores.safetensors", folder / "text.txt"
    base = ("score", model, "--data", text, "--out", scores, "--device", "cpu")
    code, out, err = run(capsys, *base, "--method", "taylor", "--set", "sign=token", "--length", 20, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["method"] == "taylor" and result["options"] == {"sign": "token"}
    assert result["tokens"] == 15 * 19 and result["sites"]["layers.1.neuron"]["units"] == 44
    expected = ppnet.score(ppnet.load(model), text, "taylor", tokenizer=words(), length=20, sign="token")
    saved = ppnet.Scores.load(scores)
    assert all((saved[name] - units).abs().max() <= 1e-6 * units.max() for name, units in expected.items())
    code, out, err = run(capsys, *base)
    assert code == 1 and "--force" in err
    plan = folder / "plan.json"
    sized = ("--size", 0.6, "--scores", scores, "--allocation", "cost")
    code, out, err = run(capsys, "resize", model, *sized, "--out", plan, "--json")
    assert code == 0 and json.loads(out)["source"] == "taylor", err
    assert Plan.load(plan).kept == ppnet.plan(ppnet.load(model), 0.6, scores=saved, allocation="cost").kept
    code, out, err = run(capsys, "compact", model, *sized, "--out", folder / "small")
    assert code == 0 and "ranked by taylor" in out, err
    assert ppnet.load(folder / "small").ppnet_plan.kept == Plan.load(plan).kept
    code, out, err = run(capsys, *base, "--method", "magnitude", "--force")
    assert code == 0 and "magnitude, 0 tokens" in out and "layers.2.kv_group" in out, err


def test_wrong_requests(capsys, folder):
    model, scores, text = folder / "model", folder / "scores.safetensors", folder / "text.txt"
    for arguments, message in (
        (("score", model, "--out", scores), "give --data FILE"),
        (("score", model, "--data", folder / "no.txt", "--out", scores), "does not exist"),
        (("score", model, "--data", text, "--out", scores, "--method", "best"), "method: 'best' is not known"),
        (("score", model, "--data", text, "--out", scores, "--set", "sign"), "must be name=value"),
        (("score", model, "--data", text, "--out", scores, "--set", "tau=1"), "tau: is no option"),
        (("compact", model, "--size", 0.5, "--scores", text, "--out", folder / "s"), "scores: cannot read"),
        (("compact", model, "--plan", text, "--scores", scores, "--out", folder / "s"), "scores: only used"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 1 and message in err and not out, (arguments, err)
    assert not scores.exists()
