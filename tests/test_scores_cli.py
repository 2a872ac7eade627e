"""``ppnet score``, and plans and small models by the scores that it wrote."""

from __future__ import annotations

import json

import pytest
from helpers import tiny
from scoring import TEXT, words
from tiny_folders import run_command as run

import ppnet
from ppnet.plan import Plan


@pytest.fixture
def folder(tmp_path):
    model = tiny("llama", vocab_size=13, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


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


def test_columns_floors_and_given_scores(capsys, folder):
    model, scores, rows = folder / "model", folder / "scores.safetensors", folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"story": TEXT}) + "\n" for _ in range(2)))
    base = ("score", model, "--data", rows, "--out", scores, "--device", "cpu", "--length", 20)
    code, out, err = run(capsys, *base)
    assert code == 1 and "column: 'text'" in err and "--column" in err
    code, out, err = run(capsys, *base, "--column", "story", "--method", "taylor")
    assert code == 0, err
    mama = (*base[:4], "--out", folder / "mama.safetensors", "--column", "story", "--set", 'weights={"kl": 0}')
    code, out, err = run(capsys, *mama, "--set", f"sft={scores}")
    assert code == 0, err
    code, out, err = run(capsys, *mama, "--force", "--set", "sft=no.safetensors")
    assert code == 1 and err.startswith("error: sft: cannot read no.safetensors"), err
    sized = (
        "--size",
        0.7,
        "--scores",
        scores,
        "--allocation",
        "global",
        "--normalise",
        "kind",
        "--floor",
        "kv_group=0.75",
    )
    code, out, err = run(capsys, "resize", model, *sized, "--json")
    kept = json.loads(out)["kept"]
    assert code == 0 and min(count for name, count in kept.items() if "kv_group" in name) >= 3, err
    small = folder / "small"
    code, out, err = run(capsys, "compact", model, *sized, "--redistribute", rows, "--column", "story", "--ridge", 0.5,
                         "--out", small, "--json")  # fmt: skip
    result = json.loads(out)
    assert code == 0 and result["kept"] == kept and result["redistribution"]["ridge"] == 0.5, err
    code, out, err = run(capsys, "heal", small, "--teacher", model, "--data", rows, "--column", "story", "--steps", 1,
                         "--length", 20, "--device", "cpu", "--out", folder / "healed")  # fmt: skip
    assert code == 0, err
    for extra, message in (
        (("--floor", "much"), "floor: 'much' must be a fraction"),
        (("--floor", "0.1", "--floor", "neuron=0.2"), "names a fraction for all kinds beside others"),
        (("--ridge", 0.5), "ridge: 0.5 has a meaning only with --redistribute"),
    ):
        code, out, err = run(capsys, "compact", model, "--size", 0.7, *extra, "--out", folder / "other")
        assert code == 1 and message in err, err


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
