"""Healing with a teacher: distillation into a small model with Hugging Face trainers, and in one call."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ppnet.checks import renamed
from ppnet.errors import CheckpointError, TrainingError
from ppnet.evaluate.tokens import IGNORED
from ppnet.families import is_decoder, predicts_tokens
from ppnet.modes import evaluating
from ppnet.train.objective import DIRECTIONS, distillation_loss, hidden_loss
from ppnet.train.trainer import PuppetTrainerMixin, aligned_targets

_OF_THE_TASK = ("labels", "shift_labels", "output_hidden_states")


@dataclass(frozen=True)
class Distillation:
    """What the student learns: ``(1 - weight) * NLL + weight * T^2 * divergence + hidden * hidden-state loss``.

    Attributes:
        weight: share of the teacher in [0, 1]; the rest is the task's own loss.
        temperature: T > 0.
        direction: ``"forward"`` KL(teacher || student), ``"reverse"`` KL(student || teacher), or ``"jsd"``.
        hidden: weight of the hidden-state loss, the squared distance relative to the teacher's squared length
            (`ppnet.train.objective.hidden_loss`).
        hidden_layers: indices into ``hidden_states``: 0 is what the embeddings give, l what layer l - 1 gives (the last
            one after the final norm); negative ones count from the end. None: all layers but the embeddings.

    A model without logits of tokens (a bare one, a classifier) learns from hidden states alone: `hidden` must be above
    0, and the other terms are left out.
    """

    weight: float = 0.9
    temperature: float = 2.0
    direction: str = "forward"
    hidden: float = 0.0
    hidden_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "temperature", "hidden"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise TrainingError(f"{name}: {value!r} must be a finite number.")
        layers = self.hidden_layers
        if layers is not None and not (
            isinstance(layers, Sequence)
            and not isinstance(layers, str)
            and all(isinstance(i, Integral) for i in layers)
        ):
            raise TrainingError(f"hidden_layers: {layers!r} must be a tuple of layer indices, e.g. (1, -1), or None.")
        if not 0 <= self.weight <= 1:
            raise TrainingError(f"weight: {self.weight!r} must be in [0, 1]: the teacher's share of the loss.")
        if not self.temperature > 0:
            raise TrainingError(f"temperature: {self.temperature!r} must be > 0.")
        if self.direction not in DIRECTIONS:
            raise TrainingError(f"direction: {self.direction!r} is not known; use one of {', '.join(DIRECTIONS)}.")
        if not self.hidden >= 0:
            raise TrainingError(f"hidden: {self.hidden!r} must be >= 0.")
        if self.weight == 0 and self.hidden == 0:
            raise TrainingError("weight, hidden: both are 0, so nothing is learnt from the teacher; raise one of them.")


class DistillationMixin(PuppetTrainerMixin):
    """Trains a model on the answers of a teacher: put it before a `transformers.Trainer` (or TRL's `SFTTrainer`).

    All terms are sums over the tokens that have labels, divided by their number in the whole optimizer step, whatever
    the micro-batches. Batches of an encoder may have none: all tokens count then that are not padding, each micro-batch
    by their mean, and the NLL is unknown (``weight=1``). Training logs have ``nll``, ``distillation_kl`` and, if used,
    ``hidden_loss``. Evaluation is the Trainer's own. Checkpoints, NaN stops and optimizer are those of
    `PuppetTrainerMixin`.

    Args:
        teacher: a model, or the folder of one (dense, gated or compacted), which is loaded once, in its own dtype, onto
            the training device. A given model stays where it is and as it is, is put into evaluation mode, gets no
            gradients, and is in no checkpoint. It needs the student's vocabulary.
        distillation: see `Distillation`.

    Raises:
        TrainingError: a teacher that does not fit, a student with gates, or a trainer with a loss of its own.
    """

    teacher: Any

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | str | os.PathLike[str] | None = None,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = Distillation() if distillation is None else distillation
        if not isinstance(self.distillation, Distillation):
            raise TrainingError(
                f"distillation: a {type(distillation).__name__}; give ppnet.train.Distillation(...) or None."
            )
        self._refuse_other_losses()
        self.teacher = self._loaded(teacher)
        student = self.accelerator.unwrap_model(self.model)
        check_teacher(student, self.teacher, self.distillation)
        self._decoder, self._predicts = is_decoder(student), predicts_tokens(student)
        self.teacher.eval()

    def _loaded(self, teacher: Any) -> nn.Module:
        if isinstance(teacher, nn.Module):
            return teacher
        if not isinstance(teacher, str | os.PathLike):
            raise TrainingError(f"teacher: {teacher!r} is neither a model nor the folder of one; give the dense model.")
        from ppnet.checkpoint import load

        try:
            return load(Path(teacher), dtype="auto").to(self.args.device)
        except CheckpointError as error:
            raise renamed(error, "teacher", "path") from error

    def _refuse_other_losses(self) -> None:
        if self.puppet is not None:
            raise TrainingError(
                "model: has gates, which learn from their own dense pass (PuppetConfig(distill=...)); compact it first."
            )
        others = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
            "loss_type": getattr(self.args, "loss_type", None) == "dft",
        }
        for name, used in others.items():
            if used:
                raise TrainingError(
                    f"{name}: {type(self).__name__} computes the task's loss itself, as the NLL; leave it out."
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The objective of one micro-batch, scaled as the Trainer expects it; see the class."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        options = self.distillation
        labels = aligned_targets(inputs, self._decoder)
        targets = self._counted(inputs) if labels is None else labels
        batch = {name: value for name, value in inputs.items() if name not in _OF_THE_TASK}
        extra = {"output_hidden_states": True} if options.hidden > 0 else {}
        taught = self._ask(batch, extra)
        outputs = model(**{**batch, "use_cache": False}, **extra)
        answer = outputs.logits if self._predicts else outputs.hidden_states[-1]
        targets = targets.to(answer.device)
        micro_steps = getattr(self, "current_gradient_accumulation_steps", 1)
        scaled = self._loss_is_scaled(num_items_in_batch)
        loss = answer.new_zeros((), dtype=torch.promote_types(answer.dtype, torch.float32))

        def term(name: str, weight: float, total: Tensor, count: int) -> Tensor:
            value = self._per_token(total, count, num_items_in_batch if scaled else None)
            if scaled and num_items_in_batch is None:
                value = value / micro_steps
            self._record(name, value * (micro_steps if scaled else 1))
            return weight * value

        count = int((targets != IGNORED).sum())
        if self._predicts and labels is not None:
            nll = nn.functional.cross_entropy(
                answer.flatten(0, 1).to(loss.dtype), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss = loss + term("nll", 1 - options.weight, nll, count)
        if self._predicts and options.weight > 0:
            divergence, _ = distillation_loss(
                answer, taught.logits.to(answer.device), targets, options.temperature, options.direction
            )
            loss = loss + term("distillation_kl", options.weight, divergence, count)
        if options.hidden > 0:
            layers = options.hidden_layers or range(1, len(outputs.hidden_states))
            pairs = [(outputs.hidden_states[i], taught.hidden_states[i].to(answer.device)) for i in layers]
            distance, _ = hidden_loss([own for own, _ in pairs], [theirs for _, theirs in pairs], targets)
            loss = loss + term("hidden_loss", options.hidden, distance, count)
        return (loss, outputs) if return_outputs else loss

    def _counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Of a batch without labels: its tokens, int64 ``(B, T)`` with -100 for padding."""
        if self._decoder:
            raise TrainingError(
                f"labels: the batch has none, only {sorted(inputs)}; distillation needs to know which tokens count "
                "(labels of -100 do not)."
            )
        if self._predicts and self.distillation.weight < 1:
            raise TrainingError(
                f"weight: {self.distillation.weight!r} leaves a share to the NLL of labels, and the batch has none, "
                f"only {sorted(inputs)}; give labels (-100 where nothing is masked), or set weight=1."
            )
        mask = inputs.get("attention_mask")
        return inputs["input_ids"] if mask is None else inputs["input_ids"].masked_fill(mask == 0, IGNORED)

    def _ask(self, batch: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
        """The teacher's outputs: in evaluation mode, in its own dtype, on its own device, without gradients."""
        device = self.teacher.get_input_embeddings().weight.device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with evaluating(self.teacher), torch.autocast(device.type, enabled=False):
            return self.teacher(**{**moved, "use_cache": False}, **extra)


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` with `DistillationMixin`. Arguments are the Trainer's, `teacher` and `distillation`."""


def check_teacher(student: Any, teacher: Any, options: Distillation) -> None:
    """Whether a teacher can teach a student.

    Raises:
        TrainingError: it is the student itself, nothing would be learnt, or vocabularies, widths or layers differ where
            they must not.
    """
    if teacher is student:
        raise TrainingError("teacher: is the student itself; give the dense model, or a copy made before training.")
    own, theirs = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    if own.shape[0] != theirs.shape[0]:
        raise TrainingError(
            f"teacher: its vocabulary has {theirs.shape[0]:,} tokens, the student's {own.shape[0]:,}; the teacher must "
            "be the model that the student was made from, or one with the same tokenizer."
        )
    if options.weight > 0 and predicts_tokens(student) and not predicts_tokens(teacher):
        raise TrainingError(
            f"teacher: a {type(teacher).__name__} has no logits of tokens, which weight={options.weight!r} asks for; "
            "give the dense model with its head, or weight=0 and hidden=1."
        )
    if options.hidden == 0:
        if not predicts_tokens(student):
            raise TrainingError(
                f"hidden: 0, and a {type(student).__name__} has no logits of tokens to learn; set hidden=1, so that it "
                "learns the teacher's hidden states."
            )
        return
    depth = student.config.num_hidden_layers
    if own.shape[1] != theirs.shape[1] or depth != teacher.config.num_hidden_layers:
        raise TrainingError(
            f"hidden: needs a teacher of the student's width and depth ({own.shape[1]}, {depth}), got "
            f"({theirs.shape[1]}, {teacher.config.num_hidden_layers}); set hidden=0."
        )
    check_layers(options.hidden_layers, depth)


def check_layers(layers: Sequence[int] | None, depth: int) -> None:
    """Raises TrainingError for indices that are not among the ``depth + 1`` hidden states."""
    wrong = [layer for layer in layers or () if not -depth - 1 <= layer <= depth]
    if wrong or (layers is not None and not layers):
        raise TrainingError(
            f"hidden_layers: {tuple(layers or ())} must be one or more of {-depth - 1} to {depth} (0: the embeddings)."
        )
