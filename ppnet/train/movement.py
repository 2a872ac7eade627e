"""Movement through training: gate gradients of every micro-batch, accumulated by a callback of any Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from ppnet.errors import TrainingError
from ppnet.scores.probe import Probe, probe_target
from ppnet.scores.registry import choose
from ppnet.scores.result import Scores
from ppnet.scores.statistics import gate_gradients
from ppnet.scores.sums import accumulator
from ppnet.units import Site, Structure


class SiteIndices:
    """The feature tables of the consumers, on the devices where they are looked up."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._tables: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, number: int, device: torch.device) -> Tensor:
        if (number, device) not in self._tables:
            self._tables[number, device] = self._sites[number].consumer.index.to(device)
        return self._tables[number, device]


def all_reduced(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over all processes, where there are several. Every process must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(tensors)
    joined = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    torch.distributed.all_reduce(joined)
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view_as(tensor) for part, tensor in zip(joined.split(sizes), tensors, strict=True)]


class MovementCallback(TrainerCallback):
    """Accumulates how every unit moves while a model is trained, with `transformers.Trainer` or trl's `SFTTrainer`.

    With g the gate gradients (`ppnet.scores.statistics`) of the loss that is trained, as it enters the optimizer step,
    after division for gradient accumulation and before clipping:

        absolute  sum over sequences of |g_{u,b}|
        signed    -sum over steps of lr_t g_{u,t}: movement as Sanh et al. (2020) define it, at unit level

    Nothing is added to the model but hooks, which are removed when training ends; weights get the gradients that they
    would have had. Evaluation and generation are not looked at. Works with PEFT adapters, bfloat16, gradient
    accumulation and activation checkpointing; with several processes the sums are averaged as gradients are. An
    interrupted run starts its sums anew when it is resumed.

        movement = ppnet.train.MovementCallback()
        Trainer(model=model, ..., callbacks=[movement]).train()
        scores = movement.scores()
    """

    def __init__(self) -> None:
        self._structure: Structure | None = None
        self._probe: Probe | None = None
        self._absolute: list[Tensor] = []
        self._signed: list[Tensor] = []
        self._step: list[Tensor] = []
        self.positions = 0

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            raise TrainingError(
                "fp16: True scales the loss by a changing factor, and movement with it; train in bf16 or float32."
            )
        if args.n_gpu > 1:
            raise TrainingError(
                f"model: movement is not collected under nn.DataParallel ({args.n_gpu} GPUs in one process); start one "
                "process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self._remove()
        host, self._structure = probe_target(kwargs["model"])
        sites = self._structure.sites
        device = next(host.parameters()).device
        self._absolute, self._signed, self._step = (
            [accumulator(site.units, device) for site in sites] for _ in range(3)
        )
        self._index = SiteIndices(sites)
        self.positions = 0
        self._probe = Probe(host, sites, sink=self._sink)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # After the step and before the schedule: the learning rate is still the one that was used.
        optimizer = kwargs.get("optimizer")
        rate = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else float(args.learning_rate)
        for signed, step in zip(self._signed, self._step, strict=True):
            signed.sub_(step, alpha=rate)
            step.zero_()

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()
        processes = max(args.world_size, 1)
        reduced = all_reduced([*self._absolute, *self._signed, torch.tensor([float(self.positions)])])
        if processes > 1:
            self.positions = int(reduced[-1])
            sums = [tensor / processes for tensor in reduced[:-1]]
            self._absolute, self._signed = sums[: len(self._absolute)], sums[len(self._absolute) :]

    def _remove(self) -> None:
        if self._probe is not None:
            self._probe.remove()
            self._probe = None

    @torch.no_grad()
    def _sink(self, number: int, x: Tensor, dx: Tensor) -> None:
        gradients, _ = gate_gradients(self._index(number, x.device), x, dx)
        absolute, step = self._absolute[number], self._step[number]
        absolute += gradients.abs().sum(0).to(absolute)
        step += gradients.sum(0).to(step)
        if number == 0:
            self.positions += x[..., 0].numel()

    # ---- results -----------------------------------------------------------------------------------------------------

    def scores(self, form: str = "absolute") -> Scores:
        """What was accumulated so far, as scores of method ``movement``.

        Args:
            form: ``"absolute"`` or ``"signed"``. Signed scores rank strong units that the loss is shrinking lowest, and
                removing these in one shot does more harm than removing units at random.

        Raises:
            TrainingError: nothing was trained.
        """
        choose("form", form, ("absolute", "signed"))
        if self._structure is None or not self.positions:
            raise TrainingError("callback: no training step has run; pass it to a Trainer and train first.")
        sums = self._absolute if form == "absolute" else self._signed
        return Scores(
            {site.name: units for site, units in zip(self._structure.sites, sums, strict=True)},
            method="movement",
            model_type=self._structure.model_type,
            options={"form": form},
            tokens=self.positions,
        )
