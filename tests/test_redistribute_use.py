"""Redistribution in use: models with gates, a real model, and what wrong requests say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODEL_TYPES, tiny
from plans import batch, logits, plan_of, random_plan, relative
from test_redistribute import data, duplicated, inputs_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppnet
from ppnet.compact import compact, planned_structure
from ppnet.equivalence import check_equivalent
from ppnet.errors import DataError, EquivalenceError, PPNetError, UnsupportedModelError
from ppnet.evaluate import perplexity
from ppnet.families import structure_of

SHARED = Path(__file__).parents[2] / "shared"
STORIES, TEXT = SHARED / "models/stories260K", SHARED / "data/tinystories"
SEPARATOR = "<|endoftext|>"
needs_stories = pytest.mark.skipif(not STORIES.is_dir() or not TEXT.is_dir(), reason="needs ../shared")


def gated(model: Any, seed: int = 3, **options: Any) -> Any:
    """Gates moved off their start, so that amplitudes are not 1."""
    ppnet.wrap(model, ppnet.PuppetConfig(**options))
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in model.puppet.parameters():
            gate.add_(torch.randn(gate.shape, generator=source) * 0.3)
    return model


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gated_plans_are_refitted_to_the_pass_at_lambda_0(model_type: str, preset: str, sequential: bool) -> None:
    """The first site's features do not depend on what else is removed: its projection is compared with lstsq."""
    model = gated(tiny(model_type), preset=preset, kinds=("neuron",))
    plan = ppnet.plan(model, 0.8)
    assert plan.u > 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ppnet.resize(model, 0.9):  # a size that is set must not matter
        small = compact(model, plan, redistribute=data(), ridge=1e-3, sequential=sequential)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    site = planned_structure(model, plan).sites[0]
    unfitted = compact(model, plan)
    a, missing = inputs_of(unfitted, site.consumer.name, data())
    y = inputs_of(model, site.consumer.name, data())[1]  # in evaluation mode: lambda = 0
    bias = unfitted.get_submodule(site.consumer.name).bias
    a, missing = (x - x.mean(0) if bias is not None else x for x in (a, y - missing))
    penalty = (1e-3 * a.square().sum(0).mean()) ** 0.5
    rows = torch.cat([a, penalty * torch.eye(a.shape[1]).double()])
    wanted = torch.cat([missing, torch.zeros(a.shape[1], y.shape[1]).double()])
    change = torch.linalg.lstsq(rows, wanted).solution
    change = change.T if site.consumer.weight_dim == 1 else change
    got, was = (m.get_submodule(site.consumer.name).weight.double() for m in (small, unfitted))
    torch.testing.assert_close(got - was, change, rtol=1e-3, atol=1e-4)
    errors = small.ppnet_plan.extra["redistribution"]["errors"]
    assert all(entry["after"] < entry["before"] for entry in errors.values())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gated_models_with_duplicated_units_lose_nothing(model_type: str) -> None:
    """Fresh gates have amplitudes of 1, so the small model gives the dense model's logits again."""
    model, plan = duplicated(model_type)
    ppnet.wrap(model)
    small = compact(model, plan, redistribute=data(count=24), ridge=1e-7)
    assert relative(logits(model, batch()), logits(small, batch())) < 2e-4
    assert not hasattr(small, "puppet")


def test_an_accelerated_model() -> None:
    model = tiny("llama")
    plain = compact(model, random_plan(model), redistribute=data())
    fast = compact(ppnet.accelerate(model), random_plan(model), redistribute=data())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


# ---- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_check_uses_the_refitted_projections_and_nothing_else(model_type: str) -> None:
    model = tiny(model_type)
    plan = random_plan(model)
    small = compact(model, plan, redistribute=data(), check=False)
    structure = structure_of(model)
    assert check_equivalent(model, small, structure, plan, refitted=True) <= 1e-5
    with pytest.raises(EquivalenceError):
        check_equivalent(model, small, structure, plan)
    producer = small.get_submodule(structure.sites[2].producers[-1].name)
    with torch.no_grad():
        producer.weight[0, 0] += 1.0
    with pytest.raises(EquivalenceError, match="first differ after layer 1"):
        check_equivalent(model, small, structure, plan, refitted=True)


