"""Prefix masks against `ppnet.plan`, and the passes of a sandwich step."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import Trainer

import ppnet
from ppnet.errors import PPNetError, TrainingError
from ppnet.gates import PuppetConfig
from ppnet.gates.draw import GATED, Stratum, choose, generator
from ppnet.gates.prefix import prefix_mask
from ppnet.train import PuppetCallback, PuppetTrainer, default_arguments, text_blocks
from ppnet.wrap import wrap


def puppet_of(seed=0, **options):
    """Gates that differ between units and sites, as after training."""
    model = wrap(tiny("llama"), PuppetConfig(seed=seed, **options))
    with torch.no_grad():
        model.puppet.theta.normal_(generator=torch.Generator().manual_seed(3))
        model.puppet.s_gate.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return model.puppet


# ---- the mask --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sites=st.lists(st.integers(1, 9), min_size=1, max_size=5), fraction=st.floats(0.0, 1.0), seed=st.integers(0, 10**6)
)
def test_prefix_mask_is_the_longest_prefix_that_fits(sites, fraction, seed):
    random = torch.Generator().manual_seed(seed)
    offsets = [0]
    for units in sites:
        offsets.append(offsets[-1] + units)
    keys = torch.rand(offsets[-1], generator=random, dtype=torch.float64)
    costs = torch.repeat_interleave(
        torch.rand(len(sites), generator=random, dtype=torch.float64) + 0.1, torch.tensor(sites)
    )
    mask = prefix_mask(keys, costs, fraction, offsets)
    firsts = {start + int(keys[start:stop].argmax()) for start, stop in pairwise(offsets)}
    kept, out = set(mask.nonzero().flatten().tolist()), (~mask).nonzero().flatten().tolist()
    assert firsts <= kept
    rest = kept - firsts
    if rest:
        assert float(costs[mask].sum()) <= fraction * float(costs.sum()) * (1 + 1e-9)
        assert not out or min(float(keys[unit]) for unit in rest) >= max(float(keys[unit]) for unit in out)
    if out:
        nearest = max(out, key=lambda unit: float(keys[unit]))
        assert float(costs[mask].sum() + costs[nearest]) > fraction * float(costs.sum()) * (1 - 1e-9)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_prefix_draws_are_what_a_plan_keeps(fraction):
    """A plan goes on with smaller units where the next one does not fit, so it holds a few more."""
    puppet = puppet_of(prefix_fraction=1.0, dense_fraction=0.0)
    plan = ppnet.plan(puppet.root, fraction, metric="flops", of="gated")
    mask = puppet._prefix_mask(fraction)
    names = [(site.name, unit) for site in puppet.structure.sites for unit in range(site.units)]
    kept = {names[unit] for unit in mask.nonzero().flatten().tolist()}
    planned = {(name, unit) for name, units in plan.kept.items() for unit in units}
    assert kept <= planned and len(planned - kept) <= 4


def test_a_drawn_prefix_has_the_drawn_size_and_gradients_of_all_gates():
    puppet = puppet_of(prefix_fraction=1.0, dense_fraction=0.0, lambda_distribution="uniform_size", smallest_size=0.1)
    counts = torch.bincount(puppet.site_of_unit)
    costs = (puppet.flops_share / counts)[puppet.site_of_unit]
    for number in range(20):
        choice = choose(puppet.config, 0, generator(0, number), puppet._u_at)
        draw = puppet.draw()
        assert choice.prefix and draw.mask is not None and draw.gate is not None
        size = float(costs[draw.mask].sum())
        firsts = float((puppet.flops_share / counts).sum())
        assert size <= max(choice.fraction, firsts) + 1e-6 and size > choice.fraction - float(costs.max()) - 1e-6
        torch.testing.assert_close(draw.gate.detach(), draw.mask.float() * puppet.out_amplitude(draw.u))
        (gradient,) = torch.autograd.grad(draw.gate.sum(), puppet.theta)
        assert (gradient != 0).any(dim=1).all()


def test_exponential_prefixes_have_the_expected_size():
    puppet = puppet_of(prefix_fraction=1.0, dense_fraction=0.0, lambda_distribution="exponential")
    counts = torch.bincount(puppet.site_of_unit)
    costs = (puppet.flops_share / counts)[puppet.site_of_unit]
    firsts = float((puppet.flops_share / counts).sum())
    for _ in range(10):
        draw = puppet.draw()
        with torch.no_grad():
            expected = float(puppet.mean_inclusion(puppet.inclusion(draw.u)))
        size = float(costs[draw.mask].sum())
        assert expected - float(costs.max()) - 1e-6 < size <= max(expected, firsts) + 1e-6


def test_prefixes_of_the_warm_up_have_the_size_of_the_scaled_lambda():
    puppet = puppet_of(prefix_fraction=1.0, dense_fraction=0.0, lambda_distribution="uniform_size", lambda_warmup=100)
    counts = torch.bincount(puppet.site_of_unit)
    costs = (puppet.flops_share / counts)[puppet.site_of_unit]
    cold = [float(costs[puppet.draw().mask].sum()) for _ in range(20)]
    puppet.progress = 99
    warm = [float(costs[puppet.draw().mask].sum()) for _ in range(20)]
    assert min(cold) > 0.8 and min(warm) < 0.5


def test_half_of_the_gated_passes_can_be_prefixes():
    config = PuppetConfig(prefix_fraction=0.5)
    drawn = [choose(config, 0, generator(0, number), lambda size: 0.5) for number in range(3000)]
    assert not any(choice.prefix for choice in drawn if choice.lambda_ == 0)
    gated = [choice for choice in drawn if choice.lambda_ > 0]
    assert abs(sum(choice.prefix for choice in gated) - len(gated) / 2) < 4 * math.sqrt(len(gated) / 4)


@pytest.mark.parametrize("warmup, total", [(100, None), (0.5, 200)])
def test_prefixes_can_take_over_from_draws(warmup, total):
    config = PuppetConfig(prefix_fraction=0.8, prefix_warmup=warmup, dense_fraction=0.0)

    def share(progress):
        drawn = [
            choose(config, progress, generator(0, number), lambda size: 0.5, total_steps=total)
            for number in range(2000)
        ]
        return sum(choice.prefix for choice in drawn) / len(drawn)

    assert share(0) < 0.03
    assert abs(share(49) - 0.4) < 4 * math.sqrt(0.24 / 2000)
    assert abs(share(99) - 0.8) < 4 * math.sqrt(0.16 / 2000) and abs(share(500) - 0.8) < 4 * math.sqrt(0.16 / 2000)


def test_draws_without_prefixes_are_those_of_a_model_that_knows_none():
    before = [choose(PuppetConfig(), 0, generator(0, number), lambda size: size) for number in range(50)]
    after = [
        choose(PuppetConfig(prefix_fraction=1.0), 0, generator(0, number), lambda size: size) for number in range(50)
    ]
    assert [choice.lambda_ for choice in before] == [choice.lambda_ for choice in after]


def test_log_size_is_uniform_in_the_logarithm():
    config = PuppetConfig(lambda_distribution="log_size", smallest_size=0.05, dense_fraction=0.0)
    drawn = [choose(config, 0, generator(0, number), lambda size: 0.5) for number in range(2000)]
    logs = [math.log(choice.fraction) for choice in drawn]
    assert stats.kstest(logs, stats.uniform(math.log(0.05), -math.log(0.05)).cdf).pvalue > 1e-3


def test_what_a_pass_is_can_be_said():
    config = PuppetConfig(dense_fraction=0.9, smallest_size=0.07)
    gated = [choose(config, 0, generator(0, number), lambda size: 0.5, GATED) for number in range(50)]
    assert all(choice.lambda_ > 0 for choice in gated) and len({choice.fraction for choice in gated}) > 40


@pytest.mark.parametrize("distribution", ["uniform_size", "log_size", "uniform_u", "exponential"])
def test_strata_part_the_sizes_evenly(distribution):
    config = PuppetConfig(lambda_distribution=distribution, smallest_size=0.1)
    parts = [
        [choose(config, 0, generator(0, 3 * number + part), lambda size: 1 - size, Stratum(part, 3)).lambda_
         for number in range(200)]
        for part in range(3)
    ]  # fmt: skip
    # The larger lambda, the smaller the size: parts follow each other, without overlap.
    assert max(parts[0]) < min(parts[1]) and max(parts[1]) < min(parts[2])
    whole = [choose(config, 0, generator(1, number), lambda size: 1 - size, GATED).lambda_ for number in range(600)]
    assert stats.ks_2samp([value for part in parts for value in part], whole).pvalue > 1e-3


def test_frozen_weights_have_no_dense_passes(tmp_path):
    model = wrap(tiny("llama"), PuppetConfig(dense_fraction=0.9))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("puppet."))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path, logging_steps=1)
    run.train()
    assert all(model.puppet.draw().u > 0 for _ in range(20))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert "puppet.theta" in changed and all(name.startswith("puppet.") for name in changed)


def test_folders_from_before_prefixes_go_on_with_draws(tmp_path):
    ppnet.save(wrap(tiny("llama"), PuppetConfig()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("prefix_fraction", "prefix_warmup"):
        del config["ppnet"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = ppnet.load(tmp_path).puppet.config
    assert (found.prefix_fraction, found.prefix_warmup) == (0.0, 0.0)


# ---- sandwich steps --------------------------------------------------------------------------------------------------


def trainer(model, folder: Path, **options):
    blocks = text_blocks(torch.arange(3, 3 + 8 * 80) % 90 + 3, None, 16, progress=False)
    arguments = default_arguments(folder, max_steps=2, per_device_train_batch_size=2, use_cpu=True, **options)
    return PuppetTrainer(model=model, args=arguments, train_dataset=blocks)


@pytest.mark.parametrize("kind", [PuppetTrainer, Trainer])
def test_trainers_say_how_far_they_are(tmp_path, kind):
    model = wrap(tiny("llama"), PuppetConfig(prefix_fraction=1.0, prefix_warmup=0.5))
    assert model.puppet.total_steps is None
    blocks = text_blocks(torch.arange(3, 3 + 8 * 80) % 90 + 3, None, 16, progress=False)
    arguments = default_arguments(tmp_path, max_steps=4, per_device_train_batch_size=2, use_cpu=True)
    callbacks = [] if kind is PuppetTrainer else [PuppetCallback()]
    kind(model=model, args=arguments, train_dataset=blocks, callbacks=callbacks).train()
    assert model.puppet.progress == 3 and model.puppet.total_steps == 4


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_sandwich_is_the_mean_of_its_passes(tmp_path, passes):
    config = PuppetConfig(sandwich=passes, distill=0.25, gate_gradient="exact", smallest_size=0.2)
    model = wrap(tiny("llama"), config).train()
    ids = torch.arange(60).view(3, 20) % 90 + 3
    labels = ids.clone()
    labels[1, 5:] = -100
    run = trainer(model, tmp_path)
    loss = run.compute_loss(model, {"input_ids": ids, "labels": labels})
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    puppet, valid = model.puppet, labels[:, 1:] != -100
    assert puppet._draw_count == passes and all(value > 0 for value in puppet._lambdas)
    penalty = puppet.penalty()

    def nll(logits):
        return nn.functional.cross_entropy(logits[:, :-1][valid], labels[:, 1:][valid])

    model.zero_grad()
    puppet._draw_count = 0
    with puppet.dense():
        dense = model(input_ids=ids).logits
    total = nll(dense)
    p = torch.softmax(dense.detach()[:, :-1][valid], -1)
    for number in range(passes):
        with puppet.drawing(Stratum(number, passes)):
            gated = model(input_ids=ids).logits
        q = torch.log_softmax(gated[:, :-1][valid], -1)
        total = total + 0.75 * nll(gated) + 0.25 * (p * (p.log() - q)).sum(-1).mean()
    expected = total / (1 + passes) + penalty
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_sandwich_trains_and_accumulates(tmp_path):
    model = wrap(tiny("llama"), PuppetConfig(sandwich=2, prefix_fraction=1.0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path, gradient_accumulation_steps=2, logging_steps=1)
    run.train()
    assert model.puppet._draw_count == 8
    logged = next(log for log in run.state.log_history if "nll" in log)
    assert math.isfinite(logged["nll"]) and logged["distillation_kl"] > 0 and logged["penalty"] > 0
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # While the exponents are 0, nothing depends on their splines.
    assert set(still) <= {"puppet.u_gate", "puppet.u_out", "puppet.u_in"}


def test_a_sandwich_refuses_activation_checkpointing(tmp_path):
    model = wrap(tiny("llama"), PuppetConfig(sandwich=1))
    with pytest.raises(TrainingError, match=r"sandwich.*checkpointing"):
        trainer(model, tmp_path, gradient_checkpointing=True).train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefix_fraction": 1.5}, r"prefix_fraction: 1\.5 must be in \[0, 1\]"),
        ({"prefix_warmup": -5}, r"prefix_warmup: -5\.0 must be >= 0"),
        ({"sandwich": -1}, r"sandwich: -1 must be >= 0"),
        ({"sandwich": 1.5}, r"sandwich: 1\.5 must be an integer"),
        ({"lambda_distribution": "log"}, "lambda_distribution: 'log' is not known"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(PPNetError, match=message):
        PuppetConfig(**options)
