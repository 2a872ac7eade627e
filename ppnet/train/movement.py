"""Movement through training: gate gradients of every micro-batch, accumulated by a callback of any Trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from ppnet.errors import CheckpointError, TrainingError
from ppnet.scores.probe import Probe, probe_target, remove_probes
from ppnet.scores.registry import choose
from ppnet.scores.result import Scores
from ppnet.scores.statistics import gate_gradients
from ppnet.scores.sums import accumulator
from ppnet.train.sums_file import load_sums, save_sums
from ppnet.units import Site, Structure

SUMS_FILE = "ppnet_movement.safetensors"
FORMAT = "ppnet.movement/1"

logger = logging.get_logger(__name__)


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
    would have had. Where training ends in an exception, `close` removes them, and so does the next training;
    `ppnet.score` and copies of the model do not heed them. Evaluation and generation are not looked at. Works with PEFT
    adapters, bfloat16, gradient accumulation and activation checkpointing; with several processes the sums are averaged
    as gradients are. The sums are saved with the Trainer's checkpoints, beside its own files, and go on where training
    is resumed from one: in one process to the bits of an uninterrupted run. From a checkpoint without them they start
    anew, with a warning.

        movement = ppnet.train.MovementCallback()
        Trainer(model=model, ..., callbacks=[movement]).train()
        scores = movement.scores()

    Args:
        resume_from: the folder of the checkpoint that training is resumed from, if that is not in `output_dir`: the
            Trainer does not tell callbacks.
    """

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.resume_from = resume_from
        self._structure: Structure | None = None
        self._probe: Probe | None = None
        self._absolute: list[Tensor] = []
        self._signed: list[Tensor] = []
        self._step: list[Tensor] = []
        self.tokens = 0

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
        # Of a training that ended in an exception; other callbacks of this one stay.
        remove_probes(kwargs["model"], unless=lambda probe: probe.run is state or probe.run is None)
        host, self._structure = probe_target(kwargs["model"])
        sites = self._structure.sites
        device = next(host.parameters()).device
        self._absolute, self._signed, self._step = (
            [accumulator(site.units, device) for site in sites] for _ in range(3)
        )
        self._index = SiteIndices(sites)
        self._last = max(number for number, site in enumerate(sites) if site.layer == sites[-1].layer)
        self.tokens = 0
        if state is not None and state.global_step > 0 and state.is_world_process_zero:
            self._restore(args, state)
        self._probe = Probe(host, sites, sink=self._sink, run=state)
        self._probe.active = False

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._probe is not None:
            self._probe.active = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._probe is not None:
            self._probe.active = False

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # After the step and before the schedule: the learning rate is still the one that was used.
        optimizer = kwargs.get("optimizer")
        rate = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else float(args.learning_rate)
        for signed, step in zip(self._signed, self._step, strict=True):
            signed.sub_(step, alpha=rate)
            step.zero_()

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()
        self._absolute, self._signed, self.tokens = self._averaged(args)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._structure is None:
            return
        absolute, signed, tokens = self._averaged(args)  # which every process takes part in
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():  # a search of hyperparameters puts a folder of its own between
            logger.warning(f"{folder}: is not there, so the sums of movement are not saved with this checkpoint.")
            return
        sums = {"absolute": torch.cat(absolute), "signed": torch.cat(signed)}
        save_sums(folder / SUMS_FILE, FORMAT, self._structure, sums, {"tokens": tokens})

    def _averaged(self, args: TrainingArguments) -> tuple[list[Tensor], list[Tensor], int]:
        """Absolute and signed sums over all processes as if these were one, and their tokens."""
        processes = max(args.world_size, 1)
        if processes == 1:
            return self._absolute, self._signed, self.tokens
        tokens = torch.tensor([float(self.tokens)], device=self._absolute[0].device)
        *sums, total = all_reduced([*self._absolute, *self._signed, tokens])
        means = [tensor / processes for tensor in sums]
        return means[: len(self._absolute)], means[len(self._absolute) :], int(total)

    def _restore(self, args: TrainingArguments, state: Any) -> None:
        """Goes on from the sums of the checkpoint, in the first process, which holds those of all."""
        assert self._structure is not None
        folder = self._checkpoint(args, state)
        if folder is None or not (folder / SUMS_FILE).is_file():
            if self.resume_from is not None:
                raise CheckpointError(
                    f"resume_from: {folder} holds no {SUMS_FILE}; give the folder of a checkpoint that was saved "
                    "with MovementCallback, the one that training is resumed from, or None."
                )
            logger.warning(
                f"Resuming at step {state.global_step} without sums of movement: no {SUMS_FILE} in that checkpoint "
                f"under {args.output_dir}. They start anew, and scores leave out the steps before. If the checkpoint "
                "is in another folder than output_dir, give MovementCallback(resume_from=that folder)."
            )
            return
        sums, facts = load_sums(folder / SUMS_FILE, FORMAT, self._structure, ("absolute", "signed"))
        for name, mine in (("absolute", self._absolute), ("signed", self._signed)):
            for total, saved in zip(mine, sums[name].split([len(total) for total in mine]), strict=True):
                total.copy_(saved * max(args.world_size, 1))
        self.tokens = int(facts["tokens"])

    def _checkpoint(self, args: TrainingArguments, state: Any) -> Path | None:
        """The folder that training is resumed from, or None: one in `output_dir` counts if its logs are those of the
        resumed state."""
        if self.resume_from is not None:
            return Path(self.resume_from)
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        try:
            history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # As text, in which NaN equals itself.
        return folder if json.dumps(history) == json.dumps(state.log_history) else None

    def close(self) -> None:
        """Takes the hooks off the model, if a training that did not end left them there. The sums so far stay."""
        self._remove()

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
        if number == self._last:
            # The last sub-layer's output reaches the loss only through what its own position predicts.
            self.tokens += int(dx.any(-1).sum())

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
        if self._structure is None or not self.tokens:
            raise TrainingError("callback: no training step has run; pass it to a Trainer and train first.")
        sums = self._absolute if form == "absolute" else self._signed
        return Scores(
            {site.name: units for site, units in zip(self._structure.sites, sums, strict=True)},
            method="movement",
            model_type=self._structure.model_type,
            order=self._structure.order,
            options={"form": form},
            tokens=self.tokens,
        )
