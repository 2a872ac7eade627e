"""Training: the objective, parameter groups, and stopping on NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn
from training import LENGTH, MARKER, arguments, blocks, one_thread, trainer, wrapped  # noqa: F401
from transformers import Trainer, TrainerCallback

import ppnet
from ppnet.errors import CheckpointError, PPNetError, TrainingError
from ppnet.train import (
    PuppetCallback,
    PuppetTrainer,
    PuppetTrainerMixin,
    distillation_loss,
    last_good_checkpoint,
    param_groups,
)


class GradientSpy(TrainerCallback):
    """Keeps the gradients of the first optimizer step. Callbacks run in order, so it comes after PuppetCallback."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_gradients(model: Any, folder: Path, kind: Any = PuppetTrainer, **overrides: Any) -> dict[str, Tensor]:
    spy = GradientSpy()
    callbacks = [*overrides.pop("callbacks", []), spy]
    data = overrides.pop("data", None)
    options = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, **overrides}
    trainer(model, folder, data, kind, callbacks=callbacks, **options).train()
    return spy.grads


def same_draw_every_time(model: Any) -> None:
    draw = model.puppet.draw

    def repeat() -> Any:
        model.puppet._draw_count = 1
        return draw()

    model.puppet.draw = repeat


# ---- objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_the_closed_form(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11).double().requires_grad_(), torch.randn(2, 5, 11).double()
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2:4] = -100
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    expected = temperature**2 * ((p * (p.log() - q.log())).sum(-1) * (targets != -100)).sum()
    total, count = distillation_loss(student, teacher, targets, temperature)
    assert count == 8
    torch.testing.assert_close(total, expected)
    (got,) = torch.autograd.grad(3 * total, student)
    (want,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(got, want)


def test_distillation_loss_rejects_wrong_shapes() -> None:
    with pytest.raises(PPNetError, match=r"student \(1, 2, 3\), teacher \(1, 2, 4\)"):
        distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long))


def test_objective_is_nll_distillation_and_penalty(tmp_path: Path) -> None:
    model = wrapped(dense_fraction=0.0, distill=0.25, distill_temperature=2.0, lambda_warmup=0)
    run = trainer(model, tmp_path)
    ids = torch.stack([blocks()[i]["input_ids"] for i in range(2)])
    labels = ids.clone()
    labels[1, 5:] = -100
    model.train()
    loss = run.compute_loss(model, {"input_ids": ids, "labels": labels}, num_items_in_batch=torch.tensor(30))
    penalty = model.puppet.penalty()
    model.puppet._draw_count = 0
    gated = model(input_ids=ids).logits.double()[:, :-1]
    dense = model.eval()(input_ids=ids).logits.double()[:, :-1]
    valid = labels[:, 1:] != -100
    nll = nn.functional.cross_entropy(gated[valid], labels[:, 1:][valid], reduction="sum") / 30
    p, q = torch.softmax(dense / 2, -1), torch.softmax(gated / 2, -1)
    kl = 4 * (p * (p / q).log()).sum(-1)[valid].sum() / 30
    assert model.puppet.last_lambda > 0
    torch.testing.assert_close(loss.double(), 0.75 * nll + 0.25 * kl + penalty.double(), rtol=1e-5, atol=1e-6)


