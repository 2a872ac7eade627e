"""One pass over the data that collects what scorers asked for, on a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppnet.calibration import Batch
from ppnet.errors import DataError, PPNetError
from ppnet.evaluate.model_state import device_of, vocabulary_of
from ppnet.evaluate.progress import Progress
from ppnet.evaluate.tokens import IGNORED
from ppnet.evaluate.windows import MAX_LOGITS
from ppnet.families import is_decoder, predicts_tokens
from ppnet.modes import evaluation_mode
from ppnet.scores.probe import Probe, input_norms, undisturbed
from ppnet.scores.registry import ACTIVATIONS, CURVATURE, FISHER, GRADIENTS, GRAM, REWARDS, Needs
from ppnet.scores.rewards import Ratings, RewardGradients, ratings
from ppnet.scores.statistics import (
    Activations,
    Affine,
    Curvature,
    GateGradients,
    Gram,
    SiteStatistics,
    SiteWeights,
    gate_gradients,
)
from ppnet.units import Site, Structure
from ppnet.wrap import engine_of, is_wrapped

# (the model's output, the batch on its device) -> one loss per sequence, (B,)
Loss = Callable[[Any, Batch], Tensor]


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients of its parameters; with gates: its dense pass.

    Activation checkpointing that is on stays on: its layers alone are told that they train, which nothing else in them
    sees.
    """
    dense = engine_of(model).puppet.dense() if is_wrapped(model) else nullcontext()
    with evaluation_mode(model), undisturbed(model), dense:
        layers = [
            module
            for module in model.modules()
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
        ]
        for layer in layers:
            layer.training = True
        handle = None
        if layers:
            # Re-entrant checkpointing computes gradients only if an input of the layer asks for one.
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            handle = embeddings.register_forward_hook(_with_gradient)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


def _with_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(torch.is_grad_enabled())


