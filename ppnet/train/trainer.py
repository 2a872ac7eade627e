"""Training gates with Hugging Face trainers: a mixin that owns the objective."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from ppnet.checks import renamed
from ppnet.errors import PPNetError, TrainingError
from ppnet.families import is_decoder
from ppnet.gates.draw import Stratum
from ppnet.modes import evaluating
from ppnet.train.callback import DIVERGED_ADVICE, PuppetCallback, refuse_distributed
from ppnet.train.checkpoint_mixin import CheckpointMixin
from ppnet.train.checkpointing import last_good_checkpoint
from ppnet.train.data import TextBlocks
from ppnet.train.objective import distillation_loss, mark_updated, param_groups, shift_labels
from ppnet.wrap import engine_of

# Share of the steps.
WARMUP = 0.03


def default_arguments(output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
    """Training arguments of ppnet: AdamW (0.9, 0.95), weight decay 0.1, cosine schedule with warm-up, fixed seeds.

    Args:
        output_dir: folder of the checkpoints.
        overrides: any `transformers.TrainingArguments`, which win over the defaults.

    The order of the data depends on the seed alone, so a run on the CPU is reproducible bit for bit. On CUDA that costs
    speed and is left to ``full_determinism=True``.
    """
    values: dict[str, Any] = {
        "learning_rate": 3e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "logging_steps": 50,
        "save_steps": 500,
        "save_total_limit": 2,
        "seed": 0,
        "report_to": "none",
        # A non-finite loss stops the run, so there is nothing to filter; the filter would synchronise every micro-step.
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available() and not overrides.get("use_cpu", False),
        **overrides,
    }
    values.setdefault("data_seed", values["seed"])
    return TrainingArguments(output_dir=str(output_dir), **values)


def _logits(outputs: Any) -> Tensor | None:
    return outputs.get("logits") if isinstance(outputs, Mapping) else None


def aligned_targets(inputs: Mapping[str, Any], shifted: bool = True) -> Tensor | None:
    """What each position is to predict, int64 ``(B, T)`` with -100 where nothing; None if the batch has no labels.

    Args:
        shifted: a position's label is the token after it; False for encoders, whose labels stand where they count.
    """
    targets = inputs.get("shift_labels")
    if targets is None and inputs.get("labels") is not None:
        targets = shift_labels(inputs["labels"]) if shifted else inputs["labels"]
    return targets


class PuppetTrainerMixin(CheckpointMixin):
    """Trains weights and gates together: put it before a `transformers.Trainer` class among the base classes.

    For every micro-batch the objective is ``(1 - a) * NLL + a * T^2 * KL(dense || gated) + penalty`` with a =
    `PuppetConfig.distill`; the distillation term (and the factor 1 - a) applies to gated passes only, its teacher being
    the model's own dense pass on the same batch, in eval mode. Under gradient accumulation NLL and KL are sums over all
    tokens of the optimizer step divided by their number, and the penalty is the mean over the step's draws. Evaluation
    and prediction are dense. Without gates it is the given Trainer with checkpoints as in `CheckpointMixin`.

    A NaN or infinite loss or gradient norm raises `TrainingError` before the weights are changed.
    """

    _tokens: int | None = None
    _watched: torch.optim.Optimizer | None = None
    _own_cache: bool | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = getattr(kwargs.get("model", args[0] if args else None), "config", None)
        own = getattr(config, "use_cache", None)
        super().__init__(*args, **kwargs)
        if config is not None and own is not None:
            config.use_cache = own  # the Trainer turned it off; here that is done while it trains
        # The Trainer's default with a tokenizer asks for a padding token, which blocks of equal length do not need.
        data = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if isinstance(data, TextBlocks) and isinstance(self.data_collator, DataCollatorWithPadding):
            self.data_collator = default_data_collator

    @property
    def puppet(self) -> Any:
        """The gates of the model, or None."""
        return getattr(self.model, "puppet", None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(callback, PuppetCallback) for callback in self.callback_handler.callbacks):
            raise TrainingError(
                f"callbacks: PuppetCallback is used together with {type(self).__name__}, which adds the penalty "
                "itself, so it would count twice; remove the callback, or use a trainer without PuppetTrainerMixin."
            )
        if self.puppet is not None and self.args.n_gpu > 1:
            raise TrainingError(
                f"model: gates do not work under nn.DataParallel ({self.args.n_gpu} GPUs in one process); start one "
                "process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if self.puppet is not None and self.puppet.config.sandwich:
            refuse_sandwich(self.puppet, self.args)
        if self.args.world_size > 1 and self.puppet is not None:
            refuse_distributed(self.puppet, bool(self.args.gradient_checkpointing))
        self._micro_losses: list[Tensor] = []
        self._last_loss = math.nan
        self._terms: dict[str, list[Tensor]] = {}
        self._own_cache = getattr(getattr(self.model, "config", None), "use_cache", None)
        with self._cache(self.args.use_cache):
            return super().train(*args, **kwargs)

    @contextmanager
    def _cache(self, on: bool | None) -> Iterator[None]:
        """Inside, the model's config says whether its passes keep keys and values; None: as it is."""
        config: Any = getattr(self.model, "config", None)
        before = getattr(config, "use_cache", None)
        if on is None or before is None:
            yield
            return
        config.use_cache = on
        try:
            yield
        finally:
            config.use_cache = before

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # Saved without, a model would generate without a cache.
        with self._cache(self._own_cache):
            super()._save(*args, **kwargs)

    # ---- objective ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The objective of one micro-batch, scaled as the Trainer expects it; see the class."""
        puppet = self.puppet
        if puppet is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        puppet.progress, puppet.total_steps = self.state.global_step, self.state.max_steps
        puppet.clear()
        if puppet.config.sandwich:
            return self._sandwich(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        share = float(puppet.config.distill)
        # Before the gated pass: activation checkpointing recomputes that one with the gates that are bound last.
        gated = engine_of(puppet.root).fixed is not None or puppet.next_lambda() > 0
        teacher = self._dense_logits(model, inputs) if share > 0 and gated else None
        # The Trainer may take the labels out of the dictionary that it is given.
        result = super().compute_loss(model, dict(inputs), return_outputs or share > 0, num_items_in_batch, **kwargs)
        nll, outputs = result if isinstance(result, tuple) else (result, None)
        micro_steps = getattr(self, "current_gradient_accumulation_steps", 1)
        scaled = self._loss_is_scaled(num_items_in_batch)
        loss = nll if teacher is None else self._taught(nll, inputs, outputs, teacher, num_items_in_batch)
        penalty = puppet.penalty().to(loss.device)
        # The Trainer divides losses that are means over their micro-batch, not those already divided by all tokens.
        loss = loss + (penalty / micro_steps if scaled else penalty)
        self._record("nll", nll * (micro_steps if scaled else 1))
        self._record("penalty", penalty)
        return (loss, outputs) if return_outputs else loss

    def _sandwich(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
        **kwargs: Any,
    ) -> Any:
        """Mean over a dense pass and `PuppetConfig.sandwich` gated ones that learn from it, plus the penalty."""
        puppet, passes = self.puppet, self.puppet.config.sandwich
        micro_steps = getattr(self, "current_gradient_accumulation_steps", 1)
        scaled = self._loss_is_scaled(num_items_in_batch)
        with puppet.dense():
            nll, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch, **kwargs)
        loss, teacher = nll, _logits(outputs) if puppet.config.distill > 0 else None
        self._record("nll", nll * (micro_steps if scaled else 1))
        for number in range(passes):
            with puppet.drawing(Stratum(number, passes)):
                nll, gated = super().compute_loss(model, dict(inputs), True, num_items_in_batch, **kwargs)
            loss = loss + (nll if teacher is None else self._taught(nll, inputs, gated, teacher, num_items_in_batch))
        penalty = puppet.penalty().to(loss.device)
        loss = loss / (1 + passes) + (penalty / micro_steps if scaled else penalty)
        self._record("penalty", penalty)
        return (loss, outputs) if return_outputs else loss

    def _taught(
        self,
        nll: Tensor,
        inputs: Mapping[str, Any],
        outputs: Any,
        teacher: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """``(1 - a) * NLL + a * distillation`` of a gated pass, both scaled as the Trainer expects a loss."""
        share, scaled = float(self.puppet.config.distill), self._loss_is_scaled(num_items_in_batch)
        micro_steps = getattr(self, "current_gradient_accumulation_steps", 1)
        divergence = self._distillation(inputs, outputs, teacher, num_items_in_batch if scaled else None)
        if scaled and num_items_in_batch is None:
            divergence = divergence / micro_steps
        self._record("distillation_kl", divergence * (micro_steps if scaled else 1))
        return (1 - share) * nll + share * divergence

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer takes the loss as already normalised over the whole accumulated batch."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _dense_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Logits ``(B, T, V)`` of the dense pass without dropout; None if the model returns none."""
        batch = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
        with evaluating(model), self.puppet.dense():
            return _logits(model(**batch))

    def _distillation(
        self, inputs: Mapping[str, Any], outputs: Any, teacher: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """T^2 * KL(dense || gated) per target token: over `num_items_in_batch` if given, else over the micro-batch."""
        config = self.puppet.config
        logits, targets = _logits(outputs), aligned_targets(inputs, is_decoder(self.puppet.root))
        if logits is None or targets is None:
            missing = "logits in the model's output" if logits is None else "labels in the batch"
            raise TrainingError(
                f"distill: {config.distill!r} needs {missing}, which {type(self).__name__} does not provide; set "
                "PuppetConfig(distill=0)."
            )
        total, count = distillation_loss(logits, teacher, targets.to(logits.device), config.distill_temperature)
        return self._per_token(total, count, num_items_in_batch)

    def _per_token(self, total: Tensor, count: int, num_items_in_batch: Tensor | int | None) -> Tensor:
        """A sum over tokens as the Trainer expects a loss: over `num_items_in_batch` if given, else over `count`."""
        if num_items_in_batch is None:
            return total / max(count, 1)
        if self.args.average_tokens_across_devices:
            # The count is over all processes, whose gradients are averaged.
            total = total * (self.accelerator.num_processes // self.get_tp_size())
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        puppet = self.puppet
        if puppet is not None and isinstance(inputs, Mapping) and "input_ids" in inputs:
            if self._tokens is None:
                steps = self.state.max_steps * self.args.gradient_accumulation_steps
                self._tokens = inputs["input_ids"].numel() * steps * self.args.world_size
            puppet.set_tokens(self._tokens)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_losses.append(loss)
        return loss

    # ---- stopping -------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer calls this once per optimizer step, right before it: the place to stop with intact weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # One transfer for all micro-steps and the norm, so that an accelerator is synchronised once per step.
        losses = torch.stack([loss.detach().float() for loss in self._micro_losses])
        self._micro_losses.clear()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm).to(losses)
        *values, norm_value = torch.cat([losses, norm.reshape(1)]).tolist()
        for number, value in enumerate(values):
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value} (micro-step {number + 1} of {len(values)})", sum(values))
        # With fp16 an infinite gradient is the loss scaler's business: it skips the step and lowers the scale.
        if not math.isfinite(norm_value) and getattr(self.accelerator, "scaler", None) is None:
            raise self._diverged(f"the gradient norm is {norm_value}", sum(values))
        self._last_loss = sum(values)
        return grad_norm

    def _diverged(self, what: str, loss: float) -> TrainingError:
        lambda_ = "" if self.puppet is None else f", lambda {self.puppet.last_lambda:.4g}"
        return TrainingError(
            f"training stopped at step {self.state.global_step + 1}: {what} (loss {loss:.6g}, loss of the step before "
            f"{self._last_loss:.6g}, learning rate {self._get_learning_rate():.4g}{lambda_}). The weights were not "
            f"updated. Last good checkpoint: {last_good_checkpoint(self.args.output_dir)}; {DIVERGED_ADVICE}."
        )

    # ---- optimizer, logs, checkpoints -----------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over `param_groups`."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            try:
                groups = param_groups(target, self.args.learning_rate, weight_decay=self.args.weight_decay)
            except PPNetError as error:
                raise renamed(error, "learning_rate", "lr") from error
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, target
            )
            if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(options):
                raise TrainingError(
                    f"optim: {self.args.optim!s} chooses its own parameter groups, which leaves out the gates' "
                    "learning rate; use an AdamW variant, or pass optimizers=(optimizer, None) built from "
                    "ppnet.train.param_groups."
                )
            self.optimizer = optimizer_class(groups, **options)
        own = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.puppet is not None and self._watched is not own:
            own.register_step_post_hook(lambda *_: mark_updated(self.model))
            self._watched = own
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean terms of the objective since the last log, and the gates' metrics, to training logs."""
        terms = self.__dict__.get("_terms", {})
        if terms and "loss" in logs:
            logs.update({name: float(torch.stack(values).mean()) for name, values in terms.items()})
            terms.clear()
        if self.puppet is not None and "loss" in logs:
            logs.update(self.puppet.metrics())
        super().log(logs, *args, **kwargs)

    def _record(self, name: str, value: Tensor) -> None:
        self.__dict__.setdefault("_terms", {}).setdefault(name, []).append(value.detach().float())

    def _manifest_facts(self) -> dict[str, Any]:
        return {"tokens": self._tokens}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._tokens = self._read_manifest(resume_from_checkpoint).get("tokens")


class PuppetTrainer(PuppetTrainerMixin, Trainer):
    """`transformers.Trainer` with `PuppetTrainerMixin`. Arguments are the Trainer's; see `default_arguments`."""


def refuse_sandwich(puppet: Any, args: TrainingArguments) -> None:
    """Several passes before one backward: activation checkpointing recomputes with the units bound last, and
    DistributedDataParallel prepares for a backward at every forward.

    Raises:
        TrainingError: either is asked for.
    """
    for option, problem in (
        ("gradient_checkpointing=True", args.gradient_checkpointing),
        (f"training on {args.world_size} processes", args.world_size > 1),
    ):
        if problem:
            raise TrainingError(
                f"sandwich: PuppetConfig(sandwich={puppet.config.sandwich}) makes several passes before a backward, "
                f"which {option} does not allow; use sandwich=0, or leave out activation checkpointing and the other "
                "processes."
            )
