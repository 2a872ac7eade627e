"""What training draws: lambda, masks, their distributions and their order; the options that say so."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny
from scipy import stats

import ppnet
from ppnet.errors import PPNetError
from ppnet.gates import PuppetConfig
from ppnet.gates.draw import choose, draw_masks, generator
from ppnet.wrap import wrap

PUPPET = wrap(tiny("llama")).puppet


def lambdas(count, progress=0, **options):
    config = PuppetConfig(**options)
    return [
        choose(config, progress, generator(config.seed, number), lambda size: 0.0).lambda_ for number in range(count)
    ]


@pytest.mark.parametrize("preset, mean", [("default", 2.0), ("paper", 1 / 0.3)])
def test_lambda_is_dense_in_a_third_of_passes_else_exponential(preset, mean):
    drawn = lambdas(6000, preset=preset, lambda_distribution="exponential")
    positive = [value for value in drawn if value > 0]
    dense = len(drawn) - len(positive)
    assert abs(dense - 2000) < 4 * math.sqrt(6000 * 2 / 9)
    assert stats.kstest(positive, stats.expon(scale=mean).cdf).pvalue > 1e-3
    assert abs(sum(positive) / len(positive) / mean - 1) < 4 / math.sqrt(len(positive))


def test_lambda_uniform_in_u():
    drawn = lambdas(3000, lambda_distribution="uniform_u", u_max=0.8, dense_fraction=0.0)
    assert stats.kstest([value / (1 + value) for value in drawn], stats.uniform(scale=0.8).cdf).pvalue > 1e-3


def test_uniform_size_draws_every_size_wherever_the_gates_stand():
    """The expected gated FLOPs at the drawn lambda are uniform on [smallest_size, 1], also when gates hardly close."""
    model = wrap(tiny("llama"), PuppetConfig(lambda_distribution="uniform_size", smallest_size=0.2, u_max=0.99))
    puppet = model.puppet
    for shift in (0.0, -0.7):
        with torch.no_grad():
            puppet.theta.add_(shift)
        kept = []
        for _ in range(400):
            coming = puppet.next_lambda()
            assert puppet.draw().u == pytest.approx(coming / (1 + coming))
            if coming > 0:
                with torch.no_grad():
                    kept.append(float(puppet.mean_inclusion(puppet.inclusion(coming / (1 + coming)))))
        assert stats.kstest(kept, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3


def test_lambda_warm_up_scales_linearly():
    full = lambdas(200)
    for progress, scale in ((0, 0.1), (4, 0.5), (9, 1.0), (500, 1.0)):
        warm = lambdas(200, progress=progress, lambda_warmup=10)
        assert warm == pytest.approx([scale * value for value in full], rel=1e-12)


def test_mask_frequencies_are_the_inclusion_probabilities():
    structure, source = PUPPET.structure, torch.Generator().manual_seed(3)
    rho = torch.rand(structure.total_units, generator=source) * 0.9 + 0.05
    rho[structure.offsets()[:-1]] = 1.0  # no site can draw nothing
    count = 3000
    masks = torch.stack([draw_masks(rho, structure, generator(0, number)) for number in range(count)]).double()
    inside = rho < 1
    p = rho[inside].double()
    z = (masks.mean(0)[inside] - p) / (p * (1 - p) / count).sqrt()
    assert masks[:, ~inside].all()
    assert z.abs().max() < 4.5 and 0.7 < z.square().mean() < 1.4
    centred = (masks[:, inside] - p) / (p * (1 - p)).sqrt()
    correlation = (centred.t() @ centred / count).fill_diagonal_(0)
    # Units are independent: 1/sqrt(count) times a normal, the largest of about 9000 pairs.
    assert correlation.abs().max() < 5.5 / math.sqrt(count)


def test_an_empty_site_keeps_its_most_probable_unit():
    structure, offsets = PUPPET.structure, PUPPET.structure.offsets()
    rho = torch.full((structure.total_units,), 0.05)
    best = [start + 2 for start in offsets[:-1]]
    rho[best] = 0.1
    masks = torch.stack([draw_masks(rho, structure, generator(1, number)) for number in range(4000)])
    for index, site in enumerate(structure.sites):
        counts = masks[:, offsets[index] : offsets[index + 1]].sum(dim=1)
        assert counts.min() == 1
        empty = 0.9 * 0.95 ** (site.units - 1)
        expected = 0.1 + empty
        found = float(masks[:, best[index]].double().mean())
        assert abs(found - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 4000)


def sequence(puppet, count):
    return [(draw.u, draw.mask) for draw in (puppet.draw() for _ in range(count))]


def same(first, second):
    return all(
        a[0] == b[0] and (a[1] is None) == (b[1] is None) and (a[1] is None or torch.equal(a[1], b[1]))
        for a, b in zip(first, second, strict=True)
    )


def test_draws_depend_on_seed_and_number_alone():
    first = sequence(wrap(tiny("llama")).puppet, 8)
    torch.manual_seed(99)
    torch.rand(5)
    assert same(sequence(wrap(tiny("llama")).puppet, 8), first)
    resumed = wrap(tiny("llama"))
    resumed.load_state_dict({**resumed.state_dict(), "puppet.draws": torch.tensor(3)})
    assert same(sequence(resumed.puppet, 5), first[3:])
    assert int(resumed.puppet.draws) == 8
    assert not same(sequence(wrap(tiny("llama"), PuppetConfig(seed=1)).puppet, 8), first)
    masks = [mask for _, mask in first if mask is not None]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) > 2


def test_next_lambda_is_what_draw_uses():
    puppet = wrap(tiny("llama"), PuppetConfig(lambda_warmup=6)).puppet
    seen = []
    for puppet.progress in range(10):
        expected = puppet.next_lambda()
        assert puppet.next_lambda() == expected
        draw = puppet.draw()
        assert puppet.last_lambda == expected and draw.u == expected / (1 + expected)
        assert (draw.mask is None) == (expected == 0.0)
        seen.append(expected)
    assert len(set(seen)) > 3


def test_dense_draw_is_the_model_itself_only_when_pinned():
    for preset, pinned in (("default", True), ("paper", False)):
        puppet = wrap(tiny("llama"), PuppetConfig(preset=preset, dense_fraction=0.999)).puppet
        draw = puppet.draw()
        assert draw.u == 0.0 and draw.mask is None
        assert (draw.gate is None) == pinned and (draw.input_scale is None) == pinned


def test_metrics():
    puppet = wrap(tiny("llama")).puppet
    puppet.draw()
    metrics = puppet.metrics()
    assert set(metrics) == {"lambda", "gated_flops_at_1", "keep_kv_group_at_1", "keep_neuron_at_1"}
    rho = puppet.inclusion(0.5).detach()
    neurons = torch.cat([torch.full((s.units,), s.kind == "neuron") for s in puppet.structure.sites])
    assert metrics["lambda"] == puppet.last_lambda
    assert metrics["gated_flops_at_1"] == pytest.approx(float(puppet.mean_inclusion(rho)))
    assert metrics["keep_neuron_at_1"] == pytest.approx(float(rho[neurons].mean()))
    assert metrics["keep_kv_group_at_1"] == pytest.approx(float(rho[~neurons].mean()))


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_config_round_trip(preset):
    config = PuppetConfig(preset=preset, kinds=("neuron",), temperature=0.7, hierarchy="pooled", gate_lr=1e-3)
    again = PuppetConfig.from_dict(config.to_dict())
    assert again == config and again.kinds == ("neuron",)
    assert PuppetConfig.from_dict({"preset": preset}) == PuppetConfig(preset=preset)


def test_presets_and_explicit_arguments():
    assert PuppetConfig().importance == "scale_free" and PuppetConfig().pin_dense
    paper = PuppetConfig(preset="paper")
    assert (paper.importance, paper.lambda_rate, paper.distill) == ("row_norm", 0.3, 0.0)
    assert paper.train_importance and paper.decay_gates and not paper.pin_dense
    mixed = PuppetConfig(preset="paper", importance="scale_free", distill=0.25, pin_dense=True)
    assert (mixed.importance, mixed.distill, mixed.pin_dense, mixed.lambda_rate) == ("scale_free", 0.25, True, 0.3)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("preset", "fast", r"preset: 'fast' is not known; use one of default, paper"),
        ("kinds", (), r"kinds: \(\) must name at least one of \('kv_group', 'neuron'\)"),
        ("kinds", ("head",), r"kinds: \('head',\) must name at least one of"),
        ("hierarchy", "deep", r"hierarchy: 'deep' is not known; use one of independent, pooled"),
        ("gate_gradient", "none", r"gate_gradient: 'none' is not known; use one of sampled, exact"),
        (
            "lambda_distribution",
            "normal",
            r"lambda_distribution: 'normal' is not known; use one of exponential, uniform_u",
        ),
        ("temperature", 0.0, r"temperature: 0\.0 must be > 0"),
        ("temperature", math.nan, r"temperature: nan must be a finite number"),
        ("degree", 0, r"degree: 0 must be >= 1"),
        ("control_points", 3, r"control_points: 3 must be > degree \(3\)"),
        ("sampled_fraction", 0.0, r"sampled_fraction: 0\.0 must be in \(0, 1\]"),
        ("sampled_fraction", 1.5, r"sampled_fraction: 1\.5 must be in \(0, 1\]"),
        ("dense_fraction", 1.0, r"dense_fraction: 1\.0 must be in \[0, 1\)"),
        ("dense_fraction", -0.1, r"dense_fraction: -0\.1 must be in \[0, 1\)"),
        ("lambda_rate", 0.0, r"lambda_rate: 0\.0 must be > 0"),
        ("u_max", 1.0, r"u_max: 1\.0 must be in \(0, 1\)"),
        ("lambda_warmup", -1, r"lambda_warmup: -1 must be >= 0"),
        ("penalty", -0.5, r"penalty: -0\.5 must be >= 0"),
        ("penalty", math.nan, r"penalty: nan must be a finite number"),
        ("distill", 1.5, r"distill: 1\.5 must be in \[0, 1\]"),
        ("distill_temperature", 0.0, r"distill_temperature: 0\.0 must be > 0"),
        ("pooled_scale", 0.0, r"pooled_scale: 0\.0 must be > 0"),
        ("gate_lr", -1e-3, r"gate_lr: -0\.001 must be >= 0"),
        ("align", 0, r"align: 0 must be >= 1"),
    ],
)
def test_invalid_options(option, value, message):
    with pytest.raises(PPNetError, match=message):
        PuppetConfig(**{option: value})


def test_options_of_a_newer_ppnet_are_named():
    with pytest.raises(PPNetError, match=r"config: unknown options \['colour', 'depth'\]; they may come from a newer"):
        ppnet.PuppetConfig.from_dict({"colour": 1, "depth": 2})
