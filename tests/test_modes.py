"""What a pass computes in each mode: training, evaluation, no_grad, inference_mode, checkpointing, several forwards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import tiny, token_ids

import ppnet
from ppnet.errors import EquivalenceError, TrainingError
from ppnet.wrap import engine_of

IDS = token_ids()


def gated(seed=5, **options):
    """A wrapped tiny llama whose gates have moved off their start."""
    model = ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(dense_fraction=0.0, **options))
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    return model


def test_generation_in_training_mode_is_dense_and_draws_nothing():
    model = gated().train()
    want = copy.deepcopy(model).eval().generate(IDS[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False), want)
    with torch.no_grad():
        model(IDS)
    assert int(model.puppet.draws) == 0
    model(IDS)
    assert int(model.puppet.draws) == 1


def test_paper_preset_evaluates_the_dense_pass_that_it_trains():
    model = gated(preset="paper").eval()
    with torch.no_grad():
        dense = model(IDS).logits
        with ppnet.resize(model, 1.0):
            assert torch.allclose(model(IDS).logits, dense, atol=1e-6)
        with ppnet.resize(model, 0.5), model.puppet.dense():
            assert torch.allclose(model(IDS).logits, dense, atol=1e-6)
        assert (ppnet.compact(model, 1.0)(IDS).logits - dense).abs().max() < 1e-5 * dense.abs().max()
        assert not torch.allclose(ppnet.unwrap(model)(IDS).logits, dense, atol=1e-3)


def test_a_size_holds_for_submodules_called_directly():
    model = gated().eval()
    with torch.no_grad():
        dense = model.model(IDS).last_hidden_state
        with ppnet.resize(model, 0.6):
            small = model.model(IDS).last_hidden_state
            assert not torch.allclose(small, dense, atol=1e-3)
        assert torch.equal(model.model(IDS).last_hidden_state, dense)


def test_inference_mode_leaves_usable_tensors_behind():
    model = gated().eval()
    with torch.inference_mode():
        ppnet.resize(model, 0.6)
        want = model(IDS).logits.clone()
    assert torch.allclose(model(IDS).logits, want, atol=1e-6)
    model(IDS, labels=IDS).loss.backward()


def test_gradients_in_evaluation_mode_at_a_size_equal_the_compacted_models():
    model = gated().eval()
    plan = ppnet.plan(model, 0.6)
    small = ppnet.compact(model, plan)
    with ppnet.resize(model, plan):
        model(IDS, labels=IDS).loss.backward()
    small(IDS, labels=IDS).loss.backward()
    kept = plan.kept["layers.1.neuron"]
    ours, theirs = (m.model.layers[1].mlp.up_proj.bias.grad for m in (model, small))
    assert torch.allclose(ours[kept], theirs, rtol=1e-4, atol=1e-7)
    assert ours.count_nonzero() <= len(kept)


@pytest.mark.parametrize("second", ["training", "evaluation"])
def test_second_forward_before_backward_under_checkpointing_is_refused(second):
    model = gated().train()
    model.gradient_checkpointing_enable()
    first = model(IDS, labels=IDS, use_cache=False).loss
    model.train(second == "training")
    with pytest.raises(TrainingError, match="second forward before the backward"):
        model(IDS, labels=IDS, use_cache=False)
    model.train()
    first.backward()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    # A pass whose graph is gone has nothing to recompute.
    model(IDS, labels=IDS, use_cache=False)
    model(IDS, labels=IDS, use_cache=False).loss.backward()


def test_reentrant_checkpointing_is_refused():
    model = gated().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant=True"):
        model(IDS, labels=IDS, use_cache=False)


def test_two_forwards_before_a_backward_without_checkpointing_are_right():
    sums = []
    for together in (True, False):
        model = gated().train()
        losses = [model(IDS, labels=IDS).loss] if together else []
        if together:
            (losses[0] + model(IDS, labels=IDS).loss).backward()
        else:
            for _ in range(2):
                model(IDS, labels=IDS).loss.backward()
        sums.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, want in sums[1].items():
        assert torch.allclose(sums[0][name], want, rtol=1e-4, atol=1e-6 * float(want.abs().max()) + 1e-9), name


def test_the_check_of_a_wrapped_model_does_not_trust_the_slicing(monkeypatch):
    """With up_proj's rows in the wrong order, masks and slices would agree with each other, not with the model."""
    model = gated().eval()
    structure = model.puppet.structure
    site = structure.sites[1]
    wrong = replace(site.producers[1], index=site.producers[1].index.flip(0))
    broken = replace(site, producers=(site.producers[0], wrong))
    sites = (structure.sites[0], broken, *structure.sites[2:])
    monkeypatch.setattr(model.puppet, "structure", replace(structure, sites=sites))
    with pytest.raises(EquivalenceError, match="logits differ"):
        ppnet.compact(model, 0.5)


def test_versions_are_read_from_the_present_parameters():
    model = gated().eval()
    resize = ppnet.resize(model, 0.6)
    with torch.no_grad():
        before = model(IDS).logits
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight * 2)
        assert not torch.equal(model(IDS).logits, before)
    assert resize.plan is engine_of(model).fixed


@pytest.mark.parametrize(
    "options, checkpointing, callback, names",
    [
        ({}, True, False, "gradient_checkpointing=True"),
        ({"hierarchy": "pooled"}, False, False, "pooled"),
        ({}, False, True, "PuppetCallback"),
    ],
)
def test_what_fails_on_several_processes_is_refused_first(options, checkpointing, callback, names):
    from ppnet.train.callback import refuse_distributed

    with pytest.raises(TrainingError, match=names):
        refuse_distributed(gated(**options).puppet, checkpointing, callback)
    refuse_distributed(gated().puppet, False)


def test_training_at_a_fixed_size_distils_in_every_step(tmp_path):
    from ppnet.train import PuppetTrainer, default_arguments, text_blocks

    model = gated(distill=0.5).train()
    ppnet.resize(model, 0.6)
    blocks = text_blocks(torch.arange(3, 90).repeat(20), length=16)
    arguments = default_arguments(
        tmp_path, max_steps=3, logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = PuppetTrainer(model=model, args=arguments, train_dataset=blocks)
    trainer.train()
    logged = [entry["distillation_kl"] for entry in trainer.state.log_history if "distillation_kl" in entry]
    assert len(logged) == 3 and all(value > 0 for value in logged)
    assert int(model.puppet.draws) == 0
