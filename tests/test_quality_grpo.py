"""benchmarks/quality_grpo.py in its short form: the task's rule, every phase, going on after a kill, wrong inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "quality_grpo.py"


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import digit_completion

    return digit_completion


def run(*arguments):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_rule_and_the_rewards(task):
    assert task.answer("7,0:9,3") == "2,4,6" and task.answer("4,4:9,2") == "4,4" and task.answer("9,1:9,2") == "2,3"
    assert task.answer("3,1:9,0") == "" and task.share("3,1:9,0", "") == task.exact("3,1:9,0", "") == 1
    assert task.share("7,0:9,3", "2,4,7") == task.share("7,0:9,3", "2,4") == pytest.approx(2 / 3)
    assert task.share("7,0:9,2", "2,4,6") == pytest.approx(2 / 3) and task.exact("7,0:9,2", "2,4,6") == 0
    assert task.share("7,0:9,0", "2") == task.share("7,0:9,1", "") == task.share("7,0:9,1", ",,") == 0


def test_prompts_without_files_are_those_of_the_files(task, tmp_path):
    train, test, source = task.load_prompts(tmp_path)
    assert source == "generated" and not set(train) & set(test) and len(test) == 200
    assert all(task.FORM.fullmatch(prompt) for prompt in [*train, *test])
    folder = ROOT.parent / "shared" / "data" / "rl"
    if not folder.exists():
        pytest.skip("../shared is not there")
    files = [task.read(folder / f"digit_completion_{split}.jsonl") for split in ("train", "test")]
    assert sorted(chain(*files)) == sorted(chain(*task.generated()))


def test_tokens_are_characters(task):
    tokenizer = task.character_tokenizer()
    ids = tokenizer("7,0:9,3")["input_ids"]
    assert len(ids) == 7 and tokenizer.decode(ids) == "7,0:9,3"
    (row,) = task.sequences(tokenizer, ["7,0:9,0"], [""])
    assert row["input_ids"][7:] == [tokenizer.eos_token_id] and row["labels"] == [-100] * 7 + row["input_ids"][7:]


@pytest.mark.slow
def test_every_phase_and_going_on_after_a_kill(tmp_path):
    first = run("--quick", "--seeds", 1, "--out", tmp_path / "out")
    assert not first.returncode, first.stderr
    result = json.loads((tmp_path / "out" / "quality_grpo.json").read_text())
    rows = result["rows"]
    assert {row["phase"] for row in rows} == {"sft", "grpo", "prune", "heal"}
    assert {row["method"] for row in rows if row["phase"] == "prune"} == {
        "random", "magnitude", "activation", "taylor", "mama"
    }  # fmt: skip
    dense = next(row["params"] for row in rows if row["phase"] == "grpo")
    assert all(0 <= row["exact"] <= row["share"] <= 1 and row["kl"] >= -1e-6 for row in rows)
    assert all(row["params"] < dense for row in rows if row["phase"] in ("prune", "heal"))
    # As after a kill between two rows: what is there is kept, what is missing is made again, and comes out the same.
    (tmp_path / "out" / "rows.json").write_text(json.dumps([row for row in rows if row["phase"] == "sft"]))
    second = run("--quick", "--seeds", 1, "--out", tmp_path / "out")
    assert not second.returncode, second.stderr
    assert "SFT: step" not in second.stdout and "GRPO: step" in second.stdout
    again = json.loads((tmp_path / "out" / "quality_grpo.json").read_text())["rows"]
    for one, other in zip(rows, again, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_wrong_inputs(task, tmp_path, monkeypatch, capsys):
    import quality_grpo

    (tmp_path / "prompts").mkdir()
    for split, line in (("train", '{"prompt": "1,2:9,3"}'), ("test", '{"prompt": "1,2:8,3"}')):
        (tmp_path / "prompts" / f"digit_completion_{split}.jsonl").write_text(line + "\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "settings.json").write_text("{}")
    wrong = {
        ("--seeds", 0): "--seeds: 0 must be at least 1",
        ("--out", tmp_path / "other" / "notes"): "cannot be a folder",
        ("--out", tmp_path / "other"): "holds something else; give a new folder",
        ("--out", tmp_path / "older"): "holds a run of other settings",
        ("--prompts", tmp_path / "prompts"): 'digit_completion_test.jsonl:1: \'{"prompt": "1,2:8,3"}\' is not',
    }
    for arguments, message in wrong.items():
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        monkeypatch.setattr(sys, "argv", ["quality_grpo.py", "--quick", *map(str, (*arguments, *out))])
        with pytest.raises(SystemExit, match="2"):
            quality_grpo.main()
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "settings.json").exists()