def test_penalty_gradient_reaches_the_gates(tmp_path: Path) -> None:
    model = wrapped(dense_fraction=0.0, distill=0.0, penalty=50.0)
    grads = first_gradients(model, tmp_path)
    model.puppet.clear()
    model.puppet._lambdas.append(model.puppet.last_lambda)
    # The first step changed the gates a little, so the direction is compared, not the bits.
    model.zero_grad()
    model.puppet.penalty().backward()
    theta = model.puppet.theta.grad.flatten(), grads["puppet.theta"].flatten()
    assert nn.functional.cosine_similarity(*theta, dim=0) > 0.95


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    grads = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = wrapped(dense_fraction=0.0, distill=0.5, gate_gradient="exact")
        same_draw_every_time(model)
        data = blocks()
        # Unequal numbers of labels per micro-batch: a mean of means would differ.
        data.lengths = torch.tensor([LENGTH, 4, 7] * 8)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        grads.append(first_gradients(model, tmp_path, data=data, **options))
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_callback_gives_the_mixins_gradient(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    config = {"dense_fraction": 0.0, "distill": 0.0, "hierarchy": "pooled"}
    mixin = first_gradients(wrapped(**config), tmp_path, **options)
    callback = first_gradients(wrapped(**config), tmp_path, kind=Trainer, callbacks=[PuppetCallback()], **options)
    assert callback.keys() == mixin.keys()
    for name, grad in mixin.items():
        torch.testing.assert_close(callback[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_mixin_and_callback_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="count twice"):
        trainer(wrapped(), tmp_path, callbacks=[PuppetCallback()]).train()
    with pytest.raises(TrainingError, match=r"no gates; call ppnet\.wrap"):
        trainer(tiny("llama"), tmp_path, kind=Trainer, callbacks=[PuppetCallback()]).train()


def test_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Positional(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
        ) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.square().mean() * 0.01

    mixed = type("Mixed", (PuppetTrainerMixin, Positional), {})
    run = trainer(wrapped(distill=0.0), tmp_path, kind=mixed, max_steps=2)
    run.train()
    assert {"penalty", "nll", "lambda"} <= set(run.state.log_history[0])
    run = trainer(wrapped(distill=0.5, dense_fraction=0.0), tmp_path, kind=mixed, max_steps=2)
    with pytest.raises(TrainingError, match=r"distill: 0\.5 needs logits"):
        run.train()


def test_training_alone_is_without_the_generation_cache(tmp_path: Path) -> None:
    model = wrapped()
    seen = []
    model.register_forward_hook(lambda *args: seen.append(model.config.use_cache))
    first, second = (trainer(model, tmp_path / name, max_steps=1, save_steps=1) for name in ("a", "b"))
    assert model.config.use_cache
    for run in (first, second):
        run.train()
        assert model.config.use_cache
    assert seen and not any(seen)
    assert ppnet.load(tmp_path / "b" / "checkpoint-1").config.use_cache


def test_evaluation_is_dense(tmp_path: Path) -> None:
    model = wrapped()
    run = PuppetTrainer(model, arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=blocks(4))
    loss = run.evaluate()["eval_loss"]
    plain = tiny("llama")
    ids = torch.stack([blocks(4)[i]["input_ids"] for i in range(4)])
    assert loss == pytest.approx(plain(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert int(model.puppet.draws) == 0


def test_activation_checkpointing_gives_the_same_gradient(tmp_path: Path) -> None:
    plain = first_gradients(wrapped(dense_fraction=0.0), tmp_path)
    checkpointed = first_gradients(wrapped(dense_fraction=0.0), tmp_path, gradient_checkpointing=True)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    model = wrapped()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: g for g in param_groups(model, 1e-3, weight_decay=0.2)}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert groups["weights"]["weight_decay"] == 0.2
    assert groups["no_decay"]["weight_decay"] == groups["gates"]["weight_decay"] == 0.0
    assert groups["gates"]["lr"] == ppnet.PuppetConfig().gate_lr == 0.03
    assert members["gates"] == {n for n in names.values() if n.startswith("puppet.")}
    assert "model.embed_tokens.weight" in members["no_decay"] and "model.norm.weight" in members["no_decay"]
    assert {n for n in names.values() if n.endswith("bias")} <= members["no_decay"]
    assert "model.layers.0.mlp.up_proj.weight" in members["weights"]
    assert sum(map(len, members.values())) == len(names)
    assert param_groups(model, 1e-3, gate_lr=0.5)[-1]["lr"] == 0.5
    paper = ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(preset="paper"))
    assert param_groups(paper, 1e-3)[-1]["lr"] == 1e-3 and param_groups(paper, 1e-3)[-1]["weight_decay"] == 0.1
    assert [g["name"] for g in param_groups(tiny("llama"), 1e-3)] == ["weights", "no_decay"]
    with pytest.raises(PPNetError, match="lr: -1"):
        param_groups(model, -1)
    with pytest.raises(PPNetError, match="no trainable parameter"):
        param_groups(tiny("llama").requires_grad_(False), 1e-3)


def test_fused_updates_are_seen_by_cached_importance(tmp_path: Path) -> None:
    model = wrapped(dense_fraction=0.0)
    trainer(model, tmp_path, save_strategy="no", optim="adamw_torch_fused", learning_rate=1e-2).train()
    cached = model.puppet.importance(0.5)
    fresh = wrapped()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(cached, fresh.puppet.importance(0.5))


# ---- stopping -------------------------------------------------------------------------------------------------------


def poison(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    return output * float("nan") if (args[0] == MARKER).any() else None


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model = wrapped()
    model.model.embed_tokens.register_forward_hook(poison)
    run = trainer(model, tmp_path, blocks(marked=9), train_sampling_strategy="sequential")
    with pytest.raises(TrainingError) as caught:
        run.train()
    message = str(caught.value)
    for part in ("stopped at step 5", "loss is nan", "learning rate", "lambda", str(tmp_path / "checkpoint-4")):
        assert part in message
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_infinite_gradient_stops(tmp_path: Path) -> None:
    model = tiny("llama")
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the gradient norm is (nan|inf).*checkpoint: None"):
        trainer(model, tmp_path).train()
    assert torch.equal(model.lm_head.weight, before)


def test_callback_stops_on_nan(tmp_path: Path) -> None:
    model = wrapped()
    model.model.embed_tokens.register_forward_hook(poison)
    run = trainer(model, tmp_path, blocks(marked=0), Trainer, callbacks=[PuppetCallback()], max_steps=12)
    with pytest.raises(TrainingError, match="gradient norm is nan"):
        run.train()


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path)
    run.train()
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("inf")
    run.state.global_step = 7
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN or infinite"):
        run._save_checkpoint(run.model, None)
    assert not (tmp_path / "checkpoint-7").exists()
