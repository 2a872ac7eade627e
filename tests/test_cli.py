"""Every command once, its JSON, and what wrong requests say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
from tiny_folders import run_command, write_folders

from ppnet.plan import Plan


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture
def ppnet(capsys):
    """`run_command` with what it prints captured."""
    return partial(run_command, capsys)


@pytest.fixture
def ok(ppnet):
    """Runs a command with --json; its result."""

    def run(*arguments: object) -> dict:
        code, out, err = ppnet(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def refused(ppnet):
    """Runs a command that must fail with exit code 1; its one line."""

    def run(*arguments: object) -> str:
        code, out, err = ppnet(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 1 and out == "" and len(lines) == 1 and "Traceback" not in err, err
        return lines[0]

    return run


def test_inspect(ok, ppnet, folders):
    found = ok("inspect", folders["puppet"])
    assert found["gated"] and len(found["sites"]) == 6
    code, out, _ = ppnet("inspect", folders["dense"])
    assert code == 0 and "layers.2.neuron" in out and "not gated" in out


def test_resize_then_compact_then_eval(ok, ppnet, folders, tmp_path):
    plan_file, small = tmp_path / "plan.json", tmp_path / "small"
    decided = ok("resize", folders["puppet"], "--size", 0.5, "--metric", "flops", "--out", plan_file)
    assert 0.45 < decided["fraction"]["flops"] <= 0.5
    assert Plan.load(plan_file).cost.flops == decided["cost"]["flops"]
    written = ok("compact", folders["puppet"], "--plan", plan_file, "--out", small)
    assert written["cost"] == decided["cost"] and written["tokenizer"] and written["checked"]
    at_size = ok("eval", folders["puppet"], "--data", folders["text"], "--size", 0.5, "--metric", "flops")
    as_it_is = ok("eval", small, "--data", folders["text"])
    assert as_it_is["rows"][0]["nll"] == pytest.approx(at_size["rows"][0]["nll"], abs=1e-5)
    assert as_it_is["rows"][0]["params"] == written["cost"]["params"]
    assert ok("bench", small, "--rounds", 1)["rows"][0]["params"] == written["cost"]["params"]
    code, out, _ = ppnet(
        "compact", folders["dense"], "--size", 20_000, "--scores", "magnitude", "--out", tmp_path / "by_magnitude",
        "--no-check",
    )  # fmt: skip
    assert code == 0 and "magnitude" in out and "not checked" in out
    assert ok("resize", folders["puppet"], "--size", 0.5, "--of", "gated", "--multiple-of", "neuron=4")["of"] == "gated"


def test_compact_streams_and_builds_models_only_to_compare_logits(ok, ppnet, refused, folders, tmp_path, monkeypatch):
    from ppnet.cli import models

    size = ("--size", 0.6, "--of", "gated", "--multiple-of", "neuron=4", "--dtype", "bfloat16")
    kept = {}
    for name, option, checked in (("memory", ("--check",), "logits"), ("unchecked", ("--no-check",), None)):
        made = ok("compact", folders["puppet"], *size, *option, "--max-shard-size", "20KB", "--out", tmp_path / name)
        kept[name] = made
        assert (made["streamed"], made["checked"]) == (name != "memory", checked)
    latency = ok("compact", folders["puppet"], "--size", 0.9, "--of", "gated", "--metric", "latency", "--out",
                 tmp_path / "fast")  # fmt: skip
    assert (latency["streamed"], latency["checked"]) == (False, "logits")
    monkeypatch.setattr(models, "load_model", None)
    made = ok("compact", folders["puppet"], *size, "--max-shard-size", "20KB", "--out", tmp_path / "streamed")
    assert made["streamed"] and made["checked"] == "weights" and made["cost"] == kept["memory"]["cost"]
    files = {file.name: file.read_bytes() for file in (tmp_path / "streamed").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "memory").iterdir()}
    assert "tokenizer.json" in files and "model.safetensors.index.json" in files
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "unchecked").iterdir()}
    code, out, _ = ppnet("compact", folders["puppet"], *size, "--out", tmp_path / "again")
    assert code == 0 and "read back beside the source (--check compares logits, in memory)" in " ".join(out.split())
    nowhere = ("--out", tmp_path / "unused")
    assert "give --redistribute TEXT" in refused("compact", folders["dense"], "--size", 0.5, *nowhere)
    assert "is no size" in refused("compact", folders["puppet"], *size, "--max-shard-size", "much", *nowhere)
    assert not (tmp_path / "unused").exists()


def test_compact_with_redistribution_then_heal(ok, ppnet, refused, folders, tmp_path):
    small, healed = tmp_path / "small", tmp_path / "healed"
    size = ("--size", 0.5, "--of", "gated", "--scores", "magnitude")
    plain = ok("compact", folders["dense"], *size, "--out", tmp_path / "plain")
    assert plain["redistribution"] is None
    made = ok("compact", folders["dense"], *size, "--redistribute", folders["text"], "--out", small)
    done = made["redistribution"]
    assert done["method"] == "least_squares" and done["tokens"] > 500 and made["cost"] == plain["cost"]
    assert Plan.load(small / "ppnet_plan.json").extra["redistribution"] == done
    options = ("--teacher", folders["dense"], "--data", folders["text"], "--length", 32)
    trained = ok("heal", small, *options, "--steps", 3, "--direction", "jsd", "--hidden", 0.1, "--out", healed)
    assert trained["steps"] == 3 and trained["parameters"] == made["cost"]["params"]
    assert trained["loss"] > 0 and trained["distillation_kl"] > 0 and trained["hidden_loss"] > 0
    assert ok("eval", healed, "--data", folders["text"])["rows"][0]["params"] == made["cost"]["params"]
    losses = []
    for seed in (1, 2):
        code, out, err = ppnet("heal", small, *options, "--steps", 3, "--seed", seed, "--out", tmp_path / f"s{seed}")
        assert code == 0 and out.startswith("after 3 steps: loss: ") and "{'" not in out + err
        losses.append(out.splitlines()[0])
    assert losses[0] != losses[1]
    code, out, _ = ppnet("compact", folders["dense"], *size, "--redistribute", folders["text"], "--redistribution",
                         "nearest", "--out", tmp_path / "text")  # fmt: skip
    assert code == 0 and "redistributed by nearest on" in out
    nowhere = tmp_path / "nowhere.txt"
    out = ("--out", tmp_path / "unused")
    assert "does not exist" in refused("compact", folders["dense"], *size, "--redistribute", nowhere, *out)
    assert "needs calibration data" in refused("compact", folders["dense"], *size, "--redistribution", "mean", *out)
    assert "does not exist" in refused("heal", small, "--teacher", folders["dense"], "--data", nowhere, *out)
    assert "is not a folder" in refused("heal", small, "--teacher", nowhere, "--data", folders["text"], *out)


def test_eval_at_sizes_prints_a_table(ppnet, folders):
    code, out, _ = ppnet("eval", folders["puppet"], "--data", folders["text"], "--sizes", "1,0.6", "--max-tokens", 200)
    assert code == 0 and "perplexity" in out and "0.6" in out


def test_speculate(ok, ppnet, refused, folders):
    command = ("speculate", folders["puppet"], "--prompt", "the cat ", "--new", 20)
    found = ok(*command, "--draft", 0.7, "--compare", "--length", 3)
    assert found["same_as_alone"] and found["text"].startswith("t h e   c a t") and found["tokens_per_s"] > 0
    assert found["memory"]["draft_own"] < found["memory"]["weights"] and max(found["lengths"]) == 3
    plain = ok(*command, "--draft", 0.9, "--no-accelerate", "--compare")
    assert plain["same_as_alone"] and plain["sequences"] == found["sequences"]
    sample = (*command, "--draft", 0.7, "--sample", "--temperature", 0.8, "--top-p", 0.9, "--length", 2)
    assert ok(*sample)["sequences"] == ok(*sample)["sequences"] != ok(*sample, "--seed", 1)["sequences"]
    dense = ("speculate", folders["dense"], "--prompt", "the cat ", "--new", 4, "--draft", 0.5)
    code, out, _ = ppnet(*dense, "--scores", "magnitude")
    assert code == 0 and "acceptance" in out and "t h e   c a t" in out
    assert "no gates to rank its units" in refused(*dense)
    assert "context of 64" in refused(*command[:-1], 100, "--draft", 0.7)


def test_eval_with_mask_draws(ok, ppnet, refused, folders):
    command = ("eval", folders["puppet"], "--data", folders["text"], "--max-tokens", 200)
    drawn = (*command, "--sizes", "0.7,0.4", "--metric", "flops", "--draws", 3)
    made = ok(*drawn, "--level", 0.5, "--coverage-draws", 2, "--seed", 5, "--window", 32)
    assert [row["size"] for row in made["rows"]] == [0.7, 0.4]
    for row in made["rows"]:
        assert [draw["seed"] for draw in row["draws"]] == [5, 6, 7] and row["coverage"]["draws"] == 2
        assert row["level"] == 0.5 and row["window"] == 32 and row["single"]["flops"] <= row["size"]
        assert row["average"]["ece"] >= 0 and row["mutual_information"] > 0
    (alone,) = ok(*command, "--size", 0.4, "--metric", "flops", "--window", 32)["rows"]
    assert alone["nll"] == pytest.approx(made["rows"][1]["single"]["nll"], abs=1e-5)
    code, out, _ = ppnet(*drawn, "--coverage-draws", 2)
    assert code == 0 and "average of the draws" in out and "90% interval" in out and "of 2 fresh draws" in out
    assert "add --size" in refused(*command, "--draws", 3)
    assert "multiple-of: has no meaning with --draws" in refused(*drawn, "--multiple-of", "neuron=4")
    assert "scores: has no meaning with --draws" in refused(*drawn, "--scores", "magnitude")
    assert "level: 0.5 has a meaning only with --draws" in refused(*command, "--size", 0.4, "--level", 0.5)
    assert "draws: must be at least 2" in refused(*command, "--size", 0.4, "--draws", 1)
    assert "size: 1.0 keeps every unit" in refused(*command, "--size", 1, "--draws", 2)
    dense = ("eval", folders["dense"], "--data", folders["text"], "--size", 0.5, "--draws", 2)
    assert "carries no gates" in refused(*dense)


def test_bench(ok, ppnet, folders):
    options = ("bench", folders["puppet"], "--sizes", 0.5, "--prompt", 8, "--new", 4, "--rounds", 1)
    (row,) = ok(*options)["rows"]
    assert row["decode_ratio"] > 0 and row["baseline"]["params"] > row["params"]
    code, out, _ = ppnet(*options)
    assert code == 0 and "dense" in out and "prefill" in out


def test_train_from_a_config_then_resume_then_report(ok, ppnet, folders, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "trained"
    command = (
        "train", folders["dense"] / "config.json", "--data", folders["text"], "--out", out, "--length", 32,
        "--batch", 2, "--dense-steps", 2, "--save-steps", 2, "--distill", 0.25, "--set", "lambda_rate=0.5",
        "--device", "cpu",
    )  # fmt: skip
    first = ok(*command, "--steps", 2)
    assert first["steps"] == 2 and first["dense_training_loss"] > 0 and "gated_flops_at_1" in first["gates"]
    config = json.loads((out / "config.json").read_text())
    assert config["ppnet"]["distill"] == 0.25 and config["ppnet"]["lambda_rate"] == 0.5
    code, _, err = ppnet(*command, "--steps", 2)
    assert code == 1 and "--force" in err
    assert ok(*command, "--steps", 4, "--resume")["steps"] == 4
    assert (out / "checkpoint-4").is_dir()
    made = ok(
        "report", out, "--data", folders["text"], "--out", tmp_path / "report", "--sizes", "1,0.5", "--draws", 1,
        "--max-tokens", 200, "--rounds", 1, "--prompt", 4, "--new", 2, "--anchor", 30,
    )  # fmt: skip
    assert len(made["rows"]) == 2 and (tmp_path / "report" / "report.html").is_file()
    code, _, err = ppnet("report", out, "--data", folders["text"], "--out", tmp_path / "report")
    assert code == 1 and "is not empty" in err


def test_wrong_requests_say_what_to_do(refused, folders, tmp_path):
    puppet, text = folders["puppet"], folders["text"]
    assert "is not a folder" in refused("inspect", tmp_path / "missing")
    assert "no config.json" in refused("eval", tmp_path, "--data", text, "--tokenizer", puppet)
    assert "above the dense" in refused("resize", puppet, "--size", 10**9)
    assert "smallest" in refused("resize", puppet, "--size", 0.001)
    assert "metric" in refused("resize", puppet, "--size", 0.5, "--metric", "time")
    assert "of:" in refused("resize", puppet, "--size", 0.5, "--of", "layers")
    assert "not a number" in refused("resize", puppet, "--size", "half")
    assert "kind=number" in refused("resize", puppet, "--size", 0.5, "--multiple-of", "neuron")
    assert "multiple_of" in refused("resize", puppet, "--size", 0.5, "--multiple-of", "expert=2")
    assert "cannot read" in refused("eval", puppet, "--data", tmp_path / "missing.txt")
    assert "no tokenizer" in refused("eval", puppet, "--data", text, "--tokenizer", tmp_path)
    assert "dtype" in refused("eval", puppet, "--data", text, "--dtype", "int3")
    assert "device" in refused("eval", puppet, "--data", text, "--device", "abacus")
    assert "context" in refused("bench", puppet, "--prompt", 500)
    assert "threads" in refused("bench", puppet, "--threads", 0)
    assert "no gates" in refused("report", folders["dense"], "--data", text, "--out", tmp_path / "report")
    assert "cannot read" in refused("compact", puppet, "--plan", tmp_path / "none.json", "--out", tmp_path / "small")


def test_wrong_training_requests(refused, folders, tmp_path):
    train = ("train", folders["dense"], "--out", tmp_path / "out")
    assert "missing.txt" in refused(*train, "--data", tmp_path / "missing.txt")
    assert "steps" in refused(*train, "--data", folders["text"], "--steps", 0)
    assert "preset" in refused(*train, "--data", folders["text"], "--preset", "newer")
    assert "name=value" in refused(*train, "--data", folders["text"], "--set", "lamda=1")
    assert "distill" in refused(*train, "--data", folders["text"], "--distill", 2)
    config = ("train", tmp_path / "config.json", "--tokenizer", folders["dense"], "--data", folders["text"])
    assert "does not exist" in refused(*config, "--out", tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    assert "not a model config" in refused(*config, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gates_are_trained_further(ok, refused, folders, tmp_path):
    stored = json.loads((folders["puppet"] / "config.json").read_text())["ppnet"]
    command = (
        "train", folders["puppet"], "--data", folders["text"], "--out", tmp_path / "out", "--length", 32, "--batch", 2,
        "--steps", 1, "--device", "cpu",
    )  # fmt: skip
    dense = refused(*command, "--dense-steps", 2)
    assert "dense-steps: 2" in dense and "has gates already" in dense and "leave it out" in dense
    for option in (("--preset", "paper"), ("--preset", "default"), ("--set", "temperature=1"), ("--set", "align=4")):
        message = refused(*command, *option)
        name = option[1].partition("=")[0] if option[0] == "--set" else "preset"
        assert f"error: {name}: the gates of" in message and "start from the dense model" in message
    assert not (tmp_path / "out").exists()
    ok(*command, "--distill", 0, "--gate-lr", 0.2, "--set", "lambda_rate=2", "--seed", 3)
    further = json.loads((tmp_path / "out" / "config.json").read_text())["ppnet"]
    assert further == {**stored, "distill": 0.0, "gate_lr": 0.2, "lambda_rate": 2.0, "seed": 3}


def test_a_config_of_a_gated_model_starts_from_scratch(ok, folders, tmp_path):
    out = tmp_path / "out"
    ok(
        "train", folders["puppet"] / "config.json", "--data", folders["text"], "--out", out, "--length", 32,
        "--batch", 2, "--steps", 1, "--dense-steps", 1, "--preset", "paper", "--device", "cpu",
    )  # fmt: skip
    assert "ppnet" not in json.loads((out / "dense" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text())["ppnet"]["preset"] == "paper"


def test_a_damaged_config_is_named(refused, folders, tmp_path):
    shutil.copytree(folders["dense"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": "wide"}))
    data = ("--data", folders["text"])
    for command in (
        ("inspect", file.parent),
        ("eval", file.parent, *data),
        ("train", file.parent, *data, "--out", tmp_path / "out"),
        ("train", file, *data, "--out", tmp_path / "out"),
    ):
        message = refused(*command)
        assert str(file) in message and "hidden_size" in message


def test_training_length_fits_the_context(refused, folders, tmp_path):
    message = refused("train", folders["dense"], "--data", folders["text"], "--out", tmp_path / "out")
    assert "length: 256 tokens are more than the model's context of 64" in message


def test_a_plan_leaves_nothing_to_choose(ok, refused, folders, tmp_path):
    ok("resize", folders["puppet"], "--size", 0.5, "--out", tmp_path / "plan.json")
    command = ("compact", folders["puppet"], "--plan", tmp_path / "plan.json", "--out", tmp_path / "small")
    for name, value in (("metric", "flops"), ("of", "gated"), ("multiple-of", "neuron=4")):
        assert f"{name}: only used to make a plan from a size; --plan is given" in refused(*command, f"--{name}", value)
    assert not (tmp_path / "small").exists()


def test_bench_sizes_a_gated_model_beside_an_old_plan(ok, folders, tmp_path):
    shutil.copytree(folders["puppet"], tmp_path / "model")
    ok("resize", folders["puppet"], "--size", 1.0, "--out", tmp_path / "model" / "ppnet_plan.json")
    made = ok("bench", tmp_path / "model", "--sizes", 0.5, "--prompt", 8, "--new", 4, "--rounds", 1)
    assert made["rows"][0]["size"] == 0.5


def test_nothing_is_overwritten_unasked(refused, ok, folders, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    compact = ("compact", folders["puppet"], "--size", 0.5, "--out", tmp_path / "full")
    assert "is not empty" in refused(*compact)
    assert "thesis.txt" in refused(*compact, "--force")
    (tmp_path / "plan.json").write_text("mine")
    resize = ("resize", folders["puppet"], "--size", 0.5, "--out", tmp_path / "plan.json")
    assert "exists" in refused(*resize)
    assert (tmp_path / "plan.json").read_text() == "mine"
    ok(*resize, "--force")
    assert Plan.load(tmp_path / "plan.json").source == "gates"


def test_usage_errors_exit_with_2(ppnet, folders, tmp_path):
    for arguments in (
        ("resize", folders["puppet"]),
        ("shrink",),
        ("eval", folders["puppet"], "--data", folders["text"], "--window", "wide"),
        ("compact", folders["puppet"], "--out", tmp_path / "small"),
        ("compact", folders["puppet"], "--out", tmp_path / "small", "--size", 0.5, "--plan", "plan.json"),
    ):
        code, out, err = ppnet(*arguments)
        assert code == 2 and out == "" and "Usage" in err


def test_interrupt_exits_with_130(ppnet, monkeypatch, tmp_path):
    def interrupted(output, fast=False):
        raise KeyboardInterrupt

    stand_in = ModuleType("ppnet.demo")
    stand_in.run = interrupted
    monkeypatch.setitem(sys.modules, "ppnet.demo", stand_in)
    code, out, _ = ppnet("demo", "--out", tmp_path / "demo")
    assert code == 130 and out == ""


def test_every_command_explains_itself(ppnet):
    code, out, _ = ppnet("--help")
    assert code == 0
    for command in ("inspect", "train", "resize", "compact", "eval", "speculate", "bench", "report", "demo"):
        assert command in out
        code, text, _ = ppnet(command, "--help")
        assert code == 0 and "Example" in text and "--json" in text


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ppnet", "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
