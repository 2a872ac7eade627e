"""Distillation: values and gradients of the objective, a teacher that nothing changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from plans import random_plan
from test_trainer import first_gradients
from torch import Tensor, nn
from training import LENGTH, arguments, blocks, one_thread, wrapped  # noqa: F401
from transformers import AutoModelForCausalLM, TrainerCallback

import ppnet
from ppnet.compact import compact
from ppnet.errors import CheckpointError, TrainingError
from ppnet.train import Distillation, DistillationTrainer, distillation_loss
from ppnet.train.objective import hidden_loss

DIRECTIONS = ("forward", "reverse", "jsd")


def divergence(student: Tensor, teacher: Tensor, direction: str, temperature: float) -> Tensor:
    """Per position, from the definitions."""
    q, p = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    mix = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    value = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, mix) + kl(q, mix)) / 2}[direction]
    return temperature**2 * value


def pair(**changes: Any) -> tuple[Any, Any]:
    """A compacted student and its teacher."""
    teacher = tiny("llama", **changes)
    return compact(teacher, random_plan(teacher)), teacher


def healer(student: Any, teacher: Any, folder: Path, options: Distillation | None = None, **overrides: Any) -> Any:
    data, callbacks = overrides.pop("data", None) or blocks(), overrides.pop("callbacks", None)
    return DistillationTrainer(
        student, arguments(folder, **overrides), train_dataset=data, callbacks=callbacks, teacher=teacher,
        distillation=options,
    )  # fmt: skip


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.rows.append(logs)


# ---- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergences_and_gradients_are_those_of_the_definition(direction: str, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11).double().requires_grad_(), 2 * torch.randn(2, 5, 11).double()
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2:4] = -100
    expected = (divergence(student, teacher, direction, temperature) * (targets != -100)).sum()
    total, count = distillation_loss(student, teacher.requires_grad_(), targets, temperature, direction)
    assert count == 8 and expected > 0.1
    torch.testing.assert_close(total, expected)
    got = torch.autograd.grad(3 * total, (student, teacher), allow_unused=True)
    (want,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(got[0], want)
    assert got[1] is None
    narrow, _ = distillation_loss(student.bfloat16(), teacher.bfloat16(), targets, temperature, direction)
    assert narrow.dtype == torch.float32 and narrow.item() == pytest.approx(expected.item(), rel=0.05)
    same, _ = distillation_loss(student, student, targets, temperature, direction)
    assert abs(float(same)) < 1e-12


def test_far_apart_logits_stay_finite() -> None:
    student, teacher = torch.tensor([[[0.0, 200.0]]], requires_grad=True), torch.tensor([[[200.0, 0.0]]])
    for direction in DIRECTIONS:
        total, _ = distillation_loss(student, teacher, torch.zeros(1, 1, dtype=torch.long), 1.0, direction)
        (gradient,) = torch.autograd.grad(total, student)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()


def test_hidden_loss_is_the_definition() -> None:
    torch.manual_seed(0)
    own = [torch.randn(2, 3, 4).double().requires_grad_() for _ in range(2)]
    theirs = [torch.randn(2, 3, 4).double() for _ in range(2)]
    targets = torch.tensor([[1, -100, 1], [-100, 1, -100]])
    real = targets != -100
    expected = sum(
        ((a - b).square().sum(-1) / b.square().sum(-1))[real].sum() for a, b in zip(own, theirs, strict=True)
    )
    total, count = hidden_loss(own, theirs, targets)
    assert count == 3
    torch.testing.assert_close(total, expected / 2)


# ---- the trainer's objective -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_objective_is_nll_divergence_and_hidden_states(direction: str, tmp_path: Path) -> None:
    student, teacher = pair()
    options = Distillation(0.7, 2.0, direction, hidden=0.3, hidden_layers=(1, -1))
    run = healer(student, teacher, tmp_path, options)
    ids = torch.stack([blocks()[i]["input_ids"] for i in range(2)])
    labels = ids.clone()
    labels[1, 5:] = -100
    mask = torch.ones_like(ids)
    student.train()
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    loss = run.compute_loss(student, inputs, num_items_in_batch=torch.tensor(30))
    assert set(inputs) == {"input_ids", "labels", "attention_mask"}
    own, theirs = (m.eval()(input_ids=ids, output_hidden_states=True) for m in (student, teacher))
    valid = labels[:, 1:] != -100
    nll = nn.functional.cross_entropy(own.logits[:, :-1][valid].double(), labels[:, 1:][valid], reduction="sum")
    kl = divergence(own.logits[:, :-1].double(), theirs.logits[:, :-1].double(), direction, 2.0)[valid].sum()
    hidden = 0.0
    for layer in (1, -1):
        a, b = (o.hidden_states[layer][:, :-1][valid].double() for o in (own, theirs))
        hidden = hidden + ((a - b).square().sum(-1) / b.square().sum(-1)).sum() / 2
    torch.testing.assert_close(loss.double(), (0.3 * nll + 0.7 * kl + 0.3 * hidden) / 30, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_accumulated_micro_batches_equal_one_batch(hidden: float, tmp_path: Path) -> None:
    grads = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        student, teacher = pair()
        data = blocks()
        data.lengths = torch.tensor([LENGTH, 4, 7] * 8)  # a mean of means would differ

        def kind(model: Any, args: Any, teacher: Any = teacher, **kwargs: Any) -> Any:
            return DistillationTrainer(model, args, teacher=teacher, distillation=Distillation(hidden=hidden), **kwargs)

        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        grads.append(first_gradients(student, tmp_path, kind, data=data, **options))
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_teacher_is_not_trained_and_not_saved(tmp_path: Path) -> None:
    student, teacher = pair(attention_dropout=0.5)
    teacher.train()  # as it may come: its dropout must not count
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    asked = []
    teacher.register_forward_hook(lambda m, args, out: asked.append((m.training, torch.is_grad_enabled())))
    logs = Logs()
    run = healer(student, teacher, tmp_path, callbacks=[logs])
    run.train()
    assert asked and set(asked) == {(False, False)}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all({"nll", "distillation_kl", "loss"} <= set(row) for row in logs.rows)
    for row in logs.rows:
        assert row["loss"] == pytest.approx(0.1 * row["nll"] + 0.9 * row["distillation_kl"], rel=1e-3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert {n: v.shape for n, v in saved.state_dict().items()} == {n: v.shape for n, v in student.state_dict().items()}
    folder = tmp_path / "checkpoint-6"
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    assert (folder / "model.safetensors").stat().st_size < weights + 20_000
    assert (folder / "optimizer.safetensors").stat().st_size < 2 * weights + 40_000


def test_resuming_gives_the_uninterrupted_run(tmp_path: Path) -> None:
    student, teacher = pair()
    other = copy.deepcopy(student)
    healer(student, teacher, tmp_path / "whole").train()
    resumed = healer(other, teacher, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    for name, value in student.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_teacher_keeps_its_dtype_and_may_be_a_folder(tmp_path: Path) -> None:
    student, teacher = pair()
    ppnet.save(teacher.bfloat16(), tmp_path / "teacher")
    run = healer(student, tmp_path / "teacher", tmp_path / "run", bf16=True, max_steps=2)
    assert run.teacher.dtype == torch.bfloat16 and not run.teacher.training
    run.train()
    given = healer(student, teacher, tmp_path / "run", max_steps=1)
    assert given.teacher is teacher and teacher.dtype == torch.bfloat16


def test_evaluation_is_the_trainers(tmp_path: Path) -> None:
    student, teacher = pair()
    run = DistillationTrainer(student, arguments(tmp_path), eval_dataset=blocks(4), teacher=teacher)
    ids = torch.stack([blocks(4)[i]["input_ids"] for i in range(4)])
    assert run.evaluate()["eval_loss"] == pytest.approx(student(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_errors_of_the_trainer(tmp_path: Path) -> None:
    student, teacher = pair()
    for values, word in (
        ({"weight": 1.5}, "weight: 1.5"), ({"temperature": 0.0}, "temperature: 0.0"),
        ({"hidden": -1.0}, "hidden: -1.0"),
        ({"direction": "back"}, "direction: 'back' is not known; use one of forward, reverse, jsd"),
        ({"weight": 0.0}, "both are 0"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=word):
            Distillation(**values)
    with pytest.raises(TrainingError, match="teacher: None is neither a model nor the folder"):
        healer(student, None, tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        healer(student, tmp_path / "missing", tmp_path)
    with pytest.raises(TrainingError, match="is the student itself"):
        healer(student, student, tmp_path)
    with pytest.raises(TrainingError, match="its vocabulary has 90 tokens, the student's 96"):
        healer(student, tiny("llama", vocab_size=90), tmp_path)
    with pytest.raises(TrainingError, match=r"student's width and depth \(32, 3\), got \(32, 2\)"):
        healer(student, tiny("llama", num_hidden_layers=2), tmp_path, Distillation(hidden=1.0))
    for layers in ((4,), (-5,), ()):
        with pytest.raises(TrainingError, match=r"hidden_layers: .* must be one or more of -4 to 3"):
            healer(student, teacher, tmp_path, Distillation(hidden=1.0, hidden_layers=layers))
    with pytest.raises(TrainingError, match="model: has gates"):
        healer(wrapped(), teacher, tmp_path)
    with pytest.raises(TrainingError, match="label_smoothing_factor"):
        healer(student, teacher, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(TrainingError, match=r"labels: the batch has none, only \['input_ids'\]"):
        run = healer(student, teacher, tmp_path)
        run.compute_loss(student.train(), {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
