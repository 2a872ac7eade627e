"""Reward movement while a model is trained by GRPO: a mixin for `trl.GRPOTrainer` (the extra ``rl`` installs trl).

    class Trainer(ppnet.train.RewardMovementMixin, trl.GRPOTrainer): ...

or `ppnet.train.grpo.RewardMovementTrainer`, which is that. `ppnet.scores.rewards` has the formulas.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ppnet.errors import PPNetError, TrainingError
from ppnet.scores.probe import Probe, probe_target
from ppnet.scores.result import Scores
from ppnet.scores.reward import from_sums
from ppnet.scores.rewards import Ratings, RewardGradients
from ppnet.scores.statistics import gate_gradients
from ppnet.train.movement import SiteIndices, all_reduced
from ppnet.train.sums_file import load_sums, save_sums

if TYPE_CHECKING:
    from trl import GRPOTrainer

SUMS_FILE = "ppnet_rewards.safetensors"
FORMAT = "ppnet.rewards/1"
SUMS = ("signed", "absolute", "positive", "negative")
GROUP, VERIFIED = "ppnet_group", "ppnet_verified"
# Losses whose gradient at the first pass over on-policy completions is the advantage times one factor per completion.
_LINEAR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


logger = logging.get_logger(__name__)


class RewardMovementMixin:
    """Collects reward movement in a `trl.GRPOTrainer`; put it before the trainer among the base classes.

    Advantages are the trainer's own. Completions keep the number of their group through the trainer's shuffling, and a
    group counts when all its completions have been seen and it is verified: its rewards differ, and the best reaches
    `reward_threshold`. What is trained does not change.

    On-policy without a KL term (``beta=0``, ``num_iterations=1``, one generation per optimizer step: trl's defaults),
    the gate gradients come out of the training backward pass itself; whatever factor the loss gives a completion is
    read off its gradient and divided out. Otherwise, with KL, clipped ratios, an entropy bonus or
    corrections in the loss, the likelihood of the completions has a backward pass of its own, without weight gradients,
    for every `score_every`-th generation.

    The sums are saved in the trainer's checkpoints and go on when training is resumed from one; groups whose
    completions have not all been seen by then are left out, so save where generations end. Within the trainer's first
    epoch they are the uninterrupted run's to the bit; in later ones trl goes on with other prompts. From a checkpoint
    without them they start anew, with a warning.

    Args:
        reward_threshold: see above; None: any group whose rewards differ.
        score_every: of so many generations one is scored. None: 1 where it is free, else 4.
        others: as `trl.GRPOTrainer`.
    """

    def __init__(
        self, *args: Any, reward_threshold: float | None = None, score_every: int | None = None, **kwargs: Any
    ) -> None:
        if score_every is not None and score_every < 1:
            raise PPNetError(f"score_every: {score_every!r} must be at least 1, or None.")
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.reward_threshold = reward_threshold
        self._free = _is_free(trainer)
        self.score_every = score_every or (1 if self._free else 4)
        given: Any = trainer.args.activation_checkpointing_kwargs or {}
        if not self._free and trainer.args.activation_checkpointing and given.get("use_reentrant"):
            raise TrainingError(
                "activation_checkpointing_kwargs: use_reentrant=True refuses the backward pass of its own that reward "
                "movement has with these settings (KL term, iterations, corrections: see the class); set "
                "activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        local = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        if local % trainer.num_generations:
            raise TrainingError(
                f"num_generations: {trainer.num_generations} does not divide the {local} completions that one process "
                "generates at a time (per_device_train_batch_size x steps_per_generation), so groups would be spread "
                "over processes; choose numbers that do."
            )
        host, self._structure = probe_target(trainer.accelerator.unwrap_model(trainer.model))
        device = next(host.parameters()).device
        self._sums = [RewardGradients(site.units, device) for site in self._structure.sites]
        self._site_index = SiteIndices(self._structure.sites)
        self._generations = self._groups_given = self._tokens = 0
        self._seen: dict[int, int] = {}
        self._rewards: Tensor | None = None
        self._logps: Tensor | None = None
        self._rated: Ratings | None = None
        self._factor: Tensor | None = None
        self._probe: Probe | None = None

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        trainer: Any = self
        newest = resume_from_checkpoint is True
        found = get_last_checkpoint(trainer.args.output_dir) if newest else resume_from_checkpoint
        if found:
            self._restore(Path(str(found)))
        host, _ = probe_target(trainer.accelerator.unwrap_model(trainer.model))
        self._probe = Probe(host, self._structure.sites, sink=self._sink)
        self._probe.active = False
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._probe.remove()
            self._probe = None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer: Any = self
        sums, groups, tokens = self._reduced()  # which every process takes part in
        if trainer.state.is_world_process_zero:
            folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
            facts = {
                "groups": groups, "tokens": tokens, "generations": self._generations, "given": self._groups_given,
            }  # fmt: skip
            save_sums(folder / SUMS_FILE, FORMAT, self._structure, sums, facts)

    def _restore(self, folder: Path) -> None:
        """Goes on from the sums of a checkpoint; those of all processes are the first one's."""
        trainer: Any = self
        first = trainer.accelerator.is_main_process
        if not (folder / SUMS_FILE).is_file():
            if first:
                logger.warning(
                    f"Resuming from {folder} without sums of reward movement: no {SUMS_FILE} in it. They start anew, "
                    "and reward_scores() leaves out the steps before."
                )
            return
        sums, facts = load_sums(folder / SUMS_FILE, FORMAT, self._structure, SUMS)
        units = [site.units for site in self._structure.sites]
        split = {name: total.split(units) for name, total in sums.items()}
        for number, site in enumerate(self._sums):
            for name in SUMS:
                getattr(site, name).copy_(split[name][number] if first else torch.zeros_like(split[name][number]))
            site.groups = int(facts["groups"]) if first else 0
            site.forget_open()
        self._tokens = int(facts["tokens"]) if first else 0
        self._generations, self._groups_given = int(facts["generations"]), int(facts["given"])

    def _reduced(self) -> tuple[dict[str, Tensor], int, int]:
        """Sums (U,), groups and tokens of all processes."""
        counts = torch.tensor([self._sums[0].groups, self._tokens], dtype=torch.float64)
        mine = [torch.cat([getattr(site, name) for site in self._sums]) for name in SUMS]
        *sums, total = all_reduced([*mine, counts.to(mine[0].device)])
        groups, tokens = total.tolist()
        return dict(zip(SUMS, sums, strict=True)), int(groups), int(tokens)

    # ---- groups ------------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        weights = self.reward_weights.to(rewards.device)  # type: ignore[attr-defined]
        self._rewards = (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        trainer: Any = self
        if not trainer.model.training or self._rewards is None:
            return output
        size, count = trainer.num_generations, len(output["advantages"])
        start = trainer.accelerator.process_index * count
        groups = self._rewards[start : start + count].view(-1, size)
        best = -torch.inf if self.reward_threshold is None else self.reward_threshold
        # NaN compares as False: a group with a completion that no reward function could judge is not verified.
        verified = ((groups.amax(1) - groups.amin(1)) > 1e-8) & (groups.amax(1) >= best)
        if self._generations % self.score_every:
            verified = torch.zeros_like(verified)
        numbers = torch.arange(len(groups), device=verified.device) + self._groups_given
        output[VERIFIED] = verified.repeat_interleave(size)
        output[GROUP] = numbers.repeat_interleave(size)
        self._groups_given += len(groups)
        self._generations += 1
        self._seen.clear()
        return output

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            # Until here: activation checkpointing runs the forward pass again within backward.
            if self._probe is not None:
                self._probe.active = False
            self._rated = self._factor = self._logps = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        if self._rated is not None and result[0].requires_grad:
            self._logps = result[0]
        return result

    def _unfinished(self, groups: Tensor) -> Tensor:
        """Which completions belong to a group that has not been scored: with ``num_iterations`` above 1 every
        generation comes again. Counts those that it lets through."""
        size = self.num_generations  # type: ignore[attr-defined]
        fresh = [self._seen.get(group, 0) < size for group in groups.tolist()]
        for group, counts in zip(groups.tolist(), fresh, strict=True):
            self._seen[group] = self._seen.get(group, 0) + counts
        return torch.tensor(fresh, device=groups.device)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        verified = inputs.get(VERIFIED)
        if self._probe is not None and verified is not None and torch.is_grad_enabled():
            verified = verified & self._unfinished(inputs[GROUP])
        if self._probe is None or verified is None or not torch.is_grad_enabled() or not bool(verified.any()):
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        trainer: Any = self
        groups = inputs[GROUP]
        self._rated = Ratings(
            advantages=inputs["advantages"].detach().double(),
            groups=groups,
            sizes=torch.full_like(groups, trainer.num_generations),
            verified=verified,
        )
        self._factor = None
        self._probe.active = True
        loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        self._tokens += int(mask[verified].sum())
        if self._logps is None:
            raise TrainingError(
                f"trainer: {type(self).__name__} did not compute its loss from _get_per_token_logps_and_entropies; "
                "this version of trl is not known, use 1.16."
            )
        if self._free:
            self._logps.register_hook(lambda gradient: self._read_factor(gradient, mask))
        else:
            mean = (mask / mask.sum(1, keepdim=True).clamp(min=1)).to(self._logps)
            self._factor = torch.ones(len(mask), dtype=torch.float64, device=mask.device)
            torch.autograd.grad(
                self._logps, self._probe.anchors(), mean, retain_graph=True, allow_unused=True
            )  # runs the sinks alone
            self._factor = None
            self._rated = None
        return loss

    def _read_factor(self, gradient: Tensor, mask: Tensor) -> None:
        """1 / (sum over a completion of dloss/dlogp): what turns its part of the loss into its mean log-likelihood."""
        total = (gradient.double() * mask).sum(1)
        self._factor = torch.where(total == 0, total, 1 / total.where(total != 0, torch.ones_like(total)))

    @torch.no_grad()
    def _sink(self, number: int, x: Tensor, dx: Tensor) -> None:
        if self._rated is None or self._factor is None:
            return
        gradients, _ = gate_gradients(self._site_index(number, x.device), x, dx)
        self._sums[number].add(gradients.double() * self._factor.to(gradients.device)[:, None], self._rated)

    # ---- results -----------------------------------------------------------------------------------------------------

    def reward_scores(self, form: str = "groups", kappa: float = 0.5) -> Scores:
        """What was collected so far, as scores of method ``reward`` (`form` and `kappa` as there). With several
        processes, every one must call it.

        Raises:
            TrainingError: no verified group of completions is complete.
        """
        sums, seen, tokens = self._reduced()
        if not seen:
            raise TrainingError(
                "rewards: no verified group of completions was seen: within every group all rewards were equal, or the "
                f"best was below reward_threshold={self.reward_threshold}; train longer, or give graded rewards."
            )
        sizes = [site.units for site in self._structure.sites]
        split = {name: total.split(sizes) for name, total in sums.items()}
        units = {
            site.name: from_sums({name: parts[number] for name, parts in split.items()}, seen, form, kappa)
            for number, site in enumerate(self._structure.sites)
        }
        return Scores(
            units,
            method="reward",
            model_type=self._structure.model_type,
            order=self._structure.order,
            options={"form": form},
            tokens=tokens,
        )


def _is_free(trainer: Any) -> bool:
    """Whether the training loss is, to first order, the advantage-weighted likelihood of on-policy completions."""
    args = trainer.args
    return bool(
        trainer.beta == 0.0
        and trainer.loss_type in _LINEAR_LOSSES
        and trainer.num_iterations == 1
        and args.gradient_accumulation_steps % args.steps_per_generation == 0
        and trainer.importance_sampling_level == "token"
        and trainer.top_entropy_quantile >= 1.0
        and not trainer._entropy_bonus_enabled
        and trainer.off_policy_mask_threshold is None
        and not trainer.use_vllm
        and not args.fp16
    )


def __getattr__(name: str) -> Any:
    if name != "RewardMovementTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        raise PPNetError("trl: is not installed; pip install 'ppnet[rl]' brings trl 1.16.") from error
    made = type(
        name, (RewardMovementMixin, GRPOTrainer), {"__module__": __name__, "__doc__": RewardMovementMixin.__doc__}
    )
    globals()[name] = made
    return made


if TYPE_CHECKING:

    class RewardMovementTrainer(RewardMovementMixin, GRPOTrainer):
        """`trl.GRPOTrainer` with `RewardMovementMixin`."""
