"""Terms of the training objective and the optimizer's parameter groups."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import PPNetError
from ppnet.evaluate.tokens import IGNORED

_ROWS_PER_CHUNK = 1024
_NORM = re.compile(r"norm|(?:^|\.)ln_", re.IGNORECASE)


DIRECTIONS = ("forward", "reverse", "jsd")


class _Divergence(torch.autograd.Function):
    """Sum over rows of a divergence between p = softmax(teacher / T) and q = softmax(student / T).

    The gradient with respect to the student is known in closed form, so it is computed with the value, some rows at a
    time: one buffer of the logits' size instead of four. It is q (g - <q, g>) / T for the derivative g of the
    divergence with respect to q: -p / q (forward), log(q / p) (reverse), log(2 q / (p + q)) / 2 (jsd).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, direction: str) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.zeros_like(student)
        total = student.new_zeros((), dtype=dtype)
        for chunk in rows.split(_ROWS_PER_CHUNK):
            log_q = torch.log_softmax(student[chunk].to(dtype) / temperature, dim=-1)
            log_p = torch.log_softmax(teacher[chunk].to(log_q) / temperature, dim=-1)
            p, q = log_p.exp(), log_q.exp()
            if direction == "forward":
                total += (p * (log_p - log_q)).sum()
                change = q - p
            else:
                log_mix = log_p if direction == "reverse" else torch.logaddexp(log_p, log_q) - math.log(2)
                share = 1.0 if direction == "reverse" else 0.5
                of_student = (q * (log_q - log_mix)).sum(-1, keepdim=True)
                total += share * of_student.sum()
                if direction == "jsd":
                    total += share * (p * (log_p - log_mix)).sum()
                change = share * q * (log_q - log_mix - of_student)
            gradient[chunk] = (change / temperature).to(student.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dtotal.to(gradient.dtype), None, None, None, None


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0, direction: str = "forward"
) -> tuple[Tensor, int]:
    """T^2 times a divergence between teacher and student, summed over the positions that have a target.

    Args:
        student, teacher: logits ``(B, T, V)`` of what learns and of what it learns from. No gradient flows to the
            teacher.
        targets: int64 ``(B, T)``, aligned with the logits (already shifted); -100 marks ignored positions.
        temperature: T > 0; the factor T^2 keeps gradients of the same scale for all T.
        direction: ``"forward"``: KL(teacher || student); ``"reverse"``: KL(student || teacher); ``"jsd"``: the
            Jensen-Shannon divergence, the mean of both to the mixture of the two.

    Returns:
        The sum in nats (float32, or float64 for float64 logits), and the number of positions summed over.

    Raises:
        PPNetError: shapes differ, the temperature is not positive, or the direction is unknown.
    """
    if student.shape != teacher.shape or student.shape[:-1] != targets.shape:
        raise PPNetError(
            f"logits: student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and targets "
            f"{tuple(targets.shape)} must be (B, T, V), (B, T, V) and (B, T)."
        )
    if not temperature > 0:
        raise PPNetError(f"distill_temperature: {temperature!r} must be > 0.")
    if direction not in DIRECTIONS:
        raise PPNetError(f"direction: {direction!r} is not known; use one of {', '.join(DIRECTIONS)}.")
    vocabulary = student.shape[-1]
    rows = (targets.reshape(-1) != IGNORED).nonzero().squeeze(1)
    flat = student.reshape(-1, vocabulary), teacher.detach().reshape(-1, vocabulary)
    return temperature**2 * _Divergence.apply(*flat, rows, temperature, direction), rows.numel()


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, int]:
    """Sum over positions with a target of |h_S - h_T|^2 / |h_T|^2, the mean over the given layers.

    Args:
        student, teacher: hidden states ``(B, T, D)`` of the same layers. No gradient flows to the teacher.
        targets: int64 ``(B, T)``, aligned with the logits; -100 marks ignored positions.

    Returns:
        The sum (float32, or float64 for float64 states), and the number of positions summed over.
    """
    real = targets != IGNORED
    total = student[0].new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    for own, theirs in zip(student, teacher, strict=True):
        want = theirs.detach()[real.to(theirs.device)].to(total)
        difference = own[real].to(total) - want
        scale = want.square().sum(-1).clamp_min(torch.finfo(total.dtype).tiny)
        total = total + (difference.square().sum(-1) / scale).sum()
    return total / len(student), int(real.sum())


def shift_labels(labels: Tensor) -> Tensor:
    """Labels aligned with logits: position t gets the label of t + 1, the last one is ignored. int64 ``(B, T)``."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def mark_updated(model: nn.Module) -> None:
    """Advances the version counters of the weights.

    Fused optimizers write weights without doing so, and a resized model notices by version that its gathered weights
    are out of date.
    """
    torch.autograd.graph.increment_version(list(model.parameters()))


def param_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Optimizer parameter groups ``weights``, ``no_decay`` and ``gates`` (empty ones are left out).

    Weight decay applies to matrices except embeddings and norms; biases and norm gains never decay. Gates decay only if
    their `PuppetConfig.decay_gates` says so.

    Args:
        model: any model, wrapped by ppnet or not. Frozen parameters are left out.
        lr: learning rate of the weights.
        gate_lr: learning rate of the gates; None: `PuppetConfig.gate_lr`, or `lr` if that is None too.
        weight_decay: coefficient of the ``weights`` group.

    Raises:
        PPNetError: a rate or the decay is negative, or the model has no trainable parameter.
    """
    for name, value in (("lr", lr), ("gate_lr", gate_lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0:
            raise PPNetError(f"{name}: {value!r} must be >= 0.")
    config = getattr(getattr(model, "puppet", None), "config", None)
    if gate_lr is None:
        gate_lr = getattr(config, "gate_lr", None)
    if gate_lr is None:
        gate_lr = lr
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights, no_decay, gates = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("puppet.") or ".puppet." in name:
            gates.append(parameter)
        elif parameter.ndim < 2 or id(parameter) in embeddings or _NORM.search(name):
            no_decay.append(parameter)
        else:
            weights.append(parameter)
    gate_decay = weight_decay if getattr(config, "decay_gates", False) else 0.0
    groups = [
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "lr": lr, "weight_decay": 0.0},
        {"name": "gates", "params": gates, "lr": gate_lr, "weight_decay": gate_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise PPNetError("model: has no trainable parameter; set requires_grad=True on weights or gates.")
    return groups
