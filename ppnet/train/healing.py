"""Healing in one call: a small model learns from the dense one through `DistillationTrainer`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from ppnet.errors import PPNetError
from ppnet.evaluate.model_state import context_of
from ppnet.train.distill import Distillation, DistillationTrainer
from ppnet.train.lora import merge_lora, with_lora
from ppnet.train.objective import IGNORED
from ppnet.train.trainer import default_arguments

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
                self.rows.append({name: batch[name][row][real] for name in ("input_ids", "labels")})

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


def padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of sequences, padded on the right, with a mask if there is padding."""
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=PADDING[name])
        for name in ("input_ids", "labels")
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = int(lengths.max())
    if int(lengths.min()) < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


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
    lora: int | Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **distillation: Any,
) -> Any:
    """Trains a small model, in place, on text with the answers of the dense model it came from.

    A short form of `DistillationTrainer`, which has all options. Nothing is written unless `output_dir` is given.

    Args:
        model: a compacted model, or any model without gates.
        teacher: the dense model or its folder; see `DistillationMixin`.
        data: text, files, token ids, a dataset or batches, as `ppnet.calibration_batches` reads them; as much of it as
            `steps` need, drawn at random from longer texts.
        steps: optimizer steps.
        tokenizer: the model's tokenizer; None if the data holds token ids.
        learning_rate: of AdamW with warm-up and cosine.
        batch_size: sequences per step.
        length: tokens per sequence; None: 512, or the model's context or the text if shorter.
        separator: text between the documents of a text file.
        lora: train low-rank adapters of this rank only (a PEFT ``LoraConfig`` for more), on all linear modules but the
            head, and merge them at the end. Needs ``pip install ppnet[lora]``.
        output_dir: folder of checkpoints, every 500 steps; None: none are written.
        arguments: more `transformers.TrainingArguments`, e.g. ``{"bf16": True}``; they win.
        callbacks: of the Trainer; e.g. to read its logs, ``nll`` and ``distillation_kl`` among them.
        **distillation: options of `Distillation`: ``weight``, ``temperature``, ``direction``, ``hidden``,
            ``hidden_layers``.

    Returns:
        The model, in the mode (training or evaluation) it came in.

    Raises:
        PPNetError: `steps` or `batch_size` below 1, or unknown options. DataError, TrainingError: see there.
    """
    from ppnet.calibration import DEFAULT_LENGTH, calibration_batches  # which imports this package for its text blocks

    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PPNetError(f"{name}: must be an integer of at least 1, got {value!r}.")
    unknown = sorted(distillation.keys() - Distillation.__dataclass_fields__.keys())
    if unknown:
        raise PPNetError(
            f"{', '.join(unknown)}: heal() knows no such option; those of the loss are "
            f"{', '.join(Distillation.__dataclass_fields__)}, others go into arguments={{...}}."
        )
    options = Distillation(**distillation)
    most = min(length or DEFAULT_LENGTH, context_of(model) or DEFAULT_LENGTH)
    batches = calibration_batches(
        model, data, tokenizer, length=length, separator=separator, batch_size=batch_size,
        max_tokens=max(2, steps * batch_size * most),
    )  # fmt: skip
    values = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "logging_steps": max(1, min(50, steps // 10)),
        "save_strategy": "no" if output_dir is None else "steps",
        "use_cpu": model.get_input_embeddings().weight.device.type == "cpu",
        **(arguments or {}),
    }
    # The Trainer makes its folder only when it writes into it.
    folder = os.path.join(tempfile.gettempdir(), "ppnet-heal") if output_dir is None else output_dir
    came = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
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
        trainer.train()
    finally:
        if student is not model:
            merge_lora(student, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(came[1][name])
            parameter.grad = None
        model.train(came[0])
    return model
