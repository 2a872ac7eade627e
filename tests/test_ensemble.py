"""Mask ensembles equal a plain float64 computation that keeps all logits; ECE and intervals have their known values."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest
import torch
from helpers import tiny
from refusals import refused
from tiny_folders import TEXT, model, puppet, tokenizer

import ppnet
from ppnet.errors import DataError, PPNetError, SizeError, UnsupportedModelError
from ppnet.evaluate import Reliability, ensemble, mixture, perplexity
from ppnet.evaluate.interval import prediction_interval, spread, student_t
from ppnet.evaluate.perplexity import perplexity_of
from ppnet.gates import Puppet
from ppnet.wrap import engine_of

SIZE = 0.6
LENGTHS = (70, 3, 33, 2, 17)


@pytest.fixture(scope="module")
def gated():
    return puppet()


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (length,), generator=generator) for length in LENGTHS]


# ---- against the definition ------------------------------------------------------------------------------------------


def all_log_probabilities(gated, plan, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the compacted model in float64, every scored token of windows without overlap: (N, V), and the tokens (N,)."""
    small = ppnet.compact(gated, plan).double().eval()
    rows, targets = [], []
    with torch.no_grad():
        for ids in documents():
            for part in ids.split(window):
                if len(part) > 1:
                    rows.append(small(part[None]).logits[0, :-1].log_softmax(-1))
                    targets.append(part[1:])
    return torch.cat(rows), torch.cat(targets)