# ---- wrong requests --------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    model = tiny("llama")
    plan = random_plan(model)
    with pytest.raises(PPNetError, match=r"redistribution: 'most' is not known; use one of least_squares, nearest"):
        compact(model, plan, redistribute=data(), redistribution="most")
    for ridge in (-1.0, float("nan"), float("inf"), "much", True):
        with pytest.raises(PPNetError, match=r"ridge: .* must be a finite number >= 0"):
            compact(model, plan, redistribute=data(), ridge=ridge)
    with pytest.raises(PPNetError, match=r"redistribution: 'mean' needs calibration data"):
        compact(model, plan, redistribution="mean")
    with pytest.raises(DataError, match="outside the model's vocabulary of 96"):
        compact(model, plan, redistribute=torch.full((2, 8), 96))
    with pytest.raises(DataError, match="tokenizer: None"):
        compact(model, plan, redistribute="once upon a time")
    with pytest.raises(DataError, match="empty"):
        compact(model, plan, redistribute=[])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    keeps_it = plan_of(model, lambda site: range(site.units - 1))
    with pytest.raises(DataError, match=r"activations of layers\.1\.neuron hold NaN"):
        compact(model, keeps_it, redistribute=data())


def test_none_is_compact_without_it() -> None:
    model = tiny("llama")
    plan = random_plan(model)
    small = compact(model, plan, redistribute=data(), redistribution="none")
    assert small.ppnet_plan is plan
    plain = compact(model, plan).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in small.state_dict().items())


def test_layers_that_hand_on_more_are_refused() -> None:
    model = tiny("llama")
    calls = []

    def another(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output * (1.0 if len(calls) == 1 else 2.0)

    model.model.layers[0].register_forward_hook(another)
    with pytest.raises(UnsupportedModelError, match="decoder layer 0 returns is not what layer 1 gets"):
        compact(model, random_plan(model), redistribute=data())
    assert [len(layer._forward_pre_hooks) for layer in model.model.layers] == [0, 0, 0]


def test_layers_that_do_not_just_add_are_refused_in_sequence() -> None:
    """As with a multiplier of the residual."""
    model = tiny("llama")
    model.model.layers[0].self_attn.register_forward_hook(lambda m, args, output: (0.5 * output[0], *output[1:]))
    plan = random_plan(model)
    with pytest.raises(UnsupportedModelError, match=r"decoder layer 0 does more than .* use sequential=False"):
        compact(model, plan, redistribute=data())
    assert compact(model, plan, redistribute=data(), sequential=False, check=False)


# ---- a trained model -------------------------------------------------------------------------------------------------


@needs_stories
def test_stories_lose_much_less() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    text = (TEXT / "train.txt").read_text()[:25_000]
    valid = (TEXT / "valid.txt").read_text()[:8_000]

    def nll(small: Any) -> float:
        return perplexity(small, tokenizer, valid, separator=SEPARATOR, progress=False).nll

    plan = ppnet.plan(model, 0.75, of="gated", scores="magnitude")
    without = nll(compact(model, plan))
    refitted = nll(compact(model, plan, redistribute=text, tokenizer=tokenizer))
    # Measured: 3.49 without, 2.30 with.
    assert refitted < without - 0.8


def test_datasets_with_another_column() -> None:
    from scoring import TEXT as LETTERS
    from scoring import words

    model = tiny("llama", vocab_size=13, pad_token_id=0)
    rows = [{"story": LETTERS}]
    small = ppnet.compact(model, 0.6, redistribute=rows, tokenizer=words(), column="story")
    assert small.ppnet_plan.extra["redistribution"]["tokens"] > 200
    with pytest.raises(DataError, match=r"column: 'text' .*\['story'\]. Name the one that holds the text, column="):
        ppnet.compact(model, 0.6, redistribute=rows, tokenizer=words())
    with pytest.raises(DataError, match=r"^redistribute: b.abc. are bytes"):
        ppnet.compact(model, 0.6, redistribute=b"abc", tokenizer=words())
