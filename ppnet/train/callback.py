"""Gates under trainers whose loss is not ppnet's: a callback that adds the cost penalty; what no trainer can do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ppnet.errors import TrainingError
from ppnet.train.checkpointing import last_good_checkpoint
from ppnet.train.objective import mark_updated

DIVERGED_ADVICE = "lower the learning rate, lengthen the warm-up or set max_grad_norm, then resume from it"


def refuse_distributed(puppet: Any, checkpointing: bool, callback: bool = False) -> None:
    """Several processes: gates get a gradient only in passes with lambda > 0, and outside the forward through the prior
    and the callback's penalty; DistributedDataParallel then fails in the middle of a step.

    Raises:
        TrainingError: a combination that is known to fail.
    """
    for option, problem in (
        ("gradient_checkpointing=True", checkpointing),
        ('PuppetConfig(hierarchy="pooled")', puppet.config.hierarchy == "pooled"),
        ("PuppetCallback", callback),
    ):
        if problem:
            raise TrainingError(
                f"{option} does not work with gates on several processes; use PuppetTrainer with "
                'gradient_checkpointing=False and hierarchy="independent" there, or one process.'
            )


class PuppetCallback(TrainerCallback):
    """Adds the gates' cost penalty to any trainer whose loss ppnet does not own (GRPO, DPO, ...).

    The penalty does not need data, so its gradient is added once per optimizer step, after gradient clipping and
    whatever the trainer's loss scaling: the mean over the step's draws, as with `PuppetTrainerMixin`. There is no
    distillation. Build the optimizer from `param_groups`, since Hugging Face trainers would decay gates.

    Args:
        tokens: number of training tokens, which the hyperprior counts once against; None: measured from the first
            example of a training dataset with ``input_ids``.

    Raises:
        TrainingError: the model has no gates, the tokens cannot be measured, or a gradient is NaN or infinite.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        puppet = getattr(kwargs.get("model"), "puppet", None)
        if puppet is None:
            raise TrainingError(
                "PuppetCallback: the model has no gates; call ppnet.wrap(model, config) before training."
            )
        if args.world_size > 1:
            refuse_distributed(puppet, bool(args.gradient_checkpointing), callback=True)
        self.puppet = puppet
        puppet.set_tokens(self.tokens if self.tokens is not None else self._measure(args, state, kwargs))
        puppet.clear()

    @staticmethod
    def _measure(args: TrainingArguments, state: Any, kwargs: Mapping[str, Any]) -> int:
        dataset: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        try:
            length = len(dataset[0]["input_ids"])
        except (TypeError, KeyError, IndexError, NotImplementedError) as error:
            raise TrainingError(
                f"tokens: cannot be measured from a {type(dataset).__name__}; pass PuppetCallback(tokens=<training "
                "tokens>)."
            ) from error
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * state.max_steps
        return length * sequences

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.puppet.progress, self.puppet.total_steps = state.global_step, state.max_steps
        self.puppet.clear()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        penalty = self.puppet.penalty()
        if penalty.requires_grad:
            penalty.backward()
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise TrainingError(
                f"training stopped at step {state.global_step + 1}: the gradient norm is {norm} (penalty "
                f"{float(penalty):.6g}, learning rate {kwargs['optimizer'].param_groups[0]['lr']:.4g}, lambda "
                f"{self.puppet.last_lambda:.4g}). The weights were not updated. Last good checkpoint: "
                f"{last_good_checkpoint(str(args.output_dir))}; {DIVERGED_ADVICE}."
            )

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        mark_updated(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            metrics = self.puppet.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)