def plain_ece(probabilities: torch.Tensor, targets: torch.Tensor, bins: int) -> float:
    """Guo et al. 2017, equations 1 to 3, one token at a time."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(probabilities, targets, strict=True):
        sure = float(row.max())
        found.setdefault(math.ceil(sure * bins), []).append((sure, int(row.argmax()) == int(target)))
    gaps = (len(b) * abs(fmean(sure for sure, _ in b) - fmean(right for _, right in b)) for b in found.values())
    return sum(gaps) / len(targets)


def entropy(probabilities: torch.Tensor) -> float:
    return float(torch.special.entr(probabilities).sum(-1).mean())


@pytest.mark.parametrize(
    ("draws", "window", "batch_size", "bins", "sharp"),
    [(2, 16, 3, 15, 1.0), (5, 13, 2, 7, 1.0), (3, 64, 1, 1, 1.0), (3, 31, 4, 10, 60.0)],
)
def test_ensemble_is_the_definition(draws, window, batch_size, bins, sharp):
    """Also where likelihoods of single draws underflow in float32 (sharp)."""
    gated = puppet()
    with torch.no_grad():
        gated.lm_head.weight.mul_(sharp)
    found = ensemble(
        gated, None, documents(), SIZE, draws=draws, window=window, batch_size=batch_size, bins=bins, seed=4
    )
    single = ppnet.plan(gated, SIZE)
    each = [all_log_probabilities(gated, gated.puppet.draw_plan(single.u, 4 + k), window) for k in range(draws)]
    log_p, targets = torch.stack([one for one, _ in each]), each[0][1]
    mean = log_p.logsumexp(0) - math.log(draws)
    assert found.tokens == len(targets) and found.u == single.u
    pairs = [
        (found.single, all_log_probabilities(gated, single, window)[0]),
        (found.average, mean),
        *zip(found.draws, log_p, strict=True),
    ]
    wide = {"rel": 1e-4, "abs": 2e-5}
    for have, want in pairs:
        nll = -float(want[range(len(targets)), targets].mean())
        assert have.nll == pytest.approx(nll, **wide)
        assert have.perplexity == pytest.approx(perplexity_of(have.nll))
        assert have.accuracy == pytest.approx(float((want.argmax(-1) == targets).double().mean()))
        assert have.confidence == pytest.approx(float(want.exp().max(-1).values.mean()), **wide)
        assert have.ece == pytest.approx(plain_ece(want.exp(), targets, bins), **wide)
        assert have.entropy == pytest.approx(entropy(want.exp()), **wide)
    information = entropy(mean.exp()) - fmean(entropy(one.exp()) for one in log_p)
    assert 0.01 < information <= math.log(draws)
    assert found.mutual_information == pytest.approx(information, **wide)


def test_the_single_plan_is_what_perplexity_measures(gated):
    options = {"window": 20, "stride": 7, "batch_size": 3, "separator": "\n", "max_tokens": 200}
    found = ensemble(gated, tokenizer(), TEXT * 5, 0.5, metric="flops", of="gated", draws=2, **options)
    with ppnet.resize(gated, 0.5, metric="flops", of="gated") as sized:
        alone = perplexity(gated, tokenizer(), TEXT * 5, **options)
    assert found.single.nll == pytest.approx(alone.nll, abs=1e-6)
    assert found.single.flops == sized.plan.cost.flops / sized.plan.dense_cost.flops
    for name in ("tokens", "windows", "documents", "window", "stride", "bos"):
        assert getattr(found, name) == getattr(alone, name)


def test_batches_and_chunks_change_nothing(gated, monkeypatch):
    whole = ensemble(gated, None, documents(), SIZE, draws=3, coverage_draws=2)
    monkeypatch.setattr(mixture, "CHUNK", 5 * 40)
    for batch_size in (1, 4):
        parts = ensemble(gated, None, documents(), SIZE, draws=3, coverage_draws=2, batch_size=batch_size)
        assert parts.average.nll == pytest.approx(whole.average.nll, abs=1e-6)
        assert parts.average.ece == pytest.approx(whole.average.ece, abs=1e-6)
        assert parts.mutual_information == pytest.approx(whole.mutual_information, abs=1e-6)
        assert parts.coverage == whole.coverage


def test_accelerated_models_have_the_same_ensemble(gated):
    plain = ensemble(gated, None, documents(), SIZE, draws=2)
    ppnet.accelerate(gated)
    try:
        fast = ensemble(gated, None, documents(), SIZE, draws=2)
    finally:
        ppnet.decelerate(gated)
    assert fast.average.nll == pytest.approx(plain.average.nll, abs=1e-5)
    assert fast.mutual_information == pytest.approx(plain.mutual_information, abs=1e-5)


def test_other_families_and_dtypes():
    wide, narrow = (
        ensemble(ppnet.wrap(tiny("gpt2", dtype=dtype)), None, documents(), 0.8, metric="flops", draws=2)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.average.nll == pytest.approx(wide.average.nll, abs=0.02)
    assert narrow.mutual_information == pytest.approx(wide.mutual_information, abs=0.02)


def test_equal_draws_average_to_themselves(gated, monkeypatch):
    plan = ppnet.plan(gated, SIZE)
    monkeypatch.setattr(Puppet, "draw_plan", lambda puppet, u, seed: plan)
    found = ensemble(gated, None, documents(), SIZE, draws=3, coverage_draws=2)
    for name in ("nll", "accuracy", "confidence", "ece", "entropy"):
        assert getattr(found.average, name) == pytest.approx(getattr(found.single, name), abs=1e-6)
    assert found.mutual_information == pytest.approx(0.0, abs=1e-6)
    assert found.nll.low == found.nll.high == found.single.nll
    assert (found.coverage.params, found.coverage.flops, found.coverage.perplexity) == (1.0, 1.0, 1.0)


# ---- draws, intervals, coverage --------------------------------------------------------------------------------------


def test_draws_follow_their_seeds(gated):
    first = ensemble(gated, None, documents(), SIZE, draws=5)
    assert [draw.seed for draw in first.draws] == [0, 1, 2, 3, 4]
    assert ensemble(gated, None, documents(), SIZE, draws=5).draws == first.draws
    later = ensemble(gated, None, documents(), SIZE, draws=3, seed=2)
    assert later.draws == first.draws[2:]
    assert len({draw.nll for draw in first.draws}) == 5
    plan = gated.puppet.draw_plan(first.u, 3)
    assert first.draws[3].params == plan.cost.params / plan.dense_cost.params


def test_coverage_is_of_fresh_draws(gated):
    options = {"draws": 3, "level": 0.6}
    found = ensemble(gated, None, documents(), SIZE, coverage_draws=9, **options)
    fresh = ensemble(gated, None, documents(), SIZE, draws=9, seed=3).draws
    assert found.draws == ensemble(gated, None, documents(), SIZE, **options).draws
    assert found.coverage.draws == 9
    for name, over in (("params", found.params), ("flops", found.flops), ("perplexity", found.perplexity)):
        share = fmean(over.low <= getattr(draw, name) <= over.high for draw in fresh)
        assert getattr(found.coverage, name) == pytest.approx(share)
    assert 0 < found.coverage.perplexity + found.coverage.params < 2


def test_spreads_are_over_the_draws(gated):
    found = ensemble(gated, None, documents(), SIZE, draws=4, level=0.8)
    for name in ("nll", "perplexity", "ece", "params", "flops"):
        values, over = [getattr(draw, name) for draw in found.draws], getattr(found, name)
        assert (over.min, over.max) == (min(values), max(values))
        assert over.mean == pytest.approx(fmean(values))
        assert over.low < over.mean < over.high
    low, high = prediction_interval([draw.nll for draw in found.draws], 0.8)
    assert (found.perplexity.low, found.perplexity.high) == (math.exp(low), math.exp(high))


@pytest.mark.parametrize(
    ("level", "freedom", "value"),
    [(0.5, 1, 1.0), (0.9, 1, 6.313752), (0.95, 2, 4.302653), (0.9, 7, 1.894579), (0.99, 10, 3.169273),
     (0.95, 31, 2.039513), (0.9, 1000, 1.646379)],
)  # fmt: skip
def test_quantiles_of_student(level, freedom, value):
    assert student_t(level, freedom) == pytest.approx(value, abs=1e-6)


def test_intervals_by_hand():
    low, high = prediction_interval([1.0, 3.0], 0.5)  # t_1 = 1, s = sqrt(2), sqrt(1 + 1/2)
    assert (low, high) == (pytest.approx(2 - math.sqrt(3)), pytest.approx(2 + math.sqrt(3)))
    same = spread([0.1] * 49, 0.9)
    assert same.low == same.mean == same.high == 0.1 and same.covers(0.1)
    assert spread([0.9, 0.99], 0.9).within(0.0, 1.0).high == 1.0
    for values, level in (([1.0], 0.9), ([1.0, 2.0], 0.0), ([1.0, 2.0], 1.0), ([1.0, 2.0], math.nan)):
        with pytest.raises(PPNetError, match=r"values|level"):
            prediction_interval(values, level)


@pytest.mark.parametrize(("count", "level"), [(2, 0.8), (5, 0.5), (8, 0.9)])
def test_intervals_cover_at_their_level(count, level):
    drawn = torch.randn(4000, count + 1, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    spreads = [(spread(values[:-1], level), values[-1]) for values in (3 + 2 * drawn).tolist()]
    assert fmean(over.covers(fresh) for over, fresh in spreads) == pytest.approx(level, abs=0.025)
    skewed = drawn.exp()  # the range needs no normal draws
    inside = (skewed[:, :-1].amin(1) <= skewed[:, -1]) & (skewed[:, -1] <= skewed[:, :-1].amax(1))
    assert float(inside.double().mean()) == pytest.approx((count - 1) / (count + 1), abs=0.025)


# ---- calibration -----------------------------------------------------------------------------------------------------


def reliability(confidence: list[float], right: list[int], bins: int = 15) -> Reliability:
    """In two parts, as it is summed up over batches."""
    found = Reliability(bins)
    for part in (slice(0, 3), slice(3, None)):
        found.add(torch.tensor(confidence[part], dtype=torch.float64), torch.tensor(right[part]).bool())
    return found


def test_ece_of_known_cases():
    perfect = reliability([0.75] * 4 + [0.5] * 2 + [1.0] * 3, [1, 1, 1, 0, 1, 0, 1, 1, 1])
    assert perfect.ece == pytest.approx(0.0, abs=1e-15)
    sure = reliability([1.0] * 8, [1, 0, 1, 0, 1, 0, 1, 0])
    assert (sure.ece, sure.accuracy, sure.confidence) == (0.5, 0.5, 1.0)
    timid = reliability([0.25] * 4, [1, 1, 1, 1])
    assert timid.ece == 0.75
    # two bins: |2/2 - 1.2/2| * 2/5 + |1/3 - 0.2| * 3/5
    assert reliability([0.6, 0.2, 0.2, 0.6, 0.2], [1, 0, 1, 1, 0], bins=2).ece == pytest.approx(0.24)
    # in one bin too much and too little cancel
    assert reliability([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1], bins=1).ece == 0.0


def test_bins_hold_their_right_edge():
    found = reliability([0.0, 0.25, 0.2500001, 0.5, 1.0, 1.0000001], [1] * 6, bins=4)
    assert found.sums[0].tolist() == [2, 2, 0, 2]
    assert found.confidence <= 1.0


# ---- the model afterwards, what is written, what is refused ----------------------------------------------------------


def interrupted(gated, monkeypatch, after: int, error: type[BaseException]) -> None:
    """The model's forward raises `error` at the pass `after`."""
    forward, calls = gated.forward, iter(range(10**6))

    def failing(*args, **kwargs):
        if next(calls) == after:
            raise error("stop")
        return forward(*args, **kwargs)

    monkeypatch.setattr(gated, "forward", failing)


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("sized", [False, True])
def test_size_and_modes_return(monkeypatch, stop, sized):
    gated = puppet()
    gated.train()
    gated.model.layers[1].eval()
    if sized:
        ppnet.resize(gated, 0.7)
    fixed, draws = engine_of(gated).fixed, int(gated.puppet.draws)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = gated(ids).logits
    if stop is None:
        ensemble(gated, None, documents(), SIZE, draws=2)
    else:
        with monkeypatch.context() as patch, pytest.raises(stop):
            interrupted(gated, patch, 2, stop)
            ensemble(gated, None, documents(), SIZE, draws=2)
    assert engine_of(gated).fixed is fixed and int(gated.puppet.draws) == draws
    assert gated.training and not gated.model.layers[1].training and gated.model.layers[0].training
    with torch.no_grad():
        assert torch.equal(gated(ids).logits, before)


