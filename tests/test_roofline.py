"""The roofline: its arithmetic on known times, that all providers of a case agree, and ``ppnet bench``."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
import torch

import ppnet.extension as extension
from ppnet.cli import main
from ppnet.errors import PPNetError
from ppnet.roofline import case as cases
from ppnet.roofline import machine as machines
from ppnet.roofline import measure
from ppnet.roofline import result as results
from ppnet.roofline.case import OPERATORS, Band, Case, copies, each, row_of
from ppnet.roofline.machine import Machine, matmuls
from ppnet.roofline.result import Result, compare
from ppnet.roofline.timing import HostTimed

CPU = torch.device("cpu")
TINY = [case for name in sorted(OPERATORS) for case in OPERATORS[name]("tiny", CPU)]


class FakeMachine:
    """A clock that the providers move, and ceilings that are known."""

    def __init__(self, **ceilings):
        self.ceilings = {kind.replace("_", " "): value for kind, value in ceilings.items()}
        self.seconds = 0.0
        self.sampled = []

    def now(self):
        return self.seconds

    def sample(self, kind):
        self.sampled.append(kind)
        return self.ceilings[kind]

    def known(self, kind):
        return self.ceilings.get(kind)

    def timed(self, run):
        return HostTimed(run, self.now, cases.WINDOW)

    def takes(self, seconds):
        def run():
            self.seconds += seconds

        return run


def fake_case(setup=dict, **changes):
    case = Case("fake", "keep 0.5", torch.float32, {"rows": 4}, 0.5, 1e9, 0.0, "copy", setup)
    return dataclasses.replace(case, **changes)


def fake_row(seconds=0.2, spread=0.01, ceiling=10.0, **changes):
    times = {"ppnet": [seconds - spread, seconds, seconds + spread], "dense": [0.4] * 3}
    return row_of(fake_case(**changes), times, {"copy": [ceiling] * 3})


def result_of(*rows, **machine):
    figure = {"value": {"median": 10.0, "p20": 9.5, "p80": 10.5}, "unit": "GB/s", "by": "hand"}
    kinds = ("read", "copy", "matmul fp32", "matmul bf16")
    setting = {"device": "cpu", "processor": "abacus", "threads": 2, "isa": "base", "pages": "huge", "torch": "2"}
    return Result(
        {**setting, "ppnet": "0", "load": 0.0, "ceilings": dict.fromkeys(kinds, figure), **machine}, "tiny", list(rows)
    )


def test_band_interpolates_between_rounds():
    assert Band.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Band(3.5, 2.0, 5.0)
    assert Band.of([7.0]) == Band(7.0, 7.0, 7.0)


def test_a_row_is_paired_by_round():
    times = {"ppnet": [0.2, 0.4, 0.2], "dense": [0.4, 0.8, 0.6], "oneDNN": [0.3, 0.5, 0.3]}
    row = row_of(fake_case(), times, {"copy": [10.0, 5.0, 10.0]})
    # 1 GB at 10 GB/s is 0.1 s; the round in which the machine was half as fast has an ideal of 0.2 s.
    assert row.bound == "copy" and row.ideal == pytest.approx(0.1) and row.rate == pytest.approx(5.0)
    assert row.share.p20 == row.share.p80 == pytest.approx(0.5)
    assert row.faster == pytest.approx({"dense": 2.0, "oneDNN": 1.5})
    assert row.best == "oneDNN" and row.best_share == pytest.approx(1 / 3) and row.rounds == 3


def test_the_higher_of_the_two_bounds_is_the_ideal():
    case = fake_case(flops=4e9)
    row = row_of(case, {"ppnet": [0.5]}, {"copy": [10.0], "matmul fp32": [20.0]})
    assert row.bound == "matmul" and row.ideal == pytest.approx(0.2) and row.share.median == pytest.approx(0.4)
    assert row.rate == pytest.approx(8.0) and row.best is None and row.faster == {}
    assert row_of(case, {"ppnet": [0.5]}, {"copy": [10.0], "matmul fp32": [80.0]}).bound == "copy"


def test_measure_takes_turns_and_samples_the_ceilings_that_matter():
    machine = FakeMachine(copy=10.0, read=20.0, matmul_fp32=100.0)

    def setup():
        return {"ppnet": machine.takes(0.2), "dense": machine.takes(0.6), "dense+mask": machine.takes(0.7)}

    row = measure(fake_case(setup), machine, seconds=0.0, least=4)
    assert row.rounds == 4 and row.calls == 1 and machine.sampled == ["copy"] * 4
    assert row.faster == pytest.approx({"dense": 3.0, "dense+mask": 3.5}) and row.share.median == pytest.approx(0.5)
    machine.sampled.clear()
    bound_by_products = measure(fake_case(setup, flops=5e10), machine, seconds=0.0, least=2)
    assert set(machine.sampled) == {"copy", "matmul fp32"} and bound_by_products.bound == "matmul"
    many = measure(fake_case(lambda: {"ppnet": machine.takes(1e-4)}), machine, seconds=0.0, least=1)
    assert many.calls == pytest.approx(200, abs=1) and many.seconds["ppnet"].median == pytest.approx(1e-4)


def test_copies_exceed_the_cache_and_every_provider_starts_with_the_first():
    inputs = copies(iter(range(100)).__next__, 16 << 20)
    assert inputs[:2] == [0, 1] and len(inputs) * (16 << 20) >= 3 * (1 << 20)
    first, second = each(inputs, lambda i: i), each(inputs, lambda i: 10 * i)
    assert [first(), first(), second(), second()] == [0, 1, 0, 10]
    assert len(copies(object, 1)) == 64 and len(copies(object, 1e12)) == 2


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.operator}: {case.label}")
def test_all_providers_of_a_case_agree(case):
    with torch.no_grad():  # as they are measured
        providers = case.setup()
        ours, *others = providers
        want = flat(providers[ours]())
        for name in others:
            if name == "dense":
                continue
            got = flat(providers[name]())
            assert len(got) == len(want), name
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype, name
                scale = float(b.float().abs().max()) if b.numel() else 0.0
                torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=case.tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip  # noqa: E501
    assert case.bytes > 0 and 0 < case.keep <= 1 and case.traffic in get_args(cases.Traffic)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for item in value for leaf in flat(item)]


def test_labels_tell_cases_apart():
    for size in ("full", "quick", "tiny"):
        keys = [
            (c.operator, c.label, tuple(c.shape.items()), c.keep) for n in OPERATORS for c in OPERATORS[n](size, CPU)
        ]
        assert len(keys) == len(set(keys))


def test_compare_marks_what_left_the_noise():
    before = result_of(fake_row())
    assert [c.mark for c in compare(before, result_of(fake_row(0.205)))[0]] == [""]
    (slower,), notes = compare(before, result_of(fake_row(0.3)))
    assert slower.mark == "slower" and slower.ratio == pytest.approx(1.5) and notes == []
    assert slower.share_before == pytest.approx(0.5) and slower.share_now == pytest.approx(1 / 3)
    assert compare(before, result_of(fake_row(0.12)))[0][0].mark == "faster"
    # The whole machine at half speed: as near to the ideal as before.
    assert compare(before, result_of(fake_row(0.4, spread=0.02, ceiling=5.0)))[0][0].mark == ""
    changes, _ = compare(before, result_of(fake_row(variant="other")))
    assert [(c.label, c.mark) for c in changes] == [("other, fp32", "new"), ("keep 0.5, fp32", "gone")]


def test_compare_says_what_else_changed():
    other = {"value": {"median": 5.0, "p20": 4.9, "p80": 5.1}, "unit": "GB/s", "by": "hand"}
    _, notes = compare(result_of(), result_of(processor="slide rule", ceilings={"read": other}))
    assert any("abacus" in note and "slide rule" in note for note in notes)
    assert any("read" in note and "5.0 GB/s" in note for note in notes)
    assert "quick" in compare(dataclasses.replace(result_of(), size="quick"), result_of())[1][0]


def test_a_result_survives_its_file(tmp_path):
    result = result_of(fake_row())
    (tmp_path / "result.json").write_text(result.to_json())
    assert Result.load(tmp_path) == Result.load(tmp_path / "result.json") == result
    head, *lines = result.to_csv().splitlines()
    assert len(lines) == 2 and len(lines[0].split(",")) == len(head.split(","))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        ("no json", "cannot be read as JSON"),
        ("[]", "schema None"),
        ('{"schema": "other 3"}', "'other 3'"),
        (json.dumps({"schema": results.SCHEMA, "machine": {}, "size": "full", "rows": [{}]}), "damaged"),
        (json.dumps({"schema": results.SCHEMA}), "damaged"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, said):
    path = tmp_path / "earlier.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PPNetError, match="compare: ") as error:
        Result.load(path)
    assert said in str(error.value) and "earlier.json" in str(error.value)


def test_the_setting_names_the_commit_and_the_driver(tmp_path, monkeypatch):
    said = {}
    monkeypatch.setattr(machines, "_said", lambda *command: said.get(command[0]))
    assert machines.commit(tmp_path) is None and machines.driver() is None
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "commit").write_text("0123abc\n")
    (tmp_path / ".git").write_text("gitdir: a git that is missing here, or does not trust the folder")
    assert machines.commit(tmp_path) == "0123abc"
    said |= {"git": "4567def-dirty", "nvidia-smi": "580.1"}
    assert machines.commit(tmp_path) == "4567def-dirty" and machines.driver() == "580.1"
    head, line, *_ = result_of(fake_row(), driver="580.1", commit="4567def").to_csv().splitlines()
    row = dict(zip(head.split(","), line.split(","), strict=True))
    assert row["driver"] == "580.1" and row["commit"] == "4567def"
    monkeypatch.undo()
    assert machines._said("no-such-program") is None and machines._said("false") is None


def test_ways_to_multiply_agree():
    x, w = torch.randn(8, 64), torch.randn(32, 64)
    for name, way in matmuls(x, w).items():
        torch.testing.assert_close(way(), x @ w.t(), msg=name)


@pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")
def test_memory_probe():
    probe = extension.host().MemoryProbe((1 << 20) + 17, 2, huge_pages=False)
    probe.tune(0.001)
    assert probe.read(0.001) > 0 and probe.copy(0.001) > 0 and probe.read_body and probe.copy_body
    assert probe.mix_body and all(probe.mix(*counts, 0.001) > 0 for counts in (*cases.MIXES, (1, 1), (3, 3)))
    for counts in ((0, 1), (1, 0), (4, 1), (1, 4)):
        with pytest.raises(ValueError, match=r"reads is \d, writes is \d, allowed are 1 .. 3"):
            probe.mix(*counts, 0.001)
    for arguments, said in (((100, 1), "bytes"), ((1 << 20, 0), "threads"), ((1 << 20, 5000), "threads")):
        with pytest.raises(ValueError, match=said):
            extension.host().MemoryProbe(*arguments)


@pytest.fixture
def small_machine(monkeypatch):
    """Buffers and products of a size that measures nothing, in no time, and the tiny cases."""
    monkeypatch.setattr(machines, "out_of_cache", lambda last: 1 << 20)
    monkeypatch.setattr(machines, "MATMUL", {"cpu": (8, 16, 16)})
    monkeypatch.setattr(machines, "TUNING", 0.001)
    monkeypatch.setattr(cases, "WINDOW", 0.0)
    monkeypatch.setattr(machines, "steady_memory", lambda: None)
    make = results.run
    monkeypatch.setattr(results, "run", lambda names, **given: make(names, **{**given, "size": "tiny"}))


def test_without_the_extension_torch_is_the_probe(small_machine, monkeypatch):
    monkeypatch.setattr(extension, "_host", None)
    machine = Machine(rounds=1, seconds=0.001)
    assert machine.ceilings["read"].by == "torch sum" and machine.ceilings["copy"].value.median > 0
    assert machine.ceilings["2:1"].by == "torch copy_"
    assert machine.known("read, L3") is None and machine.known("matmul fp16") is None


@pytest.fixture
def bench(capsys, small_machine):
    def run(*arguments):
        capsys.readouterr()
        code = 0
        try:
            main(["bench", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_bench_writes_and_compares(bench, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "today"
    code, text, err = bench("--operators", "gather_rows,scatter_rows", "--out", out, "--json")
    assert code == 0, err
    value = json.loads(text)
    assert value["schema"] == results.SCHEMA and value == json.loads((out / "result.json").read_text())
    assert {"read", "copy", "matmul fp32", "matmul bf16"} <= value["machine"]["ceilings"].keys()
    assert {row["operator"] for row in value["rows"]} == {"gather_rows", "scatter_rows"}
    row = value["rows"][0]
    assert row["bytes"] > 0 and row["share"]["p20"] <= row["share"]["median"] and "index_select" in row["faster"]
    assert sorted(path.name for path in out.iterdir()) == ["result.csv", "result.json", "roofline.png"]
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")
    code, text, err = bench("--operators", "gather_rows", "--compare", out, "--json")
    changes = json.loads(text)["compare"]["changes"]
    assert code == 0 and {change["operator"] for change in changes} == {"gather_rows"}, err
    assert all(change["before"] > 0 and change["ratio"] > 0 for change in changes)
    code, text, err = bench("--operators", "gather_rows", "--compare", out)
    assert code == 0 and "ceilings of" in text and "% of ideal" in text and "against" in text, err
    code, _, err = bench("--operators", "gather_rows", "--out", out)
    assert code == 1 and "--force" in err


def test_a_bench_that_is_stopped_keeps_what_it_measured(bench, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    measured = []

    def stop_at_the_third(case, *arguments, **named):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case.variant)
        return measure(case, *arguments, **named)

    monkeypatch.setattr(results, "measure", stop_at_the_third)
    code, _, _ = bench("--operators", "gather_rows", "--out", tmp_path / "out")
    assert code == 130 and sorted(path.name for path in (tmp_path / "out").iterdir()) == ["result.csv", "result.json"]
    kept = results.Result.load(tmp_path / "out")
    assert len(kept.rows) == 2 and [row.variant for row in kept.rows] == measured


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--operators", "gather_rows,gather_cows"), "'gather_cows' is not known; known are"),
        (("--operators", ","), "known are"),
        (("--compare", "/nowhere/result.json"), "/nowhere/result.json does not exist"),
        (("--sizes", "0.5"), "sizes: has a meaning only with a model folder"),
        (("--metric", "flops"), "metric: has a meaning only with a model folder"),
        (("--batch", "4"), "batch: has a meaning only with a model folder"),
        (("some-model", "--quick"), "quick: has a meaning only without a model folder"),
        (("--threads", "0"), "threads: must be at least 1, got 0"),
    ],
)
def test_bench_refuses(bench, arguments, said):
    code, out, err = bench(*arguments)
    assert code == 1 and out == "" and said in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_bench_of_a_gpu_that_is_not_here(bench, tmp_path):
    code, out, err = bench("--device", "cuda", "--out", tmp_path / "out")
    assert code == 1 and out == "" and "device: 'cuda' cannot be used here" in err and "try cpu" in err
    assert not (tmp_path / "out").exists()


def test_the_figure_takes_any_result():
    pytest.importorskip("matplotlib")
    from ppnet.reporting.plots import png
    from ppnet.roofline.plot import roofline

    for rows in ((), (fake_row(),), (fake_row(flops=1e9), fake_row(operator="other", flops=1e13))):
        assert png(roofline(result_of(*rows))).startswith(b"\x89PNG")