class NormFinder:
    """The norms before the sub-layers of a model, looked for when the first one is asked for."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self._structure = model, structure
        self._found: dict[str, Affine] | None = None

    def __call__(self, site: Site) -> Affine | None:
        if self._found is None:
            self._found = input_norms(self._model, self._structure, device_of(self._model))
        return self._found.get(site.block)


class Collector:
    """The statistics of every site, filled by `run`.

    Args:
        loss: the loss of every sequence; None: NLL of the labels, summed over a sequence's tokens.

    Raises:
        PPNetError: needs that the model or the loss cannot meet: encoders have no loss of their own.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, needs: Needs, *, seed: int = 0, loss: Loss | None = None
    ) -> None:
        self.model, self.structure, self.needs, self.loss = model, structure, needs, loss
        if loss is not None and not callable(loss):
            raise PPNetError(f"loss: {loss!r} must be a function (the model's output, batch) -> (B,), or None.")
        self._decoder, self._predicts = is_decoder(model), predicts_tokens(model)
        if not self._decoder:
            self._check_encoder()
        if loss is not None and needs & {FISHER, REWARDS}:
            raise PPNetError(
                "loss: fisher information and rewards are taken from the likelihood of tokens; leave loss out, or use "
                'a method that needs neither (of mama: weights={"kl": 0}).'
            )
        self.generator = torch.Generator().manual_seed(seed)
        norms = NormFinder(model, structure)
        self.sites = [SiteStatistics(site, SiteWeights(model, site, norms), seed=seed) for site in structure.sites]
        # Curvature is that of the model's own predictions, or of the loss that was given.
        self._curves = None if CURVATURE not in needs else FISHER if loss is None else GRADIENTS
        self._mask: Tensor | None = None
        self._watched: set[int] = set()
        self._target = GRADIENTS
        self._tokens: Tensor | None = None
        self._rated: Ratings | None = None
        self._index: list[Tensor] = []
        self.tokens = self.sequences = self.predicted = 0

    def _check_encoder(self) -> None:
        name = type(self.model).__name__
        if REWARDS in self.needs:
            raise PPNetError(
                f"method: rewards are of completions, and a {name} is an encoder, which writes none; use another one."
            )
        if FISHER in self.needs and not self._predicts:
            raise PPNetError(
                f"method: kl is the Fisher information of predicted tokens, and a {name} has no logits of tokens; use "
                'another method, or leave it out of mama: weights={"kl": 0}.'
            )
        if (GRADIENTS in self.needs or (CURVATURE in self.needs and not self._predicts)) and self.loss is None:
            raise PPNetError(
                f"loss: None, but gradients are needed and a {name} is an encoder, which has no next-token loss; give "
                "loss=(the model's output, batch) -> (B,), one loss per sequence."
            )

    def run(self, batches: Sequence[Batch], *, threshold: float | None = None, progress: bool = True) -> None:
        """Runs the model over the batches. With gradients: one forward and one backward pass, and with FISHER one more
        backward pass; activations of the model and one copy of what enters each consumer are kept between them."""
        device = device_of(self.model)
        rated = self._ratings(batches, threshold)
        self._prepare()
        backward = bool(self.needs - {ACTIVATIONS, GRAM})
        probe = Probe(
            self.model,
            self.structure.sites,
            sink=self._sink if backward else None,
            watch=self._watch if self.needs & {ACTIVATIONS, GRAM} else None,
        )
        report = Progress(sum(batch["input_ids"].numel() for batch in batches), "scoring, tokens")
        try:
            with report, torch.enable_grad() if backward else torch.no_grad():
                done = 0
                for batch in batches:
                    for rows in self._parts(batch):
                        part = {name: tensor[rows].to(device) for name, tensor in batch.items()}
                        size = len(part["input_ids"])
                        self._rated = None if rated is None else rated.rows(slice(done, done + size))
                        self._one(part, backward)
                        done += size
                        if progress:
                            report.advance(part["input_ids"].numel())
        finally:
            probe.remove()
            self._mask = self._rated = self._tokens = None
        for site in self.sites:
            site.tokens = self.tokens

    def _prepare(self) -> None:
        for site in self.sites:
            consumer: Any = self.model.get_submodule(site.site.consumer.name)
            where = consumer.weight.device
            self._index.append(site.site.consumer.index.to(where))
            if ACTIVATIONS in self.needs:
                site.collected[ACTIVATIONS] = Activations(site.site, where)
            if GRAM in self.needs:
                site.collected[GRAM] = Gram()
            if CURVATURE in self.needs:
                site.collected[CURVATURE] = Curvature(site.site, where)
            for name in self.needs & {GRADIENTS, FISHER}:
                site.collected[name] = GateGradients(site.site, where)
            if REWARDS in self.needs:
                site.collected[REWARDS] = RewardGradients(site.site.units, where)

    def _ratings(self, batches: Sequence[Batch], threshold: float | None) -> Ratings | None:
        if REWARDS not in self.needs:
            return None
        if not all("rewards" in batch and "groups" in batch for batch in batches):
            raise DataError(
                "data: rewards are needed, but not in it; give mappings with input_ids, labels (-100 over the prompt), "
                "rewards (a number) and groups (equal for the completions of one prompt), or scores=... of a GRPO run."
            )
        joined = {name: torch.cat([batch[name].reshape(-1) for batch in batches]) for name in ("rewards", "groups")}
        rated = ratings(joined["rewards"], joined["groups"].long(), threshold)
        if not rated.verified.any():
            raise DataError(
                "data: no group of completions is verified: within every group all rewards are equal, or the best is "
                f"below the threshold ({threshold}); give groups with different rewards."
            )
        return rated

    def _parts(self, batch: Batch) -> list[slice]:
        """Rows of one pass: fewer where the logits would exceed 1 GiB in float32."""
        count, length = batch["input_ids"].shape
        step = max(1, MAX_LOGITS // (length * vocabulary_of(self.model))) if self._predicts else count
        return [slice(start, start + step) for start in range(0, count, step)]

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def _one(self, batch: Batch, backward: bool) -> None:
        mask = batch.get("attention_mask")
        self._mask = None if mask is None else mask.bool()
        self._watched.clear()
        inputs = {"input_ids": batch["input_ids"], **({} if mask is None else {"attention_mask": mask})}
        outputs = self.model(**inputs, use_cache=False)
        # An encoder's positions predict their own tokens.
        labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:] if self._decoder else batch["input_ids"]
        if mask is not None:  # what follows padding on the left is predicted by nothing
            labels = labels.masked_fill(mask == 0, IGNORED)
        self._tokens = (labels != IGNORED).sum(1)
        self.predicted += int(self._tokens.sum())
        self.tokens = self.predicted if self.loss is None else self.sequences + len(labels)
        self.sequences += len(labels)
        if not backward:
            return
        losses = self._losses(outputs, labels, batch)
        if not torch.isfinite(losses).all():
            raise DataError(
                f"data: the loss of a sequence is NaN or infinite ({losses.detach().tolist()[:4]}); the model's "
                "weights are damaged, or its dtype overflows: try float32."
            )
        fisher = FISHER in self.needs or self._curves == FISHER
        if self.needs & {GRADIENTS, REWARDS} or self._curves == GRADIENTS:
            self._backward(GRADIENTS, losses, retain=fisher)
        if fisher:
            drawn = self._drawn(outputs.logits, labels)
            self._backward(FISHER, self._losses(outputs, drawn, batch), retain=False)

    def _backward(self, target: str, losses: Tensor, retain: bool) -> None:
        self._target = target
        # Not autograd.grad, which re-entrant checkpointing refuses. No parameter takes a gradient here.
        losses.sum().backward(retain_graph=retain)

    def _losses(self, outputs: Any, labels: Tensor, batch: Batch) -> Tensor:
        """One loss per sequence: (B,)."""
        if self.loss is not None:
            losses = self.loss(outputs, batch)
            if not isinstance(losses, Tensor) or losses.shape != (len(labels),) or not losses.requires_grad:
                raise PPNetError(
                    f"loss: must return one loss per sequence as a tensor of shape ({len(labels)},) that depends on "
                    f"the output, got {losses!r:.80}."
                )
            return losses
        logits = getattr(outputs, "logits", None)
        if logits is None or logits.shape[:2] != labels.shape:
            raise PPNetError(
                f"model: {type(self.model).__name__} returns no logits (B, T, V), so its NLL is not known; give a "
                "causal language model, or loss=(output, batch) -> (B,)."
            )
        flat = F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return flat.view(labels.shape).sum(1)

    @torch.no_grad()
    def _drawn(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels drawn from the model's own predictions where there are labels, by their Gumbel-max."""
        uniform = torch.rand(logits.shape, generator=self.generator).to(logits.device).clamp_(1e-20, 1 - 1e-7)
        drawn = (logits.float() - uniform.log_().neg_().log_()).argmax(-1)
        return torch.where(labels == IGNORED, labels, drawn)

    def _watch(self, number: int, x: Tensor) -> None:
        # Activation checkpointing runs a layer twice; a module may be used more than once in a pass.
        if number not in self._watched:
            self._watched.add(number)
            mask = self._mask if self._mask is not None and x.shape[:2] == self._mask.shape else None
            rows = x.detach().reshape(-1, x.shape[-1]) if mask is None else x.detach()[mask]
            for name in self.needs & {ACTIVATIONS, GRAM}:
                self.sites[number].collected[name].add(rows)

    @torch.no_grad()
    def _sink(self, number: int, x: Tensor, dx: Tensor) -> None:
        site = self.sites[number]
        if self._target == self._curves:
            site.collected[CURVATURE].add(self._index[number], dx)
        fisher = self._target == FISHER
        if not self.needs & ({FISHER} if fisher else {GRADIENTS, REWARDS}):
            return
        gradients, by_token = gate_gradients(self._index[number], x, dx)
        if fisher:
            site.fisher.add(gradients, by_token)
            return
        if GRADIENTS in self.needs:
            site.gradients.add(gradients, by_token)
        if self._rated is not None and self._tokens is not None:
            likelihood = -gradients / self._tokens[:, None].clamp(min=1).to(gradients)
            site.rewards.add(likelihood, self._rated)
