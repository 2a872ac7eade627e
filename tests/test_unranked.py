"""Models without gates: sizes need scores, a method that needs no data by its name, or data to be scored on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DECODERS, tiny, token_ids
from refusals import fingerprint, gated, refused
from scoring import TEXT, words
from tiny_folders import run_command, write_folders

import ppnet
from ppnet.checkpoint import save
from ppnet.compact import compact
from ppnet.errors import CheckpointError, DataError, PlanError, SizeError
from ppnet.plan import Plan
from ppnet.scores.registry import SCORERS, scorer

IDS = token_ids(batch=4, length=12)
NO_GATES = r"^scores: None, and this LlamaForCausalLM has no gates to rank its units; "
WAYS_OUT = (
    r"give scores=ppnet\.score\(model, data, tokenizer=\.\.\.\), or, without data, "
    r'scores="magnitude", which can lose to units drawn at random \(scores="random"\)\.$'
)


def same(one: Any, other: Any) -> bool:
    """Whether two models have the same weights, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The data of every pass that `compact` scores on."""
    import sys

    seen = []
    module = sys.modules["ppnet.compact"]
    own = module.score  # type: ignore[attr-defined]
    monkeypatch.setattr(
        module, "score", lambda model, data, **options: seen.append(data) or own(model, data, **options)
    )
    return seen


# ---- plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.6, 1.0, 20_000])
def test_a_plan_without_gates_and_scores_is_refused(size: float) -> None:
    model = tiny("llama")
    with refused(model, PlanError, NO_GATES + WAYS_OUT):
        ppnet.plan(model, size)
    with refused(model, PlanError, NO_GATES + WAYS_OUT):
        ppnet.plan(model, size, scores=None, allocation="global")


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_without_data_go_by_their_name(method: str, allocation: str) -> None:
    scores = ppnet.score(tiny("llama"), method=method)
    other = ppnet.score(tiny("llama"), method="random" if method == "magnitude" else "magnitude")
    for model in (tiny("llama"), gated()):
        made = ppnet.plan(model, 0.6, scores=method, allocation=allocation)
        assert made == ppnet.plan(model, 0.6, scores=scores, allocation=allocation) and made.source == method
        assert made.kept != ppnet.plan(model, 0.6, scores=other, allocation=allocation).kept
    with ppnet.resize(model, 0.6, scores=method) as resized:
        assert resized.plan.source == method


def test_any_method_without_data_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the registry: the weights that a method sees are those that it sees in `ppnet.score`."""
    for name in ("folded", "seeing"):
        monkeypatch.setitem(SCORERS, name, SCORERS["random"])  # taken out again afterwards

    def folded(statistics: Any) -> torch.Tensor:
        role = "v" if "v" in statistics.weights.roles() else "up"
        return -statistics.weights.rows(role, True).flatten(1).norm(dim=1)

    scorer("folded")(folded)
    scorer("seeing", "activations")(lambda statistics: statistics.activations)
    model = tiny("llama")
    assert ppnet.plan(model, 0.6, scores="folded") == ppnet.plan(model, 0.6, scores=ppnet.score(model, method="folded"))
    with pytest.raises(PlanError, match=r"^scores: 'seeing' needs data"):
        ppnet.plan(model, 0.6, scores="seeing")


@pytest.mark.parametrize("method", sorted(set(SCORERS) - {"magnitude", "position", "random"}))
def test_methods_that_need_data_say_so(method: str) -> None:
    message = (
        rf"^scores: '{method}' needs data to rank units by; give "
        rf'scores=ppnet\.score\(model, data, method="{method}"\)\.$'
    )
    model = tiny("llama")
    for call in (ppnet.plan, ppnet.compact):
        with refused(model, PlanError, message):
            call(model, 0.6, scores=method)
    with refused(model, PlanError, message):
        ppnet.compact(model, 0.6, scores=method, redistribute=IDS)
    wrapped = gated()
    with refused(wrapped, PlanError, message):
        ppnet.resize(wrapped, 0.6, scores=method)


