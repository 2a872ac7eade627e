"""Healing in one call: a small model learns from the dense one through `DistillationTrainer`."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from ppnet.checks import integer, number
from ppnet.errors import PPNetError
from ppnet.evaluate.model_state import context_of
from ppnet.evaluate.progress import Progress
from ppnet.evaluate.tokens import IGNORED
from ppnet.modes import flags_kept
from ppnet.train.distill import Distillation, DistillationTrainer
from ppnet.train.lora import merge_lora, with_lora
from ppnet.train.trainer import WARMUP, default_arguments

PADDING = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}


class Sequences(torch.utils.data.Dataset):
    """Token sequences of different lengths, as the Trainer reads them."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.rows: list[dict[str, Tensor]] = []
        for batch in batches:
            mask = batch.get("attention_mask")
            for row in range(len(batch["input_ids"])):
                # Padding that the batch needed is left out; the next batch pads anew.
                real = slice(None) if mask is None else mask[row].bool()
                # Labels of whole sequences belong to a task, which a model without logits of tokens does not heal by.
                names = [name for name in ("input_ids", "labels") if name in batch and batch[name].ndim == 2]
                self.rows.append({name: batch[name][row][real] for name in names})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class LastLog(TrainerCallback):
    """Keeps the newest training log: ``loss``, ``nll``, ``distillation_kl``, ``hidden_loss``."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.values = dict(logs)


class StepProgress(TrainerCallback):
    """Shows steps, the newest loss and the time left on stderr, from the first process."""

    def __init__(self, what: str) -> None:
        self.what, self.loss = what, math.nan
        self._shown: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown = Progress(state.max_steps, self.what) if state.is_world_process_zero else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._shown is not None:
            self._shown.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._shown is not None and logs and "loss" in logs:
            self._shown.what = f"{self.what}, loss {float(logs['loss']):.4g}"

    def close(self) -> None:
        """Takes the line off a terminal."""
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None


def padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of sequences, padded on the right, with a mask if there is padding."""
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=PADDING[name])
        for name in rows[0]
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = int(lengths.max())
    if int(lengths.min()) < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def _check_arguments(arguments: Any) -> None:
    """Refuses what `transformers.TrainingArguments` do not have."""
    known = inspect.signature(TrainingArguments).parameters
    if arguments is not None and not isinstance(arguments, Mapping):
        raise PPNetError(f"arguments: must map names of transformers.TrainingArguments to values, got {arguments!r}.")
    unknown = [name for name in arguments or () if name not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), [*known], 1) or ["learning_rate"]
        raise PPNetError(
            f"arguments: {unknown} are no transformers.TrainingArguments; use their names, e.g. {near[0]!r}."
        )


