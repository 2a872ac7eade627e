"""Reward movement inside trl's GRPOTrainer: equal to sums by hand, whatever the loss, the batches and the shuffling."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import GatedReference, tiny
from scoring import words

from ppnet.errors import PPNetError, TrainingError
from ppnet.families import structure_of

trl = pytest.importorskip("trl")
from ppnet.train.grpo import RewardMovementTrainer  # noqa: E402

PROMPTS = ["a b c", "d", "e f", "g h i j"]


def count_a(completions, **kwargs):
    return [sum(word in "abcde" for word in text.split()) / 4 for text in completions]


class Recording(RewardMovementTrainer):
    """Keeps what every loss was computed from, and what trained weights gave the gradients."""

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        self.seen_rewards = [*getattr(self, "seen_rewards", []), rewards.sum(1)]
        return rewards

    def _compute_loss(self, model, inputs):
        self.seen = [*getattr(self, "seen", []), {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}]
        return super()._compute_loss(model, inputs)


def trained(folder, made=None, trainer=Recording, steps=2, **changes):
    made = made_trainer(folder, made, trainer, **{"max_steps": steps, **changes})
    made.train()
    return made


def made_trainer(folder, model=None, trainer=Recording, prompts=PROMPTS, **changes):
    from datasets import Dataset

    own = {k: changes.pop(k) for k in ("reward_threshold", "score_every") if k in changes}
    arguments = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "learning_rate": 0.0,
        "max_completion_length": 5, "seed": 3, "temperature": 1.0, "save_strategy": "no", **changes,
    }  # fmt: skip
    config = trl.GRPOConfig(str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **arguments)
    model = model if model is not None else tiny("llama", pad_token_id=0, vocab_size=13)
    return trainer(
        model=model, reward_funcs=count_a, args=config, processing_class=words(), **own,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )  # fmt: skip


def by_hand(trainer, model, verified):
    """sum_q v_q |sum_i A_i s_i| and sum_q v_q sum_i A_i s_i per verified group, from plain autograd."""
    structure = structure_of(model)
    gates = torch.ones(structure.total_units, requires_grad=True)
    groups = {}
    for inputs in trainer.seen:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        with GatedReference(model, structure, gates):
            log_p = torch.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, -1)
        log_p = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, -width:]
        for row in range(len(ids)):
            mean = (log_p[row] * counted[row]).sum() / counted[row].sum()
            (s,) = torch.autograd.grad(mean, gates, retain_graph=True)
            groups.setdefault(int(inputs["ppnet_group"][row]), []).append(
                (float(inputs["advantages"][row]), s.double())
            )
    # with num_iterations=2 every completion comes twice; the rate is 0, so that both say the same
    times = trainer.num_iterations
    assert all(len(rows) == 4 * times for rows in groups.values())
    groups = {group: [(a / times, s) for a, s in rows] for group, rows in groups.items()}
    sums = [sum(a * s for a, s in groups[group]) for group in verified]
    units = [site.units for site in structure.sites]
    return [(sum(values) / len(verified)).split(units) for values in ([v.abs() for v in sums], sums)]


def groups_with(trainer, threshold=None):
    rewards = torch.cat(trainer.seen_rewards).view(-1, 4)
    best = -1 if threshold is None else threshold
    return [i for i, group in enumerate(rewards) if group.max() > group.min() and group.max() >= best]


SETTINGS = {
    "defaults": {},
    "grpo": {"loss_type": "grpo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "dr_grpo": {"loss_type": "dr_grpo", "activation_checkpointing": True},
    "kl": {"beta": 0.5, "score_every": 1},
    "iterations": {"loss_type": "bnpo", "steps_per_generation": 4, "gradient_accumulation_steps": 2, "score_every": 1},
    "twice": {"num_iterations": 2, "score_every": 1},
    "sequence": {"importance_sampling_level": "sequence", "score_every": 1, "max_grad_norm": 1e-6},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_reward_movement_by_hand(tmp_path, setting, monkeypatch):
    model = tiny("llama", pad_token_id=0, vocab_size=13)
    if setting == "kl":
        # trl loads the reference model by its name: a model of other weights, so that the KL term has a gradient
        tiny("llama", seed=5, pad_token_id=0, vocab_size=13).save_pretrained(tmp_path / "reference")
        model.config._name_or_path = str(tmp_path / "reference")
    trainer = trained(tmp_path, model, **SETTINGS[setting])
    assert trainer._free == (setting in ("defaults", "grpo", "dr_grpo"))
    verified = groups_with(trainer)
    assert len(verified) >= 2
    model.gradient_checkpointing_disable()
    absolute, signed = by_hand(trainer, model.eval(), verified)
    for name, found, found_signed, one, other in zip(
        trainer.reward_scores(), trainer.reward_scores().values(), trainer.reward_scores("signed").values(),
        absolute, signed, strict=True,
    ):  # fmt: skip
        scale = float(one.abs().max())
        torch.testing.assert_close(found, one, rtol=2e-3, atol=2e-4 * scale, msg=name)
        torch.testing.assert_close(found_signed, other, rtol=2e-3, atol=2e-4 * scale, msg=name)
    scores = trainer.reward_scores()
    tokens = {}
    for inputs in trainer.seen:
        for group, ids, mask in zip(inputs["ppnet_group"], inputs["completion_ids"], inputs["completion_mask"],
                                    strict=True):  # fmt: skip
            if int(group) in verified:
                tokens.setdefault(int(group), []).append((ids.tolist(), int(mask.sum())))
    assert trainer._sums[0].groups == len(verified)
    counted = sum(count for rows in tokens.values() for _, count in rows) // trainer.num_iterations
    assert scores.method == "reward" and scores.tokens == counted > 0
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_threshold_and_sparse_scoring(tmp_path):
    trainer = trained(tmp_path, steps=3, reward_threshold=0.7)
    verified = groups_with(trainer, 0.7)
    assert 0 < len(verified) < len(groups_with(trainer))
    absolute, _ = by_hand(trainer, trainer.model.eval(), verified)
    for found, one in zip(trainer.reward_scores().values(), absolute, strict=True):
        torch.testing.assert_close(found, one, rtol=2e-3, atol=2e-4 * float(one.abs().max()))
    sparse = trained(tmp_path, steps=4, score_every=2)
    assert sparse._sums[0].groups == len([i for i in groups_with(sparse) if (i // 2) % 2 == 0])


def test_training_is_not_changed(tmp_path):
    weights = []
    for trainer in (RewardMovementTrainer, trl.GRPOTrainer):
        for changes in ({}, {"beta": 0.1}):
            model = tiny("llama", pad_token_id=0, vocab_size=13)
            if changes:
                model.save_pretrained(tmp_path / "reference")
                model.config._name_or_path = str(tmp_path / "reference")
            trained(tmp_path, model, trainer, learning_rate=1e-2, **changes)
            weights.append(copy.deepcopy(model.state_dict()))
    for one, other in ((weights[0], weights[2]), (weights[1], weights[3])):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_says_what_is_missing(tmp_path):
    with pytest.raises(PPNetError, match="score_every: 0 must be"):
        trained(tmp_path, score_every=0)
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(TrainingError, match=r"use_reentrant=True refuses .* set .*'use_reentrant': False"):
        trained(tmp_path, importance_sampling_level="sequence", **reentrant)
    trained(tmp_path, steps=1, **reentrant)
    trainer = trained(tmp_path, steps=1, reward_threshold=9.0)
    with pytest.raises(TrainingError, match=r"no verified group of completions .* reward_threshold=9\.0"):
        trainer.reward_scores()


def test_open_groups_are_forgotten_when_a_run_is_resumed():
    from ppnet.scores.rewards import RewardGradients, ratings

    site = RewardGradients(1, torch.device("cpu"))
    rated = ratings(torch.tensor([0.0, 1.0]), torch.tensor([7, 7]), None)
    site.add(torch.tensor([[100.0]]), rated.rows(slice(0, 1)))
    site.forget_open()
    site.add(torch.tensor([[1.0], [3.0]]), rated)
    alone = RewardGradients(1, torch.device("cpu"))
    alone.add(torch.tensor([[1.0], [3.0]]), rated)
    assert torch.equal(site.absolute, alone.absolute) and torch.equal(site.signed, alone.signed) and site.groups == 1