def test_a_methods_name_goes_before_a_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    taylor, magnitude = ppnet.score(model, IDS, "taylor"), ppnet.score(model, method="magnitude")
    for name in ("magnitude", "taylor", "mine"):
        taylor.save(name)
    expected = ppnet.plan(model, 0.6, scores=taylor)
    assert expected.kept != ppnet.plan(model, 0.6, scores=magnitude).kept
    assert ppnet.plan(model, 0.6, scores="magnitude") == ppnet.plan(model, 0.6, scores=magnitude)
    with pytest.raises(PlanError, match=r"^scores: 'taylor' needs data"):
        ppnet.plan(model, 0.6, scores="taylor")
    for file in ("./magnitude", Path("magnitude"), "./taylor", "mine"):
        assert ppnet.plan(model, 0.6, scores=file) == expected
    methods = r" Nor is it the name of a method that needs no data \(magnitude, position, random\)\.$"
    with pytest.raises(CheckpointError, match=r"cannot read magnitud: No such file.*" + methods):
        ppnet.plan(model, 0.6, scores="magnitud")
    Path("noise").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"cannot read noise: ") as damaged:
        ppnet.plan(model, 0.6, scores="noise")
    assert "Nor is it" not in str(damaged.value)


# ---- compact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scores": None}, {"redistribution": "none"}])
def test_compaction_without_gates_scores_and_data_is_refused(options: dict[str, Any]) -> None:
    model = tiny("llama")
    message = NO_GATES + "give redistribute=data, which then ranks them, too, or " + WAYS_OUT
    with refused(model, PlanError, message):
        ppnet.compact(model, 0.6, **options)


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_data_of_the_redistribution_ranks_the_units(model_type: str, scored: list[Any]) -> None:
    model = tiny(model_type)
    before, weights = fingerprint(model), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # what the caller does about gradients must not matter
        small = compact(model, 0.7, redistribute=IDS, allocation="global")
    assert len(scored) == 1 and fingerprint(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    scores = ppnet.score(model, IDS)
    plan = ppnet.plan(model, 0.7, scores=scores, allocation="global")
    made = small.ppnet_plan
    assert made.source == plan.source == scores.method == "mama" and made.kept == plan.kept
    assert made.extra["scores"] == {"method": "mama", "data": "redistribute", "tokens": scores.tokens}
    assert scores.tokens == 44 and made.extra["redistribution"]["tokens"] == 48
    assert made.kept != ppnet.plan(model, 0.7, scores="magnitude", allocation="global").kept
    assert Plan.from_dict(json.loads(made.to_json())) == made
    explicit = compact(model, 0.7, redistribute=IDS, allocation="global", scores=scores)
    assert same(small, explicit) and len(scored) == 1 and "scores" not in explicit.ppnet_plan.extra


def test_text_is_read_once_with_the_callers_options(scored: list[Any]) -> None:
    model = tiny("llama", vocab_size=13, pad_token_id=0)
    tokenizer = words()
    rows = [{"story": TEXT}, {"story": TEXT[::-1]}]
    small = compact(model, 0.6, redistribute=iter(rows), tokenizer=tokenizer, column="story")
    scores = ppnet.score(model, rows, tokenizer=tokenizer, column="story")
    explicit = compact(model, 0.6, redistribute=rows, tokenizer=tokenizer, column="story", scores=scores)
    assert same(small, explicit) and small.ppnet_plan.kept == explicit.ppnet_plan.kept and len(scored) == 1
    with refused(model, DataError, r"column: 'text' .*Name the one that holds the text, column="):
        compact(model, 0.6, redistribute=rows, tokenizer=tokenizer)
    with refused(model, DataError, r"^redistribute: "):
        compact(model, 0.6, redistribute=torch.full((2, 8), 13))


def test_data_that_only_ranks() -> None:
    model = tiny("llama")
    small = compact(model, 0.6, redistribute=IDS, redistribution="none")
    assert small.ppnet_plan.source == "mama" and "redistribution" not in small.ppnet_plan.extra
    assert same(small, compact(model, 0.6, scores=ppnet.score(model, IDS)))


def test_gates_scores_and_plans_go_before_the_data(scored: list[Any]) -> None:
    model = tiny("llama")
    for small in (
        compact(gated(), 0.8, redistribute=IDS),
        compact(model, 0.8, redistribute=IDS, scores="random"),
        compact(model, ppnet.plan(model, 0.8, scores="random"), redistribute=IDS),
    ):
        assert small.ppnet_plan.source in ("gates", "random") and "scores" not in small.ppnet_plan.extra
    assert not scored


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0.001, {}, SizeError, "is not possible; the smallest is"),
        (10**9, {}, SizeError, "is above the dense model's"),
        (0.6, {"floor": 2}, PlanError, "floor: 2 for"),
        (0.6, {"multiple_of": {"head": 2}}, PlanError, "multiple_of: "),
        (0.6, {"allocation": "best"}, PlanError, "allocation: 'best' is not known"),
    ],
)
def test_wrong_sizes_show_before_the_pass_over_the_data(size, options, error, message, scored) -> None:
    model = tiny("llama")
    with refused(model, error, message):
        compact(model, size, redistribute=IDS, **options)
    assert not scored


