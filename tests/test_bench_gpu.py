"""benchmarks/bench_gpu.py on a tiny model, so that it does not fail for a slip where a GPU's minutes count."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_gpu


def test_every_part_runs(tmp_path, capsys):
    out = tmp_path / "models.json"
    assert bench_gpu.main(["--tiny", "--out", str(out), "step", "compact", "generate"]) == 0, capsys.readouterr().out
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert {"commit", "driver", "torch", "transformers"} <= found["setting"].keys()
    assert [row["variant"] for row in rows if row["part"] == "step"] == ["dense", "keep 1", "keep 0.5", "keep 0.2"]
    assert all(row["forward s"] > 0 and row["optimizer s"] > 0 for row in rows if row["part"] == "step")
    assert all(row["x the time of copying"] > 0 for row in rows if row["part"] == "compact")
    generated = {(row["variant"], row["way"]) for row in rows if row["part"] == "generate"}
    assert len(generated) == 3 * (2 + 4)  # models; prefill; decoding, ours too
    assert all(row["seconds"]["median"] > 0 for row in rows)


def test_what_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    def fails(shape, place):
        yield {"variant": "one"}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_gpu, "PARTS", {"step": fails, "compact": lambda *given: iter([{"variant": "two"}])})
    assert bench_gpu.main(["--tiny", "--out", str(tmp_path / "models.json")]) == 1
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [row.get("variant") for row in rows] == ["one", None, "two"] and "out of memory" in rows[1]["failed"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    for arguments, said in (([], "no GPU is here"), (["--tiny", "steps"], "steps: not known")):
        with pytest.raises(SystemExit):
            bench_gpu.main(arguments)
        assert said in capsys.readouterr().err
