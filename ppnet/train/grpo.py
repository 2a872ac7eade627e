"""Reward movement while a model is trained by GRPO: a mixin for `trl.GRPOTrainer` (the extra ``rl`` installs trl).

    class Trainer(ppnet.train.RewardMovementMixin, trl.GRPOTrainer): ...

or `ppnet.train.grpo.RewardMovementTrainer`, which is that. `ppnet.scores.rewards` has the formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppnet.errors import PPNetError, TrainingError
from ppnet.scores.probe import Probe, probe_target
from ppnet.scores.result import Scores
from ppnet.scores.reward import from_sums
from ppnet.scores.rewards import Ratings, RewardGradients
from ppnet.scores.statistics import gate_gradients
from ppnet.train.movement import SiteIndices, all_reduced

if TYPE_CHECKING:
    from trl import GRPOTrainer

GROUP, VERIFIED = "ppnet_group", "ppnet_verified"
# Losses whose gradient at the first pass over on-policy completions is the advantage times one factor per completion.
_LINEAR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


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
        self._generations = self._groups_given = self._completions = 0
        self._rewards: Tensor | None = None
        self._logps: Tensor | None = None
        self._rated: Ratings | None = None
        self._factor: Tensor | None = None
        self._probe: Probe | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        host, _ = probe_target(trainer.accelerator.unwrap_model(trainer.model))
        self._probe = Probe(host, self._structure.sites, sink=self._sink)
        self._probe.active = False
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._probe.remove()
            self._probe = None

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

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        verified = inputs.get(VERIFIED)
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
        if number == 0:
            self._completions += len(gradients)

    # ---- results -----------------------------------------------------------------------------------------------------

    def reward_scores(self, form: str = "groups", kappa: float = 0.5) -> Scores:
        """What was collected so far, as scores of method ``reward`` (`form` and `kappa` as there). With several
        processes, every one must call it.

        Raises:
            TrainingError: no verified group of completions is complete.
        """
        names = ("signed", "absolute", "positive", "negative")
        groups = torch.tensor([float(self._sums[0].groups)])
        mine = [getattr(site, name) for site in self._sums for name in names]
        *sums, seen = all_reduced([*mine, groups.to(mine[0].device)])
        if not float(seen):
            raise TrainingError(
                "rewards: no verified group of completions was seen: within every group all rewards were equal, or the "
                f"best was below reward_threshold={self.reward_threshold}; train longer, or give graded rewards."
            )
        units = {}
        for number, site in enumerate(self._structure.sites):
            found = dict(zip(names, sums[number * len(names) : (number + 1) * len(names)], strict=True))
            units[site.name] = from_sums(found, float(seen), form, kappa)
        return Scores(
            units,
            method="reward",
            model_type=self._structure.model_type,
            options={"form": form},
            tokens=self._completions,
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