def test_encoders_need_scores() -> None:
    model = tiny("bert")
    ids = token_ids(batch=4, length=12)
    message = (
        r"^scores: None, .*data of redistribute, but loss: None, but gradients are needed and a BertForMaskedLM is an "
        r"encoder, which has no next-token loss; .*give scores=ppnet\.score\(model, data, loss=\.\.\.\), or of a "
        r'method without gradients, scores=ppnet\.score\(model, data, method="activation"\)\.$'
    )
    with refused(model, PlanError, message):
        compact(model, 0.8, redistribute=ids)
    loss = lambda output, batch: output.logits.square().mean((1, 2))  # noqa: E731
    for scores in (ppnet.score(model, ids, loss=loss), ppnet.score(model, ids, method="activation")):
        small = compact(model, 0.8, redistribute=ids, scores=scores)
        assert small.ppnet_plan.source == scores.method and small.ppnet_plan.extra["redistribution"]["tokens"] == 48


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("models"))


FILE_OR_METHOD = (
    "give --scores FILE (ppnet score FOLDER --data TEXT --out FILE writes it), or, without data, --scores magnitude, "
    "which can lose to units drawn at random (--scores random)."
)


def test_commands_ask_for_scores(capsys: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    dense, text, out = folders["dense"], folders["text"], tmp_path / "out"
    no_gates = "error: scores: the model has no gates to rank its units; "
    needs_data = (
        "error: scores: 'taylor' needs data to rank units by; run ppnet score FOLDER --data TEXT --method taylor --out "
        "FILE, then give --scores FILE."
    )
    resize, sized = ("resize", dense, "--size", 0.5), ("eval", dense, "--data", text, "--sizes", "1,0.5")
    small = ("compact", dense, "--size", 0.5, "--out", out)
    ranks = "give --redistribute TEXT, which then ranks them, too, or "
    for arguments, message in (
        (resize, no_gates + FILE_OR_METHOD),
        (sized, no_gates + FILE_OR_METHOD),
        (small, no_gates + ranks + FILE_OR_METHOD),
        ((*resize, "--scores", "taylor"), needs_data),
        ((*sized, "--scores", "taylor"), needs_data),
        ((*small, "--scores", "taylor"), needs_data),
        ((*small, "--scores", "taylor", "--redistribute", text), needs_data),
        ((*resize, "--scores", "no.safetensors"), "error: scores: cannot read no.safetensors"),
        ((*small, "--scores", "magnitud"), "method that needs no data (magnitude, position, random)."),
        (
            ("eval", dense, "--data", text, "--scores", "random"),
            "error: scores: random has a meaning only with --sizes",
        ),
    ):
        code, printed, err = run_command(capsys, *arguments)
        assert code == 1 and printed == "" and message in " ".join(err.split()), (arguments, err)
    assert not out.exists()
    code, printed, err = run_command(capsys, *small, "--redistribute", text, "--allocation", "global")
    assert code == 0, err
    code, _, err = run_command(capsys, "resize", out, "--size", 0.5)
    assert code == 1 and "already compacted" in err  # and not that it has no gates


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_commands_rank_by_a_methods_name(capsys: Any, folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    dense, text = folders["dense"], folders["text"]
    expected = ppnet.plan(ppnet.load(dense), 0.5, scores=method)
    size = ("--size", 0.5, "--scores", method)
    code, printed, err = run_command(capsys, "resize", dense, *size, "--out", tmp_path / "plan.json", "--json")
    assert code == 0 and json.loads(printed)["source"] == method, err
    assert Plan.load(tmp_path / "plan.json") == expected
    code, printed, err = run_command(
        capsys, "compact", dense, *size, "--out", tmp_path / "small", "--redistribute", text
    )
    assert code == 0 and f"units ranked by {method}" in printed, err
    assert Plan.load(tmp_path / "small" / "ppnet_plan.json").kept == expected.kept
    code, printed, err = run_command(capsys, "eval", dense, "--data", text, "--sizes", 0.5, *size[2:], "--json")
    code, other, err = run_command(capsys, "compact", dense, *size, "--out", tmp_path / "plain", "--json")
    assert code == 0 and json.loads(other)["scores"] is None, err
    code, plain, err = run_command(capsys, "eval", tmp_path / "plain", "--data", text, "--json")
    (one,), (two,) = (json.loads(result)["rows"] for result in (printed, plain))
    assert one["nll"] == pytest.approx(two["nll"], abs=1e-6) and one["params"] == expected.cost.params


def test_compact_scores_on_the_text_of_the_redistribution(
    capsys: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    dense, text, scores = folders["dense"], folders["text"], tmp_path / "scores.safetensors"
    sized = ("compact", dense, "--size", 0.5, "--redistribute", text)
    code, printed, err = run_command(capsys, *sized, "--out", tmp_path / "small", "--json")
    made = json.loads(printed)
    assert code == 0 and made["source"] == made["scores"]["method"] == "mama" and made["scores"]["tokens"] > 500, err
    assert Plan.load(tmp_path / "small" / "ppnet_plan.json").extra["scores"] == made["scores"]
    assert run_command(capsys, "score", dense, "--data", text, "--device", "cpu", "--out", scores)[0] == 0
    code, printed, err = run_command(capsys, *sized, "--scores", scores, "--out", tmp_path / "explicit")
    assert code == 0 and "units ranked by mama" in printed, err
    assert same(ppnet.load(tmp_path / "small"), ppnet.load(tmp_path / "explicit"))


def test_bench_needs_no_scores(capsys: Any, folders: dict[str, Path]) -> None:
    """Widths make the time: those of a uniform plan are the same, whatever ranks the units."""
    options = ("--sizes", 0.5, "--prompt", 8, "--new", 4, "--rounds", 1, "--device", "cpu", "--json")
    code, printed, err = run_command(capsys, "bench", folders["dense"], *options)
    assert code == 0, err
    expected = ppnet.plan(ppnet.load(folders["dense"]), 0.5, scores="magnitude")
    assert json.loads(printed)["rows"][0]["params"] == expected.cost.params


def test_compact_asks_for_scores_of_an_encoder(capsys: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    from tiny_folders import tokenizer

    save(tiny("bert", vocab_size=40), tmp_path / "bert", tokenizer())
    command = (
        "compact",
        tmp_path / "bert",
        "--size",
        0.8,
        "--redistribute",
        folders["text"],
        "--out",
        tmp_path / "out",
    )
    code, printed, err = run_command(capsys, *command)
    assert code == 1 and printed == "" and "error: scores: the model is an encoder" in err
    assert "--method activation" in err and not (tmp_path / "out").exists()
    code, _, err = run_command(capsys, *command, "--scores", "magnitude")
    assert code == 0, err