def test_what_is_written(gated):
    found = ensemble(gated, tokenizer(), TEXT, SIZE, draws=3, coverage_draws=4, level=0.8)
    text, data = str(found), json.loads(json.dumps(found.to_dict()))
    assert "3 mask draws" in text and "80% of fresh draws" in text and "of 4 others" in text
    assert data["average"]["nll"] == found.average.nll and len(data["draws"]) == 3
    assert data["perplexity"]["low"] == found.perplexity.low and data["coverage"]["draws"] == 4
    assert "others" not in str(ensemble(gated, tokenizer(), TEXT, SIZE, draws=2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 1}, PPNetError, "draws: must be at least 2, got 1"),
        ({"coverage_draws": -1}, PPNetError, "coverage_draws: must be at least 0, got -1"),
        ({"level": 1.0}, PPNetError, "level: must be between 0 and 1, got 1.0"),
        ({"bins": 0}, PPNetError, "bins: must be at least 1, got 0"),
        ({"size": 1.0}, SizeError, "size: 1.0 keeps every unit"),
        ({"size": 0.001}, SizeError, "smallest"),
        ({"size": 0.5, "metric": "time"}, PPNetError, "metric"),
        ({"size": 0.5, "of": "layers"}, PPNetError, "of:"),
        ({"data": " "}, DataError, "empty"),
        ({"data": torch.tensor([5])}, DataError, "too short"),
        ({"data": torch.tensor([1, 40])}, DataError, "id 40 is outside"),
        ({"window": 65}, DataError, "context of 64"),
        ({"batch_size": 0}, DataError, "batch_size"),
    ],
)
def test_refused(gated, options, error, message):
    request = {"data": TEXT, "size": SIZE, **options}
    with refused(gated, error, message):
        ensemble(gated, tokenizer(), request.pop("data"), request.pop("size"), **request)


def test_models_without_masks_to_draw(gated):
    with refused(dense := model(), UnsupportedModelError, "carries no gates, so there are no masks to draw"):
        ensemble(dense, tokenizer(), TEXT, SIZE)
    small = ppnet.compact(gated, 0.5)
    with refused(small, UnsupportedModelError, "carries no gates"):
        ensemble(small, tokenizer(), TEXT, SIZE)
    with refused(encoder := ppnet.wrap(tiny("bert")), UnsupportedModelError, "encoder"):
        ensemble(encoder, None, torch.arange(9), SIZE)
    with gated.puppet.dense(), refused(gated, PPNetError, r"puppet\.dense"):
        ensemble(gated, tokenizer(), TEXT, SIZE)


def test_damaged_predictions_stop():
    gated = puppet()
    with torch.no_grad():
        gated.model.norm.weight[3] = math.nan
    with pytest.raises(PPNetError, match="NaN"):
        ensemble(gated, tokenizer(), TEXT, SIZE)
    assert engine_of(gated).fixed is None