@contextmanager
def generators_kept() -> Iterator[None]:
    """The global generators of Python, NumPy and torch go on afterwards as if nothing had been drawn inside."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """What training sets on a model beside its weights returns: modes, `requires_grad`, gradients (to None), forwards
    under autocast, activation checkpointing and its hook on the embeddings."""
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    checkpointed = [
        (module, {name: module.__dict__[name] for name in names if name in module.__dict__})
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    asked = getattr(model, "_require_grads_hooks", None)
    forward = model.__dict__.get("forward")
    with flags_kept(model):
        try:
            yield
        finally:
            extract_model_from_parallel(model, keep_fp32_wrapper=False)
            if forward is None:
                model.__dict__.pop("forward", None)
            if not asked:
                model.disable_input_require_grads()
            for module, values in checkpointed:
                for name in names:
                    module.__dict__.pop(name, None)
                module.__dict__.update(values)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(learning[name])
                parameter.grad = None


def heal(
    model: Any,
    teacher: nn.Module | str | os.PathLike[str],
    data: Any,
    *,
    steps: int,
    tokenizer: Any = None,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    length: int | None = None,
    separator: str | None = None,
    column: str = "text",
    seed: int = 0,
    lora: int | Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    **distillation: Any,
) -> Any:
    """Trains a small model, in place, on text with the answers of the dense model it came from.

    A short form of `DistillationTrainer`, which has all options. Nothing is written unless `output_dir` is given, and
    nothing but the model's weights is changed: modes, global random generators and a given teacher stay as they were.

    Args:
        model: a compacted model, or any model without gates.
        teacher: the dense model or its folder; see `DistillationMixin`.
        data: text, files, token ids, a dataset or batches, as `ppnet.calibration_batches` reads them; as much of it as
            `steps` need, drawn at random from longer texts.
        steps: optimizer steps.
        tokenizer: the model's tokenizer; None if the data holds token ids.
        learning_rate: of AdamW with cosine, and with warm-up where 3 % of the steps are at least one.
        batch_size: sequences per step.
        length: tokens per sequence; None: 512, or the model's context or the text if shorter.
        separator: text between the documents of a text file.
        column: key of the text in a dataset's rows.
        seed: what is drawn from longer texts, its order, and what adapters start from; on the CPU, equal seeds give
            equal weights.
        lora: train low-rank adapters of this rank only (a PEFT ``LoraConfig`` for more), on all linear modules but the
            head, and merge them at the end. Needs ``pip install ppnet[lora]``.
        output_dir: folder of checkpoints, every 500 steps; None: none are written.
        arguments: more `transformers.TrainingArguments`, e.g. ``{"bf16": True}``; they win. ``disable_tqdm=False``
            shows the Trainer's own bar and logs instead of `progress`.
        callbacks: of the Trainer; e.g. to read its logs, ``nll`` and ``distillation_kl`` among them.
        progress: write progress to stderr when it takes longer than two seconds.
        **distillation: options of `Distillation`: ``weight``, ``temperature``, ``direction``, ``hidden``,
            ``hidden_layers``.

    Returns:
        The model, in the mode (training or evaluation) it came in.

    Raises:
        PPNetError: `steps` or `batch_size` below 1, `seed` below 0, or unknown options.
        DataError, TrainingError: see there.
    """
    from ppnet.calibration import DEFAULT_LENGTH, calibration_batches  # which imports this package for its text blocks

    integer("steps", steps, 1)
    integer("batch_size", batch_size, 1)
    integer("seed", seed, 0)
    number("learning_rate", learning_rate)
    if length is not None:
        integer("length", length, 2)
    _check_arguments(arguments)
    unknown = sorted(distillation.keys() - Distillation.__dataclass_fields__.keys())
    if unknown:
        raise PPNetError(
            f"{', '.join(unknown)}: heal() knows no such option; those of the loss are "
            f"{', '.join(Distillation.__dataclass_fields__)}, others go into arguments={{...}}."
        )
    options = Distillation(**distillation)
    most = min(length or DEFAULT_LENGTH, context_of(model) or DEFAULT_LENGTH)
    batches = calibration_batches(
        model, data, tokenizer, length=length, separator=separator, column=column, batch_size=batch_size,
        max_tokens=max(2, steps * batch_size * most), seed=seed,
    )  # fmt: skip
    values = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "logging_steps": max(1, min(50, steps // 10)),
        # A warm-up of less than one step would be a first step at rate 0, which for steps=1 is all of them.
        **({"warmup_steps": 0} if WARMUP * steps < 1 else {}),
        "save_strategy": "no" if output_dir is None else "steps",
        "use_cpu": model.get_input_embeddings().weight.device.type == "cpu",
        "seed": seed,
        "disable_tqdm": True,
        **(arguments or {}),
    }
    # The Trainer makes its folder only when it writes into it.
    folder = os.path.join(tempfile.gettempdir(), "ppnet-heal") if output_dir is None else output_dir
    with ExitStack() as kept:
        kept.enter_context(generators_kept())
        kept.enter_context(untouched(model))
        if isinstance(teacher, nn.Module):
            kept.enter_context(flags_kept(teacher))
        set_seed(values["seed"])  # adapters start from random numbers
        student = model if lora is None else with_lora(model, lora)
        try:
            trainer = DistillationTrainer(
                model=student,
                args=default_arguments(folder, **values),
                train_dataset=Sequences(batches),
                data_collator=padded,
                callbacks=list(callbacks),
                teacher=teacher,
                distillation=options,
            )
            trainer.remove_callback(PrinterCallback)  # which prints every log as a dictionary where tqdm is off
            if progress and values["disable_tqdm"]:
                shown = StepProgress("healing")
                kept.callback(shown.close)
                trainer.add_callback(shown)
            trainer.train()
        finally:
            if student is not model:
                extract_model_from_parallel(student, keep_fp32_wrapper=False)
                merge_lora(student, model)
    return model
